"""Exercises on the whole network: batch norm, warm-up, sampling, rates, and one factor at a time."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.adam import adam

from nodules.check.answers import array, called, choice, close, given, number, require, right
from nodules.data.patches import Patches
from nodules.networks.finetune import Recipe

Rates = Callable[[float, int, float, float, float], np.ndarray]  # of progress, groups, lr, spread and warm-up


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


def exercise_5_4(one_of_each: Callable, ct: Patches) -> None:
    """Epochs of one patch a nodule."""
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
    by_patch = ct.table["malignant"].mean()
    by_nodule = ct.table.drop_duplicates("nodule")["malignant"].mean()
    told = f"malignant are {by_patch:.0%} of the phantom's patches but {by_nodule:.0%} of its nodules"
    right(f"{told}, for malignant nodules are larger and so have more slices. Now each nodule counts once an epoch.")


def _rates(spaced: Callable, fall: Callable[[float, float], float]) -> Rates:
    """Rates that are ``spaced`` over the groups as numpy does it, and ``fall`` after the warm-up."""

    def at(done: float, groups: int, lr: float, spread: float, warmup: float) -> np.ndarray:
        return spaced(lr / spread, lr, groups) * (done / warmup if done < warmup else fall(done, warmup))

    return at


def exercise_5_5(rates: Rates, why: Any) -> None:
    """The recipe's learning rate of each layer group, and why the first ones are low."""

    def fall(done: float, warmup: float) -> float:
        return (1 + np.cos(np.pi * (done - warmup) / (1 - warmup))) / 2

    from_the_start = _rates(np.geomspace, lambda done, _: (1 + np.cos(np.pi * done)) / 2)
    even, expected = _rates(np.linspace, fall), _rates(np.geomspace, fall)
    slips: dict[str, Rates] = {
        "the first group has the highest rate; it is the last one that learns at lr": lambda *of: expected(*of)[::-1],
        "the last group learns at lr and the first at lr / spread, not at lr and lr * spread": (
            lambda done, groups, lr, spread, warmup: expected(done, groups, lr * spread, spread, warmup)
        ),
        "the rates differ by the same amount; let them differ by the same ratio (np.geomspace)": even,
        "the cosine began before the warm-up ended, so the rate jumps; let it begin at lr": from_the_start,
        "there is no warm-up: until the share `warmup` is done, rates rise in a straight line from 0": (
            lambda done, groups, lr, spread, _: expected(done, groups, lr, spread, 0.0)
        ),
        "the warm-up stays at its height; after it the rates fall along half a cosine to 0": (
            _rates(np.geomspace, lambda *_: 1.0)
        ),
    }
    times = np.linspace(0, 1, 21)
    for groups, recipe in ((3, Recipe(1e-3, spread=9, warmup=0.25)), (5, Recipe(0.02, spread=100)), (2, Recipe(1.0))):
        about = groups, recipe.lr, recipe.spread, recipe.warmup
        mine = np.stack([array(called(rates, float(done), *about), (groups,)) for done in times]) / recipe.lr
        require(np.isfinite(mine).all(), "some rates are not finite; the warm-up may be 0: then do not divide by it")
        theirs = np.stack([recipe.rate(groups)(done) for done in times]) / recipe.lr
        for hint, slip in slips.items():
            slipped = np.stack([slip(done, *about) for done in times]) / recipe.lr
            require(not np.allclose(mine, slipped, atol=1e-4) or np.allclose(slipped, theirs, atol=1e-4), hint)
        first = times[np.abs(mine - theirs).max(axis=1).argmax()]
        told = f"{groups} groups, spread {recipe.spread:g}, warm-up {recipe.warmup:g}"
        hint = f"{told}: farthest from the lesson's when {first:.0%} is done; spacing, warm-up, or cosine?"
        require(np.allclose(mine, theirs, atol=1e-4), hint)
    wrong = {
        "a": "Adam divides each gradient by its size (exercise 5.3), so larger ones make hardly longer steps",
        "c": "every group takes part in every step, and none is done before another",
    }
    choice(why, "b", wrong)
    right("the same as the lesson's recipe. What pretraining got right moves little, what is new moves much.")


def exercise_5_6(one_at_a_time: Callable, claim: Any) -> None:
    """Arms that change one factor each, and what may be concluded from them."""
    first, second = Recipe(0.01), Recipe(3e-3, batch=64, warmup=0.25)
    pairs = (
        (first, replace(first, lr=1e-4, warmup=0.3, frozen_statistics=True)),
        (second, replace(second, batch=32, spread=5.0, smoothing=0.1)),
    )
    for start, goal in pairs:
        arms = given(called(one_at_a_time, start, goal), dict)
        differ = _changed(start, goal)
        others = sorted(set(map(str, arms)) - set(differ))
        require(not others, f"{', '.join(others)}: start and goal do not differ there; an arm for each field that does")
        missing = [name for name in differ if name not in arms]
        require(not missing, f"no arm changes {', '.join(missing)}; the two differ in {', '.join(differ)}")
        for name in differ:
            arm = given(arms[name], Recipe)
            require(arm != goal, f"{name}: this arm is the goal, with everything changed at once; change one field")
            hint = "this arm takes one change away from the goal, an ablation; make one change to the start"
            require(arm != replace(goal, **{name: getattr(start, name)}), f"{name}: {hint}")
            changed = _changed(start, arm)
            require(changed, f"{name}: this arm is the start; give the field the value that it has in the goal")
            hint = f"{name}: this arm changes {', '.join(changed)}; let each arm begin from the start anew"
            require(changed == [name], hint)
            require(getattr(arm, name) == getattr(goal, name), f"{name}: it takes the value that it has in the goal")
    wrong = {
        "a": "look at the arm with the low rate alone: did it need the three others?",
        "c": "it was tried beside a rate that is far too high. What it does beside a low one was not measured",
    }
    choice(claim, "b", wrong)
    right("each arm differs from the start in one field, so what it gains is owed to that field, in this company.")


def _changed(one: Recipe, other: Recipe) -> list[str]:
    """The fields in which two recipes differ."""
    return [field.name for field in fields(Recipe) if getattr(one, field.name) != getattr(other, field.name)]
