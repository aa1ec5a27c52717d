"""Exercises on networks: convolutions, pooling, receptive fields, how sure a comparison is, and a frozen body."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from nodules.check.answers import array, called, choice, close, fields, given, number, require, right
from nodules.data.patches import Patches
from nodules.evaluation import metrics
from nodules.networks import bank


def exercise_2_1(answer: Any) -> None:
    """Side, number and parameters of the maps of a ResNet's first layer."""
    answer = fields(answer, {"side", "maps", "parameters"})
    layer = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    maps = layer(torch.zeros(1, 3, 64, 64))
    side = number(answer["side"])
    require(side != 29, "a side of 29 is that without padding; the patch grows by 3 pixels on each side first")
    require(side != 64, "a side of 64 is that of stride 1; with stride 2 the filter takes every second place")
    close(side, maps.shape[-1], "the side is (64 + 2 * padding - 7) // stride + 1: the last 1 is the first place")
    close(answer["maps"], maps.shape[1], "each filter makes one map, whatever the number of channels it looks at")
    parameters = number(answer["parameters"])
    require(parameters != 64 * 7 * 7, "a filter has weights of its own for each of the 3 channels")
    require(parameters != 3 * 7 * 7, "those are the parameters of one filter; there are 64")
    require(parameters != 64 * (3 * 7 * 7 + 1), "this layer has no bias")
    close(parameters, layer.weight.numel(), "count filters x channels x height x width; stride and padding add none")
    right(f"{parameters:.0f} parameters, for a patch of any size: the same filters are used at every place.")


def exercise_2_2(convolve: Callable) -> None:
    """A convolution without padding."""
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(9, 12)), rng.normal(size=(3, 2))

    def expected(stride: int, kernel: np.ndarray = kernel) -> np.ndarray:
        return F.conv2d(*(torch.from_numpy(a.copy())[None, None] for a in (image, kernel)), stride=stride)[0, 0].numpy()

    once = np.asarray(called(convolve, image, kernel, 1))
    hint = f"a (3, 2) filter has {expected(1).shape} places on a (9, 12) image; yours gives a map of {once.shape}"
    require(once.shape == expected(1).shape, hint)
    once = array(once, expected(1).shape)
    flipped = np.allclose(once, expected(1, kernel[::-1, ::-1]))
    require(not flipped, "you flip the filter, as mathematicians do; a network's convolution does not")
    require(np.allclose(once, expected(1)), "the map differs from torch's at stride 1: multiply, then add")
    twice = np.asarray(called(convolve, image, kernel, 2))
    missing = tuple(places // 2 for places in expected(1).shape)
    hint = f"with stride 2 the map has the shape {twice.shape}: there are (H - K) // stride + 1 places down, "
    require(twice.shape != missing, f"{hint}as the first place counts whatever the stride")
    hint = f"with stride 2 the map has the shape {twice.shape}, not {expected(2).shape}: take every second place only"
    require(twice.shape == expected(2).shape, hint)
    require(np.allclose(twice, expected(2)), "stride 1 is right, stride 2 is not: place i starts at pixel i * stride")
    right("the same as torch's conv2d. A layer does this with many filters at once, and adds up over the channels.")


def exercise_2_3(pooled: Callable) -> None:
    """Maximum and mean of each map."""
    maps = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype(np.float32)
    expected = bank.pooled([torch.from_numpy(maps)], "last").numpy()
    result = np.asarray(called(pooled, maps))
    hint = f"the shape is {result.shape}, not (5, 6): two numbers for each of the 3 maps of 5 patches"
    require(result.shape == expected.shape, hint)
    result = array(result, expected.shape)
    swapped = np.allclose(result, np.roll(expected, 3, axis=1), atol=1e-5)
    require(not swapped, "first the maxima, then the means: the other way round, a trained head would misread them")
    require(not np.allclose(result, np.repeat(result[:1], 5, 0)), "all patches get the same features: keep axis 0")
    message = "it differs from the lesson's: maximum and mean over height and width, axes 2 and 3, of each map"
    require(np.allclose(result, expected, atol=1e-5), message)
    right("the lesson's own pooling. It keeps what was found and how much of it, and forgets where.")


def exercise_2_4(answer: Any) -> None:
    """The receptive field of a stack of convolutions, and what strides do to it."""
    field, why = given(answer, tuple)
    three = number(called(field, [(3, 1), (3, 1), (3, 1)]))
    require(three != 9, "three 3 x 3 layers see 7 pixels, not 9: each adds its side less its middle")
    close(three, _reach([(3, 1)] * 3), "three 3 x 3 layers of stride 1: the first sees 3 pixels, each next two more")
    layers = [(5, 2), (3, 1), (3, 2), (3, 1)]
    value, without = number(called(field, layers)), _reach([(side, 1) for side, _ in layers])
    require(value != without, f"{value:.0f} as without strides; a step on a later map is several pixels")
    late = "a layer's own stride spreads the later layers, not itself; multiply the strides of the layers before it"
    close(value, _reach(layers), late)
    wrong = {
        "a": f"more places are not a wider view: {_reach(layers)} pixels with strides, {without} without",
        "c": f"compute both: {_reach(layers)} pixels with strides, {without} without",
    }
    choice(why, "b", wrong)
    right(f"{_reach(layers)} pixels with strides, {without} without, from the same filters and as many parameters.")


def _reach(layers: list[tuple[int, int]]) -> int:
    """The receptive field as torch sees it: how many pixels of a row have a gradient."""
    image = torch.zeros(1, 1, 128, 128, requires_grad=True)
    maps = image
    for side, stride in layers:
        maps = F.conv2d(maps, torch.ones(1, 1, side, side) / side**2, stride=stride)
    maps[0, 0, maps.shape[2] // 2, maps.shape[3] // 2].backward()
    return int((image.grad[0, 0] != 0).any(0).sum())


def exercise_2_5(answer: Any, rows: pd.DataFrame) -> None:
    """The best network, how many others it can't be told apart from by eye, and what may be claimed."""
    best, holding, headline = given(answer, tuple)
    top = rows["auc"].max()
    require(number(best) != rows["auc"].idxmin(), "that row has the lowest AUC")
    close(best, rows["auc"].idxmax(), "give the number of the row, counted from 0, in which auc is highest")
    inside = int(((rows["auc_low"] <= top) & (top <= rows["auc_high"])).sum())
    require(number(holding) != inside, "you count the best network itself; its own interval holds its AUC, of course")
    overlapping = int((rows["auc_high"] >= rows["auc_low"][rows["auc"].idxmax()]).sum()) - 1
    require(
        number(holding) == inside - 1 or number(holding) != overlapping,
        "you count the intervals that overlap with the best one's; count those that hold its AUC",
    )
    close(holding, inside - 1, f"count the other rows with auc_low <= {top:.3f} <= auc_high")
    wrong = {
        "a": f"{inside - 1} others might have an AUC as high, and a phantom's patches show no cancer at all",
        "c": "they can, if both are scored on the same patients: the lesson's paired comparison does so",
    }
    choice(headline, "b", wrong)
    right(f"{inside - 1} of {len(rows) - 1}. Intervals are a rough guide; the lesson's paired comparison is sharper.")


def exercise_2_6(predict: Callable, body: nn.Module, ct: Patches) -> None:
    """A head on the features of a frozen body, scored on patients whom it has not seen."""
    y, patients = ct.table["malignant"].to_numpy(), ct.table["patient"].to_numpy()
    other = np.isin(patients, np.unique(patients)[::3])

    def predicted(others: np.ndarray) -> np.ndarray:
        used = copy.deepcopy(body)
        next(used.children()).register_forward_pre_hook(_prepared)
        p = called(predict, used, ct.images[~other], y[~other], others)
        p = array(p.detach().numpy() if isinstance(p, torch.Tensor) else p, (len(others),)).astype(float)
        before = body.state_dict()
        changed = [name for name, tensor in used.state_dict().items() if not torch.equal(tensor, before[name])]
        statistics = [name for name in changed if "running" in name or "tracked" in name]
        require(not statistics, f"batch norm changed its statistics ({', '.join(statistics)}); call body.eval() first")
        require(not changed, f"the body is not frozen: {', '.join(changed)} changed; train the head alone")
        return p

    p = predicted(ct.images[other])
    require(np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all(), "these are no probabilities from 0 to 1")
    hint = "all are 0 or 1: return probabilities (predict_proba), not classes (predict)"
    require(not np.isin(p, [0, 1]).all(), hint)
    few = predicted(ct.images[other][:10])
    same = "a patch's probability depends on the patches predicted beside it; use what was learned on images alone"
    require(np.allclose(few, p[:10], atol=1e-3), same)
    reached = metrics.auc(y[other], p, np.ones((1, other.sum())))[0]
    require(reached > 0.4, f"AUC {reached:.2f}, far below chance: you return the probability of benign, column 0")
    require(reached >= 0.6, f"AUC {reached:.2f}; 0.6 is asked for. Pool maximum and mean of each map, standardise them")
    right(f"AUC {reached:.2f} on other patients from filters that nobody trained: the floor for any pretraining.")


def _prepared(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise Wrong unless a body gets a network's input, (N, 1, 64, 64) of floating-point numbers."""
    (x,) = inputs
    ready = isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_floating_point()
    require(ready, "the body can't read patches as they are stored; call prepare(images) first")
