"""Exercises on calibration, thresholds, conformal sets, radiologists, and who is missed."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import cohen_kappa_score

from nodules.check.answers import array, called, choice, close, fields, given, number, require, right
from nodules.evaluation import decisions, metrics

Labelled = tuple[np.ndarray, np.ndarray]  # labels and probabilities, (N,) each
Parts = dict[str, np.ndarray]
COST = 9  # of a missed malignant patch, in needless follow-ups


def exercise_9_1(reliability: Callable) -> None:
    """What a model says and what is true, in bins of equally many patches."""
    rng = np.random.default_rng(1)
    z = rng.normal(-0.5, 1.5, 1000)
    y, p = (rng.random(1000) < expit(z)).astype(int), expit(2 * z)
    for bins in (5, 10):
        said, true = array(called(reliability, y, p, bins), (2, bins))
        expected_true, expected = calibration_curve(y, p, n_bins=bins, strategy="quantile")
        swapped = np.allclose(true, expected, atol=1e-6)
        require(not swapped, "the two are swapped: first the mean probability, then the share of malignant patches")
        require((np.diff(said) > 0).all(), "the mean probability must rise from bin to bin: sort the patches by p")
        hint = "the mean probabilities are not those of scikit-learn; does each bin hold equally many patches?"
        require(np.allclose(said, expected, atol=1e-6), hint)
        hint = "the shares of malignant patches are not those of scikit-learn; average y over each bin, not the calls"
        require(np.allclose(true, expected_true, atol=1e-6), hint)
    right(f"as scikit-learn has it. In the last bin p is {said[-1]:.0%}, and {true[-1]:.0%} are malignant: too sure.")


def exercise_9_2(tempered: Callable, best: Any, changes: Any, y: np.ndarray, p: np.ndarray) -> None:
    """A temperature by hand, the best one on valid, and what it changes."""
    some = np.array([0.1, 0.5, 0.8, 0.99])
    answer = array(called(tempered, some, 2.0), some.shape)
    require(not np.allclose(answer, some / 2), "that is p / T; divide the logit of p, then take the sigmoid")
    sharper = np.allclose(answer, decisions.tempered(some, 0.5))
    require(not sharper, "your temperature of 2 makes the model surer: divide the logits by it, do not multiply")
    require(((answer > 0) & (answer < 1)).all(), "these are not probabilities; take the sigmoid (expit) of the logits")
    hint = "a probability of 0.8 at temperature 2 should become 2/3: sigmoid(logit(p) / T)"
    require(np.allclose(answer, decisions.tempered(some, 2.0), atol=1e-6), hint)
    expected, t = decisions.temperature(y, p), number(best)
    require(abs(t - 1 / expected) > 0.05, f"{t:.3g} makes it surer still; is the log-loss the lowest, not the highest?")
    close(t, expected, "take the temperature with the lowest log-loss on valid, in steps of 0.05", 0.06)
    wrong = {
        "a": "the AUC asks for the order of the patches only, and dividing all logits by T keeps it",
        "c": "a logit of 0 stays 0, so 0.5 stays 0.5: no patch changes sides, unless the threshold moves",
    }
    choice(changes, "b", wrong)
    right(f"T = {t:.2f}, near the 2 of this world. A temperature repairs probabilities; it ranks nothing better.")


def exercise_9_3(cheapest: Callable, kept: Any, truth: Parts, said: Parts) -> None:
    """A threshold by its cost on valid, and the sensitivity that is left on test and elsewhere."""
    y, p = truth["valid"], said["valid"]
    for cost in (1, COST, 30):
        line = number(called(cheapest, y, p, cost))
        costs = [_cost(y, p, each, cost) for each in np.unique(p)]
        mine = _cost(y, p, line, cost)
        told = f"for a cost of {cost} your threshold {line:.3g} costs {mine:.0f}, but one of p costs {min(costs):.0f}"
        hint = "count benign patches at or above it once, malignant ones below it `cost` times"
        require(mine <= min(costs) + 1e-6, f"{told}; {hint}")
    kept, line = fields(kept, said), float(cheapest(y, p, COST))
    rates = {part: (said[part][truth[part] == 1] >= line).mean() for part in said}
    for part, rate in rates.items():
        own = float(cheapest(truth[part], said[part], COST))
        of_own = (said[part][truth[part] == 1] >= own).mean()
        reset = part != "valid" and abs(number(kept[part]) - of_own) < 1e-6 < abs(of_own - rate)
        require(not reset, f"{part}: you set the threshold again there; it is set on valid, once")
        of_all = (said[part] >= line).mean()
        hint = f"{part}: that is the share of all patches; sensitivity is that of the malignant ones"
        require(abs(number(kept[part]) - of_all) > 1e-6, hint)
        close(kept[part], rate, f"{part}: of its malignant patches, what share is at or above the threshold?", 1e-3)
    there = f"{rates['test']:.0%} on test, {rates['another scanner']:.0%} on the other scanner"
    right(f"{rates['valid']:.0%} on valid, where it was set, {there}. A threshold keeps no promise elsewhere.")


def _cost(y: np.ndarray, p: np.ndarray, line: float, cost: float) -> float:
    """Needless follow-ups, and malignant patches missed at ``cost`` each."""
    return float(((p >= line) & (y == 0)).sum() + cost * ((p < line) & (y == 1)).sum())


def exercise_9_4(conformal: Callable, follows: Any, valid: Labelled, test: Labelled) -> None:
    """Split-conformal sets, and what a stricter promise costs."""
    y, p = test
    both, held = {}, {}
    for alpha in (0.1, 0.02):
        sets = array(called(conformal, *valid, p, alpha), (len(p), 2)).astype(bool)
        expected = decisions.conformal(valid, p, alpha)
        held[alpha], both[alpha] = sets[np.arange(len(y)), y].mean(), sets.all(axis=1).mean()
        swapped = (sets[:, ::-1] == expected).mean() > 0.99
        require(not swapped, "the columns are swapped: benign is strange where p is high; it comes first")
        told = f"alpha {alpha}: your sets hold the truth in {held[alpha]:.0%}"
        require(held[alpha] > 1 - alpha - 0.05, f"{told}; is the line the (1 - alpha) quantile, of the true class?")
        # the k-th smallest, or a neighbour of it, as functions for quantiles have it
        differ = (sets != expected).any(axis=1).mean()
        require(differ < 0.01, f"{told}, but {differ:.0%} of them differ from the library's; is k as in the text?")
    wrong = {
        "b": f"count: both classes are named for {both[0.1]:.0%} of test patches, then for {both[0.02]:.0%}",
        "c": "its probabilities are the same; only the line has moved",
    }
    choice(follows, "a", wrong)
    paid = f"no opinion on {both[0.02]:.0%} instead of {both[0.1]:.0%} of the patches"
    right(f"the truth is in {held[0.02]:.0%} instead of {held[0.1]:.0%} of the sets, at the price of {paid}.")


def exercise_9_5(kappa: Callable, with_threes: Any, first: np.ndarray, second: np.ndarray) -> None:
    """Agreement of two radiologists beyond chance."""
    value, agreed = number(called(kappa, first, second)), (first == second).mean()
    require(abs(value - agreed) > 1e-3, f"{value:.2f} is how often they agree; take out what chance would give")
    by_malignant = first.mean() * second.mean()
    hint = "two readers also agree by chance where both say benign: add (1 - a) (1 - b)"
    require(abs(value - (agreed - by_malignant) / (1 - by_malignant)) > 1e-3, hint)
    require(abs(value - 2 * agreed + 1) > 1e-3, "chance is one half only if both call half of the nodules malignant")
    rng = np.random.default_rng(0)
    for a, b in ((first, second), rng.integers(0, 2, (2, 90)), (rng.random((2, 90)) < 0.1).astype(int)):
        expected = cohen_kappa_score(a, b)
        close(called(kappa, a, b), expected, f"scikit-learn says {expected:.4g}; the answer is divided by 1 - chance")
    wrong = {
        "a": "more nodules make kappa more certain, not higher; on which nodules is the median 3?",
        "c": "chance is taken out, but not which nodules were chosen; on which is the median 3?",
    }
    choice(with_threes, "b", wrong)
    right(f"kappa {value:.2f}, where they agree on {agreed:.0%}. On all of LIDC-IDRI it is 0.53, with the threes 0.43.")


def exercise_9_6(audit: Callable, letters: Any, scored: tuple[Parts, Parts], group: Any, patient: np.ndarray) -> None:
    """Sensitivity by group, an abstract that does not claim too much, and who is harmed."""
    truth, said = scored
    valid = np.unique(said["valid"])
    line = valid[np.argmin([_cost(truth["valid"], said["valid"], each, COST) for each in valid])]
    y, p = truth["test"], said["test"]
    table = given(called(audit, y, p, line, group, patient), dict)
    require(set(table) == set(group), f"the groups are {sorted(set(group))}, but you have {sorted(map(str, table))}")
    for name in sorted(set(group)):
        row = fields(table[name], {"malignant", "sensitivity", "low", "high"}, f"{name}: the answer")
        chosen = (group == name) & (y == 1)
        close(row["malignant"], chosen.sum(), f"{name}: count the malignant patches of the group, not all of them")
        called_so = (group == name) & (p >= line)
        precision = y[called_so].mean()
        hint = f"{name}: that is the share of flagged patches that are malignant; turn it around"
        require(abs(number(row["sensitivity"]) - precision) > 1e-6, hint)
        expected = metrics.mean((p >= line)[chosen], patient[chosen])
        close(row["sensitivity"], expected["value"], f"{name}: of its malignant patches, what share is flagged?", 1e-3)
        width, of_library = number(row["high"]) - number(row["low"]), expected["high"] - expected["low"]
        hint = f"{name}: the interval is {width:.2f} wide, not {of_library:.2f}; resample patients, not patches"
        require(abs(width / of_library - 1) < 0.25, hint)
    abstract, harmed = letters
    wrong = {
        "a": "nobody knows which were cancers: labels are opinions, patches are simulated; and it hides the groups",
        "b": "some tens of patches of few patients, simulated: an upper end of the interval at 1 is no proof of safety",
    }
    choice(abstract, "c", wrong)
    wrong = {
        "a": "a benign nodule loses little if it is looked at less closely; who is called benign, but is not?",
        "c": "the doctor decides, but trusts the model: its misses are what is looked at least",
    }
    choice(harmed, "b", wrong)
    told = ", ".join(f"{row['sensitivity']:.0%} of {row['malignant']} {name}" for name, row in sorted(table.items()))
    right(f"flagged are {told}. Put both numbers and their intervals on the card, not their mean.")
