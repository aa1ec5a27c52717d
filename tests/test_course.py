"""The table of notebooks, and what is read from a notebook without running it."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nodules import course, paths
from nodules.errors import InputError


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook with a parameters cell."""

    def write(source="n = 3", tags=("parameters",)):
        cells = [new_markdown_cell("# Title"), new_code_cell(source, metadata={"tags": list(tags)})]
        nbformat.write(new_notebook(cells=cells), tmp_path / "nb.ipynb")
        return tmp_path / "nb.ipynb"

    return write


def test_the_table_lists_every_notebook_by_its_heading():
    files = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
    assert [path.stem for path in files] == [lesson.name for lesson in course.LESSONS]
    headings = [nbformat.read(path, as_version=4).cells[0].source.splitlines()[0] for path in files]
    assert headings == [f"# {number}. {lesson.question}" for number, lesson in enumerate(course.LESSONS, 1)]


def test_no_other_source_names_a_notebook():
    sources = [path for path in (paths.ROOT / "src" / "nodules").rglob("*") if path.suffix in (".py", ".md", ".csv")]
    naming = {path.name for path in sources for lesson in course.LESSONS if lesson.name in path.read_text("utf-8")}
    assert naming == {"course.py"}


def test_parameters_are_read_without_running_anything(notebook):
    source = "n = 3\nrate = 0.1\nname = 'a'\nflag = True\nsizes = [1, 2]"
    assert course.parameters(notebook(source)) == {"n": 3, "rate": 0.1, "name": "a", "flag": True, "sizes": [1, 2]}


@pytest.mark.parametrize(
    "source", ["n = open('x')", "import os", "n, m = 1, 2", "n = None", "n += 1", "n = {'a': 1}", "print(1)"]
)
def test_parameters_are_literals_and_nothing_else(notebook, source):
    with pytest.raises(InputError, match="parameter"):
        course.parameters(notebook(source))


def test_a_notebook_without_its_parameters_cell_is_refused(notebook, tmp_path):
    with pytest.raises(InputError, match="0 cells are tagged"):
        course.parameters(notebook(tags=()))
    (tmp_path / "broken.ipynb").write_text("{")
    for name in ("broken.ipynb", "absent.ipynb"):
        with pytest.raises(InputError, match="not a readable notebook"):
            course.parameters(tmp_path / name)
