"""Exercises on cross-validation, neighbouring slices, one opinion a nodule, seeds and splits, and a fair ruler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from nodules.check.answers import array, called, choice, close, fields, given, number, require, right
from nodules.data import split
from nodules.data.patches import Patches
from nodules.evaluation import metrics


def exercise_6_1(folds: Callable, judged: Any) -> None:
    """Folds that keep patients apart, and what their mean score judges."""
    rng = np.random.default_rng(0)
    patients = rng.permutation(np.repeat([f"p{i:02d}" for i in range(50)], np.arange(50) % 7 + 1))
    fold = array(called(folds, patients, 5, np.random.default_rng(0)), patients.shape).astype(int)
    both = sum(len(set(fold[patients == name])) > 1 for name in set(patients))
    require(not both, f"{both} patients are in several folds: deal out patients, then give each patch its patient's")
    require(set(fold) == set(range(5)), f"the folds are called {sorted(set(fold.tolist()))}, but 0 to 4 are asked for")
    share = [len(set(patients[fold == k])) for k in range(5)]
    require(min(share) >= 7, f"the folds hold {share} of 50 patients; deal them out evenly")
    other = np.asarray(called(folds, patients, 5, np.random.default_rng(1)))
    require((other != fold).any(), "another seed gives the same folds; shuffle the patients with rng")
    wrong = {
        "a": "such a network was never scored: no patient is left on whom to do that",
        "c": "the best fold is the luckiest; and which of the networks would you use for a new patient?",
    }
    choice(judged, "b", wrong)
    right("no patient is both learned from and scored. Each fold has a network of its own; the mean is the recipe's.")


def exercise_6_2(neighbours: Callable, ct: Patches) -> None:
    """Rows of the slices below and above, of the same nodule."""
    order = np.random.default_rng(0).permutation(len(ct.images))
    part = split.whole(ct).take(order)
    nodules, slices = part.nodules, part.table["slice_index"].to_numpy()
    rows = array(called(neighbours, nodules, slices), (len(nodules), 3)).astype(int)
    require((rows[:, 1] == np.arange(len(rows))).all(), "the middle channel is the patch itself")
    require(((rows >= 0) & (rows < len(rows))).all(), "a row lies outside the table; at the end repeat the patch's own")
    mixed = (nodules[rows] != nodules[:, None]).any(axis=1).sum()
    require(not mixed, f"{mixed} patches got a slice of another nodule, such as the next row of the table")
    expected = split.stacked(part).around
    require((rows != expected[:, ::-1]).any(), "below and above are exchanged: the lower slice comes first")
    wrong = (rows != expected).any(axis=1).sum()
    require(not wrong, f"{wrong} of {len(rows)} patches differ from the lesson's; sort each nodule by its slice index")
    right("the same as the lesson's. A vessel passes through the slices, a nodule ends: now a network could tell.")


def exercise_6_3(opinions: Callable, why: Any) -> None:
    """One opinion a nodule, from the inner slices, and why the outer ones are left out."""
    stack = [(f"n{count:02d}", 100 + k) for count in range(1, 16) for k in range(count)]
    table = pd.DataFrame(stack, columns=["nodule", "slice_index"])
    table = table.assign(p=np.random.default_rng(0).random(len(table))).sample(frac=1, random_state=0)
    nodules, slices, p = (table[name].to_numpy() for name in ("nodule", "slice_index", "p"))
    names = sorted(set(nodules))
    found = fields(called(opinions, nodules, slices, p), names)
    require(len(found) == len(names), "the answer has other keys than the names of the nodules")
    empty = [name for name in names if isinstance(found[name], float) and np.isnan(found[name])]
    require(not empty, "a nodule of three slices has no opinion: with quarter = 0, p[quarter:-quarter] is empty")
    mine = pd.Series({name: number(found[name]) for name in names})
    of_all = table.groupby("nodule")["p"]
    require(not np.allclose(mine, of_all.mean()[mine.index]), "these are means over all slices; leave out outer ones")
    expected = metrics.over_slices(table, ["p"]).drop_duplicates("nodule").set_index("nodule")["p"][mine.index]
    slips = {
        "you counted on the order of the table; sort the slices of a nodule by their index first": (
            metrics.over_slices(table.assign(slice_index=np.arange(len(table))), ["p"])
        ),
        "you left out a quarter altogether; leave one out at each end": _inner(table, lambda n: n // 8),
        "round the quarter down, as // does: of 7 slices one is left out at each end": (
            _inner(table, lambda n: np.rint(n / 4).astype(int))
        ),
    }
    for hint, slip in slips.items():
        require(not np.allclose(mine, slip.groupby("nodule")["p"].first()[mine.index]), hint)
    differ = ~np.isclose(mine, expected)
    hint = "mean over slices quarter to n - quarter of a nodule, sorted by slice index; quarter is n // 4"
    require(not differ.any(), f"{differ.sum()} of {len(mine)} nodules differ from the lesson's; {hint}")
    wrong = {
        "a": "a radiologist rates the nodule once, not its slices; all of them have the same label",
        "c": "of equally good opinions, more make a surer mean; are those on the outer slices as good?",
    }
    choice(why, "b", wrong)
    right("the same as the lesson's. Now each nodule counts once, whether it is on three slices or on thirty.")


def _inner(table: pd.DataFrame, left_out: Callable[[pd.Series], pd.Series]) -> pd.DataFrame:
    """As :func:`metrics.over_slices`, with another number of slices left out at each end."""
    slices = table.groupby("nodule")["slice_index"]
    count, rank = slices.transform("size"), slices.rank(method="first")
    inner = table[(rank > left_out(count)) & (rank <= count - left_out(count))]
    return table.assign(p=table["nodule"].map(inner.groupby("nodule")["p"].mean()))


def exercise_6_4(spread: Callable, larger: Any, untold: Any, scores: np.ndarray) -> None:
    """How far scores are apart over seeds and over splits, and what one run can't tell."""
    rng = np.random.default_rng(0)
    other = rng.normal(0.8, 0.01, (7, 1)) + rng.uniform(0.01, 0.06, (7, 1)) * rng.normal(size=(7, 4))
    for grid in (scores, other):
        seeds, splits = array(called(spread, grid), (2,))
        expected = _spreads(grid)
        told = f"{grid.shape[0]} splits, {grid.shape[1]} seeds:"
        require(not np.allclose([splits, seeds], expected), f"{told} the two are swapped; over seeds comes first")
        hint = "rows and columns are swapped: a row holds the seeds of one split"
        require(not np.allclose([seeds, splits], _spreads(grid.T)), f"{told} {hint}")
        require(not np.allclose([seeds, splits], _spreads(grid, 0)), f"{told} divide by one less: ddof=1")
        slips = {
            "that is the mean of the standard deviations; average the variances, then take the root": (
                grid.std(axis=1, ddof=1).mean()
            ),
            "that is the spread of all scores, splits included; stay within a split": grid.std(ddof=1),
            "that is a variance; take its root": expected[0] ** 2,
        }
        for hint, slip in slips.items():
            require(not np.isclose(seeds, slip), f"{told} over seeds, {seeds:.3g}: {hint}")
        close(seeds, expected[0], f"{told} over seeds; the variance within each split, their mean, the root", 1e-6)
        slips = {
            "that is the spread of all scores; average over the seeds of a split first": grid.std(ddof=1),
            "that is the spread over splits at one seed; average over the seeds of a split first": (
                np.sqrt(grid.var(axis=0, ddof=1).mean())
            ),
        }
        for hint, slip in slips.items():
            require(not np.isclose(splits, slip), f"{told} over splits, {splits:.3g}: {hint}")
        close(splits, expected[1], f"{told} over splits; the mean of each, and the standard deviation of these", 1e-6)
    seeds, splits = _spreads(scores)
    answer = given(larger, str).strip().lower()
    require(answer in ("seeds", "splits"), f"{larger!r} is neither; answer seeds or splits")
    hint = f"over seeds {seeds:.4f}, over splits {splits:.4f}: which is larger?"
    require(answer == ("seeds" if seeds > splits else "splits"), hint)
    wrong = {
        "a": "it has a probability for each of them: look which are far from the label",
        "c": "the bootstrap draws from the test patients of one split and scores one network; what stays the same?",
    }
    choice(untold, "b", wrong)
    right(f"{seeds:.4f} over seeds, {splits:.4f} over splits. One run is one cell of the table: it shows neither.")


def _spreads(grid: np.ndarray, ddof: int = 1) -> tuple[float, float]:
    """Standard deviation over seeds within a split, and of the splits' means, of scores (splits, seeds)."""
    return np.sqrt(grid.var(axis=1, ddof=ddof).mean()), grid.mean(axis=1).std(ddof=ddof)


def exercise_6_5(matched_auc: Callable, difference: Callable, claim: Any) -> None:
    """The size-matched AUC, the interval of a paired difference, and what may be said of it."""
    rng = np.random.default_rng(0)
    y, diameters = rng.integers(0, 2, 80), rng.uniform(4, 20, 80)
    p = (rng.integers(0, 9, 80) + diameters // 2) / 20
    value = number(called(matched_auc, y, p, diameters))
    everything = metrics.auc(y, p, np.ones((1, 80)))[0]
    require(abs(value - everything) > 1e-6, "that is the AUC of all pairs; keep those of nearly the same diameter")
    expected = metrics.matched_auc(y, p, np.ones((1, 80)), diameters)[0]
    hint = "the lesson's differs on 80 patches: max/min of two diameters at most 1.15, and a tie counts one half"
    close(value, expected, hint, 1e-5)

    shared = rng.normal(0.8, 0.05, 1000)
    mine, theirs = shared + 0.02 + rng.normal(0, 0.005, 1000), shared
    low, high = array(called(difference, mine, theirs), (2,))
    apart = np.percentile(mine, [2.5, 97.5]) - np.percentile(theirs, [2.5, 97.5])
    require(abs(high - low) > 1.5 * abs(apart[1] - apart[0]), "subtract resample by resample, then take percentiles")
    far = np.percentile(mine, 97.5) - np.percentile(theirs, 2.5)
    require(high < 0.9 * far, "as wide as if each model had patients of its own; subtract resample by resample first")
    ends = metrics.interval(np.concatenate([[0.0], mine - theirs]))
    require(not np.allclose([low, high], [-ends["high"], -ends["low"]], atol=1e-6), "that is theirs minus mine")
    require(
        np.allclose([low, high], [ends["low"], ends["high"]], atol=1e-6),
        "take percentiles 2.5 and 97.5 of mine - theirs",
    )
    wrong = {
        "a": "of two intervals on the same patients an overlap proves nothing; look at that of the difference",
        "c": "over all sizes, does the interval of the difference lie above 0? And is this a network, of patients?",
    }
    choice(claim, "b", wrong)
    right("the same as the lesson's. A small claim that holds is worth more than a large one that does not.")
