import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nodules import baselines, plots
from nodules.errors import InputError

CLASSES = ["benign", "malignant"] * 6


@pytest.fixture(params=["class_counts", "intensity_histogram", "diameter_by_class", "patients_per_split", "intervals"])
def drawn(request):
    tables = {
        "class_counts": {"split": np.repeat(["train", "valid", "test"], 4), "class": CLASSES, "patches": range(12)},
        "intensity_histogram": {"value": range(12), "class": CLASSES, "density": np.linspace(0.1, 1, 12)},
        "diameter_by_class": {"diameter_mm": np.linspace(3, 30, 12), "class": CLASSES},
        "patients_per_split": {"split": np.repeat(["train", "valid", "test"], 4), "patches": range(1, 13)},
        "intervals": {"name": list("abcdefghijkl"), "value": 0.7, "low": 0.6, "high": np.linspace(0.7, 0.9, 12)},
    }
    more = {"intensity_histogram": {"unit": "HU"}, "intervals": {"label": "AUC", "chance": 0.5}}
    table = pd.DataFrame(tables[request.param])
    return getattr(plots, request.param)(table=table, heading="What it shows", **more.get(request.param, {}))


def test_every_figure_has_a_title_and_named_axes(drawn):
    assert isinstance(drawn, Figure)
    assert "What it shows" in (drawn.get_suptitle(), drawn.axes[0].get_title())
    for axis in drawn.axes:
        assert axis.get_ylabel() or len(axis.get_yticklabels()), "a vertical axis without a name"


def test_a_stamp_says_where_the_data_come_from(drawn):
    assert plots.stamp(drawn, "LIDC phantom (simulation)").get_supxlabel() == "LIDC phantom (simulation)"


def test_patches_are_shown_in_their_window_unchanged():
    images = np.random.default_rng(0).integers(-1000, 400, (5, 64, 64))
    figure = plots.patch_grid(images, [*"abcde"], [-1000, 400], "HU", "Five", 3)
    shown = [axis for axis in figure.axes if axis.get_images()][:5]
    for axis, image, title in zip(shown, images, "abcde", strict=True):
        picture = axis.get_images()[0]
        assert np.array_equal(picture.get_array(), image) and picture.get_clim() == (-1000, 400)
        assert axis.get_title() == title
    with pytest.raises(InputError, match="5 images but 1 titles"):
        plots.patch_grid(images, ["a"], [0, 1], "HU", "Five", 3)


def test_interval_bars_end_at_low_and_high():
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.6, 0.8], "low": [0.5, 0.75], "high": [0.9, 0.81]})
    axis = plots.intervals(table, "AUC", 0.5, "h").axes[0]
    ends = axis.containers[0].lines[2][0].get_segments()
    assert np.allclose([[s[0][0], s[1][0]] for s in ends], table[["low", "high"]])


def test_baselines_find_what_is_there_and_only_that():
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    split = pd.DataFrame({"malignant": y, "split": np.where(np.arange(400) < 300, "train", "test")})
    split["patient"] = np.arange(400) // 2 * 2 + y
    table = pd.DataFrame({"diameter_mm": 10 + 5 * y + rng.normal(0, 3, 400)})
    images = rng.normal(-800, 100, (400, 64, 64))
    scores = baselines.table(table, split, images, 0)
    assert list(scores) == ["prevalence", "mean intensity", "diameter"]
    assert scores["prevalence"]["auc"] == 0.5 and scores["prevalence"]["accuracy"] == 0.5
    assert scores["diameter"]["auc"] > 0.8 and scores["diameter"]["auc_low"] > 0.7
    assert 0.3 < scores["mean intensity"]["auc"] < 0.7
    forest = baselines.forest(scores, "auc")
    assert list(forest["name"]) == list(scores) and (forest["low"] <= forest["high"]).all()
