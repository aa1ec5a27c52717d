"""Where does a network look? Class activation maps, and how well they find a nodule whose outline is known.

Every map shows the evidence for *malignant*: what raises its logit above that of *benign*.
"""

import numpy as np
import pandas as pd
import torch
from captum.attr import LayerGradCam
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from nodules import learners, metrics, models
from nodules.device import device
from nodules.features import Bank, bank, width
from nodules.scratch import seeded
from nodules.whole import HEAD_LR, Network

BATCH = 64
BLOB = 8  # pixels, standard deviation of the centred blob


class Averaged(nn.Module):
    """A body, the mean over space of every stage, and one linear layer: what classic activation maps need.

    ``mean`` (features) is what the average patch shows, ``weight`` (features) what speaks for malignant when there is
    more of it, ``bias`` the logit of the average patch.
    """

    def __init__(self, body: models.Body, mean: Tensor, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.body, self.mean, self.weight, self.bias = body, mean, weight, bias

    def forward(self, images: Tensor) -> Tensor:
        """The logit of malignant against benign (N,), from pixel values (N, 1, 64, 64)."""
        maps = self.body(self.body.prepare(images))
        return (torch.cat([m.mean((2, 3)) for m in maps], 1) - self.mean) @ self.weight + self.bias


def averaged(body: models.Body, bank: Bank, y: np.ndarray, rows: np.ndarray) -> Averaged:
    """Fit the linear layer by logistic regression on the plain view of ``rows`` of a bank of all stages."""
    # A bank holds, stage by stage, the maxima and then the means
    means = np.repeat([False, True] * len(body.channels), np.repeat(body.channels, 2))
    scaler, model = StandardScaler(), LogisticRegression(C=0.01, max_iter=500)
    model.fit(scaler.fit_transform(bank.features[rows, 0][:, means].astype(np.float32)), y[rows])
    mean, weight = (
        torch.tensor(v, dtype=torch.float, device=device()) for v in (scaler.mean_, model.coef_[0] / scaler.scale_)
    )
    return Averaged(body.to(device()).eval(), mean, weight, float(model.intercept_[0]))


def networks(
    body: models.Body, images: np.ndarray, y: np.ndarray, split: np.ndarray, epochs: int, seed: int
) -> tuple[Averaged, Network]:
    """Two networks on one frozen body: a linear one for classic CAM, and one with fastai's head for Grad-CAM.

    Args:
        body: any of the registry.
        images: (N, 64, 64).
        y: labels, (N,).
        split: ``train``, ``valid`` or ``test`` of each patch, (N,); the heads learn from ``train``.
        epochs: of the second head.
        seed: likewise.
    """
    found = bank(body, images, "all")
    trained = learners.train(found, y, split, epochs=epochs, lr=HEAD_LR, seed=seed)
    return averaged(body, found, y, np.flatnonzero(split == "train")), Network(body, "all", trained.model).to(device())


def forgotten(network: Network, seed: int) -> Network:
    """The same body under a head of random weights."""
    drawn = seeded(lambda: learners.head(width(network.body, network.pool)), seed)
    return Network(network.body, network.pool, drawn).to(device()).eval()


@torch.inference_mode()
def cam(network: Averaged, images: np.ndarray) -> np.ndarray:
    """Classic class activation maps (Zhou et al. 2016, arXiv 1512.04150), of every stage together.

    The features of each stage, less those of the average patch, are added with the weights of their means; then the
    stages' sums at the size of the first. Up to the bias the mean over such a map **is** the logit: nothing is left
    out, and a place that looks as the average patch does counts nothing.

    Args:
        network: made by :func:`averaged`.
        images: (N, 64, 64), pixel values.

    Returns:
        (N, side, side), the side of the first stage's map.
    """
    weights, means = (values.split(network.body.channels) for values in (network.weight, network.mean))
    out = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(images[start : start + BATCH].astype(np.float32))[:, None].to(device())
        maps = network.body.eval()(network.body.prepare(batch))
        parts = [torch.einsum("nchw,c->nhw", m, w) - mean @ w for m, w, mean in zip(maps, weights, means, strict=True)]
        out.append(sum(F.interpolate(e[:, None], maps[0].shape[2:], mode="bilinear") for e in parts)[:, 0])
    return torch.cat(out).cpu().numpy()


def grad_cam(network: nn.Module, images: np.ndarray, stage: int) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) by Captum: for heads of any kind.

    Args:
        network: with ``taps``, one for each stage, as :class:`nodules.whole.Network`.
        images: (N, 64, 64), pixel values.
        stage: which stage's maps to weigh, from 0.

    Returns:
        (N, side, side), 0 or more, the side of that stage's map.
    """
    method = LayerGradCam(lambda batch: network(batch).diff(dim=1)[:, 0], network.eval().taps[stage])
    out = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(images[start : start + BATCH].astype(np.float32))[:, None].to(device())
        out.append(method.attribute(batch, relu_attributions=True)[:, 0].detach().float().cpu())
    return torch.cat(out).numpy()


def overlay(maps: np.ndarray, side: int, mode: str = "bilinear") -> np.ndarray:
    """Positive evidence at the size of the patches, each map scaled to a highest value of 1: (N, side, side).

    ``mode`` is torch's of interpolation; ``nearest`` shows the map as it was computed.
    """
    grown = F.interpolate(torch.from_numpy(maps)[:, None].float(), (side, side), mode=mode)[:, 0].clamp(min=0)
    return (grown / grown.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()


def pointing(maps: np.ndarray, masks: np.ndarray) -> pd.DataFrame:
    """How well maps find the nodule, a row a patch.

    Args:
        maps: (N, s, s), any size, as the methods return them.
        masks: (N, 64, 64), true inside the nodule.

    Returns:
        ``mass``: share of the positive evidence that lies inside (0 where there is none); ``hit``: whether the
        highest pixel does (the pointing game, Zhang et al. 2016, arXiv 1608.00507).
    """
    grown = overlay(maps, masks.shape[1]).reshape(len(maps), -1)
    inside = masks.reshape(len(masks), -1)
    mass = (grown * inside).sum(1) / np.maximum(grown.sum(1), 1e-12)
    hit = inside[np.arange(len(grown)), grown.argmax(1)] & (grown.max(1) > 0)
    return pd.DataFrame({"mass": mass, "hit": hit.astype(float)})


def controls(count: int, side: int, seed: int) -> dict[str, np.ndarray]:
    """Maps that know nothing of the picture, (count, side, side): noise and a blob in the middle."""
    away = np.square(np.arange(side) - (side - 1) / 2)
    blob = np.exp(-(away[:, None] + away) / (2 * (BLOB * side / 64) ** 2))
    return {
        "random map": np.random.default_rng(seed).random((count, side, side)),
        "centred blob": np.broadcast_to(blob, (count, side, side)).copy(),
    }


def localisation(found: dict[str, np.ndarray], masks: np.ndarray, groups: np.ndarray | None, seed: int) -> pd.DataFrame:
    """Mean ``mass`` and ``hit`` of each method's maps with 95% intervals: ``name, part, value, low, high``."""
    rows = []
    for name, maps in found.items():
        for part, values in pointing(maps, masks).items():
            rows.append({"name": name, "part": part, **metrics.mean(values.to_numpy(), groups, seed)})
    return pd.DataFrame(rows)


def likeness(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each map (N, s, s) with its counterpart, (N,); 0 where one of them is constant.

    A map that looks the same after the head's weights were drawn anew explains nothing (Adebayo et al. 2018, arXiv
    1810.03292).
    """
    first, second = (rankdata(m.reshape(len(m), -1), axis=1) for m in (maps, others))
    first, second = (ranks - ranks.mean(1, keepdims=True) for ranks in (first, second))
    size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.where(size > 0, size, 1)


def titles(table: pd.DataFrame) -> list[str]:
    """Two lines for each patch: its ``id``; its probability ``p_tta``, and ratings and patient where they are known."""
    out = []
    for row in table.to_dict("records"):
        parts = [f"p {row['p_tta']:.2f}"]
        parts += [f"ratings {row['ratings']}"] if "ratings" in row else []
        parts += [f"{row['patient']}"] if isinstance(row["patient"], str) else []
        out.append(f"{row['id']}\n{', '.join(parts)}")
    return out
