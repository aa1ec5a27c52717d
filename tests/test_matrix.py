"""All notebooks on small sets that lack what is optional, in pairs and altogether, and on very unequal sets."""

import ast
import io
import itertools
import json
from dataclasses import replace

import h5py
import nbformat
import numpy as np
import pytest
from PIL import Image

from nodules import course, paths, plots, study
from nodules.data import split
from nodules.evaluation import baselines, metrics
from nodules.report import page

SMALL = {
    "architectures": ["test_resnet"],  # the smallest network of timm
    "compare_seeds": [0, 1],
    "compare_epochs": 2,
    "lr_seeds": 2,
    "views": 2,
    "epochs": 4,
    "cycle_len": 2,
    "compared": 60,
    "arm_patches": 40,
    "arm_epochs": 1,
    "whole_epochs": 1,
    "scratch_epochs": 1,
    "folds": 2,
    "members": 2,
    "company": 60,
    "seeds": 2,
    "ingredients": list(study.CHOICES["ingredients"]),
    "fold_epochs": 1,
    "cases": 6,
    "pointed": 12,
    "erased": 6,
    "map_epochs": 2,
    "repeats": 2,
    "slices": [1, 3],
    "simulations": 10,
    "ablated": 60,
    "shifted": 30,
    "simulated": 300,
    "empty_places": 10,
}
PIXELS, MM, WHOLE = (f"the baseline {name}" for name in baselines.RULERS)
MAPS, CURVES = "whether the maps find the nodule", "the curves of the rulers"
MASKS, DIAMETERS = {MAPS, PIXELS, MM}, {"the diameters", WHOLE}
RATINGS, VOTES = "the baseline eight ratings and diameter", "one radiologist against the others"
PATIENTS, NODULES, STEP = "patients by split", "one opinion a nodule", "the step towards 3D"
ALIKE = "how alike slices are"
TWINS, SCANNERS = "near-duplicates side by side", "other scanners"
CHANCE = {TWINS, "leakage between clusters", "leakage between patients"}  # blobs are alike
ALWAYS = {SCANNERS, RATINGS}  # real patches can't be scanned again, and none of these sets has the eight ratings
NOTHING = {*MASKS, *DIAMETERS, CURVES, VOTES, PATIENTS, NODULES, STEP, ALIKE}


def made(patients=40, of_each=3, malignant=None, seed=0):
    """Blobs in noise, the larger ones malignant, with all that is optional: a nodule a patient, a slice a patch."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), of_each)
    sick = np.arange(patients) % 2 if malignant is None else np.arange(patients) < malignant
    y, n = sick[who].astype(np.int64), len(who)
    place = rng.uniform(-6, 6, (n, 2, 1, 1))
    size = np.maximum(3, np.where(y, 11.0, 6.0) + rng.normal(0, 2, n))
    rows, columns = np.mgrid[:64, :64] - 31.5
    away = np.hypot(rows - place[:, 0], columns - place[:, 1]) - size[:, None, None]
    images = -850 + 880 / (1 + np.exp(away / 1.5)) + rng.normal(0, 40, (n, 64, 64))
    return {
        "images": images.round().astype(np.int16),
        "malignant": y,
        "masks": away < 0,
        "patient": np.array([f"P{i:03d}" for i in who]),
        "nodule": np.array([f"N{i:03d}" for i in who]),
        "slice_index": np.tile(np.arange(of_each), patients),
        "diameter_mm": size * 1.4,
        "pixel_spacing_mm": rng.choice([0.6, 0.7], n),
        "ratings": np.where(y, "5;4;4", "2;1;2"),
    }


def without(*keys):
    return {key: value for key, value in made().items() if key not in keys}


def only(patches, *keys):
    return {key: patches[key] for key in keys}


def bare(patches):
    """No patient, no nodule, no mask: what Kaggle's set has."""
    return only(patches, "images", "malignant")


def one_radiologist(patches):
    return patches | {"ratings": np.where(patches["malignant"], 5.0, 1.0)}


def unequal_patients():
    patches = made()
    who = patches["patient"].copy()
    who[:60] = "P000"
    return only(patches, "images", "malignant", "masks") | {"patient": who}


def grey():
    values = (made()["images"].astype(float) + 1000) / 1400 * 255
    return bare(made()) | {"images": values.clip(0, 255).astype(np.float32)}


def clashing():
    part = np.array(["train", "valid", "test"])[np.arange(120) % 3]
    return made() | {"split": part, "group": part, "y": made()["malignant"], "class": part, "p": np.arange(120.0)}


SETS = {  # name: (what is in the file, what a run says that it leaves out beside ALWAYS)
    "everything, and names that notebooks use": (clashing, set()),
    "no masks, no ratings": (lambda: without("masks", "ratings"), MASKS | {VOTES}),
    "no patients, no spacing": (lambda: without("patient", "pixel_spacing_mm"), {PATIENTS, MM}),
    "no nodules, no diameters": (lambda: without("nodule", "diameter_mm"), DIAMETERS | {NODULES, STEP, ALIKE}),
    "no slice index, one radiologist": (lambda: one_radiologist(without("slice_index")), {STEP, VOTES}),
    "only diameters and ratings": (
        lambda: only(made(), "images", "malignant", "diameter_mm", "ratings"),
        NOTHING - DIAMETERS - {CURVES, VOTES},
    ),
    "grey levels alone": (grey, NOTHING),
    "Kaggle's form": (lambda: bare(made()), NOTHING),
    "20 patches": (lambda: bare(made(20, 1)), NOTHING),
    "one patient brings half": (unequal_patients, NOTHING - {MAPS, PIXELS, CURVES, PATIENTS}),
    "four malignant patients": (lambda: made(malignant=4), set()),
}
QUICK = ("Kaggle's form",)
DRAWN = (*QUICK, "everything, and names that notebooks use", "no masks, no ratings", "20 patches")
MORE = {"four malignant patients": {"folds": 5}}


@pytest.fixture
def quick_intervals(monkeypatch):
    """Intervals of few resamples: whether they hold is not asked here, and they take most of the time."""
    monkeypatch.setattr(metrics, "RESAMPLES", 100)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of a single dot: making figures is quick, rendering them is not."""
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "PNG")
    return lambda: monkeypatch.setattr(plots, "png", lambda *_: dot.getvalue())


def write(path, arrays):
    """Kaggle's form is HDF5 with names of its own, the others are npz."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            file["ct_slices"], file["slice_class"] = arrays["images"], arrays["malignant"][:, None]


def execute(notebook, chosen):
    """Run a notebook's cells in this process, which has imported all that they need, and show what they show."""
    names, known = {"display": show}, course.parameters(notebook)
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, notebook.name, "exec"), names)
            if last:
                show(eval(compile(ast.Expression(last.value), notebook.name, "eval"), names))
            if "parameters" in cell.metadata.get("tags", []):
                names |= {key: value for key, value in chosen.items() if key in known}


def show(*several):
    for shown, way in itertools.product(several, ("_repr_mimebundle_", "_repr_html_")):
        if hasattr(shown, way):
            getattr(shown, way)()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def test_all_notebooks_run_and_say_what_they_leave_out(tmp_path, name, quick_intervals, undrawn):
    make, expected = SETS[name]
    if name not in DRAWN:
        undrawn()
    data = tmp_path / ("own.hdf5" if name == "Kaggle's form" else "own.npz")
    write(data, make())
    for notebook in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        if notebook.stem == course.OWN_SCAN.name and name not in DRAWN:
            continue  # it asks the model of 06 about the same scan
        execute(notebook, SMALL | MORE.get(name, {}) | {"data": str(data), "run_dir": str(tmp_path / "run")})
    report = page.build(tmp_path / "run", tmp_path / "figures").read_text()
    content = json.loads((tmp_path / "figures" / "results.json").read_text())
    said = {part["what"] for part in content["left_out"]}
    assert said - CHANCE == expected | ALWAYS
    assert all(part["what"] in report and part["why"] in report for part in content["left_out"])
    assert {row["notebook"] for row in content["rows"]} >= {"01_data", "02_architectures", "04_training"}
    asked = {row["name"].rpartition(" folds, ")[0].rpartition(", ")[0] for row in content["rows"]}
    assert ("nodule network, with neighbours" in asked) == ("the step towards 3D" not in said)
    assert ("nodule network, each patch standardised" in asked) == (content["card"]["unit"] == "HU")


CHOSEN = {"chosen", "lr", "stage", "threshold", "temperature"}  # facts
CHOOSING = [course.DATA, course.ARCHITECTURES, course.RATE, course.TRAINING, course.WHOLE]
CHOOSING += [course.INTERPRETATION, course.DECISIONS]


def choices(run):
    """All that a run has chosen or fitted: choices, weights, facts."""
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in run.glob("*/*")}
    facts = [json.loads(content)["facts"] for name, content in files.items() if name.endswith("/results.json")]
    chosen = {name: value for of_notebook in facts for name, value in of_notebook.items() if name in CHOSEN}
    return chosen | {name: content for name, content in files.items() if name.endswith((".choice", ".safetensors"))}


@pytest.mark.slow
def test_nothing_is_chosen_or_fitted_on_test_patches(tmp_path, quick_intervals, undrawn, monkeypatch):
    """Where the test patches have other labels, scores change, and nothing that was chosen or fitted."""
    undrawn()
    write(tmp_path / "own.npz", made())
    divide = split.divide

    def turned_round(part, sides):
        parts = divide(part, sides)
        return parts._replace(test=replace(parts.test, y=1 - parts.test.y))

    runs = []
    for name, way in (("as it is", divide), ("turned round", turned_round)):
        monkeypatch.setattr(split, "divide", way)
        runs.append(tmp_path / name)
        for lesson in CHOOSING:
            options = {"data": str(tmp_path / "own.npz"), "run_dir": str(runs[-1])}
            execute(paths.NOTEBOOKS / f"{lesson.name}.ipynb", SMALL | options)
    before, after = map(choices, runs)
    assert before.keys() > CHOSEN and len(before) >= len(CHOSEN) + 3
    assert before == after
    scores = [json.loads((run / course.TRAINING.name / "results.json").read_text())["rows"] for run in runs]
    assert scores[0][0]["auc"] == pytest.approx(1 - scores[1][0]["auc"]), "only scores turn round"
