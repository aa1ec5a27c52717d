import numpy as np
import pandas as pd
import pytest

from nodules.report import spread

SPLITS = np.repeat(np.arange(5), 5)


def simulated(rng, seeds, splits, of_patients=0.0, split=SPLITS):
    """Results around 0: chance of each run, of each split, and of the patients that all runs share."""
    of_split = rng.normal(0, splits, split.max() + 1)
    return rng.normal(0, seeds, len(split)) + of_split[split] + rng.normal(0, of_patients)


def test_the_components_of_a_balanced_design_are_those_of_an_analysis_of_variance():
    values, split = np.array([1.0, 3.0, 2.0, 6.0, 5.0, 7.0]), np.array([0, 0, 1, 1, 2, 2])
    # Means 2, 4, 6: between 2 (4 + 0 + 4) / 2 = 8; within (2 + 8 + 2) / 3 = 4; over splits (8 - 4) / 2
    assert spread.components(values, split) == pytest.approx((2.0, np.sqrt(2.0)))


@pytest.mark.parametrize("split", [SPLITS, np.repeat(np.arange(4), [1, 2, 5, 12])], ids=["balanced", "unbalanced"])
def test_the_components_are_found_again(split):
    rng = np.random.default_rng(0)
    found = [spread.components(simulated(rng, 1.0, 2.0, split=split), split) for _ in range(4000)]
    variances = np.square(found).mean(0)
    assert variances[0] == pytest.approx(1.0, rel=0.05)
    assert variances[1] == pytest.approx(4.0, rel=0.08)


def test_what_nothing_tells_of_is_unknown():
    values = np.array([0.1, 0.2, 0.3])
    assert np.isnan(spread.components(values, np.arange(3))[0]), "one seed in each split"
    of_seeds, of_splits = spread.components(values, np.zeros(3, int))
    assert of_seeds == pytest.approx(0.1)
    assert np.isnan(of_splits), "one split"


@pytest.mark.parametrize(
    ("seeds", "splits", "of_patients"), [(1.0, 1.0, 1.0), (1.0, 0.0, 0.3), (0.2, 2.0, 0.5), (0.0, 0.0, 1.0)]
)
def test_the_interval_of_the_mean_holds_what_it_promises(seeds, splits, of_patients):
    rng = np.random.default_rng(0)
    ends = [spread.mixed(simulated(rng, seeds, splits, of_patients), SPLITS, of_patients, 1.0) for _ in range(3000)]
    covered = np.mean([low <= 0 <= high for low, high in ends])
    assert 0.935 < covered < 0.99, "never too narrow; wider where a spread of 0 is hard to tell from a small one"


def test_the_interval_holds_where_each_split_tests_other_patients():
    rng, covered = np.random.default_rng(0), []
    for _ in range(2000):
        everybody = rng.normal(0, 1, 300)
        of_split = np.array([rng.choice(everybody, 30, replace=False).mean() for _ in range(5)])
        values = of_split[SPLITS] + rng.normal(0, 0.05, len(SPLITS))
        low, high = spread.mixed(values, SPLITS, 1 / np.sqrt(30), 30 / 300)
        covered.append(low <= 0 <= high)
    assert 0.93 < np.mean(covered) < 0.985


def test_no_number_of_splits_averages_out_the_patients():
    low, high = spread.mixed(np.full(25, 0.9), SPLITS, 0.04, 0.25)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.04 * 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([(0.1, 0.2), (0.1, 0.3), (0.2, 0.3)], "above 0 in every run"),
        ([(-0.2, -0.1), (-0.3, -0.1)], "below 0 in every run"),
        ([(0.1, 0.2), (0.1, 0.3), (-0.1, 0.3)], "often above 0"),
        ([(-0.2, -0.1), (-0.3, -0.1), (-0.1, 0.3)], "often below 0"),
        ([(0.1, 0.2), (0.1, 0.2), (-0.2, -0.1)], "flips"),
        ([(0.1, 0.2), (-0.1, 0.2)], "open"),
        ([(0.0, 0.2), (0.0, 0.2)], "open"),
    ],
)
def test_a_finding_holds_where_the_interval_of_each_run_says_so(ends, verdict):
    table = pd.DataFrame(ends, columns=["low", "high"]).assign(fact="gain", name="a gain")
    held = spread.verdicts(table.assign(value=table.mean(axis=1, numeric_only=True)))
    assert list(held["verdict"]) == [verdict]
    assert held[["above", "below"]].sum(axis=1).item() <= held["runs"].item() == len(ends)


def run_of(split_seed, seed, value, **varied):
    row = {"name": "network, 5 folds, nodules", "counted": "nodules", "n": 10, "split_seed": split_seed, "seed": seed}
    row |= {"auc": value, "auc_low": value - 0.1, "auc_high": value + 0.1, "accuracy": 0.8}
    seeds = {"split_seed": split_seed, "seed": seed}
    facts = {"gain_nodules": value - 0.8, "gain_nodules_low": value - 0.82, "gain_nodules_high": value - 0.78}
    return {
        **{"rows": [row], "card": {"nodules": 10, "patches": 40}, "facts": {"06_picture_or_ruler": facts}},
        **{"varied": seeds | varied, "parameters": seeds | varied},
    }


def test_results_are_gathered_by_name_and_by_what_is_varied_beside_seeds():
    runs = [run_of(k, i, 0.8 + 0.01 * k + 0.001 * i, folds=f) for k in range(2) for i in range(2) for f in (2, 5)]
    table = spread.summary(spread.rows(runs)).set_index("name")
    assert set(table.index) == {f"network, 5 folds, nodules (folds {f})" for f in (2, 5)}
    assert set(table["metric"]) == {"AUC"}, "an accuracy without an interval is no result"
    each = table.loc["network, 5 folds, nodules (folds 5)"]
    assert each["runs"] == 4
    assert each[["mean", "one", "least", "most"]].tolist() == pytest.approx([0.8055, 0.1, 0.8, 0.811])
    assert each["low"] < 0.7055 < 0.9055 < each["high"], "wider than one run's interval"


def test_findings_carry_their_fact():
    found = spread.findings([run_of(3, 1, 0.9), run_of(3, 2, 0.7)])
    assert set(found["fact"]) == {"gain_nodules"}
    assert spread.verdicts(found)["verdict"].tolist() == ["flips"]
