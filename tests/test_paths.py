"""File systems and names as people have them."""

import errno
import fcntl
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from nodules import paths
from nodules.tools import alone, run


@pytest.fixture
def no_locks(monkeypatch):
    """A network drive without locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_files_are_written_where_there_are_no_locks_and_no_modes(tmp_path, no_locks, monkeypatch):
    def forbid(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", forbid)
    for text in ("first", "second"):
        with paths.replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "second"


def test_what_others_may_be_writing_stays_where_there_are_no_locks(tmp_path, no_locks):
    (tmp_path / f"{paths.PARTIAL}b-x.txt").write_text("")
    with paths.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("")
    assert len(list(tmp_path.iterdir())) == 2


def test_make_runs_without_locks_and_says_so(tmp_path, no_locks, monkeypatch, capsys):
    became = []
    monkeypatch.setattr(os, "execvp", lambda *command: became.append(command))
    alone.main(str(tmp_path / "runs" / "x.lock"), "true", "1")
    assert became == [("true", ("true", "1"))] and "can't be locked (No locks available)" in capsys.readouterr().err


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    command = [sys.executable, paths.ROOT / "src" / "nodules" / "tools" / "alone.py", "runs/.x.lock", "true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: runs: can't be written to (a broken link)")
    assert done.stderr.count("\n") == 1


def test_make_is_told_of_dependencies_by_the_names_that_it_uses(tmp_path, monkeypatch):
    (tmp_path / "storage").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "storage")
    notebook = tmp_path / "nb.ipynb"
    cells = [new_code_cell("data = 'phantom'", metadata={"tags": ["parameters"]}), new_code_cell("1")]
    nbformat.write(new_notebook(cells=cells), notebook)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    output = paths.Path("runs/x/nb.ipynb")
    run.execute(notebook, output, {"data": "a/mine.npz"}, 60)
    text = (tmp_path / "storage" / "x" / "nb.d").read_text()
    assert text.startswith("runs/x/nb.ipynb:") and 'ifneq "$(DATA)" "a/mine.npz"\nruns/x/nb.ipynb: other-data' in text
