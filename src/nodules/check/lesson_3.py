"""Exercises on learning rates: descent, Adam, schedules, the finder, and the luck of the best of many."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastcore.basics import even_mults
from scipy.stats import binom

from nodules.check.answers import Wrong, array, called, choice, close, given, number, require, right

SHARE = 0.8  # of patches that each network of exercise 3.5 gets right


def exercise_3_1(answer: Any) -> None:
    """Discriminative rates in equal ratios."""
    rates = array(answer, (5,))
    expected = np.array(even_mults(1e-5, 1e-3, 5))
    hint = "these grow by equal steps (linspace); equal ratios are asked for"
    require(not np.allclose(rates, np.linspace(1e-5, 1e-3, 5)), hint)
    require(
        not np.allclose(rates, expected[::-1], rtol=1e-3, atol=0), "the first group learns slowest, the last fastest"
    )
    ends = np.allclose(rates[[0, -1]], expected[[0, -1]], rtol=1e-3, atol=0)
    require(ends, "the first rate is 0.00001 and the last 0.001")
    hint = "four equal ratios lead from 0.00001 to 0.001, a factor of 100: each is its fourth root"
    require(np.allclose(rates, expected, rtol=1e-3, atol=0), hint)
    right(
        f"each group learns {expected[1] / expected[0]:.2f} times as fast as the one before it, as fastai's slice does."
    )


def exercise_3_2(answer: Any) -> None:
    """Gradient descent, and where it diverges on a parabola."""
    descend, limit, at_04 = given(answer, tuple)
    path = array(called(descend, lambda w: 2 * (w - 3), 10.0, 0.1, 5), (6,)).astype(float)
    require(path[0] == 10, f"the path begins at {path[0]:.4g}; keep w before the first step, 10 here")
    require(path[1] <= 10, "from w = 10, above the minimum at 3, it climbs: the gradient points uphill, so subtract")
    expected = _by_torch(lambda w: ((w - 3) ** 2).sum(), 10.0, 0.1, 5)
    straight = np.allclose(np.diff(path), expected[1] - expected[0])
    require(not straight, "all your steps are equal: take the gradient anew, where w is now")
    require(np.allclose(path, expected), f"the first step leads from 10 to {path[1]:.4g}; torch's to {expected[1]:.4g}")
    w = torch.ones((), requires_grad=True)
    curvature = float(torch.autograd.functional.hessian(lambda w: 2 * w**2, w))
    require(
        number(limit) != 1 / curvature, "that rate reaches the minimum in a single step: the best one, not the limit"
    )
    close(limit, 2 / curvature, "a step multiplies w by 1 - 4 * lr; from which rate on is that not between -1 and 1?")
    wrong = {
        "a": "a step at 0.4 multiplies w by 1 - 4 * 0.4: look at the sign",
        "c": "a step at 0.4 multiplies w by 1 - 4 * 0.4: look at the size",
    }
    choice(at_04, "b", wrong)
    right(f"2 / curvature is the limit, {2 / curvature:g} here. With many weights, the most curved direction sets it.")


def _by_torch(loss: Callable, start: float, lr: float, steps: int) -> np.ndarray:
    w = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    optimizer, path = torch.optim.SGD([w], lr), [start]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
        path.append(w.item())
    return np.array(path)


def exercise_3_3(adam: Callable) -> None:
    """Adam's moves for a list of gradients."""
    tiny, small, large = (_moves(adam, [g])[0] for g in (1e-4, 1e-3, 1e3))
    require(large <= 0, "a positive gradient moves the weight up: descent goes down, by minus lr * m / (sqrt(v) + eps)")
    raw = 0.01 * 0.1 / np.sqrt(0.001)
    require(
        abs(-large - raw) > 1e-6, "the first move is 3.16 times lr: divide m by 1 - beta1**step, v by 1 - beta2**step"
    )
    hint = f"first moves of {small:.3g} and {large:.3g} for gradients of 0.001 and 1000: divide by the root of v"
    require(large / 2 > small > 2 * large, hint)
    gradients = [2.0, -1.0, 0.5, 0.5, -3.0, 0.1]
    moves, expected = _moves(adam, gradients), _adam(gradients, 0.01)
    require(np.isclose(moves[0], expected[0]), f"the first move is {moves[0]:.4g}; torch's is {expected[0]:.4g}")
    of_tiny = _adam([1e-4], 0.01)[0]
    hint = f"for a gradient of 0.0001 the first move is {tiny:.4g}, torch's {of_tiny:.4g}: add eps to the root of v"
    require(np.isclose(tiny, of_tiny, rtol=1e-3), f"{hint}, not to v")
    require(
        not np.allclose(moves, np.cumsum(expected)), "you return where the weight is; return each move, not their sum"
    )
    later = (
        "the first move is right, later ones are not: m and v go on from step to step, and so does the step's number"
    )
    require(np.allclose(moves, expected, rtol=1e-4, atol=1e-9), later)
    right("the same as torch's. Adam's first move is lr long whatever the gradient's size; only the sign counts.")


def _moves(adam: Callable, gradients: list[float]) -> np.ndarray:
    """A student's moves at a rate of 0.01."""
    steps = "a division by 0: count the steps from 1, since 1 - beta1**0 is 0"
    try:
        moves = array(called(adam, gradients, 0.01), (len(gradients),)).astype(float)
    except Wrong as wrong:
        if isinstance(wrong.__cause__, ZeroDivisionError):
            raise Wrong(steps) from wrong
        raise
    require(np.isfinite(moves).all(), steps)
    return moves


def _adam(gradients: list[float], lr: float) -> np.ndarray:
    w, path = torch.zeros(1, dtype=torch.float64, requires_grad=True), [0.0]
    optimizer = torch.optim.Adam([w], lr)
    for gradient in gradients:
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        path.append(w.item())
    return np.diff(path)


def exercise_3_4(cosine: Callable) -> None:
    """Cosine annealing with restarts."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10)
    epochs = [0, 1, 2.5, 5, 8, 9.75, 10, 12.5, 19, 20, 35]
    expected = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks for a step of the optimizer, which has nothing to learn here
        for epoch in epochs:
            schedule.step(epoch)
            expected[epoch] = optimizer.param_groups[0]["lr"]
    rate = {epoch: number(called(cosine, epoch, 0.02, 10)) for epoch in epochs}
    require(min(rate.values()) >= 0, "some rates are negative: a cosine goes from 1 to -1; add 1 and halve it")
    require(abs(rate[0] - 0.02) < 1e-9, f"a cycle begins at {rate[0]:.4g} instead of lr, 0.02")
    straight = abs(rate[2.5] - 0.015) < 1e-9
    require(
        not straight, "that is a straight line; a cosine falls slowly at first, fast in the middle, slowly at the end"
    )
    hint = f"in the middle of the first cycle it is {rate[5]:.4g}, not 0.01: the argument goes from 0 to pi in a cycle"
    require(abs(rate[5] - expected[5]) < 1e-9, hint)
    hint = f"at epoch 10 a new cycle begins, at 0.02 and not {rate[10]:.4g}: take the epoch modulo cycle_len"
    require(abs(rate[10] - expected[10]) < 1e-9, hint)
    for epoch in epochs:
        close(rate[epoch], expected[epoch], f"at epoch {epoch} torch's rate is {expected[epoch]:.4g}", 1e-9)
    right("the same as torch's. Just before a restart the steps are tiny: the best time to keep the weights.")


def exercise_3_5(answer: Any) -> None:
    """How much the best of many equal networks seems to be better, and what should be reported."""
    best_of, reported = given(answer, tuple)
    rng = np.random.default_rng(0)
    drawn = {tried: np.array([number(called(best_of, tried, 100, rng)) for _ in range(1000)]) for tried in (1, 20)}
    require(drawn[1].max() <= 1, "an accuracy above 1: divide the number of right patches by that of all")
    swapped = np.ptp(drawn[1]) == 0 and drawn[1][0] in (0.01, 1)
    require(not swapped, "rng.binomial(n, p, size) wants the patches as n and the networks as size")
    require(drawn[1].std() > 1e-9, "always the same: draw the number of right patches from rng, with rng.binomial")
    close(drawn[1].mean(), SHARE, "with a single network the accuracy is 0.8 on average", 0.01)
    highest = 1 - sum(binom.cdf(np.arange(100), 100, SHARE) ** 20) / 100
    seen = drawn[20].mean()
    require(
        abs(seen - SHARE) > 0.01,
        "the best of 20 is 0.80 on average, like a single one: return the highest, not the mean",
    )
    hint = f"the best of 20 should be {highest:.2f} on average: draw the 20 independently, for 100 patches each"
    close(seen, highest, hint, 0.01)
    wrong = {
        "a": f"all are right for 80%; the highest shows {highest:.0%} by luck alone, and its user gets 80%",
        "c": "an honest number, but of twenty networks, of which one will be used; and the test set has been used up",
    }
    choice(reported, "b", wrong)
    right(
        f"{highest:.0%} from twenty networks that are right for 80%. The test set may be asked once, for one network."
    )


def exercise_3_6(answer: Any, loss: Callable, gradient: Callable) -> None:
    """The learning-rate finder, and a rate read from its curve."""
    finder, chosen = given(answer, tuple)
    curve = called(finder, lambda w: 2 * float(w @ w), lambda w: 4 * w, np.ones(1), 0.001, 1.0, 13)
    require(isinstance(curve, tuple) and len(curve) == 2, "return two things: the rates and the losses")
    rates, losses = (array(each, (13,)).astype(float) for each in curve)
    require(not np.allclose(rates, np.linspace(0.001, 1, 13)), "your rates grow by equal steps, not by equal ratios")
    expected = np.array(even_mults(0.001, 1, 13))
    require(
        np.allclose(rates, expected, rtol=1e-3), "the rates should go from low to high in equal ratios (np.geomspace)"
    )
    require(losses.std() > 0, "the loss stays the same: move w at each rate, by minus rate * gradient(w)")
    path = np.concatenate([[1], np.cumprod(1 - 4 * expected)])
    require(not np.allclose(losses, 2 * path[1:] ** 2), "these are the losses after each step; keep those before it")
    afresh = np.allclose(losses, 2 * (1 - 4 * expected) ** 2)
    require(not afresh, "each rate starts from the first w again; go on from where the last step led")
    hint = "on a parabola it differs from gradient descent by hand: at each rate keep the loss, then take one step"
    require(np.allclose(losses, 2 * path[:-1] ** 2), hint)
    start, best = loss(np.zeros(64)), min(_trained(loss, gradient, rate) for rate in np.geomspace(1e-3, 1, 31))
    rate = number(chosen)
    require(rate > 0, f"{rate:.3g} is no learning rate; it is above 0")
    reached = _trained(loss, gradient, rate)
    reading = f"50 steps at {rate:.3g} lead from a loss of {start:.2f} to {reached:.2f}"
    require(
        reached < start, f"{reading}: too high. The loss turns late, so go back from its lowest point by a factor of 10"
    )
    require(
        reached <= (start + best) / 2, f"{reading}, but {best:.2f} is possible; look where the loss falls on your curve"
    )
    right(f"{reading}; the best rate reaches {best:.2f}. A tenth of that of the lowest loss is fastai's 'minimum'.")


def _trained(loss: Callable, gradient: Callable, rate: float, steps: int = 50) -> float:
    """The loss after steps at a constant rate, from weights of 0; infinite if it overflows."""
    w = np.zeros(64)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            w = w - rate * gradient(w)
        reached = loss(w)
    return float(reached) if np.isfinite(reached) else np.inf
