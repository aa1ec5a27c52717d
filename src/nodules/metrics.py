"""Arrays to numbers, each with its interval: the one scorer that every result passes through."""

from collections.abc import Callable

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

RESAMPLES = 1000


def accuracy(y: np.ndarray, p: np.ndarray) -> float:
    """Share of patches on the right side of probability 0.5."""
    return float(np.mean((p >= 0.5) == (y == 1)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auc": roc_auc_score,
    "accuracy": accuracy,
    "log_loss": lambda y, p: log_loss(y, p, labels=[0, 1]),
}


def bootstrap_indices(groups: np.ndarray, seed: int, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """Patch indices of ``resamples`` samples drawn with replacement from whole groups (patients).

    Patches of one patient are alike, so the patient is what is drawn (cluster bootstrap, Field & Welsh 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00593.x). ``groups`` has one label per patch, shape (N,).
    """
    _, inverse = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(members), size=(resamples, len(members)))
    return [np.concatenate([members[i] for i in draw]) for draw in draws]


def score(y: np.ndarray, p: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> dict[str, float]:
    """AUC, accuracy and log-loss, each with a 95% percentile bootstrap interval.

    Args:
        y: labels in {0, 1}, shape (N,), both present.
        p: predicted probability of malignancy, shape (N,).
        groups: patient of each patch, shape (N,); None resamples patches, where patients are unknown.
        seed: of the bootstrap.

    Returns:
        ``n``, and for each metric its value and ``<metric>_low``, ``<metric>_high``.
    """
    y, p = np.asarray(y), np.asarray(p, dtype=float)
    groups = np.arange(len(y)) if groups is None else np.asarray(groups)
    samples = [i for i in bootstrap_indices(groups, seed) if 0 < y[i].mean() < 1]
    out: dict[str, float] = {"n": len(y)}
    for name, metric in METRICS.items():
        low, high = np.percentile([metric(y[i], p[i]) for i in samples], [2.5, 97.5])
        out |= {name: float(metric(y, p)), f"{name}_low": float(low), f"{name}_high": float(high)}
    return out
