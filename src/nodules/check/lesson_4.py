"""Exercises on training: losses, a training loop, overfitting, test-time augmentation, and augmentation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import log_loss
from torch.nn import functional as F

from nodules.check.answers import Wrong, array, called, choice, close, fields, given, number, require, right
from nodules.data.patches import Patches

PATCHES = 600  # of the exercises' set, those for validation among them
ROUNDED = 0.0051  # of a loss: two decimals, as a check shows them, are enough
NODULE, LUNG = 50.0, -800.0  # HU, in the patches of exercise 4.6


def exercise_4_1(answer: Any, ct: Patches) -> None:
    """The loss of a coin, of the share of malignant patches, and of a sure error."""
    answer = fields(answer, {"coin", "share", "sure"})
    y = ct.table["malignant"].to_numpy()
    coin, share = (log_loss(y, np.full(len(y), p)) for p in (0.5, y.mean()))
    sure = log_loss([1], [0.01], labels=[0, 1])
    for name in ("coin", "share", "sure"):
        require(number(answer[name]) >= 0, f"{name}: a negative loss; it is minus the logarithm")
    in_bits = abs(number(answer["coin"]) - coin / np.log(2)) < 1e-6
    require(not in_bits, "coin: that is the logarithm to the base 2; the loss takes the natural one (np.log)")
    close(answer["coin"], coin, "coin: whatever the class, its probability was 0.5; take minus the logarithm of that")
    half = abs(number(answer["share"]) + np.log(y.mean())) < 1e-6
    require(not half, "share: that is the loss of the malignant patches alone; what do the benign ones cost?")
    close(answer["share"], share, "share: weigh -log(share) and -log(1 - share) by how many patches get each", 1e-4)
    told = abs(number(answer["sure"]) + np.log(0.99)) < 1e-6
    require(not told, "sure: 0.99 went to the wrong class; what is left for the true one?")
    close(answer["sure"], sure, "sure: the true class got 0.01; take minus the logarithm of that")
    right(
        f"{coin:.3f}, {share:.3f} and {sure:.2f}: one sure error costs as much as {sure / coin:.1f} patches by a coin."
    )


def exercise_4_2(answer: Any) -> None:
    """Softmax and cross-entropy."""
    softmax, cross_entropy = given(answer, tuple)
    logits, y = np.random.default_rng(0).normal(0, 2, (20, 2)), np.arange(20) % 2
    try:
        p = array(called(softmax, logits), (20, 2))
    except Wrong as wrong:
        if "broadcast" not in str(wrong.__cause__):
            raise
        raise Wrong("the sums of the rows do not fit beside the (N, 2) logits; sum with keepdims=True") from wrong
    whole = abs(p.sum() - 1) < 1e-6
    require(not whole, "all probabilities together add up to 1: divide by the sum of each row (axis=1, keepdims=True)")
    require(np.allclose(p.sum(axis=1), 1), "the two probabilities of a patch do not add up to 1")
    require(np.allclose(p, F.softmax(torch.from_numpy(logits), 1)), "softmax differs from torch's: exp, then divide")
    large = np.array([[1000.0, 0.0], [-1000.0, -1001.0]])
    with np.errstate(all="ignore"):
        p = array(called(softmax, large), (2, 2))
    hint = "logits of 1000 give no finite probabilities: subtract each row's larger logit before exp"
    require(np.isfinite(p).all() and np.allclose(p, F.softmax(torch.from_numpy(large), 1)), hint)
    loss, of_each = number(called(cross_entropy, logits, y)), F.cross_entropy(*map(torch.from_numpy, (logits, y)))
    require(abs(loss - 20 * of_each) > 1e-6, "that is the sum over the patches; take the mean")
    require(loss > 0, "the cross-entropy is minus the mean logarithm: it is positive")
    both = -float(F.log_softmax(torch.from_numpy(logits), 1).mean())
    require(abs(loss - both) > 1e-6, "p[:, y] mixes the rows; pick each row's own class: p[np.arange(len(y)), y]")
    swapped = float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(1 - y)))
    require(abs(loss - swapped) > 1e-6, "you take the probability of the wrong class; the true one is column y")
    close(loss, float(of_each), f"torch's is {of_each:.4g}: minus the mean logarithm of the true class's probability")
    with np.errstate(all="ignore"):
        loss = called(cross_entropy, large, np.array([1, 0]))
    hint = f"a sure error gives {loss}, torch 500.2: log softmax is a - log(sum(exp(a))), without a logarithm of 0"
    require(np.isclose(loss, F.cross_entropy(torch.from_numpy(large), torch.tensor([1, 0]))), hint)
    right("the same as torch's. Loss functions take logits, not probabilities, for just this reason.")


def exercise_4_3(train: Callable) -> None:
    """A training loop of a linear model."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    y = (x @ [1, -2, 0.5, 0] + rng.normal(size=50) > 0).astype(int)
    once = array(called(train, x, y, 0.5, 1, 50), (4,)).astype(float)
    expected = _trained(x, y, 0.5, 1, 50)
    require(once.any(), "the weights are still 0 after an epoch; do you change w?")
    require(not np.allclose(once, -expected), "the weights go the wrong way: subtract the gradient")
    require(not np.allclose(once, 50 * expected), "the steps are too long: take the mean over the batch, not the sum")
    hint = "one step with all patches differs from torch's: w - lr * mean of (p - y) * x"
    require(np.allclose(once, expected, atol=1e-6), hint)
    batches = array(called(train, x, y, 0.5, 1, 16), (4,)).astype(float)
    single = _trained(x[:16], y[:16], 0.5, 1, 16)
    require(not np.allclose(batches, single, atol=1e-6), "only the first batch is used; an epoch goes over all patches")
    require(not np.allclose(batches, expected, atol=1e-6), "batches of 16 give the same as one of 50: use batch")
    dropped = _trained(x[:48], y[:48], 0.5, 1, 16)
    require(not np.allclose(batches, dropped, atol=1e-6), "of 50 patches in batches of 16 you leave out the last two")
    longer = _trained(x, y, 0.5, 1, 16, of=16)
    require(
        not np.allclose(batches, longer, atol=1e-6), "divide by the patches in the batch: the last one has only two"
    )
    hint = "batches of 16 differ from torch's: one step for each batch, with w as the batch before left it"
    require(np.allclose(batches, _trained(x, y, 0.5, 1, 16), atol=1e-6), hint)
    more = array(called(train, x, y, 0.5, 5, 16), (4,)).astype(float)
    require(not np.allclose(more, batches), "five epochs give the same as one: go on with w, do not start again from 0")
    require(np.allclose(more, _trained(x, y, 0.5, 5, 16), atol=1e-6), "right for one epoch, not for five")
    right("the same as with torch's gradients. fastai's fit is this loop, with more of everything.")


def _trained(x: np.ndarray, y: np.ndarray, lr: float, epochs: int, batch: int, of: int = 0) -> np.ndarray:
    """Weights by torch's gradients; each batch's summed loss is divided by its length or by ``of``."""
    x, y = torch.from_numpy(x), torch.from_numpy(y).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    for _ in range(epochs):
        for some, labels in zip(x.split(batch), y.split(batch), strict=True):
            loss = F.binary_cross_entropy_with_logits(some @ w, labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss / (of or len(some)), w)
            w = (w - lr * slope).detach().requires_grad_()
    return w.detach().numpy()


def exercise_4_4(answer: Any, curves: Callable, known: int) -> None:
    """How far the validation loss ends above its lowest point, with few and with all patches."""
    rise, why = given(answer, tuple)
    missing = {"40", "all"} - set(given(rise, dict))
    require(not missing, f"rise lacks {', '.join(sorted(missing))}")
    of = {"40": curves(40), "all": curves(known)}
    expected = {name: valid[-1] - valid.min() for name, (_, valid) in of.items()}
    exchanged = all(
        abs(number(rise[one]) - expected[other]) <= ROUNDED for one, other in (("40", "all"), ("all", "40"))
    )
    require(not exchanged, "you have exchanged the two")
    for name, (train, valid) in of.items():
        value = number(rise[name])
        gap = abs(value - (valid[-1] - train[-1])) <= ROUNDED
        require(not gap, f"{name}: that is the gap between the two losses; how far does validation alone rise?")
        require(
            abs(value - valid.min()) > ROUNDED,
            f"{name}: that is the lowest validation loss; how far does it end above?",
        )
        from_start = abs(value - (valid[-1] - valid[0])) <= ROUNDED
        require(not from_start, f"{name}: that is the last minus the first validation loss; subtract the lowest")
        require(
            value > 1e-6, f"{name}: no rise; the training loss ends at its lowest point, the validation loss does not"
        )
        if name == "all" and abs(value - expected[name]) > ROUNDED:
            valid = curves(PATCHES)[1]
            too_many = abs(value - (valid[-1] - valid.min())) <= ROUNDED
            require(not too_many, f"all is curves(len(known)), {known} patches: the others are for validation")
        close(value, expected[name], f"{name}: the last validation loss minus the lowest", ROUNDED)
    wrong = {
        "a": "the validation patches are the same in both cases",
        "c": "the gradient is a mean over the patches: more of them make it less noisy, not longer",
    }
    choice(why, "b", wrong)
    right(
        f"{expected['40']:.2f} with 40 patches, {expected['all']:.2f} with {known}. More patches, less room for chance."
    )


def exercise_4_5(answer: Any) -> None:
    """Two rules of test-time augmentation, and what to say when views disagree."""
    tta, missed_by, told = given(answer, tuple)
    p = np.random.default_rng(0).uniform(0.01, 0.99, (30, 5))
    mean = array(called(tta, p, "mean"), (30,))
    require(np.allclose(mean, p.mean(axis=1)), '"mean": average over the views, axis 1')
    log = array(called(tta, p, "log"), (30,))
    require(not np.allclose(log, mean), '"log" gives the same as "mean": what does the function do with rule?')
    alone = np.allclose(log, np.exp(np.log(p).mean(axis=1)))
    require(not alone, '"log": benign, 1 - p, is averaged in the same way; divide by the sum of both')
    require((log >= 0).all(), '"log": these are still logarithms; take exp of the means')
    both = torch.from_numpy(np.log([1 - p, p])).mean(dim=2)
    message = (
        '"log" differs from the softmax of the mean logarithms: mean of the logarithms, exp, then divide by the sum'
    )
    require(np.allclose(log, both.softmax(0)[1]), message)
    rule = given(missed_by, str).strip().lower()
    require(rule in ("mean", "log"), f"{missed_by!r} is no rule; answer mean or log")
    views = np.array([[0.9, 0.9, 0.001]])
    by_mean, by_log = (float(called(tta, views, name)[0]) for name in ("mean", "log"))
    require(rule == "log", f"the mean of 0.9, 0.9 and 0.001 is {by_mean:.2f}, above 0.5, so this rule finds it")
    wrong = {
        "a": f"is it {by_mean:.2f} or {by_log:.2f}? An average hides that the model contradicts itself",
        "c": "then the views 0.1, 0.1 and 0.999 of another nodule would be told as 0.1, and its one alarm hidden",
    }
    choice(told, "b", wrong)
    right(f"{by_mean:.2f} or {by_log:.2f}: the rule decides about this patient, so choose it before you look at test.")


def exercise_4_6(augment: Callable) -> None:
    """An augmentation that keeps the size of nodules."""
    row, column = np.mgrid[:64, :64]
    radii = np.arange(4, 12)
    nodules = [np.hypot((row - 26) / 1.2, column - 36) < radius for radius in radii]
    images = np.where(nodules, NODULE, LUNG).astype(np.float32)
    before, sizes = images.copy(), np.sum(nodules, axis=(1, 2))
    seen = array(called(augment, images, np.random.default_rng(0)), images.shape)
    require((images == before).all(), "your function changes the images that it was given; work on a copy")
    require(np.isfinite(seen).all(), "some pixels are not finite")
    again = array(called(augment, images, np.random.default_rng(0)), images.shape)
    hint = (
        "the same rng gives other views the second time: draw every change from rng, not from a generator of your own"
    )
    require(np.array_equal(seen, again), hint)
    require(np.ptp(seen) > 400, "the pixels are no longer Hounsfield units: keep the unit")
    copies = np.repeat(images[:1], 64, axis=0)
    rng = np.random.default_rng(1)
    different = len(np.unique(array(called(augment, copies, rng), copies.shape).round(1), axis=0))
    require(different > 1, "64 copies of one patch come out all alike: draw a change for each patch of the batch")
    require(
        different >= 6, f"a patch has only {different} different views; six are asked for: combine turns and mirrors"
    )
    for _ in range(16):
        seen = array(called(augment, images, rng), images.shape)
        for image, size in zip(seen, sizes, strict=True):
            _as_large(image, int(size))
    right(f"{different} different views of one patch in 64 draws, and the nodules are as large as before.")


def _as_large(image: np.ndarray, size: int) -> None:
    """Raise Wrong unless a nodule of a changed patch is in one piece, and its pixels about as many as before."""
    inside = image > (NODULE + LUNG) / 2
    labels, pieces = ndimage.label(inside)
    largest = np.bincount(labels.ravel())[1:].max() if pieces else 0
    whole = int(inside.sum())
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    water = (
        'corners or edges filled with 0 HU look like tissue; mirror the border (mode="reflect") or turn by 90 degrees'
    )
    require((np.abs(border) < 1e-3).sum() < 3, water)  # interpolated tissue is not 0 HU so exactly
    lung = np.median(image)
    brightness = f"lung of {LUNG:.0f} HU has {lung:.0f} after it: a CT is calibrated, so keep brightness within 100 HU"
    require(abs(lung - LUNG) <= 100, brightness)
    hint = (
        f"a nodule of {size} pixels has {whole} after it: no zoom, and no shift or crop that moves it out of the patch"
    )
    require(abs(whole - size) <= 0.12 * size + 3, hint)
    require(
        largest >= 0.9 * whole, "a nodule is cut in pieces: a shift that wraps around puts its end on the other side"
    )
