import numpy as np
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from nodules import metrics


def simulated(patients, seed):
    """Ten alike patches for each patient: one hidden value a patient, a little noise a patch."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), 10)
    y = np.repeat(np.arange(patients) % 2, 10)
    logit = 1.0 * (2 * y - 1) + np.repeat(rng.normal(0, 1, patients), 10) + rng.normal(0, 0.3, len(y))
    return y, 1 / (1 + np.exp(-logit)), groups


def test_values_are_those_of_the_definitions():
    y, p, groups = simulated(40, 0)
    scores = metrics.score(y, p, groups)
    assert scores["auc"] == roc_auc_score(y, p) and scores["n"] == 400
    assert np.isclose(scores["accuracy"], np.mean((p > 0.5) == y))
    assert np.isclose(scores["log_loss"], -np.mean(np.log(np.where(y == 1, p, 1 - p))))
    for name in metrics.METRICS:
        assert scores[f"{name}_low"] <= scores[name] <= scores[f"{name}_high"]


def test_every_resample_takes_whole_patients():
    groups = np.array(["b", "a", "a", "c", "b", "c", "c"])
    for sample in metrics.bootstrap_indices(groups, seed=0, resamples=50):
        drawn = np.bincount(sample, minlength=7)
        for name in "abc":
            assert len(set(drawn[groups == name])) == 1
        assert sum(drawn[[0, 1, 3]]) == 3


def test_alike_patches_of_a_patient_do_not_make_a_result_surer():
    y, p, groups = simulated(40, 1)
    clustered, naive = metrics.score(y, p, groups), metrics.score(y, p)
    assert clustered["auc_high"] - clustered["auc_low"] > 1.8 * (naive["auc_high"] - naive["auc_low"])


def test_intervals_repeat_for_a_seed():
    y, p, groups = simulated(30, 2)
    assert metrics.score(y, p, groups, 5) == metrics.score(y, p, groups, 5) != metrics.score(y, p, groups, 6)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", {"accuracy": metrics.accuracy})
    monkeypatch.setattr(metrics.bootstrap_indices, "__defaults__", (200,))
    truth = norm.cdf(1 / np.hypot(1, 0.3))  # the chance that a logit of N(1, 1 + 0.09) is above 0
    hits = 0
    for seed in range(200):
        scores = metrics.score(*simulated(100, 1000 + seed), seed)
        hits += scores["accuracy_low"] <= truth <= scores["accuracy_high"]
    assert 0.9 <= hits / 200 <= 0.99
