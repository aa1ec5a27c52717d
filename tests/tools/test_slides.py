import base64
import io

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from nodules.errors import InputError
from nodules.tools import slides

pytest.importorskip("sphinx_revealjs")

LONG = "A sentence of prose that somebody will read aloud. " * 12


def picture(width=1500, height=600):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "navy").save(buffer, "PNG")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "A figure."}
    return new_output("display_data", data, metadata={"image/png": {"alt": 'Figure 1. A "navy" figure. All <b>.'}})


TABLE = new_output(
    "execute_result", {"text/html": "<div><style>\n\nth {}</style>\n<table>\n<tr><td>0.5</td></tr></table>"}
)
PRINTED = new_output("stream", name="stdout", text="12 patches\n")
PROGRESS = new_output("stream", name="stderr", text="100%|###|")


@pytest.fixture
def run_dir(tmp_path):
    """A run with one tiny executed lesson."""
    cells = [
        new_markdown_cell("# 1. A question?\n\nWhat it is about.\n\n**Time:** short."),
        new_code_cell("study", outputs=[TABLE]),
        new_markdown_cell("## A section\n\nSee [lesson 2](02_architectures.ipynb) and [a file](../README.md)."),
        new_code_cell("secret = 1", outputs=[PROGRESS, PRINTED, picture()]),
        new_code_cell("secret = 2", outputs=[picture(900, 900)]),
        new_markdown_cell(f"{LONG}\n\n{LONG}\n\n- a list stays\n\n```\n# no heading\n```\n\n## Hidden\n\nText."),
        new_code_cell("secret = 3", outputs=[picture()], metadata={"tags": ["hide-cell"]}),
        new_markdown_cell("## Another\n\nText."),
        new_code_cell("secret = 4", outputs=[TABLE]),
        new_markdown_cell("Aside.", metadata={"slideshow": {"slide_type": "notes"}}),
        new_markdown_cell("## Long\n\n" + "\n".join(["- an item of a list that is too long for one slide"] * 60)),
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    nbformat.write(new_notebook(cells=cells), folder / "01_data.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# failed")]), folder / "02_architectures.failed.ipynb")
    return folder


def test_headings_start_slides_and_figures_continue_them(run_dir):
    shown = slides.show(nbformat.read(run_dir / "01_data.ipynb", as_version=4)).cells
    kinds = [(cell.metadata.slideshow.slide_type, cell.source.splitlines()[0]) for cell in shown]
    assert [kind for kind in kinds if kind[0] != "notes"] == [
        ("slide", "# 1. A question?"),
        ("slide", "## A section"),
        ("subslide", "### A section"),
        ("subslide", "### A section"),
        ("slide", "## Another"),
        ("slide", "## Long"),
    ]
    title, time, section, second, text, notes, another, aside, _ = (cell.source for cell in shown)
    assert "<figcaption>All &lt;b&gt;.</figcaption>" in section and time == "**Time:** short."
    assert "table" not in title, "what is shown under the title is about the set-up"
    assert "[lesson 2](02_architectures.html) and a file." in section and "12 patches" in section
    assert 'class="wide"' in section and 'class="tall"' in second and "&quot;navy&quot;" in second
    assert text.count(LONG.strip()) == notes.count(LONG.strip()) == 1, "what does not fit is for the speaker"
    assert "- a list stays" in text and "# no heading" in text
    assert "<table>" in another and "\n" not in another.partition("<table>")[2] and aside == "Aside."
    assert not any(word in str(shown) for word in ("secret", "100%", "Hidden"))


def shown(*cells):
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), new_markdown_cell("## A section"), *cells])
    return [cell.source for cell in slides.show(notebook).cells][1:]


def html_table(table):
    return new_output("execute_result", {"text/html": table.to_html()})


def test_a_guess_ends_its_slide_and_its_answer_is_left_out():
    asked = "<p><strong>How many?</strong> Write your guess down, then read on.</p>"
    guess = new_output("execute_result", {"text/html": asked, slides.WIDGET: {}})
    answers = "How many?\nYou made no guess; it came out as 0.298.\nYou guessed 0.30; it came out as 0.298.\n2 of 3\n"
    printed = new_output("stream", name="stdout", text=answers)
    first, second = shown(new_code_cell(outputs=[guess, guess]), new_code_cell(outputs=[printed, picture()]))
    assert first.count("How many?") == 2 and "read on" not in first and "<img" not in first
    assert "2 of 3" in second and "<img" in second and "came out" not in second and "How many?" not in second


def test_controls_and_what_shows_nothing_are_left_out():
    still = new_output("execute_result", {slides.WIDGET: {}, **picture().data})
    (section,) = shown(new_markdown_cell(f"Move the threshold.\n\n{LONG}"), new_code_cell(outputs=[still]))
    assert "Move" not in section and "<img" not in section and LONG.strip() in section
    assert "<img" in shown(new_code_cell(slides.EXPLORER + ")", outputs=[still]))[0]
    left_out = new_output("stream", name="stdout", text="Left out: it takes too long.\n")
    assert shown(new_markdown_cell(LONG), new_code_cell(outputs=[left_out, PROGRESS])) == []
    versions = pd.DataFrame({"value": [3]}, pd.Index(["python"], name="environment"))
    assert shown(new_markdown_cell(LONG), new_code_cell(outputs=[html_table(versions)])) == []
    assert len(shown(new_markdown_cell(LONG))) == 1


def test_tables_are_narrow():
    numbers = pd.DataFrame({"a": ["0.123456", "12"], "b": ["0.00001234", "-0.1234"]})
    (section,) = shown(new_markdown_cell("Word. " * 80), new_code_cell(outputs=[html_table(numbers)]))
    rows = [[cell.text for cell in row.find_all(["th", "td"])] for row in BeautifulSoup(section, "html.parser")("tr")]
    assert rows == [["a", "b"], ["0.123", "1e-05"], ["12", "-0.1234"]] and "font-size" not in section
    named = pd.DataFrame(0.5, ["x", "y", "z"], range(12))
    text, section = shown(new_markdown_cell("Word. " * 80), new_code_cell(outputs=[html_table(named)]))
    assert "<th>x</th>" in section and "font-size" in section and "Word" in text


def test_slides_load_nothing_from_the_net(run_dir, tmp_path):
    index = slides.write(run_dir, tmp_path / "slides")
    assert [link["href"] for link in BeautifulSoup(index.read_text(), "html.parser").find_all("a")] == ["01_data.html"]
    soup = BeautifulSoup((tmp_path / "slides" / "01_data.html").read_text(), "html.parser")
    loaded = [tag.get("src") or tag.get("href") for tag in soup.find_all(["script", "link", "img", "iframe"])]
    local = [address for address in loaded if address and not address.startswith("data:")]
    assert local and all((tmp_path / "slides" / address).is_file() for address in local)
    assert "import(" not in str(soup) and "@import" not in str(soup) and "//cdn" not in str(soup)


def test_arrow_keys_turn_pages_and_nothing_overflows(run_dir, tmp_path, browser):
    slides.write(run_dir, tmp_path / "slides")
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "slides" / "01_data.html").as_uri())
    page.wait_for_function("Reveal.isReady()")
    titles = []
    for _ in range(page.evaluate("Reveal.getTotalSlides()")):
        slide = page.locator("section.present > .page")
        titles.append(slide.locator("h1, h2, h3").inner_text())
        box = slide.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] >= 0 and box["y"] + box["height"] <= 721
        assert slide.evaluate("page => page.scrollWidth <= page.clientWidth")
        for image in slide.locator("img").all():
            assert image.bounding_box()["height"] > 200 and image.evaluate("image => image.naturalWidth > 0")
        page.keyboard.press("ArrowRight")
    assert titles == ["1. A question?", *["A section"] * 3, "Another", "Long"]
    assert page.locator("section.present > .page").evaluate("page => page.scrollHeight > page.clientHeight"), "scrolls"
    assert not problems and all(address.startswith(("file:", "data:")) for address in asked)
    page.close()


def test_a_run_without_notebooks_is_refused(tmp_path):
    with pytest.raises(InputError, match="no notebook has been run here"):
        slides.write(tmp_path, tmp_path / "slides")
