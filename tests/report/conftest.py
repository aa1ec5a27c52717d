import copy

import pytest

from nodules import course
from nodules.data import sources

ENDS = ("", "_low", "_high")


def ends(name, value, low, high):
    return dict(zip((name + end for end in ENDS), (value, low, high), strict=True))


FACTS = {  # of a whole run; where it claims a difference, its interval excludes zero
    "DATA": {"n": 6691, "malignant": 2526, "benign": 4165, "n_train": 5344, "n_valid": 669, "n_test": 678},
    "ARCHITECTURES": {"chosen": "resnet50 with chest-ct weights", "valid_auc": 0.8245, "kept": True},
    "RATE": {"lr": 0.0006918},
    "TRAINING": ends("gain", 0.034, 0.011, 0.07) | {"spread_low": 0.861, "spread_high": 0.889},
    "WHOLE": {},
    "RULER": ends("gain_patches", 0.0212, 0.0103, 0.0321)
    | ends("gain_nodules", -0.0144, -0.0251, -0.0035)
    | ends("added_patches", 0.03, 0.01, 0.05)
    | ends("added_nodules", 0.0172, 0.0058, 0.028)
    | ends("gain_slices", 0.0187, 0.0062, 0.0313),
    "INTERPRETATION": {"threshold": 0.4072, "stage": 1, "side": 16, "alike": 0.0806, "nodule_alike": 0.2}
    | ends("hit", 0.92, 0.88, 0.95)
    | ends("blob", 0.63, 0.57, 0.69)
    | ends("lead", 0.29, 0.21, 0.37),
    "EVALUATION": {
        **{"tested": 678, "covered": 0.945, "naive": 0.69, "line": 0.9, "pairs": 8690, "duplicates_share": 0.728},
        **{"kept": "patients", **ends("inflation_auc", 0.0201, 0.0109, 0.0511)},
        **ends("inflation_accuracy", 0.0301, 0.0109, 0.0511),
        **{"fewest": 1, **ends("inflation_fewest", 0.0401, 0.0102, 0.0611)},
        **{"compared": 31, "rival": "ruler on the slice, mm", "better": 2, "worse": 0},
        **{"most_units": 579, "unit": "patients", "at_most": 0.8496, "foretold": 0.8961},
    },
    "DECISIONS": {
        **{"temperature": 1.535, "brier": 0.1341, **ends("log_loss_change", -0.012, -0.02, -0.004)},
        **ends("calibration_before", 0.0511, 0.021, 0.08),
        **ends("calibration_after", 0.0687, 0.03, 0.09),
        **ends("sensitivity_at_90", 0.5504, 0.4395, 0.6631),
        **ends("specificity_at_90", 0.6667, 0.5751, 0.7385),
        **ends("conformal_coverage", 0.9395, 0.8902, 0.9698),
        **ends("conformal_benign", 0.9731, 0.9402, 0.9901),
        **ends("conformal_malignant", 0.7463, 0.6721, 0.8452),
        **{"conformal_single": 0.6372, "opinions": 258, "judged": 85},
        **{"radiologist_auc": 0.8755, "radiologist_kappa": 0.5335},
        **{"model_auc_radiologists": 0.956, "model_kappa_radiologists": 0.8055},
        **ends("radiologist_gap", 0.0805, 0.0312, 0.1298),
        **ends("zoom", -0.0215, -0.0365, -0.0031),
        **{"zoom_p": 0.2944, "ablated": 500, "seeds": 3, "worst_shift": "low dose", "scanned": 100},
        **ends("worst_shift_auc", -0.3387, -0.4011, -0.2764),
    },
    "OWN_SCAN": {
        **{"asked": 3, "remarked": 0, "empty": 60},
        **ends("empty_malignant", 0.05, 0.01, 0.12),
        **ends("empty_marked", 0.35, 0.23, 0.47),
    },
}
PARAMETERS = {
    "DATA": {"data": "phantom", "n_patches": 6691, "split_kind": "auto"},
    "ARCHITECTURES": {"architectures": ["resnet50"], "weights": "auto", "size": 64, "pool": "all"},
    "RATE": {"views": 4, "lr_seeds": 10},
    "TRAINING": {"views": 4, "epochs": 40, "seeds": 5, "cycle_len": 10, "cycle_mult": 1, "rule": "mean"},
    "WHOLE": {
        "views": 4,
        "arm_patches": 300,
        "arm_epochs": 6,
        "whole_epochs": 6,
        "scratch_epochs": 20,
    },
    "RULER": {"scratch_epochs": 20, "folds": 5, "fold_epochs": 1},
    "INTERPRETATION": {"cases": 12, "pointed": 200, "map_epochs": 10},
    "EVALUATION": {"repeats": 15, "slices": [1, 3], "simulations": 200},
    "DECISIONS": {"ablated": 500, "shifted": 100},
    "OWN_SCAN": {"scan": ""},
}
OPTIONAL = {  # facts that exist only where a part was not left out
    "leakage": ("kept", "inflation"),
    "radiologists": ("opinions", "judged", "radiologist", "model_"),
    "scanners": ("worst_shift", "scanned"),
}


def row(name, lesson, offset, **about):
    scores = {"n": 678}
    for i, metric in enumerate(("auc", "accuracy", "log_loss")):
        value = 0.7 + offset - i / 20
        scores |= ends(metric, value, value - 0.05, value + 0.03)
    if name != "prevalence":  # as if its source had no diameters
        scores |= ends("matched_auc", 0.6 + offset, 0.5 + offset, 0.65 + offset)
    known = {"name": name, "notebook": lesson.name, "data": "LIDC phantom (simulation)", "split": "patient", "seed": 0}
    return known | about | scores


def made():
    """A whole run of the phantom, as in ``results.json``."""
    card = sources.SOURCES["phantom"] | {"name": "phantom", "unit": "HU", "notes": [], "sha256": "9d37"}
    counts = sources.KAGGLE_COUNTS | {"patients": 734, "nodules": 1666}
    lessons = {name: getattr(course, name) for name in FACTS}
    common = {"profile": "demo-phantom", "data": card["title"], "data_sha256": "9d37", "simulation": True}
    common |= {"split": "patient", "weights": "resnet50, chest CT", "git_revision": "fd6856ec64"}
    runs = [
        {"notebook": lesson.name, "parameters": {"run_dir": "runs/x", "seed": 0} | PARAMETERS[name]} | common
        for name, lesson in lessons.items()
    ]
    rows = [row("prevalence", course.DATA, -0.2), row("ruler on the slice, mm", course.DATA, 0.213)]
    rows += [row("first result, with TTA", course.TRAINING, 0.111, weights="chest-ct")]
    rows += [row("second result, with TTA", course.TRAINING, 0.177, weights="chest-ct")]
    rows += [row("whole network, our recipe", course.WHOLE, 0.191, weights="chest-ct")]
    facts = {lesson.name: FACTS[name] for name, lesson in lessons.items()}
    return {"runs": runs, "card": card | counts, "facts": facts, "rows": rows, "tables": [], "left_out": []}


def only(content, *lessons):
    """The part of a run that some notebooks made."""
    names = [lesson.name for lesson in lessons]
    content["runs"] = [run for run in content["runs"] if run["notebook"] in names]
    content["facts"] = {name: facts for name, facts in content["facts"].items() if name in names}
    content["rows"] = [row for row in content["rows"] if row["notebook"] in names]
    return content


def without(content, *parts):
    """A run whose last notebooks left out some parts of ``OPTIONAL``."""
    dropped = tuple(start for part in parts for start in OPTIONAL[part])
    for lesson in (course.EVALUATION, course.DECISIONS):
        facts = content["facts"][lesson.name]
        content["facts"][lesson.name] = {k: v for k, v in facts.items() if not k.startswith(dropped)}
    return content


def unknown_patients(content):
    """A whole run of a file without patients, diameters or ratings."""
    content["card"] |= sources.OWN | {"name": "own", "title": "own.npz", "patients": None, "nodules": None}
    content["runs"] = [run | {"data": "own.npz", "simulation": False, "split": "random"} for run in content["runs"]]
    content["rows"] = [row | {"split": "random"} for row in content["rows"] if not row["name"].startswith("ruler")]
    content["facts"][course.RULER.name] = {}
    content["facts"][course.EVALUATION.name] |= {"kept": "clusters", "unit": "patches"}
    return without(content, "radiologists", "scanners")


CONTENTS = {
    "whole": lambda content: content,
    "data only": lambda content: only(content, course.DATA),
    "data and architectures": lambda content: only(content, *course.LESSONS[:2]),
    "not evaluated": lambda content: only(content, *course.LESSONS[:-2]),
    "patients unknown": unknown_patients,
    "all left out": lambda content: without(content, *OPTIONAL),
    "no row of the model": lambda content: content | {"rows": content["rows"][:2]},
    "no rows": lambda content: content | {"rows": []},
}


@pytest.fixture
def content():
    return copy.deepcopy(made())


@pytest.fixture(params=CONTENTS)
def any_content(request, content):
    return CONTENTS[request.param](content)
