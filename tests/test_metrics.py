import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from nodules import metrics


def simulated(patients, seed):
    """Ten alike patches for each patient: one hidden value a patient, a little noise a patch."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), 10)
    y = np.repeat(np.arange(patients) % 2, 10)
    logit = 2 * y - 1 + np.repeat(rng.normal(0, 1, patients), 10) + rng.normal(0, 0.3, len(y))
    return y, 1 / (1 + np.exp(-logit)), groups


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 60), st.sampled_from([1, 2, 8]))
def test_weighted_metrics_are_those_of_scikit_learn(seed, n, decimals):
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)])
    p = np.clip(np.round(rng.random(n), decimals), 0.01, 0.99)  # few decimals make ties
    weights = rng.integers(0, 3, (5, n)) + np.isin(np.arange(n), [0, 1])
    for row, auc, accuracy, loss in zip(weights, *(m(y, p, weights) for m in metrics.METRICS.values()), strict=True):
        assert np.isclose(auc, roc_auc_score(y, p, sample_weight=row))
        assert np.isclose(accuracy, accuracy_score(y, p >= 0.5, sample_weight=row))
        assert np.isclose(loss, log_loss(y, p, sample_weight=row))


def test_a_score_holds_the_value_inside_its_interval():
    y, p, groups = simulated(40, 0)
    scores = metrics.score(y, p, groups)
    assert np.isclose(scores["auc"], roc_auc_score(y, p)) and scores["n"] == 400
    for name in metrics.METRICS:
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]
    assert np.isfinite(metrics.score(y, y.astype(float), groups)["log_loss"]), "certain and right"


def test_every_resample_takes_whole_patients():
    groups = np.array(["b", "a", "a", "c", "b", "c", "c"])
    weights = metrics.bootstrap_weights(groups, seed=0, resamples=500)
    for name in "abc":
        assert (weights[:, groups == name].std(axis=1) == 0).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.1)


def test_alike_patches_of_a_patient_do_not_make_a_result_surer():
    y, p, groups = simulated(40, 1)
    clustered, naive = metrics.score(y, p, groups), metrics.score(y, p)
    assert clustered["auc_high"] - clustered["auc_low"] > 1.8 * (naive["auc_high"] - naive["auc_low"])


def test_a_resample_of_one_class_is_left_out():
    scores = metrics.score(np.array([0, 1, 1]), np.array([0.2, 0.9, 0.4]))
    assert scores["auc"] == scores["auc_low"] == scores["auc_high"] == 1


def test_intervals_repeat_for_a_seed():
    y, p, groups = simulated(30, 2)
    assert metrics.score(y, p, groups, 5) == metrics.score(y, p, groups, 5) != metrics.score(y, p, groups, 6)


@pytest.mark.parametrize(
    ("metric", "truth"),
    [
        # logits are N(+1 or -1, 1 + 0.09): the chance to be on the right side of 0, and of a difference above 0
        ("accuracy", norm.cdf(1 / np.hypot(1, 0.3))),
        ("auc", norm.cdf(2 / np.hypot(1, 0.3) / np.sqrt(2))),
    ],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(metric, truth):
    scores = [metrics.score(*simulated(120, seed), seed) for seed in range(300)]
    hits = np.mean([s[f"{metric}_low"] <= truth <= s[f"{metric}_high"] for s in scores])
    assert 0.91 <= hits <= 0.98
