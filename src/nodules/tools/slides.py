"""Slides of the lessons: one page for each executed notebook, shown by reveal.js, which lies beside it.

What is on a slide follows from the notebook, without metadata:

- a heading starts a slide; a second figure or table, or text after one, continues it on another;
- figures, tables and what a cell prints are shown, code and progress bars are not;
- a figure or table shares its slide with the text above it, if that has at most ``BESIDE`` characters, a table of one
  or two rows ``ROOM``;
- a question to guess at ends its slide, so that nobody sees the answer; what came out of a guess is left out, as are
  figures with controls, and what is said about moving those;
- paragraphs beyond ``LONGEST`` characters are the speaker's notes (press S); lists, tables and what was printed stay;
- what a lesson takes and needs is for the speaker, too;
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
from bs4 import BeautifulSoup, Tag
from nbconvert import SlidesExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from PIL import Image

from nodules import course, paths
from nodules.errors import InputError
from nodules.tools import optional

TEMPLATES = Path(__file__).parent / "templates"
REVEAL = "reveal.js"  # the folder beside the slides
LONGEST, BESIDE, ROOM = 1000, 420, 600  # characters of prose on a slide; beside a figure or table; a small table
COLUMNS = 8  # from more on, the letters of a table are smaller
DENSE = 750  # from so many on, as in a long list, the letters are smaller
DULL = 150  # a section with less prose than this and nothing to show gets no slide
TALL = 1.5  # a picture of a smaller ratio of width to height stands beside the text, others below
SMALL = '<div class="table small">'  # of one or two rows
SET_UP = "environment"  # the index of the table of versions
LONG_NUMBER = re.compile(r"-?\d+\.\d{5,}")
TITLE = re.compile(r"(?:Figure \d+\. )?.*?\. ", re.DOTALL)
FENCED = re.compile(r"```\n(.*)\n```", re.DOTALL)
GUESS, WIDGET = "Write your guess down", "application/vnd.jupyter.widget-view+json"
GUESSED = re.compile(r"^(?:.*\?\n)?You (?:made no guess|guessed )[^\n]*\n?", re.MULTILINE)
MOVED = re.compile(r"(?:^|\. )Move |move the number of slices")
EXPLORER = "explorer.Explorer("  # whose still picture is shown
SPOKEN = ("**You should know:**", "**Time:**")
LEFT_OUT = "```\nLeft out: "
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
    guesses: list[str] = field(default_factory=list)  # questions, after which the slide ends
    notes: list[str] = field(default_factory=list)

    def length(self) -> int:
        """Characters of prose."""
        return sum(map(len, self.text))

    def settle(self) -> None:
        """Move paragraphs that are too many to the notes; the first, lists, tables and what was printed stay."""
        length, kept = sum(map(len, self.guesses)), []
        for paragraph in self.text:
            length += len(paragraph)
            stays = length <= LONGEST or not kept or re.match(r"[-*+>|] |```|\d+\. ", paragraph)
            (kept if stays else self.notes).append(paragraph)
        self.text = kept

    def cells(self) -> Iterator[NotebookNode]:
        """Cells whose metadata tell nbconvert where a slide starts."""
        heading = self.heading if self.first else "### " + self.heading.lstrip("# ")
        source = "\n\n".join(filter(None, [heading, *self.text, self.shown, *self.guesses]))
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
        paths.write(folder / f"{name}.html", page(notebook))
        listed.append(f'<li><a href="{name}.html">{html.escape(title)}</a></li>')
    return paths.write(folder / "index.html", INDEX.format(lessons="\n".join(listed)))


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
        if number == 0 or _worth_showing(items):
            slides += _slides(heading, items)
    return new_notebook(cells=[cell for slide in slides for cell in slide.cells()])


def _worth_showing(items: list[tuple[str, str]]) -> bool:
    """Whether a section's code shows something; without code, whether it has enough text."""
    kinds = {kind for kind, source in items if not source.startswith(LEFT_OUT)}
    length = sum(len(source) for kind, source in items if kind == "text")
    return bool({"print", "shown", "guess", "widget"} & kinds) or ("code" not in kinds and length >= DULL)


def _sections(notebook: NotebookNode) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each heading with what follows: pairs of a kind and Markdown.

    Kinds are ``text``, ``notes``, ``print``, ``shown``, ``guess``, and without Markdown ``code`` and ``widget``.
    """
    heading, items = "", []
    for cell in notebook.cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type")
        if kind == "skip" or HIDDEN & set(cell.metadata.get("tags", [])):
            continue
        if cell.cell_type == "code":
            still = EXPLORER in cell.source
            items += [("code", ""), *(pair for output in cell.outputs for pair in _outputs(output, still))]
        elif cell.cell_type == "markdown":
            for block in _blocks(_linked(cell.source)):
                if MOVED.search(block):
                    continue
                if not block.startswith("#"):
                    items.append(("notes" if kind == "notes" or block.startswith(SPOKEN) else "text", block))
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


def _outputs(output: NotebookNode, still: bool = False) -> Iterator[tuple[str, str]]:
    """What a slide shows of a cell's output: picture, table, question, or what it prints; no progress bars.

    Args:
        output: of the cell.
        still: whether a picture with controls is shown without them.
    """
    data = output.get("data", {})
    if output.output_type == "stream" and output.name == "stdout":
        if printed := GUESSED.sub("", output.text).strip():
            yield "print", f"```\n{printed}\n```"
    elif WIDGET in data and "image/png" in data and not still:
        yield "widget", ""
    elif "image/png" in data:
        plain = "" if WIDGET in data else data.get("text/plain", "")
        described = output.metadata.get("image/png", {}).get("alt") or plain
        yield "shown", _figure("".join(data["image/png"].split()), described)
    elif "text/html" in data:
        soup = BeautifulSoup(data["text/html"], "html.parser")
        if GUESS in data["text/html"] and soup.strong:
            yield "guess", f"<p><strong>{html.escape(soup.strong.get_text())}</strong></p>"
        for table in soup.find_all("table"):
            if not table.select("thead th:first-child") or table.select("thead th:first-child")[-1].text != SET_UP:
                yield "shown", _table(table)


def _figure(picture: str, described: str) -> str:
    """A picture, PNG in base64, over the caption in its description, "title. caption"."""
    width, height = Image.open(io.BytesIO(base64.b64decode(picture))).size
    shape = "tall" if width / height < TALL else "wide"
    caption = TITLE.sub("", described, count=1) if TITLE.match(described) else ""
    below = caption and f"<figcaption>{html.escape(' '.join(caption.split()))}</figcaption>"
    image = f'<img src="data:image/png;base64,{picture}" alt="{html.escape(described)}">'
    return f'<figure class="{shape}">{image}{below}</figure>'


def _table(table: Tag) -> str:
    """A table without an index that only counts, its numbers rounded, in smaller letters if it has many columns."""
    rows = table.select("tbody > tr")
    index = [row.find(["th", "td"]) for row in rows]
    corners = [row.find(["th", "td"]) for row in table.select("thead > tr")]
    counts = [cell.name == "th" and cell.get_text(strip=True) == str(number) for number, cell in enumerate(index)]
    if corners and all(counts) and not any(cell.get_text(strip=True) for cell in corners):
        for cell in corners + index:
            cell.decompose()
    for cell in table.find_all("td"):
        if LONG_NUMBER.fullmatch(text := cell.get_text(strip=True)):
            value = float(text)
            cell.string = f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1g}"
    columns = max((len(row.find_all(["th", "td"])) for row in table.find_all("tr")), default=0)
    if columns > COLUMNS:
        table["style"] = f"font-size: {max(11, 18.5 * COLUMNS / columns):.1f}px"
    about = SMALL if 0 < len(rows) <= 2 else '<div class="table">'
    return about + re.sub(r"\n\s*", "", str(table)) + "</div>"


def _slides(heading: str, items: list[tuple[str, str]]) -> list[Slide]:
    """The slides of a section."""
    slides = [Slide(heading, first=True)]
    for kind, source in items:
        slide = slides[-1]
        if kind == "notes":
            slide.notes.append(source)
            continue
        if kind in ("code", "widget"):
            continue
        full = kind == "shown" and slide.length() > (ROOM if source.startswith(SMALL) else BESIDE)
        full |= kind == "guess" and not slide.guesses and slide.length() > DENSE
        if slide.shown or full or (slide.guesses and kind != "guess"):
            slide = Slide(heading, first=False)
            slides.append(slide)
        if kind == "shown":
            slide.shown = source
        elif kind == "guess":
            slide.guesses.append(source)
        elif kind == "print" and slide.text and (before := FENCED.fullmatch(slide.text[-1])):
            slide.text[-1] = f"```\n{before[1]}\n{FENCED.fullmatch(source)[1]}\n```"
        else:
            slide.text.append(source)
    # A last word goes with the figure that it is about, if there is room
    alone = len(slides) > 1 and not (slides[-1].shown or slides[-1].guesses or slides[-2].guesses)
    if alone and slides[-1].length() + slides[-2].length() <= BESIDE:
        last = slides.pop()
        slides[-1].text += last.text
        slides[-1].notes += last.notes
    for slide in slides:
        slide.settle()
    return slides
