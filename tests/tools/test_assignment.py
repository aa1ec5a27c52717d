import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nodules import paths
from nodules.errors import InputError
from nodules.tools import assignment

pytest.importorskip("nbgrader")

LESSON = "01_data"
TAKES_S = 30
BEGIN = "# Exercises\n\nDo [lesson 1](../01_data.ipynb). A worked solution is folded away below each: click it. Go."
SOLUTIONS = {"exercise_1_1": "grey = 0.5", "exercise_1_2": "two = 2.0"}


@pytest.fixture(scope="module")
def exercises(tmp_path_factory):
    """A folder with a lesson of two exercises, in the format of the project's, run by somebody who left outputs."""
    cells = [new_markdown_cell(BEGIN), new_code_cell("from nodules.check import answers as check", id="begin")]
    for number, (name, solution) in enumerate(SOLUTIONS.items(), 1):
        answer = solution.split()[0]
        task = {"schema_version": 3, "task": False}
        stub = {"grade_id": name, "solution": True, "grade": False, "locked": False, **task}
        points = {"grade_id": f"check_1_{number}", "solution": False, "grade": True, "locked": True, "points": number}
        check = f"check.close({answer}, {solution.split()[-1]}, 'a hint')"
        cells += [
            new_code_cell(f"{answer} = ...", metadata={"tags": ["exercise"], "nbgrader": stub}),
            new_code_cell(check, metadata={"tags": ["check", "raises-exception"], "nbgrader": points | task}),
            new_code_cell(f"{solution}\n{check}", metadata={"tags": ["solution", "hide-cell"]}),
        ]
    for cell in cells[1:]:
        cell.outputs = [new_output("stream", text="an output that tells the answer")]
    folder = tmp_path_factory.mktemp("exercises")
    nbformat.write(new_notebook(cells=cells), folder / f"{LESSON}.ipynb")
    return folder


@pytest.fixture(scope="module")
def released(exercises, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assignments")
    (path,) = assignment.release(folder, exercises)
    assert path == folder / "release" / LESSON / f"{LESSON}.ipynb"
    return folder


@pytest.fixture
def hand_in(released, tmp_path):
    """Write a student's submission: the release with the right answers or others, and whatever else is done to it."""

    def write(student, do=lambda notebook: None, flat=False, **answers):
        notebook = nbformat.read(released / "release" / LESSON / f"{LESSON}.ipynb", as_version=4)
        for name, source in (SOLUTIONS | answers).items():
            named(notebook, name).source = source
        do(notebook)
        path = tmp_path / "submitted" / student / ("" if flat else LESSON) / f"{LESSON}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
        return tmp_path / "submitted"

    return write


def graded(released, submissions, seconds=TAKES_S):
    table = pd.read_csv(assignment.grade(released, submissions, seconds), keep_default_na=False)
    return table.set_index("student")


def named(notebook, name):
    (cell,) = (cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == name)
    return cell


def test_a_release_holds_no_solutions_outputs_or_links(released):
    path = released / "release" / LESSON / f"{LESSON}.ipynb"
    text, notebook = path.read_text(encoding="utf-8"), nbformat.read(path, as_version=4)
    assert not any(words in text for words in ("= 0.5\\n", "HIDDEN", "tells the answer", "](../", "folded away"))
    assert named(notebook, "exercise_1_1").source == "grey = ...", "the stub stays"
    assert named(notebook, "check_1_1").source == "check.close(grey, 0.5, 'a hint')"
    assert named(notebook, "check_1_1").metadata.editable is False
    assert f"under its own name, `{LESSON}.ipynb`" in notebook.cells[0].source


def test_every_exercise_notebook_loses_its_solutions():
    for path in sorted(assignment.EXERCISES.glob("*.ipynb")):
        notebook = assignment.without_solutions(path)
        assert not any("solution" in cell.metadata.get("tags", []) for cell in notebook.cells)
        assert not any("solution is" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        checks = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
        assert len(checks) >= 4 and all(cell.metadata.nbgrader.points > 0 for cell in checks)


def test_right_and_wrong_answers_get_their_points(released, hand_in, capsys):
    hand_in("Müller, Anna", flat=True)
    submissions = hand_in("ben", exercise_1_1="import sys; print('a warning', file=sys.stderr)\ngrey = -300")
    table = graded(released, submissions)
    assert list(table.columns) == ["lesson", "points", "of", "exercise 1", "exercise 2", "note"]
    assert table.loc["Müller, Anna"].tolist() == [LESSON, 3, 3, 1, 2, ""]
    assert table.loc["ben"].tolist() == [LESSON, 2, 3, 0, 2, ""]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Müller, Anna {LESSON}: 3 of 3 points", f"ben {LESSON}: 2 of 3 points"]
    assert len(list(submissions.rglob("*"))) == 5, "the teacher's folder is left as it is"


def cheat(notebook):
    named(notebook, "check_1_1").source = "print('Right')"
    named(notebook, "check_1_2").metadata.nbgrader |= {"points": 100, "grade": False, "solution": True, "locked": False}
    notebook.metadata.kernelspec = {"name": "mine", "display_name": "mine"}


def skip_the_checks(notebook):
    for name in ("check_1_1", "check_1_2"):
        named(notebook, name).metadata.tags = ["skip-execution"]


def replace_the_checks(notebook):
    trick = "class check: close = print\nimport nodules.check.answers as module\nmodule.close = print"
    notebook.cells.insert(1, new_code_cell(trick))


def remove_cells(notebook):
    notebook.cells = [named(notebook, "exercise_1_2")]


def test_tampering_does_not_help(released, hand_in):
    wrong = {"exercise_1_1": "grey = 0", "exercise_1_2": "two = 0"}
    hand_in("a", cheat, **wrong)
    hand_in("b", replace_the_checks, **wrong)
    hand_in("c", skip_the_checks, **wrong)
    table = graded(released, hand_in("d", remove_cells))
    assert (table["of"] == 3).all() and (table["note"] == "").all()
    assert table["points"].to_dict() == {"a": 0, "b": 0, "c": 0, "d": 2}, "a removed check is put back"


STUBBORN = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""


def test_what_cannot_be_graded_gets_no_points_and_one_line(released, hand_in, capsys):
    hand_in("untouched", exercise_1_1="grey = ...", exercise_1_2="two = ...")
    hand_in("crash", exercise_1_1="import os\nos._exit(1)")
    hand_in("loop", exercise_1_1="while True: pass")
    submissions = hand_in("stubborn", exercise_1_1=STUBBORN)
    empty = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    for student, content in {"text": "no notebook", "other": empty}.items():
        (submissions / student).mkdir()
        (submissions / student / f"{LESSON}.ipynb").write_text(content)
    (submissions / "text" / "02_unknown.ipynb").write_text("")
    table = graded(released, submissions, 15)
    assert table["points"].to_dict() == {"crash": 0, "loop": 2, "other": 0, "stubborn": 0, "text": 0, "untouched": 0}
    assert (table["of"] == 3).all() and (table["note"] != "").all()
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert len(lines) == 7 and "Traceback" not in output.out + output.err
    told = (
        "left out",
        "its kernel died",
        "(exercise 1: a cell took more than 15 s)",
        "no exercise answered",
        "exercise 1: a cell took more than 15 s and could not be stopped",
        "not a notebook",
        "none of the",
    )
    for words in told:
        assert sum(words in line for line in lines) == 1, words


def test_every_folder_has_a_row_and_every_other_file_a_line(released, tmp_path, capsys):
    submissions = tmp_path / "submitted"
    names = (f"bert/{LESSON} (1).ipynb", "bert/mine.py", "a*b/x.ipynb", f"{LESSON}.ipynb", ".git/x", "cleo/.cache/x")
    for name in names:
        (submissions / name).parent.mkdir(parents=True, exist_ok=True)
        (submissions / name).write_text("")
    table = graded(released, submissions)
    renamed = f"not submitted; found {LESSON} (1).ipynb: rename it to {LESSON}.ipynb"
    assert table["note"].to_dict() == {"bert": renamed, "cleo": "not submitted"} and (table["of"] == 3).all()
    named_at_the_end = [line.removeprefix(f"{submissions}/") for line in capsys.readouterr().out.splitlines()[2:]]
    starts = (f"{LESSON}.ipynb: left out, not in", "a*b: left out, rename it", "bert/mine.py: left out, not the file")
    assert len(named_at_the_end) == 3
    assert all(line.startswith(start) for line, start in zip(named_at_the_end, starts, strict=True))


def test_a_removed_check_is_put_back_below_its_exercise(released):
    source = nbformat.read(released / "source" / LESSON / f"{LESSON}.ipynb", as_version=4)
    submitted = nbformat.from_dict(source)
    submitted.cells = [cell for cell in source.cells if cell is not named(source, "check_1_1")]
    back = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in assignment.restored(submitted, source).cells]
    assert back[-4:] == ["exercise_1_1", "check_1_1", "exercise_1_2", "check_1_2"]


def test_removed_cells_that_prepare_are_put_back_in_their_order(released):
    source = nbformat.read(released / "source" / LESSON / f"{LESSON}.ipynb", as_version=4)
    for place, name in ((1, "first"), (2, "second")):
        about = {"grade_id": name, "solution": False, "grade": False, "locked": True}
        source.cells.insert(place + 1, new_code_cell(name, metadata={"nbgrader": about}))
    submitted = nbformat.from_dict(source)
    submitted.cells = [cell for cell in source.cells if cell.source not in ("first", "second")]
    back = assignment.restored(submitted, source).cells
    assert [cell.source for cell in back] == [cell.source for cell in source.cells]


def test_bad_input_is_refused_in_one_line(released, tmp_path, capsys):
    with pytest.raises(InputError, match="run make assignment first"):
        assignment.grade(tmp_path, tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        assignment.grade(released, tmp_path / "absent")
    (tmp_path / "submitted" / "a*b").mkdir(parents=True)
    (tmp_path / "submitted" / "a*b" / f"{LESSON}.ipynb").write_text("")
    with pytest.raises(InputError, match="holds no submissions"):
        assignment.grade(released, tmp_path / "submitted")
    assert "a student's name may hold letters" in capsys.readouterr().out
    with pytest.raises(InputError, match="imports no checks"):
        assignment.without_solutions(paths.NOTEBOOKS / "01_data.ipynb")
