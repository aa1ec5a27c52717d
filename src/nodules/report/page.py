"""The report: every figure drawn from its kept data, ``results.json``, the cards, one self-contained page."""

import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from PIL import Image
from tqdm import tqdm

from nodules import course, paths, plots, record
from nodules.errors import InputError
from nodules.report import answer, cards, text
from nodules.workers import allowed, processes

CARDS = {"data_card.md": cards.data_cards, "model_card.md": cards.model_card, "claim.md": cards.claim}
RESULTS_MARKS = ("<!-- results: written by make figures -->", "<!-- end of results -->")
NOTEBOOKS_MARKS = ("<!-- notebooks: written by make figures -->", "<!-- end of notebooks -->")


class Album:
    """The figures of a run, each shown once: where the text asks for it, or with the rest.

    Args:
        figures: by name; ``title``, ``alt``, ``caption``, ``source`` and ``notebook`` of each.
    """

    def __init__(self, figures: dict[str, dict[str, Any]]) -> None:
        self.figures = dict(figures)

    def show(self, name: str) -> str:
        """A figure in markdown; empty if the run did not make it."""
        return picture(name, self.figures.pop(name)) if name in self.figures else ""

    def rest(self) -> list[tuple[course.Lesson, list[str]]]:
        """The markdown of every figure that was not shown yet, by notebook."""
        left = [
            (
                lesson,
                [picture(name, about) for name, about in self.figures.items() if about["notebook"] == lesson.name],
            )
            for lesson in course.LESSONS
        ]
        return [(lesson, pictures) for lesson, pictures in left if pictures]


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
    figures = _draw(folders, folder) | {"answer": _answer(content, folder)}
    record.write_json(folder / "results.json", content)
    for name, card in CARDS.items():
        paths.write(folder / name, card(content))
    if readme:
        paths.write(readme, renewed(readme, content))
    tables = [(t["caption"], pd.read_csv(run_dir / t["notebook"] / f"{t['name']}.csv")) for t in content["tables"]]
    return paths.write(folder / "report.html", page(content, figures, tables, folder))


def minutes(run_dir: Path) -> str:
    """How long each notebook of a run took, as papermill noted in its executed copy, and for how long any ran."""
    copies = [path for lesson in course.LESSONS if (path := run_dir / f"{lesson.name}.ipynb").exists()]
    noted = {path.stem: nbformat.read(path, as_version=4).metadata.get("papermill", {}) for path in copies}
    ended = {name: about for name, about in noted.items() if about.get("duration")}
    each = ", ".join(f"{name} {about['duration'] / 60:.1f}" for name, about in ended.items())
    whole, until = pd.Timedelta(0), pd.Timestamp(0, tz="UTC")
    for start, end in sorted((pd.Timestamp(t["start_time"]), pd.Timestamp(t["end_time"])) for t in ended.values()):
        whole += max(end - max(start, until), pd.Timedelta(0))  # some run side by side
        until = max(until, end)
    return f"minutes by notebook: {each}; {whole.total_seconds() / 60:.1f} in all"


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
    values |= {"revisions": dict.fromkeys(run["git_revision"] for run in content["runs"])}
    values |= {"data_card": cards.data_card(content), "results": cards.result_table(content["rows"])}
    values |= {"figures": Album(figures), "tables": [(caption, table.map(_legible)) for caption, table in tables]}
    report = text.render("report.md", values | {"left_out": content["left_out"]})
    return as_html(report, {name: about["title"] for name, about in figures.items()}, folder)


def as_html(report: str, titles: dict[str, str], folder: Path) -> str:
    """A report in markdown as a page, converted by nbconvert, pictures embedded.

    Args:
        report: pictures have the names of their figures as titles, and a caption in the paragraph below.
        titles: of the figures, by name.
        folder: where the figures are.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(report)])
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"path": str(folder)}})
    structure = _structured(body, titles)
    return text.render("page.html", structure | {"pico": text.style()})


def _structured(body: str, titles: dict[str, str]) -> dict[str, Any]:
    """What ``page.html`` names: the body with figures and tables marked up, its outline and its pictures.

    Args:
        body: HTML, in which each image's title is the name of its figure.
        titles: of the figures, by name.
    """
    soup = BeautifulSoup(body, "html.parser")
    for link in soup.select(".anchor-link"):
        link.decompose()
    headings = soup.find_all(["h2", "h3"])
    for number, tag in enumerate(headings, 1):  # nbconvert's own hold percent signs, and may occur twice
        tag["id"] = f"{number}-" + re.sub(r"\W+", "-", tag.get_text().lower()).strip("-")
    for image in soup.find_all("img"):
        figure, caption = image.parent, image.parent.find_next_sibling("p")
        figure.name, caption.name, name = "figure", "figcaption", image["title"]
        figure["id"], figure["data-title"] = f"fig-{name}", titles[name]
        del image["title"]
        figure.append(caption.extract())
    for table in soup.find_all("table"):
        about = table.find_previous(["h2", "h3"]).get_text()
        attributes = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": f"Table: {about}"}
        table.wrap(soup.new_tag("div", attrs=attributes))
    return {
        "title": soup.h1.get_text(),
        "body": str(soup),
        "outline": [
            (tag.name[1], tag["id"], tag.get_text()) for tag in headings if tag.get_text() not in course.SHORT.values()
        ],
        "pictures": [(tag["id"], tag["data-title"]) for tag in soup.find_all("figure")],
    }


def _legible(value: Any) -> Any:
    """A cell as people read it: three decimals, or three digits if large or tiny; empty if it is not a number."""
    if not isinstance(value, float):
        return value
    if not np.isfinite(value):
        return None if np.isnan(value) else "infinite"
    if value == int(value) and abs(value) < 1000:
        return int(value)
    return round(value, 3) if 0.001 <= abs(value) < 1000 else f"{value:.3g}"


def renewed(readme: Path, content: dict[str, Any]) -> str:
    """The text of a README with its tables of results and notebooks updated.

    Raises:
        InputError: it lacks the marks around them.
    """
    table = text.render("results.md", cards.values(content) | {"brief": _brief(content)})
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
    """What ``discussion.md`` names: kept runs beside what others report (``cited.csv``), and beside this one."""
    kept = list(answer.rows(answer.real()).values())
    kept += [row for row in answer.real()["rows"] if row["name"].endswith(answer.SURER)]
    kept = cards.result_table(kept).assign(data="real nodules of LIDC-IDRI", source="this project, a kept run")
    cited = pd.read_csv(text.TEMPLATES / "cited.csv")
    tested = cited["patches"].map("{:.0f} ".format, na_action="ignore") + cited["counted"]
    theirs = cited.assign(tested=tested)
    for metric in ("AUC", "accuracy"):
        theirs[f"{metric} (95% interval)"] = cited[metric.lower()].map("{:.3g}".format, na_action="ignore")
    columns = ["model", *(f"{score} (95% interval)" for score in ("AUC", "accuracy")), "size-matched AUC"]
    columns += ["data", "split", "tested", "source"]
    return {
        "compared": pd.concat([kept, theirs])[columns].fillna("not stated"),
        "measured": answer.ingredients(),
        "elsewhere": answer.elsewhere(content),
    }


def _brief(content: dict[str, Any]) -> pd.DataFrame:
    """The README's table: the report's number above some on real nodules and some of this run."""
    table = answer.table(content)
    keys = ("benign", "frozen", "slice", "larger", "ruler", "nodule", "both")
    chosen = [("report", 0), *(("real", key) for key in keys), *(("here", key) for key in keys)]
    table = table.loc[[key for key in chosen if key in table.index]]
    table["accuracy"] = [text.span(row.value, row.low, row.high) for row in table.itertuples()]
    titles = {
        "name": "model",
        "accuracy": "accuracy (95% interval)",
        "auc": "AUC (95% interval)",
        "part": "data",
        "tested": "measured on",
    }
    return table[list(titles)].rename(columns=titles)


def _draw(folders: list[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Draw every figure kept in ``folders`` into ``folder``, with a sidecar that says where it comes from."""
    kept = [path for source in folders for path in sorted(source.glob("*.json")) if path.name != "results.json"]
    with processes(allowed()) as executor:
        drawn = list(tqdm(executor.map(partial(_drawn, folder=folder), kept), "figures", len(kept)))
    figures = {path.stem: about for path, about in zip(kept, drawn, strict=True)}
    for picture in folder.glob("*.png"):
        beside = picture.with_suffix(".json")
        if picture.stem not in (*figures, "answer") and beside.exists():  # else it is none of an earlier report's
            picture.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
    return dict(sorted(figures.items(), key=lambda item: (item[1]["notebook"], item[1]["order"])))


def _drawn(path: Path, folder: Path) -> dict[str, Any]:
    """Draw one kept figure into ``folder``."""
    figure, about = record.redraw(path)
    save(figure, folder / f"{path.stem}.png")
    record.write_json(folder / f"{path.stem}.json", {k: v for k, v in about.items() if k != "arguments"})
    return about | {"title": plots.title(figure), "alt": plots.described(figure)}


def _answer(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw the first screen's figure from the results of this run, the one on real nodules, and the 2019 report."""
    about = {
        "caption": "Share called right, with 95% intervals; the 2019 report's as if its patches were independent. "
        "On nodules, networks give the mean of their opinions on the slices.",
        "source": f"{content['runs'][0]['data']}; real nodules of LIDC-IDRI; the 2019 report's figures 14, 15 and 22",
        "notebook": "",
    }
    table = answer.table(content)
    table = table[[key != "patch" for _, key in table.index]]  # over all folds; the others per patch are of one split
    figure = plots.stamp(plots.bars(table, "accuracy", "How much of 0.95 is real?"), about["source"])
    save(figure, folder / "answer.png")
    kept = {key: content["runs"][0][key] for key in ("profile", "parameters", "git_revision")}
    kept |= {"table": json.loads(table.to_json(orient="records"))}
    record.write_json(folder / "answer.json", about | kept)
    return about | {"title": plots.title(figure), "alt": plots.described(figure)}


def save(figure: Figure, path: Path) -> None:
    """Save as a PNG of 256 colours, a third of the size of full colour and as legible."""
    with paths.replacing(path) as temporary:
        picture = Image.open(io.BytesIO(plots.png(figure))).convert("RGB")
        picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(temporary, optimize=True)


def picture(name: str, about: dict[str, Any]) -> str:
    """A figure in markdown: ``alt``, ``caption`` and ``source`` of it."""
    alt = about["alt"].replace("[", "(").replace("]", ")")
    return f'![{alt}]({name}.png "{name}")\n\n{about["caption"]} *{about["source"]}.*'
