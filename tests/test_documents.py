"""The documents: every link between them leads somewhere, and the glossary is in order."""

import functools
import re
from collections import Counter
from urllib.parse import unquote, urlsplit

import mistune
import nbformat
import pytest

from nodules.paths import NOTEBOOKS, ROOT

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts),
]
GLOSSARY = ROOT / "docs" / "glossary.md"
parse = mistune.create_markdown(renderer=None, plugins=["table"])


def tokens(path, kind):
    """The parts of one kind, such as ``link``, of a document's Markdown, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    waiting, found = list(parse(text)), []
    while waiting:
        token = waiting.pop(0)
        waiting[:0] = token.get("children", [])
        if token["type"] == kind:
            found.append(token)
    return found


def words(token):
    """The text of a part, without its markup."""
    return token.get("raw", "") + "".join(map(words, token.get("children", [])))


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def anchors(path):
    """All anchors of a document; the second heading of the same text gets -1, and so on."""
    seen, named = Counter(), set()
    for heading in tokens(path, "heading"):
        name = slug(words(heading))
        named.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return named


def dead(path, root=ROOT):
    """The links of a document that lead to no file below ``root``, or to no heading of it."""
    links = [token["attrs"]["url"] for kind in ("link", "image") for token in tokens(path, kind)]
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue  # the web may change without us
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.exists() or not target.is_relative_to(root):
            yield f"{link}: no such file"
        elif parts.fragment and parts.fragment not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    assert not list(dead(path))


def test_a_dead_link_is_noticed(tmp_path):
    here, there = tmp_path / "here.md", tmp_path / "there.md"
    there.write_text("## Cross-validation\n## Youden's `J`: why?\n## Cross-validation\n", encoding="utf-8")
    alive = ["there.md", "there.md#cross-validation-1", "there.md#youdens-j-why", "#links", "https://nodules.invalid"]
    wrong = ["x.md: no such file", "../x.md: no such file", "#z: no such heading", "there.md#z: no such heading"]
    links = [f"[link]({link.split(': ')[0]})" for link in alive + wrong]
    here.write_text("# Links\n" + " ".join(links) + " `[code](y.md)`\n", encoding="utf-8")
    assert list(dead(here, tmp_path)) == wrong


def test_the_glossary_is_alphabetical_and_explains_each_term_once():
    headings = tokens(GLOSSARY, "heading")
    terms = [words(heading) for heading in headings if heading["attrs"]["level"] == 2]
    assert len(headings) == len(terms) + 1, "a title, then terms only"
    assert terms == sorted(terms, key=str.casefold)
    assert len({slug(term) for term in terms}) == len(terms)


FURTHER = {"early-stopping", "kappa", "momentum", "regularization", "wilson-interval"}


def test_the_lessons_link_every_term_once_from_its_first_use():
    linked = Counter()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        urls = (token["attrs"]["url"] for token in tokens(path, "link"))
        linked.update(url.partition("#")[2] for url in urls if "glossary.md#" in url)
    assert set(linked) == anchors(GLOSSARY) - FURTHER - {"glossary"} and set(linked.values()) == {1}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_lesson_opens_with_goals_what_it_needs_and_its_time(path):
    head, *cells = nbformat.read(path, as_version=4).cells
    assert re.findall(r"^(\d)\. ", head.source, re.M) == ["1", "2", "3"]
    assert "**After this lesson you can**" in head.source and "**You should know:**" in head.source
    prose = "\n".join(cell.source for cell in (head, *cells) if cell.cell_type == "markdown")
    code = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines() if line.strip()]
    minutes = len(re.sub(r"\]\([^)]*\)", "", prose).split()) / 80 + len(code) / 7  # words and lines a minute
    (stated,) = map(int, re.findall(r"(\d+) minutes to read", head.source))
    assert abs(stated - minutes) <= 5, f"about {minutes:.0f} minutes"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_lesson_asks_twice_for_a_guess_and_answers_it(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    asked = sum(source.count("Guess(") for source in code)
    assert asked >= 2
    order = (
        [i for i, source in enumerate(code) if "Guess(" in source],
        [i for i, s in enumerate(code) if ".compare(" in s],
    )
    assert min(order[0]) < min(order[1]) and max(order[0]) < max(order[1]), "first the guess, then the answer"
    assert any("the same as" in source or "torch.equal" in source for source in code), "one idea is written out"
