"""Cards: what the data are, what the model is for, and the CLAIM checklist, filled in from the results of a run.

Each function takes what :func:`nodules.report.page.build` writes to ``results.json`` and returns markdown.
"""

from typing import Any

import pandas as pd

from nodules import course
from nodules.data import patches, phantom, sources, split
from nodules.evaluation import decisions, metrics
from nodules.report import answer, text

MODEL = "second result, with TTA"  # of the notebook on training: the row that the model card is about
# The notebooks' names in templates
NOTEBOOKS = (
    "data",
    "architectures",
    "rate_finder",
    "head",
    "whole",
    "rulers",
    "interpretation",
    "evaluation",
    "decisions",
    "own_scan",
)
CONSTANTS = {
    "examined": MODEL,
    "folds": split.FOLDS,
    "slices": phantom.MAX_SLICES,
    "resamples": metrics.RESAMPLES,
    "bins": metrics.BINS,
    "rate_aimed": decisions.RATES[0],
    "alpha": decisions.ALPHA,
    "p_sure": decisions.SURE,
    "cut": sources.CUT,
}


def values(content: dict[str, Any]) -> dict[str, Any]:
    """What every template can name.

    Returns:
        ``run``: provenance of the first notebook; ``trained``: that of the notebook on training, ``model``: its row
        (both empty if there is none); ``card``; ``units``: what intervals resample; the parameters and facts of each
        notebook under its name in ``NOTEBOOKS`` (empty if it was not run); ``CONSTANTS``.
    """
    runs = {run["notebook"]: run for run in content["runs"]}
    kept = {name: run["parameters"] | content["facts"][name] for name, run in runs.items()}
    trained = [row for row in rows_of(content, course.TRAINING) if row["name"] == MODEL]
    return {
        "run": content["runs"][0],
        "trained": runs.get(course.TRAINING.name, {}),
        "model": trained[0] if trained else {},
        "card": content["card"],
        "units": "patches" if content["card"]["patients"] is None else "patients",
        **{name: kept.get(lesson.name, {}) for name, lesson in zip(NOTEBOOKS, course.LESSONS, strict=True)},
        "majority": sources.KAGGLE_COUNTS["benign"] / sources.KAGGLE_COUNTS["patches"],
        **answer.values(content),
        **CONSTANTS,
    }


def data_card(content: dict[str, Any]) -> str:
    """The card of the run's own source."""
    return text.render("data_card.md", values(content) | {"read": True})


def data_cards(content: dict[str, Any]) -> str:
    """The card of the run's own source with the models that see no picture, then what is known of the others."""
    rows = rows_of(content, course.DATA)
    blind = text.markdown(result_table(rows)[["model", "AUC (95% interval)"]]) if rows else "Not measured in this run."
    others = [_other_card(content, name) for name in (*sources.SOURCES, "own") if name != source(content)]
    return "\n".join([data_card(content), f"Models that get a few numbers, and no picture:\n\n{blind}\n", *others])


def model_card(content: dict[str, Any]) -> str:
    """What the model is, what it may be used for, and how it was measured (Mitchell et al. 2019)."""
    compared = result_table(rows_of(content, course.DATA, course.TRAINING))
    return text.render("model_card.md", values(content) | {"compared": compared})


def claim(content: dict[str, Any]) -> str:
    """The CLAIM checklist (``claim.csv``), answered for the run's source."""
    items = pd.read_csv(text.TEMPLATES / "claim.csv", keep_default_na=False)
    kind, known = source(content), values(content)
    column = kind if kind in items else "answer" if kind == "phantom" else "own"
    templates = [item[column] or item["answer"] for item in items.to_dict("records")]
    answers = [text.render_text(template, known, "claim.csv") for template in templates]
    answered = items[["item", "section", "question"]].assign(answer=answers)
    return text.render("claim.md", known | {"answered": answered})


def source(content: dict[str, Any]) -> str:
    """Which source the run read: a key of ``SOURCES``, or ``own``."""
    titles = {known["title"]: name for name, known in sources.SOURCES.items()}
    return titles.get(content["card"]["title"], "own")


def rows_of(content: dict[str, Any], *lessons: course.Lesson) -> list[dict[str, Any]]:
    """The rows of results that some notebooks added."""
    names = [lesson.name for lesson in lessons]
    return [row for row in content["rows"] if row["notebook"] in names]


def result_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as people read them: value and 95% interval in one cell."""
    columns = {
        "model": [row["name"] for row in rows],
        "AUC (95% interval)": [text.interval(row, "auc") for row in rows],
        "size-matched AUC": [text.interval(row, "matched_auc") if "matched_auc" in row else None for row in rows],
        "accuracy (95% interval)": [text.interval(row, "accuracy") for row in rows],
        "weights": [row.get("weights", "none") for row in rows],
        "split": [row["split"] for row in rows],
        "seed": [row["seed"] for row in rows],
        "tested": [f"{row['n']} {row.get('counted', 'patches')}" for row in rows],
    }
    return pd.DataFrame(columns)


def _other_card(content: dict[str, Any], name: str) -> str:
    """The card of a source that this run did not read."""
    card = {"title": "a file of your own", "name": name} | sources.SOURCES.get(name, sources.OWN)
    if name == "kaggle":
        card |= sources.KAGGLE_COUNTS
    keys = patches.__doc__.strip().split("\n\n")[-1].replace(":mod:", "")
    return text.render("data_card.md", values(content) | {"card": card, "read": False, "keys": keys})
