"""The report as a reader sees it: in a browser, on a wide screen and a phone, light and dark, and on paper."""

import re

import pytest

from nodules import paths

LEAST_CONTRAST, MOST_PAGES = 4.5, 35
# The lowest contrast (WCAG 2) of any text with what is behind it
CONTRAST = """() => {
  const parsed = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = tag => {
    for (let at = tag; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour.length && colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const tag of document.querySelectorAll("p, li, a, td, th, h1, h2, h3, figcaption, summary, code, em, strong")) {
    if (!tag.textContent.trim() || !tag.offsetParent) continue;
    const pair = [light(parsed(getComputedStyle(tag).color)), light(behind(tag))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < worst[0]) worst = [contrast, tag.textContent.slice(0, 60)];
  }
  return worst;
}"""
# Text of which a word is cut or broken, outside of what scrolls by itself
NARROW = """() => [...document.querySelectorAll("main p, main li, td, th, h1, h2, h3, figcaption, nav a")]
  .filter(tag => tag.offsetParent && tag.scrollWidth > tag.clientWidth + 1 && tag.clientWidth > 0
          && getComputedStyle(tag).display !== "inline")
  .map(tag => tag.textContent.slice(0, 60))"""


@pytest.fixture(
    scope="module",
    params=[(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")],
    ids=lambda screen: f"{screen[0]}-{screen[1]}",
)
def page(request, browser, smoke_run):
    """The report of the small run, on a screen of some width in light or dark, and what the console complained of."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if "http" in request.url[:5] else None)
    page.goto((paths.ROOT / "figures" / smoke_run.name / "report.html").as_uri())
    yield page
    page.close()


def test_it_fits_the_screen_and_is_legible(page):
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(NARROW) == []
    contrast, where = page.evaluate(CONTRAST)
    assert contrast >= LEAST_CONTRAST, where
    assert page.complaints == []


def test_the_answer_is_on_the_first_screen_and_its_figure_is_drawn(page):
    assert page.locator("h1").inner_text().startswith("How much of 0.95 is real?")
    assert page.locator("h1").bounding_box()["y"] < 200
    widths = page.locator("main img").evaluate_all("pictures => pictures.map(picture => picture.naturalWidth)")
    assert len(widths) > 30 and min(widths) > 300
    assert page.locator("main img").first.get_attribute("alt")


def test_every_link_of_the_contents_lands(page):
    page.locator("nav details").evaluate("details => details.open = true")
    links = page.locator("nav a")
    assert links.count() > 50
    page.emulate_media(reduced_motion="reduce")
    page.add_style_tag(content=":root { scroll-behavior: auto !important; }")
    for anchor in links.evaluate_all("links => links.map(link => link.getAttribute('href'))"):
        page.evaluate("anchor => { location.hash = anchor }", anchor)
        top = page.evaluate("anchor => document.getElementById(anchor.slice(1)).getBoundingClientRect().top", anchor)
        at_end = page.evaluate("window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 2")
        assert -5 <= top < 200 or at_end, anchor


def test_it_prints_on_few_pages(browser, smoke_run, tmp_path):
    page = browser.new_page()
    page.goto((paths.ROOT / "figures" / smoke_run.name / "report.html").as_uri())
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    pages = re.findall(rb"/Type\s*/Page[^s]", (tmp_path / "report.pdf").read_bytes())
    assert 10 < len(pages) <= MOST_PAGES
