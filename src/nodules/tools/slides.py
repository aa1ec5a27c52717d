"""Slides of the lessons: one page for each executed notebook, shown by reveal.js, which lies beside it.

What is on a slide follows from the notebook, without metadata:

- a heading starts a slide; a second figure or table, or text after one, continues it on another;
- figures, tables and what a cell prints are shown, code and progress bars are not;
- a figure or table shares its slide with the text above it, if that has at most ``BESIDE`` characters;
- paragraphs beyond ``LONGEST`` characters are the speaker's notes (press S); lists, tables and what was printed stay;
- the set-up above a lesson's first section, and sections with nothing to show, are left out.

Jupyter's own ``slideshow`` metadata may say ``skip`` or ``notes``, and the tags that hide a cell in the book hide it
here. What is still too long scrolls.
"""

import base64
import html
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert import SlidesExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from PIL import Image

from nodules import course, paths
from nodules.errors import InputError
from nodules.tools import optional

TEMPLATES = Path(__file__).parent / "templates"
REVEAL = "reveal.js"  # the folder beside the slides
LONGEST, BESIDE = 1000, 420  # characters of prose on a slide; beside a figure or table
DENSE = 750  # from so many on, as in a long list, the letters are smaller
DULL = 150  # a section with less prose than this and nothing to show gets no slide
TALL = 1.5  # a picture of a smaller ratio of width to height stands beside the text, others below
FENCED = re.compile(r"```\n(.*)\n```", re.DOTALL)
HIDDEN = {"hide-cell", "hide-output", "remove-cell", "remove-output"}
INDEX = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Slides</title>
<style>body {{ font: 20px/1.6 system-ui, sans-serif; max-width: 44em; margin: 3em auto; padding: 0 1em }}</style>
<h1>Slides</h1>
<ul>
{lessons}
</ul>
<p>Arrow keys or the space bar turn the page, S opens the speaker's notes, Esc shows all slides. Add
<code>?print-pdf</code> to an address and print the page to get a PDF file.</p>
"""


@dataclass
class Slide:
    """One slide, in Markdown."""

    heading: str
    first: bool  # of its section
    text: list[str] = field(default_factory=list)  # paragraphs
    shown: str = ""  # a figure or table
    notes: list[str] = field(default_factory=list)

    def length(self) -> int:
        """Characters of prose."""
        return sum(map(len, self.text))

    def settle(self) -> None:
        """Move paragraphs that are too many to the notes; the first, lists, tables and what was printed stay."""
        length, kept = 0, []
        for paragraph in self.text:
            length += len(paragraph)
            stays = length <= LONGEST or not kept or re.match(r"[-*+>|] |```|\d+\. ", paragraph)
            (kept if stays else self.notes).append(paragraph)
        self.text = kept

    def cells(self) -> Iterator[NotebookNode]:
        """Cells whose metadata tell nbconvert where a slide starts."""
        heading = self.heading if self.first else "### " + self.heading.lstrip("# ")
        source = "\n\n".join(filter(None, [heading, *self.text, self.shown]))
        about = {"slide_type": "slide" if self.first else "subslide"}
        yield new_markdown_cell(source, metadata={"slideshow": about, "dense": self.length() > DENSE})
        if self.notes:
            yield new_markdown_cell("\n\n".join(self.notes), metadata={"slideshow": {"slide_type": "notes"}})


def write(run_dir: Path, folder: Path) -> Path:
    """Write the slides of a run's executed notebooks, ``<lesson>.html``, and ``index.html``, which is returned.

    Raises:
        InputError: no notebook has been run, or reveal.js is not installed.
    """
    static = Path(optional.package("sphinx_revealjs").__file__).parent / "_static" / "revealjs"
    names = [lesson.name for lesson in course.LESSONS if (run_dir / f"{lesson.name}.ipynb").is_file()]
    if not names:
        raise InputError(f"{run_dir}: no notebook has been run here; run make notebooks first")
    with paths.writing(folder):
        for old in (folder / f"{lesson.name}.html" for lesson in course.LESSONS):
            old.unlink(missing_ok=True)
        for part in ("dist", "plugin/notes"):
            unneeded = shutil.ignore_patterns("*.map", "*.esm.js")
            shutil.copytree(static / part, folder / REVEAL / part, ignore=unneeded, dirs_exist_ok=True)
        shutil.copy(static / "LICENSE", folder / REVEAL)
    listed = []
    for name in names:
        notebook = show(nbformat.read(run_dir / f"{name}.ipynb", as_version=4))
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        notebook.metadata.title = title
        with paths.replacing(folder / f"{name}.html") as temporary:
            temporary.write_text(page(notebook), encoding="utf-8")
        listed.append(f'<li><a href="{name}.html">{html.escape(title)}</a></li>')
    with paths.replacing(folder / "index.html") as temporary:
        temporary.write_text(INDEX.format(lessons="\n".join(listed)), encoding="utf-8")
    return folder / "index.html"


def page(notebook: NotebookNode) -> str:
    """Slides as HTML that loads nothing but ``reveal.js/``, beside it."""
    exporter = SlidesExporter(
        extra_template_paths=[str(TEMPLATES)],
        template_file="slides.html.j2",
        reveal_url_prefix=REVEAL,
        reveal_theme="white",
        reveal_transition="none",
        reveal_number="c/t",
        reveal_width="1280",
        reveal_height="720",
        exclude_anchor_links=True,
    )
    # Their addresses are not used by the template
    for name in ("require_js_url", "jquery_url", "mathjax_url", "mermaid_js_url"):
        setattr(exporter, name, "")
    return exporter.from_notebook_node(notebook)[0]


def show(notebook: NotebookNode) -> NotebookNode:
    """The slides of an executed notebook, as a notebook of Markdown cells, a slide each, and notes."""
    slides = []
    for number, (heading, items) in enumerate(_sections(notebook)):
        if number == 0:  # what is shown under the title is about the set-up
            items = [(kind, source) for kind, source in items if kind in ("text", "notes")]
        length = sum(len(source) for kind, source in items if kind == "text")
        if number == 0 or length >= DULL or {"print", "shown"} & {kind for kind, _ in items}:
            slides += _slides(heading, items)
    return new_notebook(cells=[cell for slide in slides for cell in slide.cells()])


def _sections(notebook: NotebookNode) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each heading with what follows: pairs of a kind (``text``, ``notes``, ``print``, ``shown``) and Markdown."""
    heading, items = "", []
    for cell in notebook.cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type")
        if kind == "skip" or HIDDEN & set(cell.metadata.get("tags", [])):
            continue
        if cell.cell_type == "code":
            items += [pair for output in cell.outputs for pair in _outputs(output)]
        elif cell.cell_type == "markdown":
            for block in _blocks(_linked(cell.source)):
                if not block.startswith("#"):
                    items.append(("notes" if kind == "notes" else "text", block))
                    continue
                if heading:
                    yield heading, items
                heading, items = block if block.startswith("# ") else "## " + block.lstrip("# "), []
    yield heading or "# Slides", items


def _blocks(source: str) -> Iterator[str]:
    """Paragraphs, headings, lists and fenced blocks of a Markdown text."""
    block, fenced = [], False
    for line in [*source.splitlines(), ""]:
        alone = not fenced and re.match(r"#{1,6} ", line)
        if block and (alone or not (fenced or line.strip())):
            yield "\n".join(block)
            block = []
        fenced ^= line.startswith(("```", "~~~"))
        if alone:
            yield line
        elif line.strip() or fenced:
            block.append(line)
    if block:
        yield "\n".join(block)


def _linked(source: str) -> str:
    """Links to other lessons lead to their slides; links to other files become plain text."""
    lessons = "|".join(lesson.name for lesson in course.LESSONS)
    source = re.sub(rf"\]\(({lessons})\.ipynb\)", r"](\1.html)", source)
    return re.sub(rf"(?<!!)\[([^\]]+)\]\((?!https?:|(?:{lessons})\.html)[^)]*\)", r"\1", source)


def _outputs(output: NotebookNode) -> Iterator[tuple[str, str]]:
    """What a slide shows of a cell's output: its picture or table, or what it prints; no progress bars."""
    data = output.get("data", {})
    if output.output_type == "stream" and output.name == "stdout" and output.text.strip():
        yield "print", f"```\n{output.text.strip()}\n```"
    elif "image/png" in data:
        picture = "".join(data["image/png"].split())
        width, height = Image.open(io.BytesIO(base64.b64decode(picture))).size
        described = output.metadata.get("image/png", {}).get("alt") or data.get("text/plain", "")
        shape = "tall" if width / height < TALL else "wide"
        yield (
            "shown",
            (f'<p class="{shape}"><img src="data:image/png;base64,{picture}" alt="{html.escape(described)}"></p>'),
        )
    elif "text/html" in data:
        for table in BeautifulSoup(data["text/html"], "html.parser").find_all("table"):
            yield "shown", '<div class="table">' + re.sub(r"\n\s*", "", str(table)) + "</div>"


def _slides(heading: str, items: list[tuple[str, str]]) -> list[Slide]:
    """The slides of a section."""
    slides = [Slide(heading, first=True)]
    for kind, source in items:
        slide = slides[-1]
        if kind == "notes":
            slide.notes.append(source)
            continue
        if slide.shown or (kind == "shown" and slide.length() > BESIDE):
            slide = Slide(heading, first=False)
            slides.append(slide)
        if kind == "shown":
            slide.shown = source
        elif kind == "print" and slide.text and (before := FENCED.fullmatch(slide.text[-1])):
            slide.text[-1] = f"```\n{before[1]}\n{FENCED.fullmatch(source)[1]}\n```"
        else:
            slide.text.append(source)
    # A last word goes with the figure that it is about, if there is room
    if len(slides) > 1 and not slides[-1].shown and slides[-1].length() + slides[-2].length() <= BESIDE:
        last = slides.pop()
        slides[-1].text += last.text
        slides[-1].notes += last.notes
    for slide in slides:
        slide.settle()
    return slides
