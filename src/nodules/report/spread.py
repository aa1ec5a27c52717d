"""The report of a sweep: how far results lie apart over seeds and splits, and which findings hold in every run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from nodules import paths, plots, record
from nodules.report import page, text
from nodules.report.answer import FINDINGS

RUNS = "runs.json"  # what every run found, by key
RESULTS = "results.json"
METRICS = {"accuracy": "accuracy", "auc": "AUC", "matched_auc": "size-matched AUC"}
SEEDS = ("split_seed", "seed")


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """What the runs of an earlier report found, by key; empty if there is none."""
    try:
        return json.loads((folder / RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def condition(run: dict[str, Any]) -> str:
    """What is varied in a run beside seeds, as text; empty if nothing is."""
    return ", ".join(f"{name} {value}" for name, value in run["varied"].items() if name not in SEEDS)


def components(values: np.ndarray, split: np.ndarray) -> tuple[float, float]:
    """Standard deviations of results, (N,), over seeds within a split and over splits, (N,) labels.

    One-way random effects by the method of moments, for groups of any size (Searle, Casella & McCulloch 1992, section
    3.6). Over splits it is what remains once the spread over seeds is taken out. NaN where nothing tells.
    """
    names, group, sizes = np.unique(split, return_inverse=True, return_counts=True)
    count, groups = len(values), len(names)
    means = np.bincount(group, values) / sizes
    within = ((values - means[group]) ** 2).sum() / (count - groups) if count > groups else np.nan
    if groups == 1:
        return float(np.sqrt(within)), np.nan
    between = (sizes * (means - values.mean()) ** 2).sum() / (groups - 1)
    size = (count - (sizes**2).sum() / count) / (groups - 1)
    over = max(0.0, (between - np.nan_to_num(within)) / size)
    return float(np.sqrt(within)), float(np.sqrt(over))


def mixed(values: np.ndarray, split: np.ndarray, patients: float, tested: float) -> tuple[float, float]:
    """The 95% interval of the mean result over patients, splits and seeds together.

    However many the splits, all of them are of the same patients, whose chance no split averages out.

    Args:
        values: results, (N,).
        split: the split of each, (N,).
        patients: standard error of one run by resampling patients.
        tested: share of all patients that a run tests, 1 in cross-validation: all of them together have a standard
            error of ``patients`` times its square root.
    """
    count, groups = len(values), len(np.unique(split))
    of_seeds, of_splits = np.nan_to_num(components(values, split))
    shared = patients**2 * (tested if groups > 1 else 1)
    terms = [(of_seeds**2 / count, count - groups), (of_splits**2 / groups, groups - 1), (shared, np.inf)]
    variance = sum(term for term, _ in terms)
    freedom = variance**2 / max(sum(term**2 / df for term, df in terms if df > 0), 1e-300)  # Satterthwaite 1946
    half = float(stdtrit(min(max(freedom, 1), 1e6), 0.975) * np.sqrt(variance))
    return values.mean() - half, values.mean() + half


def rows(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Every result of every run: ``name, metric, value, low, high, split, run``; ``n`` of ``all`` were scored."""
    found = []
    for i, run in enumerate(runs):
        extra = condition(run)
        for row in run["rows"]:
            about = {"name": row["name"] + (f" ({extra})" if extra else ""), "n": row["n"], "run": i}
            everything = run["card"]["nodules" if row.get("counted") == "nodules" else "patches"]
            about |= {"split": row["split_seed"], "all": everything}
            for metric, title in METRICS.items():
                if f"{metric}_low" in row:
                    ends = {"low": row[f"{metric}_low"], "high": row[f"{metric}_high"]}
                    found.append(about | {"metric": title, "value": row[metric]} | ends)
    return pd.DataFrame(found)


def summary(every: pd.DataFrame) -> pd.DataFrame:
    """Each result over its runs, from :func:`rows`.

    Returns:
        ``name, metric, runs, mean``; ``one``, half the mean width of one run's interval; ``seeds, splits``, standard
        deviations as from :func:`components`; ``low, high`` as from :func:`mixed`; ``least, most`` of all runs.
    """
    lines = []
    for (name, metric), group in every.groupby(["name", "metric"], sort=False):
        values, split = group["value"].to_numpy(), group["split"].to_numpy()
        half = (group["high"] - group["low"]).mean() / 2
        tested = 1.0 if re.search(r"\d+ folds", name) else group["n"].mean() / group["all"].mean()
        low, high = np.clip(mixed(values, split, half / 1.96, tested), 0, 1)  # with few splits it is wide
        of_seeds, of_splits = components(values, split)
        lines.append(
            {"name": name, "metric": metric, "runs": len(group), "mean": values.mean(), "one": half}
            | {"seeds": of_seeds, "splits": of_splits, "low": low, "high": high}
            | {"least": values.min(), "most": values.max()}
        )
    return pd.DataFrame(lines)


def findings(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Differences with an interval, of every run: ``fact, name, value, low, high``."""
    found = []
    for run in runs:
        extra = condition(run)
        for facts in run["facts"].values():
            for fact, title in FINDINGS.items():
                if f"{fact}_low" in facts:
                    ends = {"value": facts[fact], "low": facts[f"{fact}_low"], "high": facts[f"{fact}_high"]}
                    about = {"fact": fact, "name": title + (f" ({extra})" if extra else "")}
                    found.append(about | ends)
    return pd.DataFrame(found, columns=["fact", "name", "value", "low", "high"])


def verdicts(found: pd.DataFrame) -> pd.DataFrame:
    """Which findings hold: ``fact, name, runs, above, below, mean, least, most, verdict``.

    A run is ``above`` or ``below`` 0 if its interval is. The verdict is *above* or *below 0 in every run*; *flips*, if
    one run is above and another below; *often above* or *often below 0*, if so in more than half; else *open*.
    """
    lines = []
    for (fact, name), group in found.groupby(["fact", "name"], sort=False):
        count, above, below = len(group), int((group["low"] > 0).sum()), int((group["high"] < 0).sum())
        verdict = "open"
        for side, surely in (("above", above), ("below", below)):
            if surely == count:
                verdict = f"{side} 0 in every run"
            elif surely > count / 2:
                verdict = f"often {side} 0"
        verdict = "flips" if above and below else verdict
        ends = {"mean": group["value"].mean(), "least": group["value"].min(), "most": group["value"].max()}
        counts = {"runs": count, "above": above, "below": below}
        lines.append({"fact": fact, "name": name, **counts, **ends, "verdict": verdict})
    return pd.DataFrame(lines)


def build(name: str, found: dict[str, dict[str, Any]], asked: int, failed: dict[str, str], folder: Path) -> Path:
    """Write a sweep's report.

    Args:
        name: of the sweep.
        found: what each finished run found, by key.
        asked: number of runs asked for.
        failed: why each failed run did, by label.
        folder: gets ``report.html``, ``runs.json``, ``results.json`` and the figures.

    Returns:
        The path of ``report.html``.
    """
    runs = list(found.values())
    every, differences = rows(runs), findings(runs)
    table, held = summary(every), verdicts(differences)
    source = " · ".join(sorted({run["provenance"]["data"] for run in runs})) + f" · {len(runs)} runs"
    pictures = {}
    for metric in [metric for metric in METRICS.values() if (table["metric"] == metric).any()]:
        of_metric = [each[each["metric"] == metric] for each in (every, table)]
        caption = (
            "A mark is a run, its colour and shape a split of the patients. Grey: one run's 95% interval, at the mean. "
        )
        caption += "Black: the 95% interval of the mean over patients, splits and seeds."
        pictures[f"spread_{metric.replace(' ', '_')}"] = (plots.spread(*of_metric, metric, name), caption)
    if len(differences):
        caption = "Each line is a run with its 95% interval, sorted. Blue lies surely above 0, orange surely below."
        pictures["findings"] = (plots.findings(differences, "Which findings hold?"), caption)
    about = {}
    for key, (figure, caption) in pictures.items():
        page.save(plots.stamp(figure, source), folder / f"{key}.png")
        shown = {"title": plots.title(figure), "alt": plots.described(figure)}
        about[key] = shown | {"caption": caption, "source": source}
    content = {
        "sweep": name,
        "asked": asked,
        "runs": len(runs),
        "failed": failed,
        "simulation": any(run["provenance"]["simulation"] for run in runs),
        "data": sorted({run["provenance"]["data"] for run in runs}),
        "revisions": sorted({run["provenance"]["git_revision"] for run in runs}),
        "minutes": sum(run["seconds"] for run in runs) / 60,
        "varied": {
            key: sorted({json.dumps(run["varied"][key]) for run in runs if key in run["varied"]})
            for key in dict.fromkeys(key for run in runs for key in run["varied"])
        },
        "notebooks": runs[0]["notebooks"],
        "results": json.loads(table.to_json(orient="records", double_precision=5)),
        "findings": json.loads(held.to_json(orient="records", double_precision=5)),
    }
    record.write_json(folder / RUNS, found)
    record.write_json(folder / RESULTS, content)
    values = {"figures": page.Album(about), "table": _shown(table), "held": _told(held)}
    report = text.render("sweep.md", content | values)
    titles = {key: each["title"] for key, each in about.items()}
    return paths.write(folder / "report.html", page.as_html(report, titles, folder))


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The summary as people read it."""
    pairs = zip(table["low"], table["high"], strict=True)
    ranges = zip(table["least"], table["most"], strict=True)
    return pd.DataFrame(
        {
            "result": table["name"],
            "metric": table["metric"],
            "runs": table["runs"],
            "mean": table["mean"].map("{:.3f}".format),
            "one run's interval": table["one"].map("± {:.3f}".format),
            "SD over seeds": table["seeds"].map("{:.4f}".format, na_action="ignore"),
            "SD over splits": table["splits"].map("{:.4f}".format, na_action="ignore"),
            "95% interval of the mean": [f"{low:.3f} to {high:.3f}" for low, high in pairs],
            "all runs": [f"{least:.3f} to {most:.3f}" for least, most in ranges],
        }
    )


def _told(held: pd.DataFrame) -> pd.DataFrame:
    """The verdicts as people read them."""
    if not len(held):
        return held
    ranges = zip(held["least"], held["most"], strict=True)
    return pd.DataFrame(
        {
            "difference": held["name"],
            "verdict": held["verdict"],
            "mean": held["mean"].map("{:+.3f}".format),
            "all runs": [f"{least:+.3f} to {most:+.3f}" for least, most in ranges],
            "surely above 0": [f"{above} of {runs}" for above, runs in zip(held["above"], held["runs"], strict=True)],
            "surely below 0": [f"{below} of {runs}" for below, runs in zip(held["below"], held["runs"], strict=True)],
        }
    )
