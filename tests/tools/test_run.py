import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nodules import paths
from nodules.errors import InputError, NotebookFailed
from nodules.tools import run

DEFAULTS = "n = 3\nrate = 0.1\nname = 'a'\nflag = True\nsizes = [1, 2]"


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook with a parameters cell and the given code cells."""

    def write(*code, parameters=DEFAULTS, tags=("parameters",), name="nb.ipynb"):
        cells = [new_markdown_cell("# Title"), new_code_cell(parameters, metadata={"tags": list(tags)})]
        cells += [new_markdown_cell("text\n\n## The step"), *(new_code_cell(source) for source in code)]
        path = tmp_path / name
        nbformat.write(new_notebook(cells=cells), path)
        return path

    return write


def test_values_are_typed_by_yaml(notebook):
    texts = ["n=5", "rate=1e-3", "name=b c", "flag=false", "sizes=[3, 4, 5]"]
    expected = {"n": 5, "rate": 0.001, "name": "b c", "flag": False, "sizes": [3, 4, 5]}
    assert run.merge(notebook(), {}, texts) == expected
    assert run.merge(notebook(), {"rate": 2, "other": 1}, []) == {"rate": 2.0}
    assert isinstance(run.merge(notebook(), {"rate": 2}, [])["rate"], float)


@pytest.mark.parametrize(
    "text",
    [
        "m=1",
        "n",
        "n=1.5",
        "n=true",
        "n=one",
        "flag=1",
        "flag='true'",
        "rate=fast",
        "sizes=3",
        "sizes=[a]",
        "n=[",
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(notebook, text):
    with pytest.raises(InputError) as caught:
        run.merge(notebook(), {}, [text])
    assert "\n" not in str(caught.value) and text.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["20240105", "2024-01-05", "on", "007", "~", "1e3", "[a", "a: b", "null", "'x'"])
def test_text_is_taken_as_it_is(notebook, text):
    assert run.merge(notebook(), {}, [f"name={text}"]) == {"name": text}


def test_a_cell_may_take_what_the_command_or_the_profile_says(tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("cell_timeout_s: 7200\n")
    assert run.time_limit(run.read_profile(profile), None) == 7200
    assert run.time_limit({"cell_timeout_s": 7200}, 60) == 60 and run.time_limit({}, None) == 3600
    for profile, given in (({}, 0), ({"cell_timeout_s": -1}, None)):
        with pytest.raises(InputError, match=r"cell_timeout_s=.*out of range"):
            run.time_limit(profile, given)
    assert run.read_profile(paths.ROOT / "params" / "paper.yaml")["cell_timeout_s"] > 3600


def test_a_profile_is_checked_against_all_notebooks(tmp_path, notebook, monkeypatch):
    notebook()
    notebook(parameters="epochs = 3", name="other.ipynb")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    profile = tmp_path / "p.yaml"
    profile.write_text("n: 4\nepochs: 9\n")
    assert run.read_profile(profile) == {"n": 4, "epochs": 9}
    for text, words in {
        "epoch: 9": "no notebook has a parameter 'epoch'",
        "epochs: many": "'many' is str, not int",
        "- 1": "not a mapping of parameters",
        "a: [": "can't be read as YAML",
        "n: !!python/object/apply:os.getcwd []": "can't be read as YAML",
    }.items():
        profile.write_text(text)
        with pytest.raises(InputError, match=words):
            run.read_profile(profile)


def test_a_profile_holds_values_of_the_type_that_notebooks_want():
    assert run.checked(paths.ROOT, {"compare_lr": "1e-3", "seed": 1}) == {"compare_lr": 1e-3, "seed": 1}


def test_a_good_notebook_leaves_its_copy_and_one_line_a_step(notebook, tmp_path, capfd):
    source = notebook("import sys; print(n, sys.executable)", "1 + 1")
    output = tmp_path / "out{}" / "nb.ipynb"
    run.execute(source, output, {"n": 7}, 60)
    cells = nbformat.read(output, as_version=4).cells
    assert any(c.cell_type == "code" and c.outputs and f"7 {sys.executable}" in str(c.outputs) for c in cells)
    assert sorted(path.name for path in output.parent.iterdir()) == ["nb.d", "nb.ipynb"]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("nb ")]
    assert len(lines) == 4 and lines[-1].split()[1] == "4/4" and lines[-1].endswith("The step")


def test_a_kernel_of_the_same_name_for_the_user_does_not_shadow_ours(notebook, tmp_path):
    kernel = tmp_path / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    environment = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path / "share" / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "0"}
    command = [sys.executable, "-m", "nodules", "run", str(notebook("1")), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "kernel 'python3': runs /bin/false" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\nraise ValueError('went wrong')", ["x = 1", "ValueError: went wrong"]),
        ("import os; os._exit(1)", ["its kernel died"]),
        ("import time; time.sleep(60)", ["timed out", "time.sleep(60)"]),
    ],
)
def test_a_failure_keeps_a_partial_copy_under_another_name(notebook, tmp_path, source, words):
    output = tmp_path / "out" / "nb.ipynb"
    with pytest.raises(NotebookFailed) as caught:
        run.execute(notebook("before = 1", source), output, {}, 15)
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in output.parent.iterdir()] == ["nb.failed.ipynb"]
    assert "before = 1" in (output.parent / "nb.failed.ipynb").read_text()
    run.execute(notebook("1"), output, {}, 60)
    assert sorted(path.name for path in output.parent.iterdir()) == ["nb.d", "nb.ipynb"]


def command_line(*arguments):
    return subprocess.run([sys.executable, "-m", "nodules", *map(str, arguments)], capture_output=True, text=True)


def test_bad_input_is_one_line_and_code_2(notebook, tmp_path):
    bad_data = "from nodules.data import patches\npatches.read('absent.npz')"
    for arguments, words in {
        (notebook("1"), tmp_path / "o.ipynb", "-p", "m=1"): "has no such parameter",
        (tmp_path / "absent.ipynb", tmp_path / "o.ipynb"): "not a readable notebook",
        (notebook(bad_data, name="bad.ipynb"), tmp_path / "o.ipynb"): "absent.npz: no such file",
    }.items():
        done = command_line("run", *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
        assert not (tmp_path / "o.ipynb").exists()


def test_a_failing_notebook_is_code_1_and_shows_cell_and_error(notebook, tmp_path):
    done = command_line("run", notebook("y = 2\n1 / 0"), tmp_path / "o.ipynb")
    assert done.returncode == 1 and "y = 2" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from nodules import course", ["course.py"]),
        ("from nodules.data import files, split", ["data/files.py", "data/split.py", "errors.py"]),
        ("from nodules.data.split import Part", ["data/split.py", "errors.py"]),
        ("import nodules.data.split as s", ["data/split.py", "errors.py"]),
        ("from nodules.data import *", []),
        ("from nodules import tools", ["data/split.py", "errors.py", "tools/__init__.py"]),
        ("from nodules.tools.bench import main", ["data/split.py", "errors.py", "tools/__init__.py", "tools/bench.py"]),
        ("def f():\n    from nodules.networks import heads", ["data/split.py", "errors.py", "networks/heads.py"]),
        ("import numpy\nfrom nodules_of_others import errors", []),
    ],
)
def test_modules_are_followed_through_packages(notebook, tmp_path, monkeypatch, code, expected):
    sources = {
        "__init__.py": '"""A docstring."""',
        "course.py": "X = 1",
        "errors.py": "class InputError(ValueError): ...",
        "data/__init__.py": '"""A docstring."""',
        "data/files.py": "Y = 1",
        "data/split.py": "from nodules.errors import InputError\nclass Part: ...",
        "networks/__init__.py": "",
        "networks/heads.py": "from nodules.data.split import Part\nfrom nodules.networks import heads",
        "tools/__init__.py": '"""A docstring."""\nfrom nodules.data import split',
        "tools/bench.py": "def main(): ...",
    }
    for name, source in sources.items():
        path = tmp_path / "nodules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(run, "PACKAGE", tmp_path / "nodules")
    assert [str(path.relative_to(run.PACKAGE)) for path in run.modules(notebook(code))] == expected


def test_the_notebooks_use_modules_of_the_course_and_none_of_the_report():
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        names = {str(module.relative_to(run.PACKAGE)) for module in run.modules(path)}
        assert names >= {"errors.py", "paths.py", "plots.py", "record.py", "study.py", "data/split.py"}, path.name
        assert not any(name.startswith(("report/", "tools/")) for name in names), path.name


def test_make_learns_which_modules_a_notebook_uses_and_leaves_out_what_only_draws(notebook, tmp_path):
    used, output = notebook("from nodules import plots"), tmp_path / "nb.ipynb"
    run._write_dependencies(used, output, None)
    names = ["src/nodules/errors.py", "src/nodules/plots.py"]
    rule = f"{output}: $(filter-out $(DRAWING),{' '.join(names)})"
    assert output.with_suffix(".d").read_text().splitlines() == [rule, *(f"{name}:" for name in names)]
    printing = f"include {output.with_suffix('.d')}\n{output}:\n\t@echo $^\n"
    command = ["make", "-s", "-B", "-f", "-", str(output), "DRAWING=src/nodules/plots.py"]
    done = subprocess.run(command, cwd=paths.ROOT, input=printing, capture_output=True, text=True)
    assert done.stdout.split() == ["src/nodules/errors.py"], done.stderr


def test_make_learns_on_which_data_a_notebook_was_run(notebook, tmp_path):
    source, output = notebook("1", parameters='data = "phantom"'), tmp_path / "nb.ipynb"
    for data, written in {"phantom": "phantom", "../a b/$(x).npz": "../a?b/??x?.npz"}.items():
        run.execute(source, output, {"data": data}, 60)
        assert f'ifneq "$(DATA)" "{written}"\n{output}: other-data\nendif' in output.with_suffix(".d").read_text()
    run.execute(notebook("1"), output, {}, 60)
    assert "other-data" not in output.with_suffix(".d").read_text(), "it did not read the data itself"


def test_the_kernel_is_known_by_what_it_is_and_not_by_its_name(tmp_path, monkeypatch):
    def spec(interpreter):
        monkeypatch.setattr(run.KernelSpecManager, "get_kernel_spec", lambda *_: SimpleNamespace(argv=[interpreter]))
        run._check_kernel()

    (tmp_path / "link").symlink_to(sys.prefix)
    folder = Path(sys.executable).parent
    for path in ("python", "python3", sys.executable, *map(str, sorted(folder.glob("python*")))):
        if "config" not in path:
            spec(path)
    spec(str(tmp_path / "link" / folder.name / "python3"))
    (tmp_path / "python3").write_text(f"#!/bin/sh\necho {tmp_path}\n")  # another environment under the same name
    (tmp_path / "python3").chmod(0o755)
    for path in (str(tmp_path / "python3"), str(tmp_path / "absent"), "/bin/true"):
        with pytest.raises(InputError, match="remove that kernelspec"):
            spec(path)


def test_a_home_that_cannot_be_written_to_has_a_way_out(tmp_path, notebook, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("JUPYTER_RUNTIME_DIR", "XDG_RUNTIME_DIR", "JUPYTER_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set another home, as in HOME="):
        run.execute(notebook("1"), tmp_path / "out" / "nb.ipynb", {}, 60)
