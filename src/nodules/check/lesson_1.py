"""Exercises on the data: windows, the AUC, splits by patient, and what guessing gives."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nodules.check.answers import array, called, choice, close, fields, given, number, require, right
from nodules.data import patches
from nodules.data.patches import Patches
from nodules.evaluation import metrics


def exercise_1_1(answer: Any) -> None:
    """The grey level of -300 HU in the window from -1000 to 400 HU."""
    require(number(answer) != -300, "that is the Hounsfield unit itself; where does it lie in the window, from 0 to 1?")
    close(answer, 0.5, "subtract the lower end, then divide by the width of the window, 1400 HU")
    right("-300 HU lies in the middle of this window, so it is shown as mid-grey.")


def exercise_1_2(auc: Callable) -> None:
    """The AUC by counting pairs, ties as a half."""
    y, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    value = number(called(auc, y, p))
    require(value != 0.25, "0.25 where three of four pairs are in order: you count the pairs that are not")
    close(value, 0.75, "of the pairs of y=[0, 0, 1, 1], p=[.1, .4, .35, .8] three of four are in order")
    tied = number(called(auc, np.array([0, 1]), np.array([0.5, 0.5])))
    close(tied, 0.5, "a pair of equal probabilities is neither right nor wrong: count it as a half")
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 60), rng.integers(0, 9, 60) / 8
    close(called(auc, y, p), metrics.auc(y, p, np.ones((1, 60)))[0], "it differs from the library on 60 random patches")
    right("the same as the library's. Only the order of the probabilities matters, not their size.")


def exercise_1_3(split: Callable) -> None:
    """A test set that shares no patient with the rest."""
    patients = np.repeat([f"p{i:02d}" for i in range(50)], np.arange(1, 51) % 7 + 1)
    for share in (0.2, 0.5):
        test = np.asarray(called(split, patients, share, 0))
        hint = "you return patients; asked is True or False for each patch (np.isin)"
        require(test.dtype.kind not in "USO", hint)
        test = array(test, patients.shape).astype(bool)
        shared = set(patients[test]) & set(patients[~test])
        require(not shared, f"{len(shared)} patients are on both sides: draw patients, then take all their patches")
        drawn, asked = len(set(patients[test])), round(share * 50)
        hint = (
            f"{drawn} of 50 patients are drawn for a share of {share}, not {asked}: draw that many, each at most once"
        )
        require(abs(drawn - asked) <= 1, f"{hint} (replace=False)")
    test = np.asarray(called(split, patients, 0.2, 0)).astype(bool)
    again, other = (np.asarray(called(split, patients, 0.2, seed)).astype(bool) for seed in (0, 1))
    require((again == test).all(), "the same seed gives another split; use np.random.default_rng(seed)")
    require((other != test).any(), "another seed gives the same split; draw the patients at random")
    right("no patient is on both sides. The patches may be a little more or fewer than a fifth; the patients are not.")


def exercise_1_4(answer: Any, ct: Patches) -> None:
    """The share of pixels that the soft-tissue window shows as plain black, and what is lost in it."""
    share, lost = given(answer, tuple)
    black, white = (ct.images <= -160).mean(), (ct.images >= 240).mean()
    require(abs(number(share) - white) > 1e-6, "that is the share of plain white; black is below the lower end")
    require(not 1 < number(share) <= 100, "give the share as a number from 0 to 1, not in percent")
    close(share, black, "count the pixels of ct.images at or below -160 HU, and divide by that of all pixels", 1e-3)
    wrong = {
        "a": "bone is above 300 HU: white in this window, not black",
        "c": "vessels and solid nodules are soft tissue, between -160 and 240 HU: this window is made for them",
    }
    choice(lost, "b", wrong)
    right(f"{black:.0%} of the pixels are plain black: air and lung. A faint, ground-glass nodule would vanish too.")


def exercise_1_5(answer: Any) -> None:
    """Always saying "benign" where 1 nodule in 20 is malignant."""
    answer = fields(answer, {"accuracy", "sensitivity", "missed"})
    close(answer["accuracy"], 0.95, "of 1000 nodules 950 are benign, and all of these are called right")
    close(answer["sensitivity"], 0, "sensitivity is the share of malignant nodules that are called malignant; none is")
    close(answer["missed"], 50, "5% of 1000 nodules are malignant, and every one of them is called benign")
    right("an accuracy of 0.95, like the report's, from a rule that misses every cancer. Ask for the prevalence first.")


def exercise_1_6(feature: Callable) -> None:
    """A feature of the pixels alone that separates the classes on patients whom the student has not seen."""
    seen, more = (patches.read("phantom", 600, seed=seed) for seed in (0, 1))
    unseen = ~more.table["patient"].isin(seen.table["patient"]).to_numpy()
    y = more.table["malignant"].to_numpy()[unseen]
    values = array(called(feature, more.images[unseen]), y.shape).astype(float)
    require(np.isfinite(values).all(), "some values are not finite")
    require(len(np.unique(values)) > 1, "your feature is the same for every patch")
    reached = metrics.auc(y, values, np.ones((1, len(y))))[0]
    require(reached > 0.4, f"AUC {reached:.2f}: below chance. Turn the sign, so that malignant patches get high values")
    require(reached >= 0.75, f"AUC {reached:.2f}; 0.75 is asked for. How much bright tissue is in the middle?")
    right(f"AUC {reached:.2f} on {len(y)} patches of other patients, with one number a patch. No network yet.")
