"""What every kind of figure shows."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nodules import plots
from nodules.errors import InputError

CLASSES = ["benign", "malignant"] * 6


@pytest.fixture(params=["intensity_histogram", "diameter_by_class", "intervals"])
def drawn(request):
    tables = {
        "intensity_histogram": {"value": range(12), "class": CLASSES, "density": np.linspace(0.1, 1, 12)},
        "diameter_by_class": {"diameter_mm": np.linspace(3, 30, 12), "class": CLASSES},
        "intervals": {"name": list("abcdefghijkl"), "value": 0.7, "low": 0.6, "high": np.linspace(0.7, 0.9, 12)},
    }
    more = {"intensity_histogram": {"unit": "HU"}, "intervals": {"label": "AUC", "reference": 0.5}}
    table = pd.DataFrame(tables[request.param])
    return getattr(plots, request.param)(table=table, heading="What it shows", **more.get(request.param, {}))


def test_every_figure_has_a_title_and_named_axes(drawn):
    assert isinstance(drawn, Figure)
    assert "What it shows" in (drawn.get_suptitle(), drawn.axes[0].get_title())
    for axis in drawn.axes:
        rows = [text.get_text() for text in axis.get_yticklabels() if re.search("[a-z]", text.get_text())]
        assert axis.get_ylabel() or rows, "a vertical axis without a name"


def test_a_stamp_says_where_the_data_come_from(drawn):
    assert plots.stamp(drawn, "LIDC phantom (simulation)").get_supxlabel() == "LIDC phantom (simulation)"


HISTORY = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [0.7, 0.4, 0.2], "valid_loss": [0.7, 0.5, 0.6]})
HISTORY["accuracy"] = [0.6, 0.7, 0.65]
STEPS = pd.DataFrame({"epoch": np.arange(12) / 4, "lr": np.linspace(0.01, 0, 12)})


def test_training_curves_show_every_kind_of_weights_and_both_losses():
    table = pd.concat([HISTORY.assign(label=w, seed=s) for w in ("chest-ct", "random") for s in (0, 1)])
    figure = plots.training_curves(table, [0.1, 0.8], [0.5, 1], "h")
    left, right = figure.axes
    assert [sum(len(line.get_xdata()) == 3 for line in axis.lines) for axis in (left, right)] == [4, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chest-ct", "random", "train", "valid"]
    assert left.get_ylim() == (0.1, 0.8) and right.get_ylim() == (0.5, 1)
    colours = {line.get_color() for line in right.lines if len(line.get_xdata()) == 3}
    assert colours == {plots.BLUE, plots.GREEN}, "a kind of weights has its colour in every figure"


def test_the_loss_figure_marks_the_lowest_validation_loss():
    axis = plots.losses(HISTORY, 0.8, "h").axes[0]
    assert axis.lines[2].get_xydata().tolist() == [[2, 0.5]] and axis.get_ylim() == (0, 0.8)


def test_a_result_names_the_accuracies_on_test():
    figure = plots.result(HISTORY, STEPS, {"test, plain": 0.7, "test, TTA": 0.75}, 0.8, 0.5, "h")
    left, middle, right = figure.axes
    assert left.get_ylim() == (0.5, 1) and middle.get_ylim() == (0, 0.8)
    assert [line.get_ydata().tolist() for line in middle.lines] == [[0.7, 0.4, 0.2], [0.7, 0.5, 0.6]]
    assert [t.get_text() for t in left.get_legend().get_texts()][1:] == ["test, plain: 0.700", "test, TTA: 0.750"]
    assert np.allclose(right.lines[0].get_xydata(), STEPS)


def test_the_finder_marks_what_was_chosen():
    curves = pd.DataFrame({"seed": 0, "lr": np.geomspace(1e-7, 10, 50), "loss": np.linspace(0.7, 0.5, 50)})
    suggestions = pd.DataFrame({"seed": [0, 1], "name": ["valley", "valley"], "lr": [1e-3, 3e-3]})
    left, right = plots.lr_finder(curves, suggestions, 2e-3, "h").axes
    assert left.get_xscale() == right.get_xscale() == "log" and "2.0e-03" in right.get_title()
    assert "valley: 2.0e-03" in left.get_legend().get_texts()[0].get_text()


def test_schedules_are_drawn_as_recorded():
    table = pd.concat([STEPS.assign(schedule=name) for name in ("a", "b")])
    figure = plots.schedules(table, "h")
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert np.allclose(figure.axes[1].lines[0].get_xydata(), STEPS)


def test_the_network_is_drawn_stage_by_stage():
    stages = pd.DataFrame(
        {"name": ["stage 1", "stage 2", "head"], "channels": [8, 16, 48], "side": [16, 8, np.nan], "parameters": 7000}
    )
    kernel, convolved = np.eye(7), np.zeros((32, 32))
    figure = plots.network(stages, np.zeros((64, 64)), kernel, convolved, np.zeros((2, 3, 16, 16)), [0, 1], "h")
    titles = " ".join(axis.get_title() for axis in figure.axes)
    assert "8 × 16 × 16" in titles and "16 × 8 × 8" in titles and "7,000 parameters" in titles
    assert sum(bool(axis.get_images()) for axis in figure.axes) == 3 + 2 * 3


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


def test_intervals_of_two_parts_have_two_colours():
    table = pd.DataFrame({"name": ["a", "a", "b", "b"], "part": ["valid", "test"] * 2, "value": 0.7})
    figure = plots.intervals(table.assign(low=0.6, high=0.8), "AUC", "h")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["valid", "test"]
    assert len(figure.axes[0].containers) == 2


def test_interval_bars_end_at_low_and_high():
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.6, 0.8], "low": [0.5, 0.75], "high": [0.9, 0.81]})
    axis = plots.intervals(table, "AUC", "h", 0.5).axes[0]
    ends = axis.containers[0].lines[2][0].get_segments()
    assert np.allclose([[s[0][0], s[1][0]] for s in ends], table[["low", "high"]])


def test_phases_have_a_panel_an_arm_and_valid_as_points():
    table = pd.DataFrame(
        {"arm": np.repeat(["a", "b", "c", "d", "e"], 4), "part": ["train", "train", "valid", "valid"] * 5}
    )
    table = table.assign(stopped=False, phase="all layers", done=[-1, 0, 0.5, 1] * 5, loss=np.linspace(0.5, 3, 20))
    figure = plots.phases(table, "h")
    assert [axis.get_title() for axis in figure.axes[:5]] == ["a", "b", "c", "d", "e"]
    assert figure.axes[0].lines[2].get_marker() == "o"
    assert np.allclose(figure.axes[4].lines[2].get_ydata(), table["loss"][18:])


def test_a_stopped_arm_has_a_cross_and_one_from_scratch_no_head():
    table = pd.DataFrame(
        {
            "arm": list("aabb"),
            "stopped": [False, False, True, True],
            "phase": "all layers",
            "part": "train",
            "loss": [0.9, 0.5, 0.9, 2.0],
        }
    )
    whole, early = plots.phases(table.assign(done=[-0.5, 1, 0, 0.2]), "h").axes
    crosses = [
        [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "X"] for axis in (whole, early)
    ]
    assert crosses == [[], [[[0.2, 2.0]]]]
    assert [len(axis.texts) for axis in (whole, early)] == [0, 1]


def test_a_loss_out_of_all_bounds_is_marked_at_the_edge():
    table = pd.DataFrame({"arm": np.repeat(["a", "b"], 2), "part": ["train", "valid"] * 2, "done": [0.5, 1] * 2})
    table = table.assign(stopped=False, phase="all layers")
    tame, wild = plots.phases(table.assign(loss=[0.6, 0.5, 0.7, 1e26]), "h").axes
    assert tame.get_ylim()[1] == wild.get_ylim()[1] == plots.HIGHEST_LOSS
    assert [line.get_xydata().tolist() for line in wild.lines if line.get_marker() == "^"] == [[[1, 10]]]
    assert "1e+26" in wild.get_title() and tame.get_title() == "a"


def test_bars_stand_in_blocks_with_their_values():
    table = pd.DataFrame({"name": list("abc"), "part": ["x", "x", "y"], "value": [0.5, 0.6, 0.7]})
    axis = plots.bars(table.assign(low=0.4, high=0.8), "accuracy", "h").axes[0]
    assert [bar.get_width() for block in axis.containers for bar in getattr(block, "patches", [])] == [0.5, 0.6, 0.7]
    assert {"x", "y", "50%", "60%", "70%"} <= {text.get_text() for text in axis.texts}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]


def test_a_figure_is_described_by_what_it_shows_and_not_by_its_title(drawn):
    told = plots.described(drawn)
    assert "What it shows" not in told and "against" in told
    grid = plots.patch_grid(np.zeros((3, 4, 4)), list("abc"), [0, 1], "HU", "Title", 3)
    assert plots.described(grid) == "3 pictures"


def test_the_confusion_matrix_says_counts_and_shares():
    share = {"value": [0.75, 0.25, 0.5, 0.5], "low": 0.2, "high": 0.8, "patches": [3, 1, 2, 2]}
    truth = {"truth": np.repeat(["benign", "malignant"], 2), "called": ["benign", "malignant"] * 2}
    axis = plots.confusion(pd.DataFrame({**truth, **share}), "h").axes[0]
    assert axis.texts[0].get_text() == "3\n75.0%\n(20.0% to 80.0%)"
    assert np.array_equal(axis.get_images()[0].get_array(), [[0.75, 0.25], [0.5, 0.5]])


def test_curves_name_each_model_and_chance():
    table = pd.concat(
        [pd.DataFrame({"curve": curve, "x": [0, 1], "name": name}) for curve in ("ROC", "PR") for name in "ab"]
    )
    figure = plots.curves(table.assign(value=0.5, low=0.4, high=0.6), 0.4, "h")
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b", "chance"]
    assert figure.axes[1].lines[-1].get_ydata() == [0.4, 0.4]


def test_a_case_is_a_patch_and_the_same_patch_with_its_map():
    images, maps = np.arange(3 * 64 * 64).reshape(3, 64, 64), np.random.default_rng(0).random((3, 64, 64))
    masks = np.zeros(maps.shape, dtype=bool)
    masks[2, 20:40, 20:40] = True
    figure = plots.cases(images, masks, maps, ["a", "b", "c"], [0, 9], "h", columns=2)
    assert [axis.get_title("left") for axis in figure.axes[:6:2]] == ["a", "b", "c"]
    patch, (under, over) = figure.axes[4].get_images()[0], figure.axes[5].get_images()
    assert np.array_equal(patch.get_array(), images[2]) and np.array_equal(under.get_array(), images[2])
    assert np.array_equal(over.get_array(), maps[2])
    assert [len(axis.collections) for axis in figure.axes[:6]] == [0, 0, 0, 0, 0, 1], "the outline, where it is known"


def test_the_gallery_outlines_the_nodule_in_every_picture():
    mask = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 10
    maps = np.zeros((2, 4, 64, 64))
    shown = {
        "rows": ["a", "b"],
        "columns": ["CAM", "laid over", "Grad-CAM", "laid over"],
        "window": [0, 1],
        "heading": "h",
    }
    figure = plots.gallery(np.zeros((64, 64)), mask, maps, **shown)
    assert len(figure.axes) == 10 and all(len(axis.collections) == 1 for axis in figure.axes)
    assert not any(axis.collections for axis in plots.gallery(np.zeros((64, 64)), ~mask & mask, maps, **shown).axes)


def test_bands_give_each_panel_its_lines_and_one_legend():
    parts = [(panel, name) for panel in ("a", "b", "c") for name in ("one", "two")]
    line = pd.DataFrame({"x": [1, 10, 100], "value": [0.5, 0.6, 0.7], "low": 0.4, "high": 0.8})
    table = pd.concat([line.assign(panel=panel, name=name) for panel, name in parts])
    figure = plots.bands(table, 2, "patients", ["AUC", "ECE"], "h", log=True)
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in shown] == ["a", "b", "c"] and {len(axis.lines) for axis in shown} == {2}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert figure.axes[0].get_ylabel() == "AUC" and figure.axes[2].get_ylabel() == "ECE"
    assert figure.axes[0].get_xscale() == "log"
    assert not plots.bands(table[table["name"] == "one"], 3, "x", ["y"], "h").legends, "one line needs no legend"


def test_reliability_shows_each_model_against_the_diagonal():
    line = pd.DataFrame({"x": [0.2, 0.8], "value": [0.3, 0.7], "low": [0.2, 0.5], "high": [0.4, 0.9]})
    axis = plots.reliability(pd.concat([line.assign(name=name) for name in "ab"]), "h").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["perfect", "a", "b"]
    assert axis.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]


def test_differences_are_bold_where_they_are_sure():
    table = pd.DataFrame({"row": ["a", "b"], "column": ["c", "c"], "value": [0.1, -0.1], "sure": [1, 0]})
    axis = plots.differences(table, "AUC", ["across", "down"], "h").axes[0]
    assert {text.get_text(): text.get_weight() for text in axis.texts} == {"+0.100": "bold", "-0.100": "normal"}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("across", "down")


def test_the_kinship_of_pairs_is_told_by_colour_and_style_and_the_line_drawn():
    table = pd.DataFrame({"correlation": [0.2, 0.5, 0.95], "kin": ["different patients"] * 2 + ["same nodule"]})
    axis = plots.kinship(table, 0.9, "h").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["different patients", "same nodule"]
    assert len({(str(patch.get_edgecolor()), patch.get_linestyle()) for patch in axis.patches}) == 2
    assert any(list(line.get_xdata()) == [0.9, 0.9] for line in axis.lines)
