"""Exercises on interpretation: thresholds, precision, activation maps by hand, and tests of such maps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from scipy.stats import spearmanr
from sklearn.metrics import precision_score, recall_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from nodules.check.answers import array, called, choice, close, given, number, require, right
from nodules.data.patches import Patches
from nodules.evaluation import decisions, localisation
from nodules.networks.maps import forgotten

SHARE = 0.1  # of the pixels that are deleted


def exercise_7_1(rates: Callable) -> None:
    """Sensitivity, specificity and precision, equal to scikit-learn's."""
    rng = np.random.default_rng(0)
    y = (rng.random(200) < 0.3).astype(int)
    calls = ((0.4 * y + rng.random(200)) > 0.6).astype(int)
    mine = array(called(rates, y, calls), (3,))
    sensitivity, specificity = recall_score(y, calls), recall_score(y, calls, pos_label=0)
    precision, inverse = precision_score(y, calls), precision_score(y, calls, pos_label=0)
    close(mine[0], sensitivity, "sensitivity: divide the true positives by all malignant patches, called or not")
    require(abs(mine[1] - (1 - specificity)) > 1e-6, "that is the false-positive rate; specificity is 1 minus it")
    require(abs(mine[1] - inverse) > 1e-6, "specificity is a share of the benign patches, not of those called benign")
    close(mine[1], specificity, "specificity: divide the true negatives by all benign patches")
    require(abs(mine[2] - (y == calls).mean()) > 1e-6, "the third is the accuracy; precision looks at positive calls")
    close(mine[2], precision, "precision: divide the true positives by all that are called malignant")
    right("equal to scikit-learn's. Sensitivity is also called recall, and precision the positive predictive value.")


def exercise_7_2(youden: Callable, part: Any) -> None:
    """A threshold as good as the lesson's, and where to choose it."""
    rng = np.random.default_rng(0)
    y = (rng.random(300) < 0.2).astype(int)
    p = np.round(1 / (1 + np.exp(1.5 - y - rng.normal(size=300))), 3)

    def both(threshold: float) -> float:
        return (p[y == 1] >= threshold).mean() + (p[y == 0] < threshold).mean()

    false, true, thresholds = roc_curve(y, p, drop_intermediate=False)
    mine, best = number(called(youden, y, p)), both(decisions.youden(y, p))
    lowest, hits = thresholds[np.argmin(true - false)], np.array([((p >= t) == y).mean() for t in np.unique(p)])
    require(min(abs(mine - best), abs(mine - best + 1)) > 1e-9, "return the threshold, not the sum that it reaches")
    require(p.min() <= mine <= p.max(), f"{mine:.4g} is no threshold between the lowest and the highest probability")
    require(abs(mine - np.unique(p)[hits.argmax()]) > 1e-9, "that has the best accuracy, which the larger class rules")
    require(both(mine) > both(lowest) + 1e-9, "that is the lowest sum, not the highest")
    above = (
        f"sensitivity + specificity is {both(mine):.3f} at yours, but {best:.3f} can be reached; call p >= threshold"
    )
    require(both(mine) >= best - 1e-9, above)
    wrong = {
        "a": "on patches it learned from the network looks better than it is, so its threshold there misleads",
        "c": "what is chosen on test looks best there by luck as well; nothing is left to say how good it is",
    }
    choice(part, "b", wrong)
    right("as good as the lesson's. It weighs a missed cancer and a false alarm alike: somebody must decide that, too.")


def exercise_7_3(precision: Callable, at: Any, harm: Any) -> None:
    """Precision by prevalence."""
    for sensitivity, specificity, prevalence in ((0.9, 0.7, 0.3), (0.6, 0.95, 0.01)):
        # The same on 100000 people, counted by scikit-learn
        people = np.array([[sensitivity, 1 - sensitivity], [1 - specificity, specificity]])
        people *= np.array([[prevalence], [1 - prevalence]]) * 1e5
        expected = precision_score([1, 1, 0, 0], [1, 0, 1, 0], sample_weight=people.ravel())
        mine = number(called(precision, sensitivity, specificity, prevalence))
        shared = sensitivity / (sensitivity + 1 - specificity)
        require(abs(mine - shared) > 1e-6, "that holds where half are malignant; weight both rates by the prevalence")
        about = f"sensitivity {sensitivity}, specificity {specificity}, prevalence {prevalence}"
        close(mine, expected, f"true positives over all positives is {expected:.4f} ({about})")
    at = given(at, dict)
    for prevalence in (0.4, 0.02):
        require(prevalence in at, f"the answer lacks the prevalence {prevalence}")
        hint = f"take your function at 0.85, 0.85 and {prevalence}"
        close(at[prevalence], called(precision, 0.85, 0.85, prevalence), hint, 1e-3)
    wrong = {
        "a": "those are the same, but what is a positive call worth at 2%?",
        "b": "of 100 cancers as many are found as before: sensitivity is the same. Look at the positive calls",
    }
    choice(harm, "c", wrong)
    right(
        f"{at[0.4]:.0%} of the calls are right at 40% malignant, {at[0.02]:.0%} at 2%. Report both, and the prevalence."
    )


def exercise_7_4(cam: Callable) -> None:
    """A map whose mean, plus the bias, is the logit of a torch network."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 4, 6, generator=draws).relu()
    layer = nn.Linear(5, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, 5, generator=draws))
        logits = layer(F.adaptive_avg_pool2d(features, 1).flatten(1))[:, 0].numpy()
    weight, bias = layer.weight.detach()[0], layer.bias.item()
    maps = array(called(cam, features.clone(), weight.clone()), (3, 4, 6))
    means = maps.mean((1, 2))
    require(
        np.abs(means * 24 - (logits - bias)).max() > 1e-4, "the map's sum is the logit; its mean shall be: no division"
    )
    require((maps < 0).any(), "nothing is negative: evidence against malignant belongs to the map as well")
    require(np.abs(means * 5 - (logits - bias)).max() > 1e-4, "sum over channels, do not average")
    off = np.abs(means + bias - logits).max()
    require(off < 1e-4, f"mean plus bias is off the logit by up to {off:.2g}; weight each channel, sum over channels")
    expected = torch.einsum("nchw,c->nhw", features, weight).numpy()
    require(
        np.abs(maps - expected).max() < 1e-4, "the mean is right, but not each cell: it counts its own features only"
    )
    right("the mean of the map plus the bias is the logit: nothing is left out. A deeper head does not allow that.")


def _grad_cam(network: nn.Module, images: Tensor) -> Tensor:
    """Captum's maps of the body, (N, 16, 16)."""
    method = LayerGradCam(lambda batch: network(batch)[:, 0], network.body)
    return method.attribute(images, relu_attributions=True)[:, 0].detach()


def exercise_7_5(grad_cam: Callable, network: nn.Module, images: Tensor) -> None:
    """Grad-CAM, equal to Captum's."""
    expected = _grad_cam(network, images).numpy()
    maps = called(grad_cam, network, images)
    maps = array(maps.detach() if isinstance(maps, Tensor) else maps, expected.shape)
    require((maps >= 0).all(), "some evidence is negative; Grad-CAM cuts it off: relu")
    left = len(network.body._forward_hooks)
    network.body._forward_hooks.clear()
    require(not left, "your hook is still there, and would keep the features of every later pass: handle.remove()")
    features = network.body(images).detach().requires_grad_()
    (slope,) = torch.autograd.grad(network.head(features).sum(), features)
    scale = expected.max()
    hints = {
        "take the mean of the gradient over space first, then multiply: one weight a channel": slope * features,
        "that is the gradient alone; it weights the features": slope,
        "cut off after the sum over channels, not before": (slope.mean((2, 3), keepdim=True) * features).relu(),
        "take the gradient at the features; these are the features alone": features,
    }
    for hint, variant in hints.items():
        require(np.abs(maps - variant.sum(1).relu().detach().numpy()).max() > 1e-3 * scale, hint)
    factor = maps.sum() / expected.sum()
    require(
        abs(factor - 1) < 1e-3 or np.abs(maps / max(factor, 1e-9) - expected).max() > 1e-3 * scale,
        f"the right maps, but {factor:.3g} times as high: weight by the mean of the gradient, and sum over channels",
    )
    require(np.abs(maps - expected).max() < 1e-3 * scale, "the maps differ from Captum's; follow the three steps")
    right("equal to Captum's LayerGradCam, with one hook. On a mean and one linear layer it is a scaled classic CAM.")


def _check_tests(likeness: Callable, pointing: Callable, deleted: Callable) -> None:
    """Raise Wrong unless the three tests of a map are right on maps of noise."""
    rng = np.random.default_rng(0)
    maps, masks = rng.random((20, 64, 64)), np.zeros((20, 64, 64), dtype=bool)
    masks[:, 20:50, 10:40] = True
    others = np.exp(3 * (maps + rng.random(maps.shape)))
    alike = number(called(likeness, maps, others))
    pearson = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(maps, others, strict=True)])
    require(abs(alike - pearson) > 1e-3, "that is Pearson's correlation of the values; correlate their ranks")
    expected = np.mean([spearmanr(a, b, axis=None).statistic for a, b in zip(maps, others, strict=True)])
    close(alike, expected, "likeness: one rank correlation a patch over all its places, then the mean", 1e-3)

    within = [mask[np.unravel_index(each.argmax(), each.shape)] for each, mask in zip(maps, masks, strict=True)]
    hits = number(called(pointing, maps, masks))
    mass = ((maps * masks).sum((1, 2)) / maps.sum((1, 2))).mean()
    require(abs(hits - mass) > 1e-6, "that is the mass inside; the pointing game asks for the highest place only")
    close(hits, np.mean(within), "pointing: look up each map's own highest place in its own mask")

    pixels = rng.normal(5, 1, maps.shape)
    before = pixels.copy()
    erased = array(called(deleted, pixels, maps, 0.25), maps.shape)
    require((pixels == before).all(), "your function changes the images that it is given; work on a copy")
    gone = erased != before
    counts = gone.sum((1, 2))
    require((abs(counts - 1024) <= 1).all(), f"{counts[0]} of 4096 pixels change in the first image, not a quarter")
    lowest = np.where(gone, maps, np.inf).min((1, 2))
    highest = np.where(gone, -np.inf, maps).max((1, 2))
    require((lowest >= highest).all(), "the erased pixels are not those that the map ranks highest")
    means = np.broadcast_to(before.mean((1, 2), keepdims=True), maps.shape)
    require(np.allclose(erased[gone], means[gone]), "an erased pixel takes the mean of its own image, before deletion")


def exercise_7_6(
    likeness: Callable, pointing: Callable, deleted: Callable, harmed: Any, network: nn.Module, ct: Patches, new: Any
) -> None:
    """Three tests of a map, and whom a plausible but wrong one harms; reports what the tests say of the network."""
    _check_tests(likeness, pointing, deleted)
    wrong = {
        "a": "it does not change the network's call, but it may change whether a doctor believes it",
        "c": "a developer can look for the mistake; who bears the wrong treatment, or none?",
    }
    choice(harmed, "b", wrong)

    rows = np.flatnonzero((ct.table["malignant"] == 1) & new & ct.masks.any((1, 2)))
    images = (ct.images[rows].clip(-1000, 400) / 500 + 1.4).astype(np.float32)
    small = [_grad_cam(net, torch.from_numpy(images[:, None])) for net in (network, forgotten(network, 1))]
    grown = F.interpolate(small[0][:, None], (64, 64), mode="bilinear")[:, 0].numpy()
    shown = {"Grad-CAM": grown, "blob": localisation.controls(len(rows), 0)["centred blob"]}

    @torch.no_grad()
    def mean_p(pixels: np.ndarray) -> float:
        return float(network(torch.from_numpy(pixels[:, None].astype(np.float32))).sigmoid().mean())

    print(f"{len(rows)} malignant patches of patients not learned from; mean probability {mean_p(images):.2f}")
    for name, maps in shown.items():
        p = mean_p(deleted(images, maps, SHARE))
        print(f"{name}: points inside {pointing(maps, ct.masks[rows]):.0%}; {p:.2f} without its top {SHARE:.0%}")
    varied = (small[0].std((1, 2)) > 0) & (small[1].std((1, 2)) > 0)
    same = likeness(*(maps[varied].numpy() for maps in small)) if varied.any() else 0.0
    print(f"likeness to the maps of a forgotten head: {same:.2f} (1: the same map)")
    right("all three tests work. Compare the lines: does the map beat a blob that never looked at the image?")
