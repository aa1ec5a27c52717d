"""Sphinx's configuration of the book.

``make book`` gathers the pages in a folder laid out like the repository, so that a link from one to another works in
the book as it does on GitHub and in JupyterLab.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"
BESIDE = {"figures/report.html", "figures/results.json"}  # of every run, in the folder above the book
CARDS = {"figures/data_card": "The data", "figures/model_card": "The model", "figures/claim": "Reporting checklist"}
WIDGET_OR_OBJECT = re.compile(r"<|\w+\(")  # how an output's text begins if it says nothing about the picture


def _repository() -> str:
    """Owner and name on GitHub, from the variable ``REPOSITORY`` or from git; empty if the project is not there."""
    url = os.environ.get("REPOSITORY", "")
    if not url:
        command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
        try:
            url = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", url)
    return found[1] if found else ""


REPOSITORY = _repository()

project = "How much of 0.95 is real?"
author = "the contributors of this project"
html_title = project
language = "en"
extensions = ["myst_nb", "sphinx_copybutton"]
# Headings that skip a level, which Sphinx puts right, and lines for Jupyter alone in examples
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

myst_heading_anchors = 4  # named as on GitHub
nb_execution_mode = "off"  # make has executed them
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True
nb_render_error_lexer = "text"  # the errors are hints, not tracebacks
nb_code_prompt_show = "Show a worked solution"
nb_code_prompt_hide = "Hide the solution"
# A widget needs a kernel: its still picture takes its place
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_favicon = "static/favicon.svg"
html_use_index = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
copybutton_selector = "div.cell_input div.highlight pre, div[class*=highlight-sh] pre"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": f"https://github.com/{REPOSITORY}",
        "repository_branch": BRANCH,
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """List the lessons that were run, each with its exercises; give the cards and what README tells a user a title."""
    if page == "index":
        lessons = sorted(path.stem for path in (app.srcdir / "notebooks").glob("*.ipynb"))
        pages = [f"{folder}/{name}" for name in lessons for folder in ("notebooks", "notebooks/exercises")]
        there = [name for name in pages if (app.srcdir / f"{name}.ipynb").exists()]
        source[0] = source[0].replace("LESSONS", "\n".join(there))
    elif page == "README":
        source[0] = "# Run it yourself\n" + source[0][source[0].index("\n## ") :]
    elif page in CARDS:
        source[0] = f"# {CARDS[page]}\n\n{source[0]}"


class Alternatives(SphinxPostTransform):
    """Describes each picture in the words of the same output's plain text, or by the heading above it."""

    default_priority = 3  # before myst-nb chooses one form of each output

    def run(self, **_: Any) -> None:
        """Set ``alt`` of all pictures that cells have drawn."""
        for output in self.document.findall(nodes.container):
            if output.get("nb_element") != "mime_bundle":
                continue
            text = " ".join(form.astext() for form in output if form["mime_type"] == "text/plain")
            if not text or WIDGET_OR_OBJECT.match(text):
                text = self._heading(output)
            for picture in output.findall(nodes.image):
                picture["alt"] = text

    @staticmethod
    def _heading(node: nodes.Node) -> str:
        while not isinstance(node, nodes.section):
            node = node.parent
        return node.next_node(nodes.title).astext()


class LinksOut(SphinxPostTransform):
    """Leads links to files that the book leaves out to GitHub; without a repository there, only their text stays."""

    default_priority = 8  # before MyST warns of them

    def run(self, **_: Any) -> None:
        """Replace each link to a file of the repository that is not a page of the book."""
        folder = (ROOT / self.env.docname).parent
        for link in list(self.document.findall(pending_xref)):
            target, hash_sign, anchor = link["reftarget"].partition("#")
            path = Path(os.path.normpath(folder / target))
            if link["reftype"] != "myst" or link["refdomain"] or not path.is_relative_to(ROOT):
                continue
            name = path.relative_to(ROOT).as_posix()
            if name in BESIDE:
                uri = "../" * (self.env.docname.count("/") + 1) + path.name + hash_sign + anchor
            elif path.exists():
                uri = f"https://github.com/{REPOSITORY}/blob/{BRANCH}/{name}{hash_sign}{anchor}" if REPOSITORY else ""
            else:
                continue
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri) if uri else link.children)


def add_links(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Add Paperspace to the ways to open a notebook, and say what is downloaded."""
    for button in context.get("header_buttons", []):
        if button.get("label") == "launch-buttons":
            url = f"https://console.paperspace.com/github/{REPOSITORY}/blob/{BRANCH}/{page}.ipynb"
            about = {"text": "Paperspace", "tooltip": "Launch on Paperspace", "icon": "fas fa-cloud"}
            button["buttons"].append({"type": "link", "url": url, **about})
        for each in button.get("buttons", []):
            if each.get("label") == "download-source-button" and page.startswith("notebooks/"):
                each["tooltip"] = "Download this notebook"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("html-page-context", add_links, priority=600)
    app.add_post_transform(Alternatives)
    app.add_post_transform(LinksOut)
