"""The report: every figure drawn from its kept data, ``results.json``, the cards, one self-contained page."""

import io
from pathlib import Path
from string import Formatter, Template
from typing import Any

import nbformat
import pandas as pd
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from nodules import cards, patches, paths, plots, results
from nodules.errors import InputError

# The 2019 report's figures in its numbering
FIGURES = {
    1: "Nonmalignant lung nodules",
    2: "Malignant lung nodules",
    3: "A convolutional neural network",
    4: "Training with ResNet34",
    5: "Training with ResNet50",
    6: "Training with ResNet101",
    7: "Training with ResNet152",
    8: "The learning rate finder",
    9: "Learning rate and iterations",
    10: "Last layers trained without augmentation",
    11: "Last layers trained with augmentation",
    12: "Data augmentation of a lung nodule",
    13: "Malignant lung nodule and class activation map",
    14: "First result: last layers",
    15: "Second result: augmentation, cosine annealing and test-time augmentation",
    16: "Most correct, predicted malignant",
    17: "Most correct, predicted nonmalignant",
    18: "Most incorrect, predicted malignant",
    19: "Most incorrect, predicted nonmalignant",
    20: "Most uncertain predictions",
    21: "Confusion matrix",
    22: "Whole network trained",
}
CITED, TRIED, DISCUSSION, TRUST = (
    Path(__file__).with_name(name) for name in ("cited.csv", "tried.csv", "discussion.md", "trust.md")
)
CARDS = {"data_card.md": cards.data_cards, "model_card.md": cards.model_card, "claim.md": cards.claim}
DISCUSSED = ("01_data", "04_training", "05_whole_network")  # notebooks whose rows stand beside the cited ones
LINKS = """
What the model is for, and for what not: [model_card.md](model_card.md). The CLAIM checklist, filled in:
[claim.md](claim.md). The cards of the other sources: [data_card.md](data_card.md).
"""
README_MARKS = ("<!-- results: written by make figures -->", "<!-- end of results -->")
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 17px/1.55 Georgia, serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3, table { font-family: system-ui, sans-serif; }
h3 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
td, th { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
.anchor-link, .prompt { display: none; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def build(run_dir: Path, folder: Path, readme: Path | None = None) -> Path:
    """Write the report of one run.

    Args:
        run_dir: ``runs/<profile>-<data>``, where notebooks have kept figures and results.
        folder: gets ``<figure>.png`` and ``<figure>.json`` (its provenance), ``results.json``,
            ``data_card.md``, ``model_card.md``, ``claim.md`` and, last, ``report.html``. Figures that this run
            does not make are removed.
        readme: where the result table between the marks is written anew.

    Raises:
        InputError: nothing has been run yet, or a figure's data no longer fit its drawing function.
    """
    folders = sorted(path.parent for path in run_dir.glob("*/results.json"))
    if not folders:
        raise InputError(f"{run_dir}: no notebook has been run here; run make notebooks first")
    found = [results.load(one) for one in folders]
    for one, run in zip(folders, found, strict=True):
        for file in run["files"]:
            results.verify(one, file, run["files"])
    facts = {run["provenance"]["notebook"]: run["facts"] for run in found}
    content = {
        "runs": [run["provenance"] for run in found],
        "card": found[0]["card"],
        "facts": facts,
        "rows": [row for run in found for row in run["rows"]],
        "tables": [t | {"notebook": run["provenance"]["notebook"]} for run in found for t in run["tables"]],
        "left_out": [t | {"notebook": run["provenance"]["notebook"]} for run in found for t in run["left_out"]],
    }
    figures = _draw(folders, folder, facts)
    results.write_json(folder / "results.json", content)
    for name, card in CARDS.items():
        _write(folder / name, card(content))
    if readme:
        update_readme(readme, content)
    tables = {t["caption"]: pd.read_csv(run_dir / t["notebook"] / f"{t['name']}.csv") for t in content["tables"]}
    return _write(folder / "report.html", page(content, figures, tables, folder))


def discussion(content: dict[str, Any]) -> str:
    """The section "Is 0.95 good?": this run's rows beside what others state (``cited.csv``)."""
    rows = [row for row in content["rows"] if row["notebook"] in DISCUSSED]
    ours = cards.result_table(rows).assign(data=[row["data"] for row in rows], source=[row["notebook"] for row in rows])
    cited = pd.read_csv(CITED)
    low, high = _wilson(cited["accuracy"][0], cited["patches"][0])
    theirs = cited.assign(**{"test patches": cited["patches"].map("{:.0f}".format, na_action="ignore")})
    for metric in ("AUC", "accuracy"):
        theirs[f"{metric} (95% interval)"] = [_stated(row, metric.lower()) for row in cited.to_dict("records")]
    columns = ["what", "AUC (95% interval)", "accuracy (95% interval)", "data", "split", "test patches", "source"]
    table = pd.concat([ours, theirs])[columns].fillna("not stated")
    majority = patches.KAGGLE_COUNTS["benign"] / patches.KAGGLE_COUNTS["patches"]
    run = content["runs"][0]
    return Template(DISCUSSION.read_text(encoding="utf-8")).substitute(
        data=run["data"],
        split=run["split"],
        table=cards.markdown(table),
        tried=cards.markdown(pd.read_csv(TRIED)),
        low=f"{low:.3f}",
        high=f"{high:.3f}",
        majority=f"{majority:.1%}",
    )


def chapter(facts: dict[str, Any], figures: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The chapter "How far can it be trusted?" (``trust.md``), and which figures each of its sections shows.

    A section is left out where this run lacks one of its numbers or figures: nobody rated, nothing was scanned again.

    Returns:
        Text of each section, its first the introduction, with the names of its figures; empty without any.
    """
    first, *sections = TRUST.read_text(encoding="utf-8").split("\n### ")
    found = {}
    for section in sections:
        names = Template(section).get_identifiers()
        if set(names) <= set(figures) and {field for _, field, _, _ in Formatter().parse(section) if field} <= set(
            facts
        ):
            pictures = {name: _shown(name, figures[name]) for name in names}
            found["### " + Template(section.format(**facts)).substitute(pictures)] = names
    return {first: []} | found if found else {}


def update_readme(readme: Path, content: dict[str, Any]) -> None:
    """Replace what stands between the marks by the table of results."""
    text = readme.read_text(encoding="utf-8")
    first, last = README_MARKS
    before, _, rest = text.partition(first)
    _, mark, after = rest.partition(last)
    if not mark:
        raise InputError(f"{readme}: lacks the lines {first} and {last}; put them around the result table")
    table = cards.markdown(cards.result_table(content["rows"]))
    _write(readme, f"{before}{first}\n{cards.about(content)}\n\n{table}\n{last}{after}")


def page(
    content: dict[str, Any], figures: dict[str, dict[str, Any]], tables: dict[str, pd.DataFrame], folder: Path
) -> str:
    """The page: a notebook of markdown cells turned to HTML by nbconvert, the pictures inside it."""
    revision = content["runs"][0]["git_revision"]
    cells = [
        f"# Lung nodule malignancy from 64x64 CT patches\n\n{cards.about(content)} Code {revision}.",
        cards.data_card(content) + LINKS,
    ]
    cells += ["## Results\n\n" + cards.markdown(cards.result_table(content["rows"]))]
    cells += ["## The 2019 report's figures"]
    for number, title in FIGURES.items():
        name = f"fig{number:02d}"
        heading = f"### Figure {number}. {title}\n\n"
        cells.append(heading + (_shown(name, figures[name]) if name in figures else "*Not made by this run.*"))
    trust = chapter(content["facts"].get("07_evaluation", {}), figures)
    cells += [discussion(content), *trust]
    told = {name for names in trust.values() for name in names}
    beyond = {name: about for name, about in figures.items() if not name.startswith("fig") and name not in told}
    cells += ["## Beyond the report"] + [
        f"### {about['title']}\n\n{_shown(name, about)}" for name, about in beyond.items()
    ]
    left_out = [f"- {one['what']}, because {one['why']} ({one['notebook']})" for one in content["left_out"]]
    cells += ["## What this run leaves out\n\n" + "\n".join(left_out)] * bool(left_out)
    cells += ["## Tables"] * bool(tables)
    cells += [f"### {caption}\n\n" + cards.markdown(table.round(3)) for caption, table in tables.items()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(cell) for cell in cells])
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"path": str(folder)}})
    return PAGE.substitute(title="Lung nodule malignancy", body=body)


def _stated(row: dict[str, Any], metric: str) -> str | float:
    """What a cited row says of a metric, with the interval where it has one; NaN where nothing."""
    if pd.isna(row[metric]):
        return float("nan")
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    return str(row[metric]) if pd.isna(low) else f"{row[metric]:.3f} ({low:.3f} to {high:.3f})"


def _wilson(share: float, count: float) -> tuple[float, float]:
    """95% interval of a share of ``count`` independent patches (Wilson 1927)."""
    interval = binomtest(round(share * count), int(count)).proportion_ci(method="wilson")
    return interval.low, interval.high


def _draw(folders: list[Path], folder: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Draw every figure kept in ``folders`` into ``folder``, with a sidecar that says where it comes from."""
    kept = [path for one in folders for path in sorted(one.glob("*.json")) if path.name != "results.json"]
    figures = {}
    for path in tqdm(kept, "figures"):
        figure, about = results.redraw(path)
        about["caption"] = about["caption"].format(**facts[about["notebook"]])
        about["title"] = plots.title(figure)
        _save(figure, folder / f"{path.stem}.png")
        results.write_json(folder / f"{path.stem}.json", {k: v for k, v in about.items() if k != "arguments"})
        figures[path.stem] = about
    for picture in folder.glob("*.png"):
        if picture.stem not in figures:
            picture.unlink(missing_ok=True)
            picture.with_suffix(".json").unlink(missing_ok=True)
    return dict(sorted(figures.items(), key=lambda item: (item[1]["notebook"], item[1]["order"])))


def _save(figure: Figure, path: Path) -> None:
    """Save as a PNG of 256 colours, a third of the size of full colour and as legible."""
    with paths.replacing(path) as temporary:
        picture = Image.open(io.BytesIO(plots.png(figure))).convert("RGB")
        picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(temporary, optimize=True)


def _shown(name: str, about: dict[str, Any]) -> str:
    return f"![{about['title']}]({name}.png)\n\n{about['caption']} *{about['source']}.*"


def _write(path: Path, text: str) -> Path:
    with paths.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
