"""Exercises on intervals, near-duplicates, leakage and comparisons."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm

from nodules.check.answers import array, called, choice, close, given, number, require, right
from nodules.data import duplicates
from nodules.data.patches import Patches
from nodules.evaluation import metrics

WINDOW = -1000, 400  # HU


def exercise_8_1(wilson: Callable, claim: Any) -> None:
    """Wilson's interval of the report's accuracy, and what it does not hold."""
    low, high = array(called(wilson, 20, 20), (2,))
    require(high > low, "20 of 20 right gives an interval of no width. Is that certain? Keep the terms with z squared")
    for hits, n in ((20, 20), (3, 5), (636, 669)):
        low, high = array(called(wilson, hits, n), (2,))
        require(low < high, f"for {hits} of {n} the lower end is not below the upper one; return low, high")
        expected = metrics.wilson(hits / n, n)
        near = np.allclose([low, high], expected, atol=1e-3)
        about = f"{expected[0]:.3f} to {expected[1]:.3f}"
        require(near, f"{hits} of {n}: {low:.3f} to {high:.3f}, but scipy says {about}; is z 1.96, and all divided?")
    wrong = {
        "a": "any share of a sample has one: other patches would have given another share",
        "c": "a narrower one would promise still more. With several slices of a patient it should be wider",
    }
    choice(claim, "b", wrong)
    right(f"{low:.3f} to {high:.3f}, if all 669 patches were independent. No interval makes up for the wrong patches.")


def exercise_8_2(bootstrap: Callable, values: np.ndarray, patient: np.ndarray) -> None:
    """The bootstrap by units: patients, or patches."""
    widths = {}
    for what, units in (("patients", patient), ("patches", np.arange(len(values)))):
        low, high = array(called(bootstrap, values, units, 0), (2,))
        require(low < values.mean() < high, f"{low:.3f} to {high:.3f} does not hold the mean, {values.mean():.3f}")
        widths[what] = high - low
        expected = metrics.mean(values, units)
        of_library = expected["high"] - expected["low"]
        ratio = widths[what] / of_library
        told = f"units are {what}: the interval is {ratio:.2f} times as wide as the library's"
        hint = "take a unit twice if it is drawn twice, and use the 2.5th and the 97.5th percentile"
        if what == "patients" and ratio < 0.7:
            hint = "did you draw patches? Draw names of units, then take all patches of each"
        require(0.85 < ratio < 1.15, f"{told}; {hint}")
    again, other = (np.asarray(called(bootstrap, values, patient, seed)) for seed in (0, 1))
    same = (again == called(bootstrap, values, patient, 0)).all()
    require(same, "the same seed gives another interval; draw with np.random.default_rng(seed)")
    require((again != other).any(), "another seed gives the same interval; draw with np.random.default_rng(seed)")
    wider = widths["patients"] / widths["patches"]
    right(f"by patients the interval is {wider:.1f} times as wide as by patches, which claims more than it knows.")


def exercise_8_3(coverage: Callable, why: Any) -> None:
    """How often intervals hold the truth, by patients and by slices, at 4 and at 16 slices."""
    by_slices = {}
    for slices in (4, 16):
        patients, by_slices[slices] = array(called(coverage, slices), (2,))
        require(patients <= 1 and by_slices[slices] <= 1, "give shares from 0 to 1, not counts or percent")
        # half of the variance is shared, so the variance of the mean is this many times what independence promises
        inflation = 1 + (slices - 1) / 2
        expected = 2 * norm.cdf(1.96 / np.sqrt(inflation)) - 1
        swapped = abs(patients - expected) < 0.04 and by_slices[slices] > 0.9
        require(not swapped, "the two are swapped: first by the means of patients, then by all slices")
        told = f"{slices} slices:"
        require(abs(patients - 0.945) < 0.03, f"{told} {patients:.2f} by patients is not it; average axis 1 first")
        hint = "is not it; give interval all slices, as one flat array, and count low <= 0 <= high"
        require(abs(by_slices[slices] - expected) < 0.05, f"{told} {by_slices[slices]:.2f} by slices {hint}")
    wrong = {
        "a": "the mean gets a little better: its variance is (1 + 1 / slices) / 50",
        "b": "the share of 1000 worlds is known to 0.03; it fell by ten times as much",
    }
    choice(why, "c", wrong)
    fell = f"{by_slices[4]:.0%} with 4 slices, {by_slices[16]:.0%} with 16"
    right(f"an interval over slices holds the truth in {fell}, where it promises 95%.")


def exercise_8_4(alike: Callable, share: Any, ct: Patches) -> None:
    """The correlation at the best shift, and how many neighbouring slices are near-duplicates."""
    images = ct.images[[0, 1, 30, 300]].clip(*WINDOW).astype(float)
    itself = number(called(alike, images[0], images[0]))
    close(itself, 1, "the correlation of an image with itself is 1: subtract its mean, divide by its norm", 1e-3)
    moved = number(called(alike, images[0], np.roll(images[0], (3, -5), axis=(0, 1))))
    close(moved, 1, "of an image moved by 3 and -5 pixels: try all shifts, both ways and along both axes", 1e-3)
    brighter = number(called(alike, images[0], images[1] + 500))
    plain = number(called(alike, images[0], images[1]))
    close(brighter, plain, "500 HU added to an image changed it: subtract each image's mean first", 1e-3)
    for k in (1, 2, 3):
        expected = duplicates.correlation(images, np.array([[0, k]]), WINDOW)[0]
        close(called(alike, images[0], images[k]), expected, f"the library says {expected:.4g}", 1e-3)
    pairs = np.column_stack([np.arange(len(ct.images) - 1), np.arange(1, len(ct.images))])
    near = duplicates.correlation(ct.images, pairs, WINDOW) >= duplicates.LINE
    kin = duplicates.kinship(ct.table, pairs)
    require(abs(number(share) - near.mean()) > 1e-3, "that is of all pairs; keep those that show the same nodule")
    expected, strangers = near[kin == "same nodule"].mean(), near[kin == "different patients"].mean()
    close(share, expected, "use duplicates.correlation with `window`, and take the mean of >= duplicates.LINE", 0.01)
    right(f"{expected:.0%} of neighbouring slices of a nodule are near-duplicates, of two patients' {strangers:.0%}.")


def exercise_8_5(accuracies: Callable) -> None:
    """What shuffling adds to the accuracy of a model that can only remember."""
    shuffled, apart = array(called(accuracies, 6), (2,))
    require(apart < 0.6, f"{apart:.2f} with nodules apart, where nothing is known: pass groups=nodule to GroupKFold")
    hint = "KFold takes rows in their order, so a nodule's slices stay together, unless shuffle=True"
    require(shuffled > 0.9, f"{shuffled:.2f} on shuffled patches is too low; {hint}")
    one, one_apart = array(called(accuracies, 1), (2,))
    told = f"{max(one, one_apart):.2f} with one slice per nodule, where nothing can leak"
    require(max(one, one_apart) < 0.6, f"{told}: is the model scored on the patches it was fitted on?")
    require(min(one, one_apart) > 0.4, "an accuracy far below 0.5 with one slice per nodule; do you pass slices on?")
    right(f"{shuffled:.2f} shuffled, {apart:.2f} apart; with one slice per nodule {one:.2f}. The gain is memory.")


def exercise_8_6(holm: Callable, better: Callable, trial: Callable) -> None:
    """Holm's correction by hand, and which of six networks are surely better than a ruler."""
    for p_values in ([0.01, 0.02, 0.04], [0.04, 0.01, 0.03], [0.2, 0.021, 0.02, 0.9], [0.5, 0.4]):
        p, expected = np.array(p_values), metrics.holm(np.array(p_values))
        corrected = array(called(holm, p), p.shape)
        require((corrected <= 1).all(), f"{p_values}: {corrected.round(3).tolist()} has a p value above 1")
        bonferroni = np.allclose(corrected, np.minimum(1, p * len(p)))
        require(not bonferroni, "all are multiplied by m: that is Bonferroni's correction; Holm's steps down, m, m - 1")
        in_order = np.allclose(corrected, np.sort(expected)) and not np.allclose(corrected, expected)
        require(not in_order, f"{p_values}: right values, but sorted; return them in the order given")
        falls = (np.diff(corrected[np.argsort(p)]) < -1e-9).any()
        require(not falls, f"{p_values}: a larger p value became a smaller one; none may be below the one before it")
        told = f"{p_values}: {corrected.round(3).tolist()}, but the library has {expected.round(3).tolist()}"
        require(np.allclose(corrected, expected), told)
    y, scores, units = trial(4)
    names = set(given(called(better, y, scores, units), (list, tuple, set)))
    hint = "is not among them, though it is better. Overlapping intervals are no test: use metrics.paired"
    require("A" in names, f"A {hint}")
    require("F" not in names, "F differs surely, but it is worse: look at the sign of the difference")
    hint = "is better by luck alone; call your holm with the p values of all six, then compare with 0.05"
    require(not names & set("BCDE"), f"{', '.join(sorted(names & set('BCDE')))} {hint}")
    require(names == {"A"}, f"{sorted(names)}: return the names of networks, without the ruler")
    right("A alone is surely better, though its interval overlaps the ruler's. Without Holm, C would be too: by luck.")
