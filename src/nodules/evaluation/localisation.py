"""How well activation maps locate a nodule of known outline, compared with maps that ignore the image."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from nodules.evaluation import metrics
from nodules.networks.maps import overlay

BLOB = 8  # pixels, standard deviation of the centred blob


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


def controls(count: int, side: int, seed: int) -> dict[str, np.ndarray]:
    """Maps that ignore the image, (count, side, side): noise and a blob in the middle."""
    away = np.square(np.arange(side) - (side - 1) / 2)
    blob = np.exp(-(away[:, None] + away) / (2 * (BLOB * side / 64) ** 2))
    return {
        "random map": np.random.default_rng(seed).random((count, side, side)),
        "centred blob": np.broadcast_to(blob, (count, side, side)).copy(),
    }


def scores(maps: dict[str, np.ndarray], masks: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Mean ``mass`` and ``hit`` of each method's maps with 95% intervals: ``name, part, value, low, high``."""
    rows = []
    for name, of_method in maps.items():
        for part, values in pointing(of_method, masks).items():
            rows.append({"name": name, "part": part, **metrics.mean(values.to_numpy(), units, seed)})
    return pd.DataFrame(rows)


def likeness(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each map (N, s, s) with its counterpart, (N,); 0 where one of them is constant.

    A map that looks the same under a randomly initialised head explains nothing (Adebayo et al. 2018, arXiv
    1810.03292).
    """
    first, second = (rankdata(m.reshape(len(m), -1), axis=1) for m in (maps, others))
    first, second = (ranks - ranks.mean(1, keepdims=True) for ranks in (first, second))
    size = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.where(size > 0, size, 1)
