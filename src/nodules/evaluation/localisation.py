"""How well activation maps locate a nodule of known outline, compared with maps that ignore the image."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import nn

from nodules.data.sources import SIDE
from nodules.evaluation import metrics
from nodules.networks.maps import overlay
from nodules.networks.network import predict

BLOB = 8  # pixels, standard deviation of the centred blob
SHARES = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7])  # of the pixels that are erased or shown


def pointing(maps: np.ndarray, masks: np.ndarray) -> pd.DataFrame:
    """How well maps locate the nodule, one row per patch.

    Args:
        maps: (N, s, s), of any size.
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


def controls(count: int, seed: int) -> dict[str, np.ndarray]:
    """Maps that ignore the image, (count, 64, 64): noise and a blob in the middle."""
    away = np.square(np.arange(SIDE) - (SIDE - 1) / 2)
    blob = np.exp(-(away[:, None] + away) / (2 * BLOB**2))
    return {
        "random map": np.random.default_rng(seed).random((count, SIDE, SIDE)),
        "centred blob": np.broadcast_to(blob, (count, SIDE, SIDE)).copy(),
    }


def scores(maps: dict[str, np.ndarray], masks: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Mean ``mass`` and ``hit`` of each method's maps with 95% intervals: ``name, part, value, low, high``."""
    rows = []
    for name, of_method in maps.items():
        for part, values in pointing(of_method, masks).items():
            rows.append({"name": name, "part": part, **metrics.mean(values.to_numpy(), units, seed)})
    return pd.DataFrame(rows)


def lead(
    maps: np.ndarray, others: np.ndarray, masks: np.ndarray, units: np.ndarray, seed: int, part: str = "hit"
) -> dict[str, float]:
    """How much better ``maps`` locate the nodule than ``others``, paired: the ``part`` of :func:`pointing`.

    Returns:
        As from :func:`nodules.evaluation.metrics.difference`.
    """
    gained = (pointing(maps, masks)[part] - pointing(others, masks)[part]).to_numpy()
    weights = metrics.bootstrap_weights(units, seed)
    return metrics.difference(weights @ gained / weights.sum(1))


def likeness(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each map (N, s, s) with its counterpart, (N,); 0 where one of them is constant.

    A map that looks the same under a randomly initialised head explains nothing (Adebayo et al. 2018, arXiv
    1810.03292).
    """
    first, second = (rankdata(m.reshape(len(m), -1), axis=1) for m in (maps, others))
    first, second = (ranks - ranks.mean(1, keepdims=True) for ranks in (first, second))
    size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.where(size > 0, size, 1)


def erasure(network: nn.Module, images: np.ndarray, maps: np.ndarray) -> dict[str, np.ndarray]:
    """How the probability of malignancy moves when pixels are erased or shown in the order of a map.

    Deletion and insertion (Petsiuk, Das & Saenko 2018, arXiv 1806.07421): a map is true to the network if erasing a
    few of its highest pixels takes the probability away, and showing a few brings it back. An erased pixel takes the
    mean of its image. That is a density, too, so only curves of the same network are compared.

    Args:
        network: whose decision the maps explain.
        images: (N, 64, 64), pixel values.
        maps: (N, 64, 64).

    Returns:
        ``deletion`` and ``insertion``: probabilities (N, S) at each of ``SHARES``.
    """
    # Ties, as where a map is 0, are broken by place, the same for all maps
    rank = np.argsort(np.argsort(-maps.reshape(len(maps), -1), axis=1, kind="stable"), axis=1)
    rank = rank.reshape(maps.shape) / maps[0].size
    empty = images.mean(axis=(1, 2), keepdims=True)
    return {
        way: np.stack(
            [predict(network, np.where((rank < share) == shown, images, empty), 1)[:, 0] for share in SHARES], 1
        )
        for way, shown in (("deletion", False), ("insertion", True))
    }


def erasure_curves(curves: dict[str, dict[str, np.ndarray]], units: np.ndarray, seed: int) -> pd.DataFrame:
    """Means of :func:`erasure` by method, with 95% intervals: ``name, panel, x, value, low, high``, x in percent."""
    rows = [
        {"name": name, "panel": way, "x": 100 * share, **metrics.mean(values, units, seed)}
        for name, ways in curves.items()
        for way, of_way in ways.items()
        for share, values in zip(SHARES, of_way.T, strict=True)
    ]
    return pd.DataFrame(rows)
