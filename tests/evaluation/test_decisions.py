"""From a probability to a decision, on labels drawn from known probabilities."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from nodules.evaluation import decisions, experiments, localisation, metrics


def drawn(n, seed, sharpness=1.0):
    """Calibrated probabilities and labels drawn from them; then logits sharpened, as by a model too sure."""
    rng = np.random.default_rng(seed)
    p = expit(rng.normal(0, 1.5, n))
    return (rng.random(n) < p).astype(int), expit(sharpness * logit(p))


def ids(y):
    """Each patch a unit of its own, as where patients are unknown."""
    return np.arange(len(y))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_model_too_sure(sharpness):
    y, p = drawn(20_000, 0, sharpness)
    temperature = decisions.temperature(y, p)
    assert temperature == pytest.approx(sharpness, rel=0.06)
    calm = decisions.tempered(p, temperature)
    ones = np.ones((1, len(y)))
    assert metrics.calibration_error(y, calm, ones, ids(y)) < 0.02 and metrics.log_loss(
        y, calm, ones
    ) <= metrics.log_loss(y, p, ones)
    assert roc_auc_score(y, calm) == pytest.approx(roc_auc_score(y, p))


def test_certain_predictions_are_calmed_without_infinities():
    assert np.isfinite(decisions.tempered(np.array([0.0, 1.0]), 2)).all()


def test_a_calibrated_model_lies_on_the_diagonal_and_a_sharpened_one_does_not():
    y, p = drawn(8000, 1)
    table = decisions.reliability(y, p, ids(y), 0)
    assert len(table) == metrics.BINS and table["patches"].sum() == 8000 and table["patches"].std() < 2
    assert ((table["low"] <= table["x"]) & (table["x"] <= table["high"])).sum() >= 7
    sharp = decisions.reliability(y, expit(3 * logit(p)), ids(y), 0)
    assert ((sharp["low"] > sharp["x"]) | (sharp["high"] < sharp["x"])).sum() >= 5


def test_few_distinct_probabilities_make_fewer_bins():
    table = decisions.reliability(np.array([0, 1, 1, 0]), np.array([0.2, 0.2, 0.9, 0.9]), np.arange(4), 0)
    assert table["x"].tolist() == pytest.approx([0.2, 0.9]) and table["value"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("n", [40, 301])
def test_a_threshold_reaches_the_rate_and_gives_away_no_more_than_it_must(wanted, decimals, n):
    y, p = drawn(n, 2)
    y[: n // 4], y[n // 4 : n // 2] = 0, 1  # of 40, ten of a class are enough for nine tenths to be a whole number
    p = np.round(p, decimals)
    rates = {
        "sensitivity": lambda t: ((p[y == 1] >= t).mean(), (p[y == 0] < t).mean()),
        "specificity": lambda t: ((p[y == 0] < t).mean(), (p[y == 1] >= t).mean()),
    }
    for rate, both in rates.items():
        reached, given = both(decisions.threshold(y, p, rate, wanted))
        options = [both(t) for t in [*np.unique(p), 2.0]]
        assert reached >= wanted and given == max(g for r, g in options if r >= wanted)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 30))
def test_no_threshold_beats_the_chosen_one(seed, n):
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)])
    p = np.round(rng.random(n), 1)

    def sum_of_rates(threshold):
        return (p[y == 1] >= threshold).mean() + (p[y == 0] < threshold).mean()

    chosen = decisions.youden(y, p)
    assert np.isfinite(chosen)
    assert sum_of_rates(chosen) == pytest.approx(max(sum_of_rates(t) for t in [*np.unique(p), 2.0]))


def test_operating_points_are_chosen_on_valid_and_measured_on_test():
    valid, test = drawn(4000, 3), drawn(4000, 4)
    table = decisions.operating_points(valid, test, ids(test[0]), 0).set_index(["name", "part"])
    line = table.loc[("specificity 90% on valid", "specificity"), "threshold"]
    assert (valid[1][valid[0] == 0] < line).mean() == pytest.approx(0.9, abs=0.001)
    measured = table.loc[("specificity 90% on valid", "specificity")]
    assert measured["value"] == (test[1][test[0] == 0] < line).mean() != 0.9
    assert measured["low"] < 0.9 < measured["high"]
    assert len(table) == 2 * 2 * len(decisions.RATES)


def test_the_net_benefit_is_that_of_the_formula():
    y, p = drawn(500, 5)
    table = decisions.net_benefit(y, p, ids(y), 0).set_index("x")
    for t in (decisions.THRESHOLDS[6], decisions.THRESHOLDS[20]):
        true, false = ((p >= t) & (y == 1)).sum(), ((p >= t) & (y == 0)).sum()
        assert table.loc[t, "value"] == pytest.approx(true / 500 - false / 500 * t / (1 - t))
    everybody = decisions.net_benefit(y, np.ones(500), ids(y), 0)
    t = decisions.THRESHOLDS
    assert np.allclose(everybody["value"], y.mean() - (1 - y.mean()) * t / (1 - t))


def test_conformal_sets_hold_the_truth_as_often_as_promised():
    rates = []
    for seed in range(1000):
        y, p = drawn(200, seed, sharpness=3)  # the promise does not need a calibrated model
        sets = decisions.conformal((y[:100], p[:100]), p[100:])
        rates.append(sets[np.arange(100), y[100:]].mean())
    assert 0.895 <= np.mean(rates) <= 0.915, "at least 0.9, at most 1 / 101 more"


def test_the_conformal_line_is_the_rank_that_the_theorem_names():
    y, p = np.zeros(99, int), np.arange(1, 100) / 100
    assert decisions.conformal_line(y, p, 0.1) == 0.9, "the 90th of 99"
    assert decisions.conformal_line(y[:9], p[:9], 0.1) == 0.09, "the 9th of 9"


def test_too_few_patches_to_promise_anything_leave_both_classes_possible():
    assert decisions.conformal((np.array([0, 1]), np.array([0.1, 0.9])), np.array([0.01, 0.99])).all()


def test_coverage_counts_by_class_and_by_what_is_named():
    y = np.array([0, 0, 1, 1])
    sets = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=bool)
    table = decisions.coverage(y, sets, ids(y), 0).set_index("name")["value"]
    assert table.tolist() == [0.75, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_silence_on_the_unsure_raises_accuracy():
    y, p = drawn(3000, 6)
    table = decisions.abstention(y, p, ids(y), 0).set_index("x")
    assert table.loc[1.0, "value"] == ((p >= 0.5) == (y == 1)).mean()
    assert table["value"].iloc[0] > table["value"].iloc[8] > table["value"].iloc[-1]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def compared(models, y, units):
    """The gains of each other model over the incumbent, as the notebook on architectures computes them."""
    others = [name for name in models if name != "incumbent"]
    gains = [metrics.paired(y, models[name], models["incumbent"], units) for name in others]
    return pd.DataFrame(gains, index=others, columns=["value", "p_value"])


def test_only_a_sure_difference_replaces_the_incumbent():
    y, p = drawn(2000, 7)
    noise = np.random.default_rng(0).normal(0, 1, (3, len(y)))
    alike, worse = (expit(logit(p) + spread * n) for spread, n in zip((0.1, 2), noise[:2], strict=True))

    def choose(**models):
        return decisions.challenged("incumbent", compared(models, y, ids(y)))

    assert choose(incumbent=alike, other=p, worse=worse) == "incumbent"
    assert choose(incumbent=worse, other=p, third=alike) in ("other", "third")
    assert choose(incumbent=p) == "incumbent", "there is no other"


def test_the_choice_is_the_same_on_machines_that_round_otherwise():
    y, p = drawn(600, 8)
    rng = np.random.default_rng(1)
    models = {name: expit(logit(p) + rng.normal(0, 0.3, len(y))) for name in ("incumbent", "b", "c", "d")}
    models["better"] = expit(logit(p) + 2 * (2 * y - 1) + rng.normal(0, 0.3, len(y)))
    for rivals, chosen in (("bcd", "incumbent"), (["b", "c", "better"], "better")):
        for _ in range(20):
            rounded = {n: models[n] + rng.normal(0, 2e-3, len(y)) for n in ("incumbent", *rivals)}
            assert decisions.challenged("incumbent", compared(rounded, y, ids(y))) == chosen


def by_severity(y, p, units):
    about = pd.DataFrame({"shift": np.where(y == 1, "noise", "as it was"), "severity": y})
    truth = (p > np.median(p)).astype(int)
    return experiments.by_severity(about, truth, p, units, 0, {"auc": "AUC"})


def erased(y, p, units):
    return localisation.erasure_curves({"map": {"deletion": np.outer(p, localisation.SHARES)}}, units, 0)


@pytest.mark.parametrize(
    "measure",
    [
        lambda y, p, units: decisions.reliability(y, p, units, 0),
        lambda y, p, units: decisions.operating_points((y, p), (y, p), units, 0),
        lambda y, p, units: decisions.net_benefit(y, p, units, 0),
        lambda y, p, units: decisions.coverage(y, np.column_stack([p < 0.6, p > 0.4]), units, 0),
        lambda y, p, units: decisions.abstention(y, p, units, 0),
        lambda y, p, units: metrics.confusion(y, (p > 0.5).astype(int), units),
        lambda y, p, units: metrics.curves(y, p, units),
        by_severity,
        erased,
    ],
)
def test_more_patches_of_the_same_patients_make_nothing_surer(measure):
    y, p = drawn(100, 3)
    once, ninefold = measure(y, p, ids(y)), measure(*(np.repeat(values, 9) for values in (y, p, ids(y))))
    assert np.allclose(once[["low", "high"]], ninefold[["low", "high"]]) and (once["high"] > once["low"]).any()
