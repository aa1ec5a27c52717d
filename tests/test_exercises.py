"""Exercises: their solutions pass, dots and typical wrong answers are refused with a hint."""

import re

import matplotlib
import nbformat
import pytest
import yaml

from nodules import course, paths
from nodules.check.answers import Wrong

matplotlib.use("agg")

FILES = {lesson.name: paths.NOTEBOOKS / "exercises" / f"{lesson.name}.ipynb" for lesson in course.LESSONS}
CHECKED = re.compile(r"check\.exercise_(\d+)_(\d)\(")

# What a student might write in an exercise's cell, and words of the hint that it must get
WRONG = {
    name: yaml.safe_load((paths.ROOT / "tests" / "wrong_answers" / f"{name}.yaml").read_text("utf-8")) for name in FILES
}


def cells(name, tag=None):
    """The code cells of a lesson's exercises, or those with a tag."""
    code = [cell for cell in nbformat.read(FILES[name], as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in code if tag is None or tag in cell.metadata.get("tags", [])]


@pytest.fixture(scope="module")
def prepared():
    """The names that a lesson's exercises begin with, computed once."""
    known = {}

    def prepare(name):
        if name not in known:
            known[name] = {}
            for cell in cells(name):
                if not cell.metadata.get("tags"):
                    exec(cell.source, known[name])
        return dict(known[name])

    return prepare


@pytest.mark.parametrize("name", FILES)
def test_exercises_have_four_parts_and_are_numbered(name):
    numbers = [CHECKED.search(cell.source).groups() for cell in cells(name, "check")]
    lesson = str(list(FILES).index(name) + 1)
    assert numbers == [(lesson, str(i + 1)) for i in range(len(numbers))] and 4 <= len(numbers) <= 6
    for tag in ("exercise", "solution"):
        assert len(cells(name, tag)) == len(numbers)
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in cells(name, "solution")), "folded away"
    assert set(WRONG[name]) == {"_".join(number) for number in numbers}, "typical wrong answers for each"


@pytest.mark.parametrize("name", FILES)
def test_every_solution_is_right(name, prepared, capsys):
    names = prepared(name)
    for cell in cells(name, "solution"):
        exec(cell.source, names)
        assert capsys.readouterr().out.splitlines()[-1].startswith("Right: ")


@pytest.mark.parametrize("name", FILES)
def test_dots_are_no_answer(name, prepared):
    for exercise, check in zip(cells(name, "exercise"), cells(name, "check"), strict=True):
        names = prepared(name)
        exec(exercise.source, names)
        with pytest.raises(Wrong, match="three dots"):
            exec(check.source, names)


@pytest.mark.parametrize(
    ("name", "number", "answer", "hint"),
    [(name, n, *case.values()) for name, all_of in WRONG.items() for n, cases in all_of.items() for case in cases],
)
def test_typical_wrong_answers_get_a_hint(name, number, answer, hint, prepared):
    names = prepared(name)
    exec(answer, names)
    (check,) = (cell for cell in cells(name, "check") if f"exercise_{number}(" in cell.source)
    with pytest.raises(Wrong) as refused:
        exec(check.source, names)
    assert re.search(hint, str(refused.value)), str(refused.value)
    assert refused.value._render_traceback_() == [f"Not yet: {refused.value}"], "one line, no traceback"
