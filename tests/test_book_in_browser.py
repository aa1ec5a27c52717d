"""The book as a reader sees it: in a browser, from a server without a network, on a screen, a phone and paper."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from bs4 import BeautifulSoup

import soak
from nodules import course, paths

pytestmark = pytest.mark.slow
REPOSITORY = "someone/nodules"
EXERCISES, WIDGET = "notebooks/exercises/01_data", "notebooks/07_interpretation"
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}  # what a page fetches by itself


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def folder(smoke_run):
    """The folder of the small run's report, with the book in it, built anew."""
    folder = paths.ROOT / "figures" / smoke_run.name
    (folder / "book" / "index.html").unlink(missing_ok=True)
    done = soak.make(paths.ROOT, "book", "-j2", f"REPOSITORY=git@github.com:{REPOSITORY}.git", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Where a local server offers the book."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/book"
        server.shutdown()


@pytest.fixture(scope="module")
def pages(folder):
    """All pages of the book, parsed, by their path."""
    files = [path for path in folder.glob("book/**/*.html") if "_static" not in path.parts]
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in files}


@pytest.fixture
def page(browser, address):
    """An empty page of a browser that reaches the book alone; ``complaints`` lists what it asked for beyond that."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))

    def guard(route):
        if route.request.url.startswith((address, "file:", "data:")):
            return route.continue_()
        page.complaints.append(route.request.url)
        return route.abort()

    page.route("**/*", guard)
    yield page
    page.close()


def test_contents_are_in_the_order_of_the_lessons(folder, pages):
    links = pages[folder / "book" / "index.html"].select("nav.bd-links a")
    files = [f"{part}/{lesson.name}.html" for lesson in course.LESSONS for part in ("notebooks", "notebooks/exercises")]
    listed = [link["href"] for link in links]
    assert [href for href in listed if href.startswith("notebooks/")] == files
    assert {"docs/glossary.html", "docs/errors.html", "figures/data_card.html", "figures/model_card.html"} < {*listed}


def test_no_link_is_dead(folder, pages):
    known = {path: {tag["id"] for tag in soup.select("[id]")} for path, soup in pages.items()}
    report = folder / "report.html"
    parsed = BeautifulSoup(report.read_text(encoding="utf-8"), "html.parser")
    known[report] = {tag["id"] for tag in parsed.select("[id]")}
    dead = []
    for path, soup in pages.items():
        for link in soup.select("a[href]"):
            target, anchor = urldefrag(unquote(link["href"]))
            file = (path.parent / target).resolve() if target else path
            if not target.startswith("http") and not (file.is_file() and (not anchor or anchor in known[file])):
                dead.append(f"{path.relative_to(folder)}: {link['href']}")
    assert dead == []
    assert pages[folder / "book" / "index.html"].select("main a[href='../report.html']")
    assert parsed.select("a[href='book/index.html']"), "the report leads back"


def test_nothing_is_loaded_from_elsewhere(folder, pages):
    for path, soup in pages.items():
        loaded = [tag.get(key, "") for name, key in LOADED.items() for tag in soup.find_all(name)]
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))], path
    for style in folder.glob("book/_static/**/*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style


def test_headings_are_in_order_and_pictures_described(pages):
    for path, soup in pages.items():
        levels = [int(tag.name[1]) for tag in soup.select("article h1, article h2, article h3, article h4")]
        steps = [after - before for before, after in pairwise(levels)]
        assert levels[:1] in ([1], []) and levels.count(1) <= 1 and max(steps, default=0) <= 1, path
        assert all(picture.get("alt") for picture in soup.select("article img")), path


@pytest.mark.parametrize("name", [lesson.name for lesson in course.LESSONS])
def test_every_picture_of_a_notebook_is_there(name, folder, pages, smoke_run):
    cells = nbformat.read(smoke_run / f"{name}.ipynb", as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    soup = pages[folder / "book" / "notebooks" / f"{name}.html"]
    assert len(soup.select(".cell_output img")) == sum("image/png" in output for output in outputs) > 0
    assert "widget-view" not in str(soup)


def test_every_page_fits_the_screen(page, pages, folder, address):
    for path in pages:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{address}/{path.relative_to(folder / 'book').as_posix()}")
        widths = page.locator("article img").evaluate_all("pictures => pictures.map(picture => picture.naturalWidth)")
        assert min(widths, default=1) > 0, path
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
    assert page.complaints == []


@pytest.mark.parametrize("way", ["server", "file"])
def test_search_finds_a_word(way, page, folder, address):
    page.goto(f"{address}/index.html" if way == "server" else (folder / "book" / "index.html").as_uri())
    page.locator("button.search-button-field").first.click()
    page.locator("dialog input[name=q]").fill("bootstrap")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a").first
    found.wait_for()
    if way == "server":  # a browser lets no page read other files, so there the results have no excerpts
        page.locator("#search-results .context").first.wait_for()
        assert page.complaints == []
    title = found.inner_text()
    found.click()
    page.wait_for_url("**/notebooks/**")
    assert page.locator("h1").first.inner_text().startswith(title)
    assert "bootstrap" in page.locator("article").inner_text().lower()


def test_a_solution_unfolds(page, address):
    page.goto(f"{address}/{EXERCISES}.html")
    solution = page.locator("details", has_text="Right: ").first
    code = solution.locator("pre").first
    assert not code.is_visible()
    solution.locator("summary").click()
    assert code.is_visible()
    assert page.locator("article pre", has_text="Not yet: ").first.is_visible(), "the unsolved check"


def test_a_widget_has_its_still_picture(page, address):
    page.goto(f"{address}/{WIDGET}.html")
    picture = page.locator("#look-for-yourself .cell_output img").last
    picture.scroll_into_view_if_needed()
    assert picture.bounding_box()["width"] > 300
    assert page.complaints == []


def test_the_reader_can_switch_to_dark(page, address):
    page.goto(f"{address}/index.html")
    colours = {}
    for mode in ("dark", "light"):
        page.locator("button.theme-switch-button:visible").click()
        page.locator(f"button.theme-change-button[data-mode={mode}]:visible").click()
        page.reload()  # the choice is kept
        colours[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.locator("html").get_attribute("data-theme") == mode
    assert colours["dark"] != colours["light"]


def test_a_notebook_opens_elsewhere_and_downloads(page, address):
    page.goto(f"{address}/{EXERCISES}.html")
    links = page.locator(".article-header-buttons a").evaluate_all("links => links.map(link => link.href)")
    for place in ("colab.research.google.com", "console.paperspace.com"):
        assert f"https://{place}/github/{REPOSITORY}/blob/main/{EXERCISES}.ipynb" in links
    (download,) = (link for link in links if link.startswith(address))
    nbformat.validate(nbformat.reads(page.request.get(download).text(), as_version=4))


def test_only_the_text_is_printed(page, address):
    page.goto(f"{address}/{WIDGET}.html")
    page.emulate_media(media="print")
    assert page.locator("article p").first.is_visible()
    for around in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".article-header-buttons"):
        assert not page.locator(around).first.is_visible(), around
