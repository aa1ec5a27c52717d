"""Nothing is unpickled, and no parameter becomes code."""

import ast
import pickle
import sys
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from nodules import __main__, paths, record
from nodules.errors import InputError
from nodules.networks import bodies, network
from nodules.tools import run

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"read_pickle", "load_learner", "unsafe_load", "full_load", "to_pickle", "eval", "exec"}


def sources():
    """Name and syntax tree of every module and notebook."""
    for path in sorted((paths.ROOT / "src").rglob("*.py")):
        yield str(path.relative_to(paths.ROOT)), ast.parse(path.read_text())
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield path.name, ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def unsafe(tree):
    """Calls and imports that could run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name.split(".")[-1] in LOADERS and not name.endswith((".eval", "Explorer")):
                yield name
            if name == "torch.load" and options.get("weights_only") != "True":
                yield name
            if name == "np.load" and options.get("allow_pickle") != "False":
                yield name
            if name == "yaml.load":
                yield name


def test_no_code_unpickles():
    calls = {name: list(unsafe(tree)) for name, tree in sources()}
    assert len(calls) > 40 and not {name: names for name, names in calls.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "pd.read_pickle(p)",
        "eval(t)",
    ],
)
def test_the_search_finds_what_it_searches_for(code):
    assert list(unsafe(ast.parse(code)))


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


COMMANDS = {
    "own.npz": ["export", "out", "--data", "own.npz"],
    "own.h5": ["export", "out", "--data", "own.h5"],
    "ct_tiles.tif": ["export", "out", "--data", "."],
    "malignancy.csv": ["export", "out", "--data", "."],
    "all_patches.hdf5": ["export", "out", "--data", "."],
    "p.yaml": ["run", str(paths.NOTEBOOKS / "01_data.ipynb"), "out", "--profile", "p.yaml"],
    "n.ipynb": ["run", "n.ipynb", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["pickle", "inside"])
def test_a_malicious_file_runs_nothing(tmp_path, monkeypatch, capsys, name, kind):
    path, sprung = tmp_path / name, tmp_path / "sprung"
    malicious = pickle.dumps(Trap(sprung))
    rest = {"ct_tiles.tif": "malignancy.csv", "malignancy.csv": "ct_tiles.tif"}
    if name == "malignancy.csv":
        tifffile.imwrite(tmp_path / rest[name], np.zeros((2, 64, 64), np.int16), photometric="minisblack")
    elif name in rest:
        pd.DataFrame({"malignancy": [0.0, 1.0]}).to_csv(tmp_path / rest[name])
    if kind == "inside" and name == "own.npz":
        np.savez(path, images=np.array([Trap(sprung)] * 2), malignant=np.array([0, 1]))
    elif kind == "inside" and path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            file["images"], file["malignant"] = np.void(malicious), np.array([0, 1])
            file["images"].attrs["pickle"] = np.void(malicious)
    elif kind == "inside" and name == "p.yaml":
        path.write_text(
            f"seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{sprung}']]"
        )
    else:
        path.write_bytes(malicious)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["nodules", *COMMANDS[name]])
    assert __main__.main() == 2 and capsys.readouterr().err.count("\n") == 1
    assert not sprung.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["resnet34.safetensors", "resnet34-b627a593.pth", "test_resnet.safetensors"])
def test_malicious_weights_run_nothing(tmp_path, monkeypatch, name):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    with pytest.raises(InputError, match=name.split(".")[0]):
        bodies.build(bodies.Spec(name.split("-")[0].removesuffix(".safetensors"), "imagenet"))
    head = tmp_path / "weights" / name
    with pytest.raises(InputError, match="not a head of"):
        network.restore(bodies.Spec("test_resnet", "random"), "HU", head)
    assert not (tmp_path / "sprung").exists()


def test_malicious_kept_files_run_nothing(tmp_path):
    folder = tmp_path / "01_data"
    folder.mkdir()
    for name in ("results.json", "split.csv", "network.choice"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError, match="damaged"):
        record.Earlier(str(tmp_path), "01_data").choice("network")
    assert not (tmp_path / "sprung").exists()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["pool", "run_dir"]), st.text(max_size=60)), st.lists(st.text(max_size=30)))
def test_parameters_stay_data_in_the_notebook_that_runs(texts, names):
    notebook = load_notebook_node(str(paths.NOTEBOOKS / "02_architectures.ipynb"))
    chosen = texts | {"architectures": names}
    filled = parameterize_notebook(notebook, chosen, report_mode=False, kernel_name=run.KERNEL, language="python")
    (cell,) = (cell for cell in filled.cells if "injected-parameters" in cell.metadata.get("tags", []))
    written = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        written[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert written == chosen


@settings(deadline=None)
@given(st.text(max_size=40))
def test_a_parameter_from_the_command_line_is_itself_or_refused(text):
    notebook = paths.NOTEBOOKS / "01_data.ipynb"
    try:
        chosen = run.merge(notebook, {}, [f"data={text}"])
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert type(chosen["data"]) is str and chosen["data"].isprintable()
