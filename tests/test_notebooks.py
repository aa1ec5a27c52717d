"""The notebooks as a reader finds them, and all of them end to end."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import jinja2
import nbformat
import pandas as pd
import pytest
import yaml
from jinja2 import nodes
from safetensors.torch import load_file

import soak
from nodules import course, paths
from nodules.data.split import SPLITS
from nodules.errors import InputError
from nodules.paths import ROOT
from nodules.report import cards, text
from nodules.study import Study
from nodules.tools import run

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
MOST_LINES, LONGEST = 20, 100  # of a code cell, characters of a line


@pytest.mark.parametrize("lesson", course.LESSONS, ids=lambda lesson: lesson.name)
def test_a_notebook_is_prose_and_short_cells(lesson):
    number, path = 1 + course.LESSONS.index(lesson), paths.NOTEBOOKS / f"{lesson.name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == "markdown" and first.source.splitlines()[0] == f"# {number}. {lesson.question}"
    assert last.cell_type == "markdown" and "does not show" in last.source
    assert course.parameters(path)
    assert notebook.metadata.kernelspec.name == run.KERNEL
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MOST_LINES, f"{len(lines)} lines:\n{cell.source}"
        assert max(map(len, lines)) <= LONGEST, cell.source
        assert not cell.outputs and cell.execution_count is None, "commit notebooks without outputs"
    parsed = [list(ast.walk(ast.parse(cell.source))) for cell in code]
    imports = [
        i for i, cell in enumerate(parsed) if any(isinstance(node, ast.Import | ast.ImportFrom) for node in cell)
    ]
    assert imports == [0], "one import cell, the first"
    calls = [ast.unparse(node) for cell in parsed for node in cell if isinstance(node, ast.Call)]
    assert [call for call in calls if call.startswith("Study")] == [f"Study.open('{lesson.name}', globals())"]
    assert any(isinstance(node, ast.Assert) for cell in parsed for node in cell)


def test_in_jupyterlab_a_notebook_does_what_the_default_run_does():
    demo = yaml.safe_load((ROOT / "params" / "demo.yaml").read_text())
    for lesson in course.LESSONS:
        defaults = course.parameters(paths.NOTEBOOKS / f"{lesson.name}.ipynb")
        assert {name: demo[name] for name in demo.keys() & defaults} == {n: defaults[n] for n in demo.keys() & defaults}


def test_only_the_first_notebook_is_told_which_patches_and_how_to_split_them():
    for lesson in course.LESSONS:
        names = course.parameters(paths.NOTEBOOKS / f"{lesson.name}.ipynb").keys()
        of_data = {"data", "n_patches", "split_kind", "split_seed"}
        assert names & of_data == (of_data if lesson is course.DATA else set())
        assert {"seed", "run_dir"} <= names


def test_the_text_names_only_what_the_notebooks_keep():
    noted, drawn, lessons = {}, set(), dict(zip(cards.NOTEBOOKS, course.LESSONS, strict=True))
    for name, lesson in lessons.items():
        path = paths.NOTEBOOKS / f"{lesson.name}.ipynb"
        known = list(ast.walk(ast.parse("\n".join(cell["source"] for cell in course.code_cells(path)))))
        calls = [node for node in known if isinstance(node, ast.Call)]
        facts = [call for call in calls if ast.unparse(call.func) == "study.fact"]
        noted[name] = {keyword.arg for call in facts for keyword in call.keywords} | course.parameters(path).keys()
        drawn |= {node.value for node in known if isinstance(node, ast.Constant)}
    noted["data"] |= {f"n_{side}" for side in SPLITS}  # noted in one call for all sides
    noted["rulers"] |= {
        f"{fact}_{level}" for fact in ("gain", "added") for level in ("patches", "nodules")
    }  # in a loop
    named, shown = set(), set()
    for path in set(text.TEMPLATES.glob("*.*")) - {text.TEMPLATES / "sweep.md"}:  # which is of many runs
        template = jinja2.Environment().parse(path.read_text())
        for got in template.find_all(nodes.Getattr):
            if isinstance(got.node, nodes.Name) and got.node.name in lessons:
                named.add((got.node.name, got.attr))
        for call in template.find_all(nodes.Call):
            first, *more = call.args or [None]
            if isinstance(first, nodes.Name) and first.name in lessons and isinstance(more[0], nodes.Const):
                named.add((first.name, more[0].value))
            if isinstance(call.node, nodes.Getattr) and call.node.attr == "show" and isinstance(first, nodes.Const):
                shown.add(first.value)
    assert len(named) > 30 and len(shown) > 15
    assert not {(lesson, name) for lesson, name in named if name not in noted[lesson]}
    assert shown - {"answer"} <= drawn, "that of the first screen is drawn from all notebooks' results"


PAGE = "figures/smoke-phantom/report.html"  # what make figures makes


def make(*arguments):
    return soak.make(ROOT, *arguments, OMP_NUM_THREADS="1")  # two jobs of a thread each disturb one another least


@pytest.fixture(scope="module")
def smoke():
    """All notebooks and the report, made by Make from nothing on the smoke profile, two jobs at a time."""
    shutil.rmtree(ROOT / "runs" / "smoke-phantom", ignore_errors=True)
    shutil.rmtree(ROOT / "figures" / "smoke-phantom", ignore_errors=True)
    done = make("figures", "-j2")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_all_notebooks_run_end_to_end(smoke):
    folder = ROOT / "runs" / "smoke-phantom"
    assert {path.name for path in folder.glob("*.ipynb")} == {path.name for path in NOTEBOOKS}
    split = pd.read_csv(folder / "01_data" / "split.csv")
    assert list(split) == ["id", "patient", "malignant", "split", "split_kind"] and len(split) == 600
    steps = re.findall(r"^(\d\d_\w+) +(\d+)/(\d+) ", smoke.stdout, re.M)
    assert [done for _, done, _ in steps].count("1") == len(NOTEBOOKS), "one line a step"
    assert len(steps) == sum(int(total) for _, done, total in steps if done == "1")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_is_seen_once_and_described(smoke, path):
    folder = ROOT / "runs" / "smoke-phantom"
    cells = nbformat.read(folder / path.name, as_version=4).cells
    shown = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert not any("<Figure" in output.data.get("text/plain", "") for output in shown)
    widget = "application/vnd.jupyter.widget-view+json"
    figures = [output for output in shown if "image/png" in output.data and widget not in output.data]
    kept = [json.loads(about.read_text()) for about in (folder / path.stem).glob("*.json") if about.stem != "results"]
    described = [output.metadata["image/png"]["alt"] for output in figures]
    assert len(figures) == len(kept) == len(set(described)) > 0
    for about in kept:
        assert any(about["caption"] in text for text in described)


def test_the_smoke_report_holds_what_the_notebooks_made(smoke):
    folder = ROOT / "figures" / "smoke-phantom"
    content = json.loads((folder / "results.json").read_text())
    assert content["card"]["simulation"] and content["card"]["patches"] == 600
    assert {row["notebook"] for row in content["rows"]} <= {path.stem for path in NOTEBOOKS}
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64") == len(list(folder.glob("*.png")))
    for number in sorted(set(course.FIGURES) - {5, 6, 7}):  # of networks that this profile leaves out
        name = course.figure_name(number)
        assert (folder / f"{name}.png").exists() and course.HEADINGS[name] in report
    for about in map(json.loads, (path.read_text() for path in folder.glob("*.json") if path.stem != "results")):
        assert "simulation" in about["source"]


@pytest.mark.slow
def test_a_run_from_nothing_elsewhere_gives_the_same_to_the_last_byte(smoke_run, tmp_path):
    project = soak.copy(tmp_path)
    soak.finish(project, "-j2", OMP_NUM_THREADS="1", PYTHONHASHSEED="7")
    first, second = soak.product(ROOT), soak.product(project)
    assert soak.differences(first, second) == []
    assert any(name.endswith("04_training/predictions.csv") for name in first) and len(first) > 60


def test_a_second_make_runs_nothing(smoke):
    done = make("figures")
    assert done.returncode == 0 and done.stdout.strip().endswith("is up to date.")


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        ("src/nodules/plots.py", False),
        ("src/nodules/report/page.py", False),
        ("src/nodules/report/templates/trust.md", False),
        ("src/nodules/study.py", True),
        ("src/nodules/data/split.py", True),
        ("src/nodules/data/phantom.py", True),
        ("notebooks/01_data.ipynb", True),
        ("params/smoke.yaml", True),
        ("params/demo.yaml", None),
        ("requirements.txt", True),
    ],
)
def test_a_change_redoes_what_depends_on_it_and_no_more(smoke, changed, runs):
    planned = make("-n", "-W", changed, PAGE).stdout
    assert ("nodules run notebooks/01_data.ipynb" in planned) == bool(runs)
    assert ("nodules report" in planned) == (runs is not None)


def test_other_data_whose_path_ends_alike_is_not_taken_for_the_same(smoke):
    planned = make("-n", PAGE, "DATA=elsewhere/phantom.npz").stdout
    assert all(f"nodules run notebooks/{path.name}" in planned for path in NOTEBOOKS)


def test_one_table_holds_networks_and_baselines_of_one_split(smoke):
    rows = pd.DataFrame(json.loads((ROOT / "figures" / "smoke-phantom" / "results.json").read_text())["rows"])
    rows = rows[rows["notebook"].isin(["05_whole_network", "06_picture_or_ruler"])].set_index("name")
    tested = [
        "whole network, our recipe",
        "nodule network",
        "plain network",
        "SqueezeNet",
        "CapsuleNet",
        "oriented gradients",
    ]
    assert rows.loc[tested, "n"].nunique() == 1 and rows.loc[tested, "auc"].between(0, 1).all()
    folds = rows[rows["counted"] == "patches"]
    assert len(folds) == 8 and folds.index.str.contains("2 folds").all() and (folds["n"] == 600).all()
    assert (rows.loc[rows["counted"] == "nodules", "n"] < 600).all()


def test_maps_are_measured_for_every_architecture_against_controls(smoke):
    measured = pd.read_csv(ROOT / "runs" / "smoke-phantom" / "07_interpretation" / "localisation.csv")
    names = set(measured["name"])
    assert {"random map", "centred blob"} < names and set(measured["part"]) == {"mass", "hit"}
    for architecture in ("resnet34", "efficientnet_lite0"):
        maps = ["classic CAM", *(f"Grad-CAM stage {stage}" for stage in (1, 2, 3, 4))]
        assert {f"{architecture}, {name}" for name in maps} < names
    assert {"nodule network, attention", "nodule network, evidence"} < names


def test_headless_the_widget_leaves_a_picture(smoke):
    cells = nbformat.read(ROOT / "runs" / "smoke-phantom" / "07_interpretation.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if "explorer.Explorer(" in cell.source)
    (shown,) = (output.data for output in cell.outputs if "data" in output)
    assert "image/png" in shown and "application/vnd.jupyter.widget-view+json" in shown


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ("networks/heads.py", course.LESSONS),
        (
            "networks/finetune.py",
            [course.WHOLE, course.RULER, course.INTERPRETATION, course.EVALUATION, course.OWN_SCAN],
        ),
        ("networks/small.py", [course.WHOLE, course.RULER, course.INTERPRETATION, course.EVALUATION, course.OWN_SCAN]),
        ("networks/maps.py", [course.INTERPRETATION]),
        ("evaluation/experiments.py", [course.EVALUATION, course.DECISIONS]),
    ],
)
def test_a_change_in_code_leaves_alone_what_does_not_use_it(smoke, changed, redone):
    planned = make("-n", "-W", f"src/nodules/{changed}", PAGE).stdout
    assert [lesson for lesson in course.LESSONS if f"run notebooks/{lesson.name}" in planned] == list(redone)


def test_predictions_are_the_product(smoke):
    folder = ROOT / "runs" / "smoke-phantom" / "04_training"
    table = pd.read_csv(folder / "predictions.csv")
    assert list(table) == ["id", "patient", "split", "y", "p", "p_tta"]
    assert set(table["split"]) == {"valid", "test"} and table[["p", "p_tta"]].stack().between(0, 1).all()
    assert load_file(folder / "head.safetensors")
    rows = json.loads((ROOT / "figures" / "smoke-phantom" / "results.json").read_text())["rows"]
    for row in (row for row in rows if row["notebook"] == "04_training"):
        for key in ("data", "split", "weights", "architecture", "seed", "epochs", "accuracy_low", "auc_high"):
            assert key in row


@pytest.mark.parametrize(
    ("notebook", "parameter", "words"),
    [
        ("01_data", "split_kind=odd", "split_kind='odd': unknown; use one of auto, patient, random"),
        ("02_architectures", "architectures=[resnet35]", "architecture='resnet35': no such network"),
        ("02_architectures", "pool=some", "pool='some': unknown; use one of last, all"),
        ("02_architectures", "compare_lr=-0.1", "compare_lr=-0.1: out of range"),
        ("02_architectures", "compare_seeds=[]", "compare_seeds=[]: out of range"),
        ("03_learning_rate", "views=0", "views=0: out of range; use 1 to 1000"),
        ("04_training", "rule=median", "rule='median': unknown; use one of mean, log, beta"),
        ("06_picture_or_ruler", "folds=1", "folds=1: unknown; use one of 0, 2, 3"),
        ("07_interpretation", "cases=-1", "cases=-1: out of range"),
        ("09_decisions", "shifted=0", "shifted=0: out of range"),
    ],
)
def test_bad_parameters_are_refused_before_any_work(tmp_path, notebook, parameter, words):
    name, _, value = parameter.partition("=")
    given = {"run_dir": str(tmp_path), "data": "absent.npz", name: yaml.safe_load(value)}
    with pytest.raises(InputError, match=re.escape(words)):
        Study.open(notebook, course.parameters(paths.NOTEBOOKS / f"{notebook}.ipynb") | given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("notebook", "parameter", "words"),
    [
        ("01_data", "split_kind=odd", "split_kind='odd': unknown; use one of auto, patient, random"),
        ("06_picture_or_ruler", "folds=1", "folds=1: unknown; use one of 0, 2, 3"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(tmp_path, notebook, parameter, words):
    command = [sys.executable, "-m", "nodules", "run", f"notebooks/{notebook}.ipynb", str(tmp_path / "o.ipynb")]
    command += ["-p", parameter, "-p", f"run_dir={tmp_path}"]  # no notebook has been run there
    command += ["-p", "data=absent.npz"] if notebook == course.DATA.name else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["o.failed.ipynb"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (".", "demo-folder"),
        ("./", "demo-folder"),
        ("..", "demo-folder"),
        ("data/.", "demo-data"),
        ("20240105", "demo-20240105"),
        ("2024-01-05/", "demo-2024-01-05"),
        ("on", "demo-on"),
        ("elsewhere/phantom.npz", "demo-phantom"),  # and not into figures/ itself, which git keeps
        ("phantom/", "demo-phantom"),  # a folder of that name, not the source
        ("Größe.npz", "demo-Größe"),
    ],
)
def test_any_name_of_data_has_a_folder_of_its_own(name, folder):
    planned = make("-n", "notebooks", "PROFILE=demo", f"DATA={name}").stdout
    assert f"runs/.{folder}.lock" in planned
    planned = make("-n", f"figures/{folder}/report.html", "PROFILE=demo", f"DATA={name}").stdout
    told = "./phantom" if name == "phantom/" else name.rstrip("/")
    assert f'-p data="{told}" -p run_dir="runs/{folder}"' in planned and "--readme" not in planned
    assert planned.count("-p data=") == 1, "only the first notebook reads the data"
    assert planned.count(f'-p run_dir="runs/{folder}"') == len(NOTEBOOKS)


def test_what_lies_beside_the_data_is_left_alone(tmp_path):
    for name in ("all_patches.hdf5", "malignancy (1).csv", "a: b $c #d.txt"):
        (tmp_path / name).write_text("")
    for data in (tmp_path, f"{tmp_path}/"):
        done = make("-n", f"figures/smoke-{tmp_path.name}/report.html", f"DATA={data}")
        assert done.returncode == 0, done.stderr
    assert "nodules run notebooks/01_data.ipynb" in done.stdout


def test_a_cell_may_take_longer(tmp_path):
    planned = make("-n", "figures/demo-x/report.html", "PROFILE=demo", "DATA=x", "CELL_TIMEOUT_S=20000").stdout
    assert planned.count("--cell-timeout-s 20000") == len(NOTEBOOKS)


def test_a_home_that_cannot_be_written_to_is_replaced(tmp_path):
    for home in ("/proc/none", str(tmp_path)):
        command = ["make", "-f", "Makefile", "-f", "-", "home"]
        environment = {"PATH": os.environ["PATH"], "HOME": home}
        rule = "home:\n\t@echo $$HOME\n"
        done = subprocess.run(command, cwd=ROOT, env=environment, input=rule, capture_output=True, text=True)
        assert done.stdout.strip() == (str(ROOT / ".cache" / "home") if home == "/proc/none" else home)


@pytest.mark.parametrize(("minutes", "planned"), [(-1, False), (1, True)])
def test_a_folder_of_scans_that_changed_is_read_again(tmp_path, minutes, planned):
    project, scan = soak.copy(tmp_path), tmp_path / "scans" / "a.dcm"
    run = tmp_path / "runs" / "smoke-scans" / "01_data.ipynb"
    for path in (scan, run):
        path.parent.mkdir(parents=True)
        path.touch()
    changed = run.stat().st_mtime + 60 * minutes
    os.utime(scan, (changed, changed))
    done = soak.make(project, "-n", "DATA=scans", "runs/smoke-scans/01_data.ipynb")
    assert done.returncode == 0 and ("nodules run" in done.stdout) == planned


def test_bare_make_prints_every_target():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in ("figures", "notebooks", "test", "lab", "bench", "lint", "clean", "distclean"):
        assert f"make {target} " in shown


@pytest.mark.parametrize("setting", ["PROFILE=nope", "PROFILE=smoke demo", "PROFILE=%", "PROFILE="])
def test_an_unknown_profile_is_named_in_one_line(setting):
    done = make("figures", setting)
    assert done.returncode == 2 and f"{setting}: no such profile; use one of" in done.stderr
    assert "smoke" in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(
    "name", ["my scans.npz", "a'b.npz", 'a"; touch sprung; "', "`id`", "$$(id)", "a#b", "a:b", "a%b", "a=b", ""]
)
def test_a_name_that_make_or_the_shell_would_take_apart_is_refused(name):
    done = make("figures", "PROFILE=smoke", f"DATA={name}")
    assert done.returncode == 2 and "contains a space or a character that is special" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
