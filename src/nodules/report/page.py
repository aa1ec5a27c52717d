"""The report: every figure drawn from its kept data, ``results.json``, the cards, one self-contained page."""

import io
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from PIL import Image
from tqdm import tqdm

from nodules import course, paths, plots, record
from nodules.data.sources import KAGGLE_COUNTS
from nodules.errors import InputError
from nodules.evaluation import metrics
from nodules.report import cards, text

CARDS = {"data_card.md": cards.data_cards, "model_card.md": cards.model_card, "claim.md": cards.claim}
RESULTS_MARKS = ("<!-- results: written by make figures -->", "<!-- end of results -->")
NOTEBOOKS_MARKS = ("<!-- notebooks: written by make figures -->", "<!-- end of notebooks -->")


class Album:
    """The figures of a run, each shown once: where the text asks for it, or with the rest.

    Args:
        figures: by name; ``title``, ``caption`` and ``source`` of each.
    """

    def __init__(self, figures: dict[str, dict[str, Any]]) -> None:
        self.figures = dict(figures)

    def show(self, name: str) -> str:
        """A figure in markdown; empty if the run did not make it."""
        return _picture(name, self.figures.pop(name)) if name in self.figures else ""

    def rest(self) -> list[tuple[str, str]]:
        """Title and markdown of every figure that was not shown yet."""
        return [(about["title"], _picture(name, about)) for name, about in self.figures.items()]


def build(run_dir: Path, folder: Path, readme: Path | None = None) -> Path:
    """Write the report of one run.

    Args:
        run_dir: ``runs/<profile>-<data>``, where notebooks have kept figures and results.
        folder: gets ``<figure>.png`` and ``<figure>.json`` (its provenance), ``results.json``,
            ``data_card.md``, ``model_card.md``, ``claim.md`` and, last, ``report.html``. Figures that this run
            does not make are removed.
        readme: a README whose tables of results and notebooks are renewed.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: nothing has been run yet, what a notebook kept is incomplete or was changed, a figure's data no
            longer fit its drawing function, or the README lacks the marks around its tables.
    """
    folders = sorted(path.parent for path in run_dir.glob("*/results.json"))
    if not folders:
        raise InputError(f"{run_dir}: no notebook has been run here; run make notebooks first")
    content = _gather(folders)
    figures = _draw(folders, folder)
    record.write_json(folder / "results.json", content)
    for name, card in CARDS.items():
        _write(folder / name, card(content))
    if readme:
        _write(readme, renewed(readme, content))
    tables = [(t["caption"], pd.read_csv(run_dir / t["notebook"] / f"{t['name']}.csv")) for t in content["tables"]]
    return _write(folder / "report.html", page(content, figures, tables, folder))


def minutes(run_dir: Path) -> str:
    """How long each notebook of a run took, as papermill noted in its executed copy, in one line."""
    copies = [path for lesson in course.LESSONS if (path := run_dir / f"{lesson.name}.ipynb").exists()]
    noted = {path.stem: nbformat.read(path, as_version=4).metadata.get("papermill", {}) for path in copies}
    taken = {name: about["duration"] / 60 for name, about in noted.items() if about.get("duration")}
    each = ", ".join(f"{name} {value:.1f}" for name, value in taken.items())
    return f"minutes by notebook: {each}; {sum(taken.values()):.1f} in all"


def page(
    content: dict[str, Any], figures: dict[str, dict[str, Any]], tables: list[tuple[str, pd.DataFrame]], folder: Path
) -> str:
    """The report as HTML: ``report.md`` filled in and converted by nbconvert, pictures embedded.

    Args:
        content: as in ``results.json``.
        figures: as for :class:`Album`.
        tables: captions and tables.
        folder: where the figures are.
    """
    values = cards.values(content) | _comparison(content)
    values |= {"data_card": cards.data_card(content), "results": cards.result_table(content["rows"])}
    values |= {"figures": Album(figures), "tables": [(caption, table.round(3)) for caption, table in tables]}
    report = text.render("report.md", values | {"left_out": content["left_out"]})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(report)])
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"path": str(folder)}})
    return text.render("page.html", {"body": body})


def renewed(readme: Path, content: dict[str, Any]) -> str:
    """The text of a README with its tables of results and notebooks updated.

    Raises:
        InputError: it lacks the marks around them.
    """
    results = cards.result_table(content["rows"])
    table = text.render("results.md", cards.values(content) | {"results": results})
    return _between(readme, with_notebooks(readme), RESULTS_MARKS, table)


def with_notebooks(readme: Path) -> str:
    """The text of a README with its table of notebooks updated from :data:`nodules.course.LESSONS`.

    Raises:
        InputError: it lacks the marks around the table.
    """
    table = text.render("notebooks.md", {"linked": True})
    return _between(readme, readme.read_text(encoding="utf-8"), NOTEBOOKS_MARKS, table)


def _between(readme: Path, old: str, marks: tuple[str, str], table: str) -> str:
    first, last = marks
    before, _, rest = old.partition(first)
    _, mark, after = rest.partition(last)
    if not mark:
        raise InputError(f"{readme}: lacks the lines {first} and {last}; put them where the table goes")
    return f"{before}{first}\n{table.strip()}\n{last}{after}"


def _gather(folders: list[Path]) -> dict[str, Any]:
    """What the notebooks kept in their ``folders``, verified, in one dictionary: the content of ``results.json``."""
    kept = [record.load(folder) for folder in folders]
    for folder, notebook in zip(folders, kept, strict=True):
        for file in notebook["files"]:
            record.verify(folder, file, notebook["files"])
    names = [notebook["provenance"]["notebook"] for notebook in kept]
    return {
        "runs": [notebook["provenance"] for notebook in kept],
        "card": kept[0]["card"],
        "facts": {name: notebook["facts"] for name, notebook in zip(names, kept, strict=True)},
        "rows": [row for notebook in kept for row in notebook["rows"]],
        **{
            part: [
                entry | {"notebook": name}
                for name, notebook in zip(names, kept, strict=True)
                for entry in notebook[part]
            ]
            for part in ("tables", "left_out")
        },
    }


def _comparison(content: dict[str, Any]) -> dict[str, Any]:
    """What ``discussion.md`` names: this run's rows beside those of others (``cited.csv``), and what was measured."""
    rows = cards.rows_of(content, course.DATA, course.TRAINING, course.WHOLE)
    ours = cards.result_table(rows).assign(data=[row["data"] for row in rows], source=[row["notebook"] for row in rows])
    cited = pd.read_csv(text.TEMPLATES / "cited.csv")
    theirs = cited.assign(**{"test patches": cited["patches"].map("{:.0f}".format, na_action="ignore")})
    for metric in ("AUC", "accuracy"):
        theirs[f"{metric} (95% interval)"] = [_cited(row, metric.lower()) for row in cited.to_dict("records")]
    columns = ["model", "AUC (95% interval)", "accuracy (95% interval)", "data", "split", "test patches", "source"]
    low, high = metrics.wilson(cited["accuracy"][0], cited["patches"][0])
    return {
        "compared": pd.concat([ours, theirs])[columns].fillna("not stated"),
        "measured": pd.read_csv(text.TEMPLATES / "measured.csv"),
        "low": low,
        "high": high,
        "majority": KAGGLE_COUNTS["benign"] / KAGGLE_COUNTS["patches"],
    }


def _cited(row: dict[str, Any], metric: str) -> str | None:
    """What a cited row states of a metric, with its interval if it has one; None if it states nothing."""
    if pd.isna(row[metric]):
        return None
    return str(row[metric]) if pd.isna(row[f"{metric}_low"]) else text.interval(row, metric)


def _draw(folders: list[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Draw every figure kept in ``folders`` into ``folder``, with a sidecar that says where it comes from."""
    kept = [path for source in folders for path in sorted(source.glob("*.json")) if path.name != "results.json"]
    figures = {}
    for path in tqdm(kept, "figures"):
        figure, about = record.redraw(path)
        _save(figure, folder / f"{path.stem}.png")
        record.write_json(folder / f"{path.stem}.json", {k: v for k, v in about.items() if k != "arguments"})
        figures[path.stem] = about | {"title": plots.title(figure)}
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


def _picture(name: str, about: dict[str, Any]) -> str:
    return f"![{about['title']}]({name}.png)\n\n{about['caption']} *{about['source']}.*"


def _write(path: Path, content: str) -> Path:
    with paths.replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path
