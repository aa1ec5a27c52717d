"""Exercises as assignments, and their grades: a thin layer on nbgrader.

nbgrader keeps a folder: ``release/<lesson>/<lesson>.ipynb`` for students, the same below ``source`` with what students
do not see, ``submitted/<student>/<lesson>/<lesson>.ipynb``, ``autograded``, and ``gradebook.db`` with points and locked
cells. Its check cells import the checks anew when they grade, so that a name that a student reuses changes nothing.

Grading executes submissions, which is other people's code: do it in a container or a throw-away account.
"""

import os
import re
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbconvert import NotebookExporter
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor
from nbformat import NotebookNode
from traitlets.config import Config

from nodules import paths
from nodules.errors import InputError, in_brief, within
from nodules.tools import optional

EXERCISES = paths.NOTEBOOKS / "exercises"
SECONDS = 60  # for a cell of a submission; an exercise takes a few of them
CELLS = 5  # a submission may take as long as so many such cells, then its cells get a second each
LARGEST = 20_000_000  # bytes of a submission
IMPORT = re.compile(r"^from nodules\.check import \w+ as check$", re.MULTILINE)
FOLDED = re.compile(r" *A worked solution is folded away[^.]*\.")
RELATIVE = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")
NAMED = "Hand in this file under its own name, `{}`."
USABLE = re.compile(r"(?! )[\w@,()' -][\w@.,()' -]*(?<! )")
CHARACTERS = "letters, digits, spaces inside and _ @ , ( ) ' - ., but no . at the beginning"
HIDDEN = "### BEGIN HIDDEN TESTS\n{}\nimport importlib\nimportlib.reload(check)\n### END HIDDEN TESTS\n"
LOCKED = {"schema_version": 3, "grade": False, "solution": False, "locked": True, "task": False}


def release(folder: Path, exercises: Path = EXERCISES) -> list[Path]:
    """Write the exercise notebooks to ``folder`` as assignments without solutions, and return those for students.

    Earlier releases there are replaced, their grades forgotten.

    Raises:
        InputError: nbgrader is not installed, or refuses a notebook.
    """
    api = _api(folder)
    with paths.writing(folder):
        for part in ("source", "release"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "gradebook.db").unlink(missing_ok=True)
        for path in sorted(exercises.glob("*.ipynb")):
            nbformat.write(without_solutions(path), _at(folder / "source", path.stem))
            result = api.generate_assignment(path.stem)
            if not result["success"]:
                raise InputError(f"{path}: refused by nbgrader ({_reason(result)}); correct the metadata of its cells")
    return sorted((folder / "release").glob("*/*.ipynb"))


def without_solutions(path: Path) -> NotebookNode:
    """An exercise notebook as nbgrader's source: no solutions, no outputs, set-up locked, checks imported anew.

    Raises:
        InputError: it does not import its checks.
    """
    removing = TagRemovePreprocessor(remove_cell_tags={"solution"}, enabled=True)
    exporter = NotebookExporter(preprocessors=[removing, ClearOutputPreprocessor(enabled=True)])
    notebook = nbformat.reads(exporter.from_filename(str(path))[0], as_version=4)
    found = IMPORT.search("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    if found is None:
        raise InputError(f"{path}: imports no checks; begin with from nodules.check import lesson_N as check")
    first = next((cell for cell in notebook.cells if cell.cell_type == "markdown"), None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # of links, only the words: students have this file alone
            cell.source = RELATIVE.sub(r"\1", FOLDED.sub("", cell.source))
        elif cell.metadata.get("nbgrader", {}).get("grade"):
            cell.source = HIDDEN.format(found[0]) + cell.source
        elif "nbgrader" not in cell.metadata:
            cell.metadata["nbgrader"] = {**LOCKED, "grade_id": cell.id}
    if first is not None:
        first.source += "\n\n" + NAMED.format(path.name)
    return notebook


def grade(folder: Path, submissions: Path, cell_timeout_s: int = SECONDS) -> Path:
    """Grade ``submissions``, which are executed, and write ``folder/grades.csv``.

    Args:
        folder: as written by :func:`release`.
        submissions: holds ``<student>/<lesson>/<lesson>.ipynb``, or ``<student>/<lesson>.ipynb``.
        cell_timeout_s: seconds a cell may take.

    Returns:
        The path of a table: ``student``, ``lesson``, ``points``, ``of``, the points of each exercise, ``note`` (why
        something could not be graded). Each student's folder has a row for each lesson that anybody has submitted; what
        is not submitted counts as 0 points. What belongs to no student or lesson is named in a line that is printed.

    Raises:
        InputError: nothing was released, or there are no submissions.
    """
    within(1, 100_000, cell_timeout_s=cell_timeout_s)
    _api(folder)
    if not (folder / "gradebook.db").is_file():
        raise InputError(f"{folder}: holds no released assignment; run make assignment first")
    students, left_out = _students(submissions)
    lessons = {path.parent.name for path in (folder / "source").glob("*/*.ipynb")}
    found, misnamed, others = _found(submissions, students, lessons)
    left_out += others
    if not found and not misnamed:
        print(*left_out, sep="\n", end="\n" if left_out else "", flush=True)
        raise InputError(f"{submissions}: holds no submissions; name a folder of student/lesson.ipynb")
    rows = []
    with paths.writing(folder):
        for part in ("submitted", "autograded"):
            shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copy(folder / "gradebook.db", folder / "grades.db")  # points of an earlier grading are not kept
        for student in students:
            for lesson in sorted({lesson for _, lesson in (*found, *misnamed)}):
                row = _graded(folder, student, lesson, found.get((student, lesson)), cell_timeout_s)
                if (student, lesson) in misnamed:
                    name = misnamed[student, lesson].name
                    row["note"] += f"; found {name}: rename it to {lesson}.ipynb"
                rows.append(row)
                print("{student} {lesson}: {points:g} of {of:g} points{note}".format(**_line(rows[-1])), flush=True)
    print(*left_out, sep="\n", end="\n" if left_out else "", flush=True)
    with paths.replacing(folder / "grades.csv") as temporary:
        table = pd.DataFrame(rows)
        numbered = sorted(name for name in table if name.startswith("exercise "))
        table[["student", "lesson", "points", "of", *numbered, "note"]].to_csv(temporary, index=False)
    return folder / "grades.csv"


def restored(submitted: NotebookNode, source: NotebookNode) -> NotebookNode:
    """A submission in which only what students write is theirs.

    Locked cells and the metadata of all cells are the source's, since metadata, too, can change a grade: a tag
    keeps a cell from being executed. Locked cells that are missing are put back, below those that they followed.
    """
    known = {cell.metadata.nbgrader.grade_id: cell for cell in source.cells if "nbgrader" in cell.metadata}
    missing = dict(known)
    cells = []
    for cell in submitted.cells:
        original = missing.pop(cell.metadata.get("nbgrader", {}).get("grade_id"), None)
        cell.metadata = NotebookNode() if original is None else original.metadata
        cells.append(original if original and original.metadata.nbgrader.locked else cell)
    for name, cell in missing.items():
        if cell.metadata.nbgrader.grade or cell.metadata.nbgrader.locked:
            before = list(known)[: list(known).index(name)]
            places = [
                i for i, other in enumerate(cells) if other.metadata.get("nbgrader", {}).get("grade_id") in before
            ]
            cells.insert(max(places, default=-1) + 1, cell)
    if len(missing) == len(known):
        raise ValueError("none of the assignment's cells are in it")
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    return nbformat.from_dict({**source, "cells": cells})


def _graded(folder: Path, student: str, lesson: str, submission: Path | None, seconds: int) -> dict[str, Any]:
    """The row of one student and lesson: points of each exercise, 0 where nothing could be graded, and why."""
    source = nbformat.read(_path(folder / "source", lesson), as_version=4)
    checks = {
        cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points
        for cell in source.cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    }
    points, note = dict.fromkeys(checks, 0.0), ""
    try:
        if submission is None:
            raise ValueError("not submitted")
        notebook = restored(_read(submission), source)
        nbformat.write(notebook, _at(folder / "submitted" / student, lesson))
        reached, note = _executed(folder, student, lesson, seconds)
        points |= reached
        if not note and not any(reached.values()) and _answers(notebook) == _answers(source):
            note = "no exercise answered"
    except ValueError as error:
        note = in_brief(error)
    numbered = {_numbered(name): value for name, value in points.items()}
    total = {"points": sum(points.values()), "of": float(sum(checks.values()))}
    return {"student": student, "lesson": lesson, **total, **numbered, "note": note}


def _executed(folder: Path, student: str, lesson: str, seconds: int) -> tuple[dict[str, float], str]:
    """The points of each check of a submission, which nbgrader executes, and what there is to say about that.

    Raises:
        ValueError: it could not be executed.
    """
    end = time.monotonic() + CELLS * seconds
    started = []

    def timeout(cell: NotebookNode) -> int:
        started.append(cell)
        return max(1, min(seconds, int(end - time.monotonic())))

    api = _api(folder, "grades.db", timeout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nbgrader")  # its use of its database
        result = api.autograde(lesson, student)
        log = result.get("log", "")
        if not result["success"]:
            known = {"DeadKernelError": "its kernel died, killed or out of memory"}
            slow = f"{_place(started[-1:])}a cell took more than {seconds} s"
            known["CellTimeoutError"] = f"{slow} and could not be stopped"
            why = [text for name, text in known.items() if name in log]
            raise ValueError(why[0] if why else f"not executed: {_reason(result)}")
        with api.gradebook as gradebook:
            graded = gradebook.find_submission_notebook(lesson, lesson, student)
            points = {grade.name: float(grade.score) for grade in graded.grades}
    slow = [cell for cell in started if "CellTimeoutError" in {output.get("ename") for output in cell.outputs}]
    return points, f"{_place(slow)}a cell took more than {seconds} s" if "Timeout waiting" in log else ""


def _place(cells: list[NotebookNode]) -> str:
    """The exercise of the first of some cells, to begin a note, if that is known."""
    name = cells[0].metadata.get("nbgrader", {}).get("grade_id", "") if cells else ""
    return f"{_numbered(name)}: " if name.startswith(("exercise_", "check_")) else ""


def _numbered(name: str) -> str:
    """What the table calls a cell's exercise."""
    return f"exercise {name.rpartition('_')[2]}"


def _answers(notebook: NotebookNode) -> dict[str, str]:
    """The cells that students fill in, by name."""
    named = [(cell.metadata.get("nbgrader", {}), cell.source.strip()) for cell in notebook.cells]
    return {about.grade_id: source for about, source in named if about.get("solution")}


def _read(path: Path) -> NotebookNode:
    """A submission.

    Raises:
        ValueError: it is no notebook, whatever else it is.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # the file is somebody else's: anything may be in it
        raise ValueError(f"not a notebook ({in_brief(error)})") from error
    return notebook


def _students(submissions: Path) -> tuple[list[str], list[str]]:
    """The students' folders, by name, and a line for each thing beside them; hidden ones are nobody's.

    Raises:
        InputError: there is no such folder.
    """
    if not submissions.is_dir():
        raise InputError(f"{submissions}: no such folder; name the one that holds the submissions")
    students, left_out = [], []
    for path in sorted(submissions.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            left_out.append(f"{path}: left out, not in a student's folder")
        elif not USABLE.fullmatch(path.name):
            left_out.append(f"{path}: left out, rename it; a student's name may hold {CHARACTERS}")
        else:
            students.append(path.name)
    return students, left_out


def _found(submissions: Path, students: list[str], lessons: set[str]) -> tuple[dict, dict, list[str]]:
    """The files of each student and lesson, those whose names only begin so, and a line for each other file.

    Links are left out, since they may lead anywhere.
    """
    found, misnamed, others = {}, {}, []
    for student in students:
        for path in (*sorted((submissions / student).glob("*")), *sorted((submissions / student).glob("*/*"))):
            hidden = any(part.startswith(".") for part in path.relative_to(submissions).parts)
            if hidden or (path.is_dir() and not path.is_symlink() and path.suffix != ".ipynb"):
                continue
            begun = [lesson for lesson in lessons if path.name.startswith(lesson)]
            if path.is_symlink() or not path.is_file() or not begun:
                others.append(f"{path}: left out, not the file of a lesson")
            elif path.suffix == ".ipynb" and path.stem in lessons:
                found[student, path.stem] = path
            elif (key := (student, max(begun, key=len))) in misnamed:
                others.append(f"{path}: left out, {misnamed[key].name} is another such file")
            else:
                misnamed[key] = path
    for key in found.keys() & misnamed.keys():
        others.append(f"{misnamed.pop(key)}: left out, {key[1]}.ipynb is graded")
    return found, misnamed, sorted(others)


def _api(folder: Path, database: str = "gradebook.db", timeout: Callable | None = None) -> Any:
    """The interface of nbgrader to a folder.

    Raises:
        InputError: nbgrader is not installed.
    """
    app, preprocessors = optional.package("nbgrader.apps.api"), optional.package("nbgrader.preprocessors")
    if shutil.which("alembic") is None:  # nbgrader calls it by its name alone, but no environment may be activated
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    config = Config()
    config.CourseDirectory.root = config.Exchange.root = str(folder.resolve())
    config.CourseDirectory.db_url = f"sqlite:///{folder.resolve() / database}"
    # Its default list would replace the stubs of the exercises
    names = ("LockCells", "ClearOutput", "CheckCellMetadata", "ComputeChecksums", "SaveCells")
    names += ("ClearHiddenTests", "ComputeChecksums", "CheckCellMetadata")
    config.GenerateAssignment.preprocessors = [getattr(preprocessors, name) for name in names]
    config.Execute.timeout_func = timeout
    config.Execute.extra_arguments = ["--HistoryManager.hist_file=:memory:", "--log-level=CRITICAL"]
    # A warning or a progress bar is no error
    config.IgnorePattern.enabled, config.IgnorePattern.pattern = True, "^"
    return app.NbGraderAPI(config=config, log_level=40)


def _reason(result: dict[str, Any]) -> str:
    """The first line of nbgrader's log or error that names an exception; else the first line."""
    lines = [line.strip() for line in (result.get("log", "") + result.get("error", "")).splitlines()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Died)\b", line)]
    return (named or lines or ["no reason given"])[0][:200]


def _line(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"note": row["note"] and f" ({row['note']})"}


def _path(folder: Path, lesson: str) -> Path:
    return folder / lesson / f"{lesson}.ipynb"


def _at(folder: Path, lesson: str) -> Path:
    """Where nbgrader looks for a lesson's notebook; its folder is made."""
    path = _path(folder, lesson)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
