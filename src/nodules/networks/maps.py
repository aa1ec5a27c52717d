"""Class activation maps: where a network looks.

Every map shows the evidence for *malignant*: what raises its logit above that of *benign*.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from fastai.torch_core import no_random
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from nodules.data.split import Part, Parts
from nodules.networks import bank, bodies, heads
from nodules.networks.bank import Bank
from nodules.networks.device import device, tensor
from nodules.networks.network import Network

MAP_BATCH = 64  # patches per forward and backward pass


class Averaged(nn.Module):
    """A body, the mean over space of every stage, and one linear layer, as classic activation maps require.

    ``mean`` (D,) holds the features of the average patch, ``weight`` (D,) their evidence for malignant, and ``bias``
    is the logit of the average patch.
    """

    def __init__(self, body: bodies.Body, mean: Tensor, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.body, self.mean, self.weight, self.bias = body, mean, weight, bias

    def forward(self, images: Tensor) -> Tensor:
        """The logit of malignant against benign (N,), from pixel values (N, 1, 64, 64)."""
        maps = self.body(self.body.prepare(images))
        return (torch.cat([m.mean((2, 3)) for m in maps], 1) - self.mean) @ self.weight + self.bias


def averaged(body: bodies.Body, features: Bank, part: Part) -> Averaged:
    """Fit the linear layer by logistic regression on the plain views of a part, from a bank of all stages."""
    # A bank holds, stage by stage, the maxima and then the means
    means = np.repeat([False, True] * len(body.channels), np.repeat(body.channels, 2))
    scaler, model = StandardScaler(), LogisticRegression(C=0.01, max_iter=500)
    model.fit(scaler.fit_transform(features.features[part.rows, 0][:, means].astype(np.float32)), part.y)
    mean, weight = (
        torch.tensor(v, dtype=torch.float, device=device()) for v in (scaler.mean_, model.coef_[0] / scaler.scale_)
    )
    return Averaged(body.to(device()).eval(), mean, weight, float(model.intercept_[0]))


def networks(body: bodies.Body, parts: Parts, recipe: heads.Recipe, seed: int) -> tuple[Averaged, Network]:
    """Two networks on one frozen body: a linear one for classic CAM, and one with fastai's head for Grad-CAM.

    Args:
        body: the frozen body.
        parts: patches to train and validate on.
        recipe: of fastai's head.
        seed: of fastai's head.
    """
    features = bank.compute(body, parts.train.source, "all")
    trained = heads.train(features, parts, recipe, seed)
    return averaged(body, features, parts.train), Network(body, "all", trained.model).to(device())


def forgotten(network: nn.Module, seed: int) -> nn.Module:
    """The same network with a randomly initialised ``head``."""
    drawn = copy.deepcopy(network)
    with no_random(seed):
        for layer in drawn.head.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return drawn.eval()


@torch.inference_mode()
def cam(network: Averaged, images: np.ndarray) -> np.ndarray:
    """Classic class activation maps (Zhou et al. 2016, arXiv 1512.04150), summed over all stages.

    Each stage's features, minus those of the average patch, are weighted by the linear layer and summed; the stages
    are then added at the size of the first. Up to the bias, the mean of the map **is** the logit: nothing is left out,
    and a place that looks like the average patch contributes nothing.

    Args:
        network: made by :func:`averaged`.
        images: (N, 64, 64), pixel values.

    Returns:
        (N, side, side), the side of the first stage's map.
    """
    weights, means = (values.split(network.body.channels) for values in (network.weight, network.mean))
    out = []
    for start in range(0, len(images), MAP_BATCH):
        batch = tensor(images[start : start + MAP_BATCH])
        maps = network.body.eval()(network.body.prepare(batch))
        parts = [torch.einsum("nchw,c->nhw", m, w) - mean @ w for m, w, mean in zip(maps, weights, means, strict=True)]
        grown = [F.interpolate(e[:, None], maps[0].shape[2:], mode="bilinear")[:, 0] for e in parts]
        # Interpolation keeps the mean only where one side divides the other
        kept = [
            large + (small.mean((1, 2)) - large.mean((1, 2)))[:, None, None]
            for large, small in zip(grown, parts, strict=True)
        ]
        out.append(sum(kept))
    return torch.cat(out).cpu().numpy()


def grad_cams(network: nn.Module, images: np.ndarray, stages: Sequence[int]) -> list[np.ndarray]:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of several stages in one pass, for any kind of head.

    Args:
        network: with ``taps``, one per stage, like :class:`nodules.networks.network.Network`.
        images: (N, 64, 64), pixel values.
        stages: indices of those whose maps are weighted.

    Returns:
        Of each stage (N, side, side), non-negative, the side of that stage's map.
    """
    taps, kept, out = network.eval().taps, {}, []
    with ExitStack() as hooks:
        for stage in stages:
            hook = taps[stage].register_forward_hook(lambda *call, stage=stage: kept.update({stage: call[-1]}))
            hooks.enter_context(hook)
        for start in range(0, len(images), MAP_BATCH):
            score = network(tensor(images[start : start + MAP_BATCH])).diff(dim=1).sum()
            features = [kept[stage] for stage in stages]
            weights = [gradient.mean((2, 3), keepdim=True) for gradient in torch.autograd.grad(score, features)]
            evidence = [(f * w).sum(1).relu() for f, w in zip(features, weights, strict=True)]
            out.append([of_stage.detach().float().cpu() for of_stage in evidence])
    return [torch.cat(batches).numpy() for batches in zip(*out, strict=True)]


def grad_cam(network: nn.Module, images: np.ndarray, stage: int) -> np.ndarray:
    """Grad-CAM of one stage, as from :func:`grad_cams`."""
    return grad_cams(network, images, [stage])[0]


def overlay(maps: np.ndarray, side: int, mode: str = "bilinear") -> np.ndarray:
    """Positive evidence at the size of the patches, each map scaled to a maximum of 1: (N, side, side).

    ``mode`` is torch's interpolation mode; ``nearest`` shows the map as computed.
    """
    grown = F.interpolate(torch.from_numpy(maps)[:, None].float(), (side, side), mode=mode)[:, 0].clamp(min=0)
    return (grown / grown.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()
