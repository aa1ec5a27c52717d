"""What is predicted without looking at the image."""

import numpy as np
import pandas as pd
import pytest

from nodules.data import lidc, split
from nodules.data.split import Part
from nodules.evaluation import baselines, metrics, tables


@pytest.fixture
def everything():
    """400 patches of 200 patients, the malignant ones larger, pixels that say nothing."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    table = pd.DataFrame({"id": np.arange(400), "diameter_mm": 10 + 5 * y + rng.normal(0, 3, 400)})
    images = rng.normal(-800, 100, (400, 64, 64))
    return Part(images, y, np.arange(400), table, np.arange(400) // 2 * 2 + y)


@pytest.fixture
def parts(everything):
    return split.divide(everything, np.repeat(["train", "test"], [300, 100]))


def test_baselines_find_what_is_there_and_only_that(everything, parts):
    predicted = baselines.predictions(everything, parts)
    assert predicted.index.tolist() == list(range(300, 400)) and predicted.stack().between(0, 1).all()
    assert list(predicted) == ["prevalence", "mean intensity", "diameter"]
    scores = {name: metrics.score(parts.test.y, predicted[name], parts.test.units) for name in predicted}
    assert scores["prevalence"]["auc"] == 0.5 and scores["prevalence"]["accuracy"] == 0.5
    assert scores["diameter"]["auc"] > 0.8 and scores["diameter"]["auc_low"] > 0.7
    assert 0.3 < scores["mean intensity"]["auc"] < 0.7
    forest = tables.forest({name: {"test": score} for name, score in scores.items()}, "auc")
    assert list(forest["name"]) == list(scores) and (forest["low"] <= forest["high"]).all()


def test_the_ceiling_needs_all_eight_ratings_and_the_diameter(everything, parts):
    for name in lidc.ATTRIBUTES:
        assert "eight ratings and diameter" not in baselines.predictions(everything, parts)
        everything.table[name] = everything.y + 1.0
    assert "eight ratings and diameter" in baselines.predictions(everything, parts)


def test_only_the_patches_that_train_are_fitted(everything, parts):
    features = everything.table[["diameter_mm"]]
    before = baselines.logistic(features, parts)
    parts.test.y[:] = 1 - parts.test.y
    parts.valid.y[:] = 1 - parts.valid.y
    assert np.array_equal(baselines.logistic(features, parts), before)
    assert baselines.logistic(features, parts, C=1e-6).std() < 0.01 < before.std(), "a small C keeps weights close to 0"


def test_gradients_are_the_same_for_turned_brightness_and_differ_between_shapes():
    edge = np.zeros((64, 64))
    edge[:, 32:] = 400
    bright, flat, turned = edge - 300, np.zeros((64, 64)), edge.T
    features = baselines.gradients(np.stack([edge, bright, flat, turned])).to_numpy()
    assert features.shape == (4, 1764) and np.allclose(features[0], features[1])
    assert not features[2].any() and np.abs(features[0] - features[3]).max() > 0.1
