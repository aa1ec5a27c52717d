"""Metrics and their intervals against independent implementations and known truths."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import bootstrap
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, average_precision_score, brier_score_loss, log_loss, roc_auc_score

from nodules.evaluation import experiments, metrics


def simulated(patients, seed):
    return experiments.simulate(patients, 10, seed)[:3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 60), st.sampled_from([1, 2, 8]))
def test_weighted_metrics_are_those_of_scikit_learn(seed, n, decimals):
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)])
    p = np.clip(np.round(rng.random(n), decimals), 0.01, 0.99)  # few decimals make ties
    weights = rng.integers(0, 3, (5, n)) + np.isin(np.arange(n), [0, 1])
    scores = [metric(y, p, weights) for metric in metrics.METRICS.values()]
    for row, auc, accuracy, loss, brier in zip(weights, *scores, strict=True):
        assert np.isclose(auc, roc_auc_score(y, p, sample_weight=row))
        assert np.isclose(accuracy, accuracy_score(y, p >= 0.5, sample_weight=row))
        assert np.isclose(loss, log_loss(y, p, sample_weight=row))
        assert np.isclose(brier, brier_score_loss(y, p, sample_weight=row))


def forecast(seed, sharpness, patients=170):
    """Patients of known risk with four patches each, and a model whose logits are ``sharpness`` times too large."""
    rng, units = np.random.default_rng(seed), np.repeat(np.arange(patients), 4)
    risk = rng.normal(0, 2, patients)[units] + rng.normal(0, 0.3, len(units))
    y = (rng.random(patients)[units] < expit(risk)).astype(int)
    return y, expit(sharpness * risk), units


@pytest.mark.parametrize("sharpness", [1.0, 1.6])
def test_the_calibration_error_and_its_interval_find_the_truth(sharpness):
    y, p, units = forecast(0, sharpness, 50_000)
    truth = metrics.calibration_error(y, p, np.ones((1, len(y))), units)[0] if sharpness > 1 else 0.0
    assert truth == 0 or truth > 0.05
    scores = [metrics.score(*forecast(seed, sharpness), seed) for seed in range(40)]
    value, low, high = (
        np.array([score[f"calibration_error{end}"] for score in scores]) for end in ("", "_low", "_high")
    )
    assert np.median(value) == pytest.approx(truth, abs=0.015), "without bias"
    assert ((low <= value) & (value <= high)).all(), "an interval holds its value"
    assert ((low <= truth) & (truth <= high)).mean() >= 0.9


def test_the_calibration_error_multiplies_different_patients():
    y, p, units = np.array([1, 0, 1, 0]), np.full(4, 0.25), np.array([0, 0, 1, 2])
    # residuals 0.75, -0.25 | 0.75 | -0.25; sums 0.5, 0.75, -0.25; products of different patients, both ways round
    squares = 2 * (0.5 * 0.75 - 0.5 * 0.25 - 0.75 * 0.25) / (2 * (2 + 2 + 1))
    assert metrics.calibration_error(y, p, np.ones((1, 4)), units)[0] == pytest.approx(np.sqrt(squares))


def test_a_score_holds_the_value_inside_its_interval():
    y, p, units = simulated(40, 0)
    scores = metrics.score(y, p, units)
    assert np.isclose(scores["auc"], roc_auc_score(y, p)) and scores["n"] == 400
    for name in (*metrics.METRICS, metrics.CALIBRATION):
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]
    assert np.isfinite(metrics.score(y, y.astype(float), units)["log_loss"]), "certain and right"


def test_every_resample_takes_whole_patients():
    units = np.array(["b", "a", "a", "c", "b", "c", "c"])
    itself, *resamples = metrics.bootstrap_weights(units, seed=0)
    assert (itself == 1).all() and len(resamples) == metrics.RESAMPLES
    weights = np.stack(resamples)
    for name in "abc":
        assert (weights[:, units == name].std(axis=1) == 0).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.1)


def test_alike_patches_of_a_patient_do_not_make_a_result_surer():
    y, p, units = simulated(40, 1)
    clustered, naive = metrics.score(y, p, units), metrics.score(y, p, np.arange(len(y)))
    assert clustered["auc_high"] - clustered["auc_low"] > 1.8 * (naive["auc_high"] - naive["auc_low"])


def test_a_resample_of_one_class_is_left_out():
    scores = metrics.score(np.array([0, 1, 1]), np.array([0.2, 0.3, 0.4]), np.arange(3))
    assert scores["auc"] == scores["auc_high"] == 1 and np.isfinite(list(scores.values())).all()


def test_a_perfect_score_on_few_patients_is_not_certain():
    y = np.arange(20) % 2
    few, many = (metrics.score(y, y.astype(float), units) for units in (np.arange(20) // 4, np.arange(20)))
    assert few["auc"] == few["accuracy"] == few["auc_high"] == 1
    assert few["auc_low"] == few["accuracy_low"] == pytest.approx(metrics.wilson(1, 5)[0])
    assert many["auc_low"] == pytest.approx(metrics.wilson(1, 10)[0]), "of the class that has fewer"


def test_a_perfect_size_matched_score_is_as_uncertain_as_its_pairs_are_few():
    y = np.repeat([1, 0], 100)
    size = np.where(y, 20.0, 5.0)
    size[-1] = 20
    score = metrics.score(y, y + 0.0, np.arange(200), diameters=size)
    assert score["matched_auc"] == 1 and score["matched_auc_low"] == pytest.approx(metrics.wilson(1, 1)[0])
    assert score["auc_low"] == pytest.approx(metrics.wilson(1, 100)[0])


def test_a_difference_that_no_resample_changes_is_not_sure():
    y, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.2, 0.8])
    told = metrics.paired(y, p, 1 - p, np.zeros(4))  # one patient: all resamples are the sample
    assert told == {"value": 1, "low": 0, "high": 1, "p_value": 1}
    assert metrics.paired(y, 1 - p, p, np.zeros(4)) == {"value": -1, "low": -1, "high": 0, "p_value": 1}


def test_a_resample_that_misses_a_fold_is_scored_on_the_others():
    rng = np.random.default_rng(0)
    fold, y = np.repeat(np.arange(5), 4), np.tile([1, 0, 0, 0], 5)  # one malignant patient in each fold
    p = rng.random(20)
    scores = metrics.score(y, p, np.arange(20), fold=fold)
    weights = metrics.bootstrap_weights(np.arange(20), 0)
    draws = [
        np.mean([roc_auc_score(y[on], p[on], sample_weight=w[on]) for k in range(5) if _both(y, w, on := fold == k)])
        for w in weights[1:]
        if any(_both(y, w, fold == k) for k in range(5))
    ]
    assert len(draws) > 900, "nearly all resamples count"
    assert [scores["auc_low"], scores["auc_high"]] == pytest.approx(np.percentile(draws, [2.5, 97.5]))


def _both(y, weights, rows):
    return len(np.unique(y[rows & (weights > 0)])) == 2


def test_intervals_repeat_for_a_seed():
    y, p, units = simulated(30, 2)
    assert metrics.score(y, p, units, 5) == metrics.score(y, p, units, 5) != metrics.score(y, p, units, 6)


def test_the_interval_is_that_of_an_independent_bootstrap():
    y, p, units = simulated(60, 0)
    rows = [np.flatnonzero(units == name) for name in np.unique(units)]

    def auc(drawn):
        taken = np.concatenate([rows[i] for i in drawn])
        return roc_auc_score(y[taken], p[taken])

    independent = bootstrap(
        (np.arange(len(rows)),),
        auc,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    ours = metrics.score(y, p, units)
    assert ours["auc_low"] == pytest.approx(independent.confidence_interval.low, abs=0.015)
    assert ours["auc_high"] == pytest.approx(independent.confidence_interval.high, abs=0.015)


def test_several_trainings_are_scored_by_their_mean():
    y, p, units = simulated(40, 3)
    worse = np.clip(p + np.random.default_rng(0).normal(0, 0.3, len(p)), 0.01, 0.99)
    first, second, both = (metrics.score(y, q, units) for q in (p, worse, np.stack([p, worse])))
    assert np.isclose(both["auc"], (first["auc"] + second["auc"]) / 2)
    assert both["auc_low"] < both["auc"] < both["auc_high"]


def test_a_paired_comparison_is_sharper_than_two_intervals():
    y, p, units = simulated(40, 4)
    worse = np.clip(p + np.random.default_rng(0).normal(0, 0.2, len(p)), 0.01, 0.99)
    difference = metrics.paired(y, p, worse, units)
    better, lesser = metrics.score(y, p, units), metrics.score(y, worse, units)
    assert np.isclose(difference["value"], better["auc"] - lesser["auc"])
    assert better["auc_low"] < lesser["auc_high"], "the two intervals overlap"
    assert difference["low"] > 0 and difference["p_value"] < 0.01, "yet the difference is plain"
    turned = metrics.paired(y, worse, p, units)
    assert np.isclose(turned["value"], -difference["value"]) and turned["p_value"] == difference["p_value"]


def test_equal_models_differ_by_chance_only_about_as_often_as_5_percent():
    false_alarms = 0
    for seed in range(200):
        y, p, units = simulated(80, seed)
        rng = np.random.default_rng(10_000 + seed)  # not the draws of the simulation itself
        noise = [np.repeat(rng.normal(0, 0.5, 80), 10) for _ in range(2)]  # alike within a patient
        first, second = (1 / (1 + np.exp(-(np.log(p / (1 - p)) + n))) for n in noise)
        false_alarms += metrics.paired(y, first, second, units, seed=seed)["p_value"] < 0.05
    assert 0.01 <= false_alarms / 200 <= 0.1


def test_no_difference_has_a_p_value_of_one():
    y, p, units = simulated(20, 5)
    assert metrics.paired(y, p, p, units) == {"value": 0, "low": 0, "high": 0, "p_value": 1}


def test_holm_is_the_textbook_example():
    assert np.allclose(metrics.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert metrics.holm(np.array([0.9, 0.8])).max() == 1


def test_the_size_matched_auc_counts_pairs_of_nearly_the_same_size():
    rng = np.random.default_rng(0)
    y, p, size = np.arange(40) % 2, np.round(rng.random(40), 1), rng.uniform(5, 15, 40)
    size[3] = np.nan
    weights = rng.integers(0, 3, (5, 40)).astype(float)
    for row, value in zip(weights, metrics.matched_auc(y, p, weights, size), strict=True):
        pairs = [(i, k) for i in np.flatnonzero(y == 1) for k in np.flatnonzero(y == 0)]
        pairs = [(i, k) for i, k in pairs if max(size[i], size[k]) <= 1.15 * min(size[i], size[k])]
        right = [row[i] * row[k] * ((p[i] > p[k]) + 0.5 * (p[i] == p[k])) for i, k in pairs]
        assert np.isclose(value, sum(right) / sum(row[i] * row[k] for i, k in pairs))
    assert np.isnan(metrics.matched_auc(y, p, weights, np.where(y, 30.0, 10.0))).all(), "no pair is alike in size"


def test_a_ruler_has_little_to_say_among_nodules_of_one_size():
    rng = np.random.default_rng(0)
    size = rng.lognormal(2, 0.6, 2000)
    y = (rng.random(2000) < 1 / (1 + np.exp(-4 * (np.log(size) - 2)))).astype(int)
    ruler = metrics.score(y, size, np.arange(2000), diameters=size)
    assert ruler["auc"] > 0.85 and 0.5 < ruler["matched_auc"] < 0.6
    texture = metrics.score(y, y + rng.normal(0, 1, 2000), np.arange(2000), diameters=size)
    assert texture["matched_auc"] == pytest.approx(texture["auc"], abs=0.04)
    gain = metrics.paired(y, y + rng.normal(0, 1, 2000), size, np.arange(2000), "matched_auc", diameters=size)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert "matched_auc" not in metrics.score(y, size, np.arange(2000))
    assert "matched_auc" not in metrics.score(y, size, np.arange(2000), diameters=np.where(y, 30.0, 10.0))


def test_in_cross_validation_each_fold_is_ranked_by_itself():
    y, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.8, 0.9])  # the second fold's scores are all higher
    assert metrics.score(y, p, np.arange(4))["auc"] == 0.75
    fold = np.array([0, 0, 1, 1])
    score = metrics.score(y, p, np.arange(4), fold=fold)
    assert score["auc"] == 1 and score["n"] == 4
    assert metrics.paired(y, p, p[::-1], np.arange(4), fold=fold)["value"] == 1


def test_a_mean_lies_in_its_interval_that_patients_widen():
    _, p, units = simulated(40, 0)
    mean, clustered = metrics.mean(p, np.arange(len(p))), metrics.mean(p, units)
    assert mean["value"] == clustered["value"] == pytest.approx(p.mean())
    assert clustered["low"] < mean["low"] < mean["value"] < mean["high"] < clustered["high"]


def test_the_confusion_matrix_counts_and_divides_by_the_truth():
    y, called = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    table = metrics.confusion(y, called, np.arange(6)).set_index(["truth", "called"])
    assert table["patches"].to_dict() == {
        ("benign", "benign"): 3,
        ("benign", "malignant"): 1,
        ("malignant", "benign"): 1,
        ("malignant", "malignant"): 1,
    }
    assert table.loc[("benign", "benign"), "value"] == 0.75 and table.loc[("malignant", "malignant"), "value"] == 0.5
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_curves_enclose_the_auc_and_their_bands_the_curves():
    y, p, units = simulated(60, 3)
    table = metrics.curves(y, p, units)
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


def test_each_model_is_compared_with_the_planned_ones_as_the_paired_bootstrap_does():
    y, p, units = simulated(40, 4)
    rng = np.random.default_rng(0)
    worse, coin = np.clip(p + rng.normal(0, 0.2, len(p)), 0.01, 0.99), rng.random(len(p))
    models = {"p": p, "worse": worse, "coin": coin}
    table = metrics.against(y, models, ["coin", "p"], units)
    assert table[["name", "other"]].values.tolist() == [["p", "coin"], ["worse", "coin"], ["worse", "p"]]
    assert table.iloc[2][["value", "low", "high", "p_value"]].to_dict() == metrics.paired(y, worse, p, units)
    assert np.array_equal(table["p_holm"], metrics.holm(table["p_value"].to_numpy()))


def test_a_known_difference_is_found_in_spite_of_many_comparisons():
    found = 0
    for seed in range(6):
        y, p, units = simulated(80, seed)
        rng = np.random.default_rng(10_000 + seed)
        coins = {f"coin {i}": rng.random(len(p)) for i in range(60)}
        worse = expit(np.log(p / (1 - p)) + np.repeat(rng.normal(0, 2, 80), 10))
        table = metrics.against(y, coins | {"worse": worse, "p": p}, ["p"], units, seed).set_index("name")
        found += table["p_holm"]["worse"] < 0.05
    assert found >= 5, "an AUC about 0.1 lower, beside sixty others"


def test_patches_taken_as_independent_make_a_comparison_too_sure():
    alarms = {"patients": 0, "patches": 0}
    for seed in range(100):
        y, p, units = simulated(60, seed)
        rng = np.random.default_rng(10_000 + seed)
        noise = [np.repeat(rng.normal(0, 1, 60), 10) for _ in range(2)]
        first, second = (expit(np.log(p / (1 - p)) + n) for n in noise)
        for name, resampled in (("patients", units), ("patches", np.arange(len(y)))):
            alarms[name] += metrics.paired(y, first, second, resampled, seed=seed)["p_value"] < 0.05
    assert alarms["patients"] <= 12 and alarms["patches"] >= 25


def test_a_rate_of_all_or_nothing_has_wilsons_interval():
    hits, units = np.column_stack([np.ones(12), np.zeros(12), np.arange(12) % 2]), np.repeat(np.arange(4), 3)
    table = metrics.rates(hits, np.ones_like(hits), units)
    assert table.loc[0, ["low", "high"]].tolist() == list(metrics.wilson(1.0, 4)) and table["high"][0] == 1
    assert table.loc[1, ["low", "high"]].tolist() == list(metrics.wilson(0.0, 4)) and table["high"][1] > 0.4
    assert table.iloc[2].equals(metrics.shares(hits, np.ones_like(hits), units).iloc[2])
    assert np.allclose(metrics.wilson(0.5, 10), (0.2366, 0.7634), atol=1e-4)


def test_shares_are_ratios_of_sums_and_empty_where_nothing_is_counted():
    numerator, denominator = np.array([[1, 0], [0, 0], [1, 0.0]]), np.array([[1, 0], [1, 0], [1, 0.0]])
    table = metrics.shares(numerator, denominator, np.arange(3))
    assert table["value"].tolist()[0] == pytest.approx(2 / 3) and table.iloc[1].isna().all()
    assert table["low"][0] < 2 / 3 < table["high"][0]


def test_repeated_splits_are_less_sure_than_their_number():
    values = np.random.default_rng(0).normal(0.05, 0.02, 15)
    interval = metrics.over_repeats(values, 1 / 9)
    naive = student.ppf(0.975, 14) * values.std(ddof=1) / np.sqrt(15)
    assert interval["value"] == pytest.approx(values.mean())
    assert interval["high"] - interval["value"] == pytest.approx(naive * np.sqrt(1 + 15 / 9))
    assert interval["high"] - interval["value"] == pytest.approx(interval["value"] - interval["low"])
