"""Experiments on small worlds whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from nodules.data import split
from nodules.data.split import Part
from nodules.evaluation import experiments, metrics
from nodules.networks import bank, bodies, heads


@pytest.fixture(scope="module")
def world():
    """Patients whose slices share a fingerprint that says nothing of the label, and a weak true sign."""
    rng = np.random.default_rng(0)
    patients, slices = 150, 6
    patient = np.repeat(np.arange(patients), slices)
    y = np.repeat(rng.integers(0, 2, patients), slices)
    fingerprint = rng.normal(0, 3, (patients, 40))[patient]
    x = np.column_stack([y + rng.normal(0, 1.5, len(y)), fingerprint + rng.normal(0, 0.3, fingerprint.shape)])
    names = [f"p{number:03d}" for number in patient]
    table = pd.DataFrame({"id": [f"{i:04d}" for i in range(len(y))], "malignant": y, "group": names, "nodule": names})
    return x, table


@pytest.fixture(scope="module")
def strong():
    """The quick model with less restraint, so that a small world can leak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "STRENGTH", 1.0)
        yield


def test_shuffling_adds_what_a_fingerprint_gives_away_and_more_slices_give_more(world, strong):
    x, table = world
    scores = experiments.leakage(x, table, [1, 6], repeats=15, seed=0)
    assert len(scores) == 2 * 15 * 2 and set(metrics.METRICS) < set(scores)
    assert scores["ratio"].between(0.1, 0.16).all(), "a tenth is tested, and eight tenths are learned from"
    gain = experiments.inflation(scores).query("arm == 'gain'").set_index(["metric", "slices"])
    for name in ("AUC", "accuracy", "log-loss"):
        assert gain.loc[(name, 6), "low"] > 0, f"{name} leaks"
        assert gain.loc[(name, 1), "low"] < 0 < gain.loc[(name, 1), "high"], f"{name}: one slice a patient cannot leak"
    assert gain.loc[("AUC", 6), "value"] > 0.1


def test_the_two_arms_have_the_same_counts(world):
    _, table = world
    parts = split.assign(table.assign(patient=table["group"]), "patient", 3)["split"].to_numpy()
    y = table["malignant"].to_numpy()
    dealt = split.dealt(parts, y, 3)
    assert pd.crosstab(parts, y).equals(pd.crosstab(dealt, y)) and (dealt != parts).any()
    assert table.assign(part=dealt).groupby("group")["part"].nunique().max() > 1
    assert (split.dealt(parts, y, 3) == dealt).all() and (split.dealt(parts, y, 4) != dealt).any()


def test_components_are_white_and_see_no_label(world):
    features = bank.Bank(np.random.default_rng(0).normal(size=(200, 2, 30)).astype(np.float16), "", 1.0)
    x = experiments.components(features, 0)
    assert x.shape == (200, 30)
    assert np.allclose(np.cov(x.T), np.eye(30), atol=0.02) and np.allclose(x, experiments.components(features, 0))


def test_more_patients_help_and_the_curve_is_scored_on_test(world, strong):
    _, table = world
    weak = np.random.default_rng(0).normal(0, 4, (len(table), 40))  # forty weak signs of the label
    x = weak + table[["malignant"]].to_numpy()
    sides = split.assign(table.assign(patient=table["group"]), "patient", 0)["split"].to_numpy()
    y, patient = table["malignant"].to_numpy(), table["group"].to_numpy()
    parts = split.divide(Part(np.zeros((len(y), 64, 64)), y, np.arange(len(y)), table, patient), sides)
    train_patients = len(np.unique(parts.train.units))
    curve, errors = experiments.learning_curve(x, parts, [10, 40, train_patients], repeats=5, seed=0)
    assert errors.shape == (1 + metrics.RESAMPLES, 3) and curve["value"].is_monotonic_increasing
    assert np.allclose(1 - errors[0], curve["value"])
    assert np.allclose(1 - np.nanpercentile(errors[1:], [97.5, 2.5], axis=0), curve[["low", "high"]].T)
    p = experiments.quick(x[sides == "train"], y[sides == "train"], x[sides == "test"])
    assert curve["value"].iloc[-1] == pytest.approx(roc_auc_score(y[sides == "test"], p))
    assert ((curve["low"] < curve["value"]) & (curve["value"] < curve["high"])).all()


def test_a_power_law_is_found_again_and_carried_on():
    sizes, rng = np.array([20, 50, 125, 310, 780]), np.random.default_rng(0)

    def truth(n):
        return 0.05 + 0.3 * (n / 20) ** -0.6

    errors = truth(sizes) + np.vstack([np.zeros(5), rng.normal(0, 0.002, (20, 5))])
    law = experiments.extrapolate(sizes, errors, np.array([780, 3120]))
    assert np.allclose(law["value"], 1 - truth(law["x"]), atol=0.005)
    assert ((law["low"] < law["value"]) & (law["value"] < law["high"])).all()


def shifted(rng, n=120):
    """Patches of 40 patients as they were and under one shift of severity 1 and 2."""
    about = pd.DataFrame({"shift": ["as it was"] * n + ["fog"] * 2 * n, "severity": np.repeat([0, 1, 2], n)})
    y, units = np.tile(np.arange(n) % 2, 3), np.tile(np.arange(n) // 3, 3)
    noise = np.repeat([0.3, 0.8, 2.0], n) * rng.normal(size=3 * n)
    return about, y, units, 1 / (1 + np.exp(-(2 * y - 1 + noise)))


def test_a_model_falls_with_severity_and_starts_as_it_was():
    about, y, units, p = shifted(np.random.default_rng(0))
    table = experiments.by_severity(about, y, p, units, 0, {"auc": "AUC", "calibration_error": "calibration error"})
    auc = table[table["metric"] == "AUC"].set_index("x")["value"]
    assert list(auc.index) == [0, 1, 2] and auc[0] > auc[1] > auc[2]
    assert auc[2] == pytest.approx(roc_auc_score(y[240:], p[240:])) and set(table["shift"]) == {"fog"}


def test_what_a_recipe_gains_is_the_mean_over_severities_and_seeds():
    rng = np.random.default_rng(1)
    about, y, units, p = shifted(rng)
    worse = np.stack([1 / (1 + np.exp(-(np.log(p / (1 - p)) + rng.normal(0, 2, len(p))))) for _ in range(2)])
    fog = about[about["severity"] > 0]
    recipes = {"none": worse, "good": p[None], "same": worse}
    table = experiments.gains(fog, y, recipes, units, 0, "none").set_index("row")
    blocks = [slice(120, 240), slice(240, 360)]
    by_hand = np.mean([roc_auc_score(y[b], p[b]) - np.mean([roc_auc_score(y[b], w[b]) for w in worse]) for b in blocks])
    assert table.loc["good", "value"] == pytest.approx(by_hand) and table.loc["good", "low"] > 0
    assert (table.loc["same", ["value", "low", "high"]] == 0).all() and list(table.index) == ["good", "same"]
    assert table["p_value"]["same"] == 1 and table["p_holm"]["good"] == 2 * table["p_value"]["good"] < 0.05


def test_heads_of_each_augmentation_learn_the_same_task(tmp_path, monkeypatch):
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(experiments, "ABLATION_SEEDS", 2)
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    images = rng.normal(-700, 100, (60, 64, 64))
    images[y == 1, 24:40, 24:40] += 500
    images = images.astype(np.int16)
    table = pd.DataFrame({"id": np.arange(60).astype(str), "malignant": y})
    source = np.concatenate([np.zeros((40, 64, 64), np.int16), images])
    part = Part(source, y, 40 + np.arange(60), table, table["id"].to_numpy())  # the last of more patches
    body = bodies.build(bodies.Spec("resnet10t", "random"), "HU")
    features = bank.compute(body, images)
    calls, train = [], heads.train
    monkeypatch.setattr(heads, "train", lambda *given: calls.append(given) or train(*given))
    for kind in ("none", "blur"):
        models = experiments.ablation_heads(body, part, "all", kind, seed=5)
        assert calls[-1][2].augment == (kind != "none"), "else an augmentation is computed, and never seen"
        p = experiments.predict(models, features, np.arange(60))
        assert p.shape == (2, 60) and min(roc_auc_score(y, of_head) for of_head in p) > 0.9
        assert not np.allclose(p[0], p[1]), "each seed has its own head"
    assert [seed for *_, seed in calls] == [5, 6] * 2


@pytest.mark.parametrize("patients", [60, 120])
def test_the_simulated_model_is_as_good_as_it_says(patients):
    drawn = [experiments.simulate(patients, 5, seed) for seed in range(400)]
    truth = drawn[0][3]
    assert np.mean([roc_auc_score(y, p) for y, p, _, _ in drawn]) == pytest.approx(truth["auc"], abs=0.004)
    assert np.mean([((p >= 0.5) == y).mean() for y, p, _, _ in drawn]) == pytest.approx(truth["accuracy"], abs=0.005)
    assert truth["auc"] == pytest.approx(stats.norm.cdf(2 / np.sqrt(2 * (1 + 0.09))))


def test_95_percent_intervals_over_patients_hold_the_truth_as_promised_and_over_patches_do_not():
    table = experiments.coverage(patients=120, slices=3, simulations=500, seed=0).set_index(["part", "name"])
    assert table.loc["patients", "value"].between(0.93, 0.97).all()
    assert (table.loc["patches", "value"] < 0.87).all()
    assert ((table["low"] < table["value"]) & (table["value"] < table["high"])).all()
