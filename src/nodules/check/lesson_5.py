"""Exercises on the whole network: batch norm, warm-up, sampling, neighbouring slices, and a fair ruler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.adam import adam

from nodules.check.answers import array, called, choice, close, given, number, require, right
from nodules.data import split
from nodules.data.patches import Patches
from nodules.evaluation import metrics


def exercise_5_1(batch_norm: Callable) -> None:
    """Batch norm in both modes, equal to torch's."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 5, generator=draws) * torch.tensor([1.0, 3, 0.5])[:, None, None] + 2
    mean, var = torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 4, 0.25])

    def off(answer: np.ndarray, expected: torch.Tensor) -> float:
        return np.abs(answer - expected.numpy()).max()

    trained = array(called(batch_norm, x.clone(), mean.clone(), var.clone(), True), tuple(x.shape))
    kept = F.batch_norm(x, mean, var)
    require(off(trained, kept) > 1e-3, "in training the batch's own mean and variance are used, not the running ones")
    axes = (0, 2, 3)
    centred = x - x.mean(axes, keepdim=True)
    hints = {
        "divide the squares by their number, not by one less: torch's var wants correction=0": (
            centred / (x.var(axes, keepdim=True) + 1e-5).sqrt()
        ),
        "divide by the root of the variance, not by the variance": (
            centred / (x.var(axes, correction=0, keepdim=True) + 1e-5)
        ),
        "every channel has a mean and a variance of its own": (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt(),
        "pool rows and columns as well as patches: dim=(0, 2, 3)": (
            (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        ),
    }
    for hint, variant in hints.items():
        require(off(trained, variant) > 1e-3, hint)
    expected = F.batch_norm(x, mean.clone(), var.clone(), training=True)
    require(off(trained, expected) < 1e-3, "training mode differs from torch's; one mean and variance a channel")
    evaluated = array(called(batch_norm, x.clone(), mean.clone(), var.clone(), False), tuple(x.shape))
    require(off(evaluated, expected) > 1e-3, "in evaluation the running mean and variance are used, not the batch's")
    require(off(evaluated, kept) < 1e-3, "evaluation mode differs from torch's; subtract mean, divide by sqrt(var+eps)")
    right("equal to torch's in both modes. In training a patch's output depends on the others of its batch.")


def _batches_until(momentum: float, share: float) -> int:
    """How many batches of mean 1 torch's running mean needs to get from 0 to a share."""
    mean, var, count = torch.zeros(1), torch.ones(1), 0
    while mean.item() < share:
        F.batch_norm(torch.ones(4, 1), mean, var, training=True, momentum=momentum)
        count += 1
    return count


def exercise_5_2(batches: Any, price: Any) -> None:
    """How long the running mean lags behind a jump, at two momenta."""
    batches = given(batches, dict)
    for momentum in (0.1, 0.5):
        require(momentum in batches, f"the answer lacks the momentum {momentum}")
        count, expected = number(batches[momentum]), _batches_until(momentum, 0.9)
        require(count > 1, "momentum is the share of the new batch, not of the old mean")
        require(
            count != round(0.9 / momentum), "it does not rise by momentum a batch: it covers a share of what is left"
        )
        require(count == int(count), "count whole batches: after how many is it at 0.9 or above?")
        require(count != expected - 1, f"after {count:.0f} batches at {momentum} the mean is still below 0.9")
        close(count, expected, f"at {momentum}, what is left of the jump after n batches is (1 - momentum) to the nth")
    wrong = {
        "a": "in training, batch norm uses the batch's own statistics; the running ones are only kept",
        "c": "how many batches does a running mean rest on, if half of it is the last one?",
    }
    choice(price, "b", wrong)
    right("22 batches or 4. Low rates keep such jumps small, and a warm-up gives the statistics time to follow.")


def exercise_5_3(first_step: Callable, why: Any) -> None:
    """How far Adam's first step moves a layer, by torch's own Adam."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, 3, 3, generator=draws) * (2 / (32 * 9)) ** 0.5
    gradient = torch.randn(weight.shape, generator=draws) * 1e-3

    def torchs(size: float, lr: float) -> float:
        moved, zeros = weight.clone(), [torch.zeros_like(weight) for _ in range(2)]
        about = {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "maximize": False}
        adam([moved], [size * gradient], zeros[:1], zeros[1:], [], [torch.zeros(())], lr=lr, eps=1e-5, **about)
        return ((moved - weight).norm() / weight.norm()).item()

    asked = [(size, lr) for size in (1, 100) for lr in (0.01, 3e-4)]
    moved = [number(called(first_step, weight.clone(), size * gradient, lr)) for size, lr in asked]
    require(moved[2] < 50 * moved[0], "a hundredfold gradient gives a hundredfold step; Adam divides by its size")
    require(abs(moved[0] / moved[1] - 0.01 / 3e-4) < 1, "a step is the learning rate times gradient over its size")
    expected = [torchs(*each) for each in asked]
    ratio = moved[0] / expected[0]
    require(not abs(ratio - weight.norm().item()) < 0.01 * ratio, "that is the step's length; divide by the weights'")
    for (size, lr), mine, theirs in zip(asked, moved, expected, strict=True):
        about = f"rate {lr:g}, gradients of about {size * 1e-3:g}"
        close(mine, theirs, f"torch's Adam moves {theirs:.4g} of the weights' length ({about})", 0.01 * theirs)
    wrong = {
        "a": "a gradient a hundred times as large makes hardly a longer first step: Adam divides by its size",
        "c": "a warm-up shows no more patches; it changes how far each of the first steps goes",
    }
    choice(why, "b", wrong)
    right(
        "the same as torch's Adam. A rate for new weights tears pretrained ones apart, so it is low and rises slowly."
    )


def exercise_5_4(one_of_each: Callable, folds: Callable, ct: Patches) -> None:
    """Epochs of one patch a nodule, and folds that keep patients apart."""
    rng = np.random.default_rng(0)
    nodules = rng.permutation(np.repeat([f"n{i:02d}" for i in range(20)], np.arange(20) % 4 + 1))
    draws = [array(called(one_of_each, nodules, np.random.default_rng(seed)), (20,)).astype(int) for seed in range(60)]
    first = draws[0]
    require(((first >= 0) & (first < len(nodules))).all(), "return rows, numbers of patches")
    for rows in draws:
        require(len(set(nodules[rows])) == 20, "a nodule is there twice, so another is missing: one patch of each")
    never = len(nodules) - len(set(np.concatenate(draws)))
    require(not never, f"in 60 epochs {never} slices were never shown; draw the slice of a nodule at random")
    orders = {tuple(nodules[rows]) for rows in draws}
    require(len(orders) > 1, "the nodules come in the same order in every epoch; shuffle the rows")

    patients = rng.permutation(np.repeat([f"p{i:02d}" for i in range(50)], np.arange(50) % 7 + 1))
    fold = array(called(folds, patients, 5, np.random.default_rng(0)), patients.shape).astype(int)
    both = sum(len(set(fold[patients == name])) > 1 for name in set(patients))
    require(not both, f"{both} patients are in several folds: deal out patients, then give each patch its patient's")
    require(set(fold) == set(range(5)), f"the folds are called {sorted(set(fold.tolist()))}, but 0 to 4 are asked for")
    share = [len(set(patients[fold == k])) for k in range(5)]
    require(min(share) >= 7, f"the folds hold {share} of 50 patients; deal them out evenly")
    other = np.asarray(called(folds, patients, 5, np.random.default_rng(1)))
    require((other != fold).any(), "another seed gives the same folds; shuffle the patients with rng")
    by_patch = ct.table["malignant"].mean()
    by_nodule = ct.table.drop_duplicates("nodule")["malignant"].mean()
    told = f"malignant are {by_patch:.0%} of the phantom's patches but {by_nodule:.0%} of its nodules"
    right(f"{told}, for large nodules have more slices. And no patient is both learned from and scored.")


def exercise_5_5(neighbours: Callable, ct: Patches) -> None:
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
    right("the same as the lesson's. A vessel passes through the slices, a nodule ends: now the network can tell.")


def exercise_5_6(matched_auc: Callable, difference: Callable, claim: Any) -> None:
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
