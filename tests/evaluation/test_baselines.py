"""What is predicted without looking at the image."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nodules.data import lidc, split
from nodules.data.patches import Patches
from nodules.evaluation import baselines, metrics, tables


def disc(radius):
    """The outline of a disc in the middle of a patch."""
    x = np.arange(64) - 31.5
    return np.hypot(x[:, None], x) <= radius


@pytest.fixture
def ct():
    """400 patches of 200 patients, the malignant nodules larger, pixels that say nothing."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    size = np.clip(10 + 5 * y + rng.normal(0, 3, 400), 3, None)
    table = pd.DataFrame({"id": np.arange(400).astype(str), "malignant": y, "diameter_mm": size})
    table = table.assign(patient=np.arange(400) // 2 * 2 + y, pixel_spacing_mm=rng.uniform(0.5, 0.9, 400))
    masks = np.stack([disc(d / mm / 2) for d, mm in zip(size, table["pixel_spacing_mm"], strict=True)])
    return Patches(rng.normal(-800, 100, (400, 64, 64)), table, masks, card=None)


@pytest.fixture
def parts(ct):
    return split.divide(split.whole(ct), np.repeat(["train", "test"], [300, 100]))


def test_baselines_find_what_is_there_and_only_that(ct, parts):
    predicted = baselines.predictions(ct, parts)
    assert predicted.index.tolist() == list(range(400)) and predicted.stack().between(0, 1).all()
    assert list(predicted) == ["prevalence", "mean intensity", *baselines.RULERS]
    test = predicted.iloc[parts.test.rows]
    scores = {name: metrics.score(parts.test.y, test[name], parts.test.units) for name in test}
    assert scores["prevalence"]["auc"] == 0.5 and scores["prevalence"]["accuracy"] == 0.5
    assert scores["ruler on the whole nodule"]["auc"] > 0.8 and scores["ruler on the whole nodule"]["auc_low"] > 0.7
    assert scores["ruler on the slice, mm"]["auc"] > scores["ruler on the slice, pixels"]["auc"] > 0.7
    assert 0.3 < scores["mean intensity"]["auc"] < 0.7
    forest = tables.forest({name: {"test": score} for name, score in scores.items()}, "auc")
    assert list(forest["name"]) == list(scores) and (forest["low"] <= forest["high"]).all()


def test_each_ruler_needs_what_it_measures(ct, parts):
    pixels, mm, whole = baselines.RULERS
    known = set(baselines.predictions(replace(ct, masks=None), parts))
    assert whole in known and not known & {pixels, mm}
    known = set(baselines.predictions(replace(ct, table=ct.table.drop(columns="pixel_spacing_mm")), parts))
    assert pixels in known and mm not in known


def test_an_extent_is_the_longest_way_across():
    bar, spot = np.zeros((2, 64, 64), bool)
    bar[[10, 11, 12, 13], [10, 11, 12, 13]] = True  # diagonal
    spot[5, 5] = True
    extents = baselines.extents(np.stack([disc(10), bar, spot, np.zeros_like(bar)]))
    assert extents[0] == pytest.approx(20, abs=1) and extents[1] == pytest.approx(3 * np.sqrt(2) + 1, abs=0.1)
    assert extents[2] == 1 and np.isnan(extents[3])


def test_a_slice_without_an_outline_is_measured_on_the_next_slice_of_its_nodule():
    table = pd.DataFrame({"nodule": [*"bababbc"], "slice_index": [2, 1, 1, 0, 0, 3, 0]}, index=range(10, 17))
    extents = np.array([np.nan, 7.0, 5.0, np.nan, 4.0, np.nan, np.nan])
    assert baselines.laid(extents, table).tolist() == [5, 7, 5, 7, 4, 5, 0], "nodule c has no outline at all"
    assert baselines.laid(extents, table[["nodule"]]).tolist() == [0, 7, 5, 0, 4, 0, 0], "the order is unknown"


def test_the_ceiling_needs_all_eight_ratings_and_the_diameter(ct, parts):
    for name in lidc.ATTRIBUTES:
        assert "eight ratings and diameter" not in baselines.predictions(ct, parts)
        ct.table[name] = ct.table["malignant"] + 1.0
    assert "eight ratings and diameter" in baselines.predictions(ct, parts)


def test_only_the_patches_that_train_are_fitted(ct, parts):
    features = ct.table[["diameter_mm"]]
    before, every = baselines.logistic(features, parts.train), baselines.predictions(ct, parts)
    parts.test.y[:] = 1 - parts.test.y
    parts.valid.y[:] = 1 - parts.valid.y
    assert np.array_equal(baselines.logistic(features, parts.train), before)
    assert baselines.predictions(ct, parts).equals(every)
    assert baselines.logistic(features, parts.train, C=1e-6).std() < 0.01 < before.std(), (
        "a small C keeps weights close to 0"
    )


def test_out_of_fold_each_patch_is_predicted_by_the_others(ct):
    everything, fold = split.whole(ct), np.arange(400) // 2 % 4
    features = ct.table[["diameter_mm"]]
    p = baselines.out_of_fold(features, everything.y, fold)
    assert metrics.score(everything.y, p, everything.units, fold=fold)["auc"] > 0.8
    flipped = np.where(fold == 1, 1 - everything.y, everything.y)
    again = baselines.out_of_fold(features, flipped, fold)
    assert np.array_equal(again[fold == 1], p[fold == 1]) and (again[fold != 1] != p[fold != 1]).all()


def test_gradients_are_the_same_for_turned_brightness_and_differ_between_shapes():
    edge = np.zeros((64, 64))
    edge[:, 32:] = 400
    bright, flat, turned = edge - 300, np.zeros((64, 64)), edge.T
    features = baselines.gradients(np.stack([edge, bright, flat, turned])).to_numpy()
    assert features.shape == (4, 1764) and np.allclose(features[0], features[1])
    assert not features[2].any() and np.abs(features[0] - features[3]).max() > 0.1
