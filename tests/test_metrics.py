import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score

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


def test_several_trainings_are_scored_by_their_mean():
    y, p, groups = simulated(40, 3)
    worse = np.clip(p + np.random.default_rng(0).normal(0, 0.3, len(p)), 0.01, 0.99)
    one, other, both = (metrics.score(y, q, groups) for q in (p, worse, np.stack([p, worse])))
    assert np.isclose(both["auc"], (one["auc"] + other["auc"]) / 2)
    assert both["auc_low"] < both["auc"] < both["auc_high"]


def test_a_paired_comparison_is_sharper_than_two_intervals():
    y, p, groups = simulated(40, 4)
    worse = np.clip(p + np.random.default_rng(0).normal(0, 0.2, len(p)), 0.01, 0.99)
    found = metrics.paired(y, p, worse, groups)
    one, other = metrics.score(y, p, groups), metrics.score(y, worse, groups)
    assert np.isclose(found["value"], one["auc"] - other["auc"])
    assert one["auc_low"] < other["auc_high"], "the two intervals overlap"
    assert found["low"] > 0 and found["p_value"] < 0.01, "yet the difference is plain"
    turned = metrics.paired(y, worse, p, groups)
    assert np.isclose(turned["value"], -found["value"]) and turned["p_value"] == found["p_value"]


def test_equal_models_differ_by_chance_only_about_as_often_as_5_percent():
    false_alarms = 0
    for seed in range(200):
        y, p, groups = simulated(80, seed)
        rng = np.random.default_rng(10_000 + seed)  # not the draws of the simulation itself
        noise = [np.repeat(rng.normal(0, 0.5, 80), 10) for _ in range(2)]  # alike within a patient
        first, second = (1 / (1 + np.exp(-(np.log(p / (1 - p)) + n))) for n in noise)
        false_alarms += metrics.paired(y, first, second, groups, seed=seed)["p_value"] < 0.05
    assert 0.01 <= false_alarms / 200 <= 0.1


def test_no_difference_has_a_p_value_of_one():
    y, p, groups = simulated(20, 5)
    assert metrics.paired(y, p, p, groups) == {"value": 0, "low": 0, "high": 0, "p_value": 1}


def test_holm_is_the_textbook_example():
    assert np.allclose(metrics.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert metrics.holm(np.array([0.9, 0.8])).max() == 1


def test_over_folds_each_fold_is_ranked_by_itself():
    y, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.8, 0.9])  # the second fold's scores are all higher
    assert metrics.score(y, p)["auc"] == 0.75
    score = metrics.over_folds(y, p, np.array([0, 0, 1, 1]))
    assert score["auc"] == 1 and score["n"] == 4


def test_a_mean_lies_in_its_interval_that_patients_widen():
    _, p, groups = simulated(40, 0)
    mean, clustered = metrics.mean(p), metrics.mean(p, groups)
    assert mean["value"] == clustered["value"] == pytest.approx(p.mean())
    assert clustered["low"] < mean["low"] < mean["value"] < mean["high"] < clustered["high"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 30))
def test_no_threshold_beats_the_chosen_one(seed, n):
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)])
    p = np.round(rng.random(n), 1)

    def sum_of_rates(threshold):
        return (p[y == 1] >= threshold).mean() + (p[y == 0] < threshold).mean()

    chosen = metrics.youden(y, p)
    assert np.isfinite(chosen)
    assert sum_of_rates(chosen) == pytest.approx(max(sum_of_rates(t) for t in [*np.unique(p), 2.0]))


def test_the_confusion_matrix_counts_and_divides_by_the_truth():
    y, called = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    table = metrics.confusion(y, called).set_index(["truth", "called"])
    assert table["patches"].to_dict() == {
        ("benign", "benign"): 3,
        ("benign", "malignant"): 1,
        ("malignant", "benign"): 1,
        ("malignant", "malignant"): 1,
    }
    assert table.loc[("benign", "benign"), "value"] == 0.75 and table.loc[("malignant", "malignant"), "value"] == 0.5
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_curves_enclose_the_auc_and_their_bands_the_curves():
    y, p, groups = simulated(60, 3)
    table = metrics.curves(y, p, groups)
    roc, pr = (table[table["curve"] == name] for name in ("ROC", "PR"))
    assert np.trapezoid(roc["value"], roc["x"]) == pytest.approx(roc_auc_score(y, p), abs=0.01)
    assert np.trapezoid(pr["value"], pr["x"]) == pytest.approx(average_precision_score(y, p), abs=0.02)
    assert pr["value"].iloc[-1] == pytest.approx(y.mean())
    assert (table["low"] <= table["value"] + 1e-9).mean() > 0.95 and (
        table["value"] <= table["high"] + 1e-9
    ).mean() > 0.95


def test_every_patch_gets_the_mean_of_its_nodule():
    table = pd.DataFrame({"nodule": list("baab"), "p": [0.4, 0.1, 0.3, 0.8], "y": [1, 0, 0, 1]}, index=[7, 3, 5, 1])
    merged = metrics.over_slices(table, ["p"])
    assert merged["p"].to_dict() == pytest.approx({7: 0.6, 3: 0.2, 5: 0.2, 1: 0.6})
    assert merged[["nodule", "y"]].equals(table[["nodule", "y"]])


def test_slices_that_graze_a_nodule_do_not_count_where_their_order_is_known():
    table = pd.DataFrame({"nodule": list("aaaabbc"), "slice_index": [30, 10, 40, 20, 1, 2, 9]})
    table["p"] = [0.6, 0.0, 1.0, 0.5, 0.2, 0.4, 0.9]
    assert metrics.over_slices(table, ["p"])["p"].tolist() == pytest.approx([0.55] * 4 + [0.3] * 2 + [0.9])
