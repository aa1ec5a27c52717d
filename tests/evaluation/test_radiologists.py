"""A radiologist against the others, and a model against the same."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from nodules.data import lidc
from nodules.evaluation import radiologists


def test_each_radiologist_is_judged_by_the_others_alone():
    nodules = pd.DataFrame({"nodule": ["a", "b", "c"], "ratings": ["5;4;1", "4;4", "3;3;5;1"], "y": [9, 9, 9]})
    table = radiologists.votes(nodules)
    # a: the others' medians are 2.5, 3 (no target) and 4.5; b has too few radiologists; c: 3 (no target) twice, 3, 3
    assert table[["nodule", "rating", "y"]].values.tolist() == [["a", 5, 0], ["a", 1, 1]]
    assert list(table.columns) == ["nodule", "ratings", "y", "rating"]


def test_no_opinion_at_all_gives_an_empty_table():
    assert radiologists.votes(pd.DataFrame({"nodule": ["a"], "ratings": ["5;4"]})).empty


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    y, call = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    weights = rng.integers(0, 3, (4, 60)).astype(float)
    for row, value in zip(weights, radiologists.kappa(y, call, weights), strict=True):
        assert value == pytest.approx(cohen_kappa_score(y, call, sample_weight=row))


def test_who_never_decides_agrees_by_chance_only():
    y, ones = np.array([0, 1, 1, 1]), np.ones((1, 4))
    assert radiologists.kappa(y, np.full(4, 0.5), ones) == 0 and radiologists.agreement(y, np.full(4, 0.5), ones) == 0.5


def test_a_model_that_knows_the_others_beats_a_radiologist_and_a_coin_does_not():
    votes = radiologists.votes(lidc.nodules())
    units = votes["patient"].to_numpy()
    oracle = 0.8 * votes["y"].to_numpy() + 0.1
    table = radiologists.compare(votes, oracle, 0.5, units, 0).set_index(["name", "part"])
    assert table.loc[("AUC", "the model"), "value"] == table.loc[("kappa", "the model"), "value"] == 1
    radiologist = table.loc[("AUC", "a radiologist")]
    assert radiologist["value"] == pytest.approx(roc_auc_score(votes["y"], votes["rating"]))
    assert radiologist["low"] < radiologist["value"] < radiologist["high"] < 1
    gap = table.loc[("AUC", "model minus radiologist")]
    assert gap["low"] > 0 and gap["value"] == pytest.approx(1 - radiologist["value"])
    coin = np.random.default_rng(0).random(len(votes))
    lost = radiologists.compare(votes, coin, 0.5, units, 0).set_index(["name", "part"])
    assert lost.loc[("kappa", "model minus radiologist"), "high"] < 0
