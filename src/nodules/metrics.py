"""Arrays to numbers, each with its interval: the one scorer that every result passes through."""

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

RESAMPLES = 1000
GRID = np.linspace(0, 1, 101)  # where curves are read


def auc(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the weighted share of (malignant, benign) pairs ranked rightly, ties counting half.

    The same as scikit-learn's ``roc_auc_score`` with sample weights, for many sets of weights at once.

    Args:
        y: labels in {0, 1}, shape (N,).
        p: scores, shape (N,).
        weights: shape (R, N).

    Returns:
        Shape (R,); NaN where the weights leave only one class.
    """
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=-np.inf))
    malignant = np.add.reduceat((weights * y)[:, order], starts, axis=1)
    benign = np.add.reduceat((weights * (1 - y))[:, order], starts, axis=1)
    below = benign.cumsum(axis=1) - benign / 2
    pairs = malignant.sum(axis=1) * benign.sum(axis=1)
    return (malignant * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)


def accuracy(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of patches on the right side of probability 0.5; shapes as for :func:`auc`."""
    return weights @ ((p >= 0.5) == (y == 1)) / weights.sum(axis=1)


def log_loss(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood in nats, of probabilities clipped as float32 can hold them; shapes as above."""
    smallest = np.finfo(np.float32).eps
    likelihood = np.clip(np.where(y == 1, p, 1 - p), smallest, 1)
    return weights @ -np.log(likelihood) / weights.sum(axis=1)


METRICS = {"auc": auc, "accuracy": accuracy, "log_loss": log_loss}


def bootstrap_weights(groups: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each patch stands in each of ``resamples`` samples of whole groups (patients), shape (R, N).

    Patches of one patient are alike, so the patient is what is drawn with replacement (cluster bootstrap,
    Field & Welsh 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x). ``groups`` has one label a patch, (N,).
    """
    names, members = np.unique(groups, return_inverse=True)
    even = np.full(len(names), 1 / len(names))
    return np.random.default_rng(seed).multinomial(len(names), even, size=resamples)[:, members].astype(float)


def _resampled(y: np.ndarray, p: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[np.ndarray, ...]:
    """Labels, scores (S, N), and weights (1 + R, N): the sample itself, then its resamples."""
    y, p = np.asarray(y), np.atleast_2d(np.asarray(p, dtype=float))
    weights = bootstrap_weights(np.arange(len(y)) if groups is None else np.asarray(groups), seed)
    return y, p, np.vstack([np.ones(len(y)), weights])


def score(y: np.ndarray, p: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> dict[str, float]:
    """AUC, accuracy and log-loss, each with a 95% percentile bootstrap interval.

    Args:
        y: labels in {0, 1}, shape (N,), both present.
        p: predicted probability of malignancy, shape (N,); or (S, N) of S trainings, whose mean score is given.
        groups: patient of each patch, shape (N,); None resamples patches, where patients are unknown.
        seed: of the bootstrap.

    Returns:
        ``n``, and for each metric its value and ``<metric>_low``, ``<metric>_high``.
    """
    return over_folds(y, p, np.zeros(len(y)), groups, seed)


def over_folds(
    y: np.ndarray, p: np.ndarray, fold: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> dict[str, float]:
    """As :func:`score`, of cross-validation: each metric is taken in each fold (N,) and averaged over folds.

    Scores of different folds come from different trainings, so they are not ranked against each other.
    """
    y, p, weights = _resampled(y, p, groups, seed)
    members = [fold == name for name in np.unique(fold)]
    out: dict[str, float] = {"n": len(y)}
    for name, metric in METRICS.items():
        every = [metric(y[rows], one[rows], weights[:, rows]) for one in p for rows in members]
        value, *resampled = np.mean(every, axis=0)
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        out |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return out


def paired(
    y: np.ndarray, p: np.ndarray, q: np.ndarray, groups: np.ndarray | None = None, metric: str = "auc", seed: int = 0
) -> dict[str, float]:
    """How much better ``p`` is than ``q`` on the same patches: paired bootstrap, arguments as for :func:`score`.

    Returns:
        ``value`` (the difference in the metric), ``low``, ``high`` (95% interval), ``p_value`` (two-sided: twice
        the share of resamples on the other side of zero, at least 1 / resamples).
    """
    y, p, weights = _resampled(y, p, groups, seed)
    means = [np.mean([METRICS[metric](y, one, weights) for one in scores], axis=0) for scores in (p, np.atleast_2d(q))]
    value, *resampled = means[0] - means[1]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    tail = min(np.nanmean(np.array(resampled) <= 0), np.nanmean(np.array(resampled) >= 0))
    p_value = min(1.0, max(2 * tail, 1 / RESAMPLES))
    return {"value": float(value), "low": float(low), "high": float(high), "p_value": float(p_value)}


def mean(values: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> dict[str, float]:
    """Mean of (N,) values, a rate where they are 0 or 1: ``value, low, high`` by bootstrap as in :func:`score`."""
    weights = bootstrap_weights(np.arange(len(values)) if groups is None else groups, seed)
    resampled = weights @ values / weights.sum(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def over_slices(predictions: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Replace what was predicted of each patch by the mean over the slices of its ``nodule``.

    Where ``slice_index`` is known, only the middle half of the slices counts: the outer ones graze the nodule.

    Returns:
        As many rows as given; ``drop_duplicates("nodule")`` leaves one a nodule.
    """
    counted = predictions
    if "slice_index" in predictions:
        slices = predictions.groupby("nodule")["slice_index"]
        quarter = slices.transform("size") // 4
        rank = slices.rank(method="first")
        counted = predictions[(rank > quarter) & (rank <= slices.transform("size") - quarter)]
    means = counted.groupby("nodule")[columns].mean()
    return predictions.assign(**means.loc[predictions["nodule"]].set_index(predictions.index))


def youden(y: np.ndarray, p: np.ndarray) -> float:
    """The threshold with the highest sensitivity + specificity (Youden 1950); halfway to the next lower score."""
    false, true, thresholds = roc_curve(y, p, drop_intermediate=False)
    best = 1 + int(np.argmax((true - false)[1:]))  # the first threshold is infinite
    below = p[p < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if len(below) else float(thresholds[best])


def confusion(y: np.ndarray, called: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> pd.DataFrame:
    """Counts of truth against call (0 benign, 1 malignant), and their share of the truth with 95% intervals.

    Returns:
        ``truth, called, patches, value, low, high``, four rows.
    """
    names, rows = ("benign", "malignant"), []
    for truth in (0, 1):
        members = y == truth
        for call in (0, 1):
            share = mean((called[members] == call).astype(float), None if groups is None else groups[members], seed)
            patches = int((members & (called == call)).sum())
            rows.append({"truth": names[truth], "called": names[call], "patches": patches, **share})
    return pd.DataFrame(rows)


def curves(y: np.ndarray, p: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> pd.DataFrame:
    """ROC and precision-recall curves with pointwise 95% bootstrap bands.

    Returns:
        ``curve`` (``ROC`` or ``PR``), ``x`` (1 - specificity, or recall), ``value`` (sensitivity, or precision),
        ``low``, ``high``.
    """
    _, p, weights = _resampled(y, p, groups, seed)
    lines = {"ROC": _roc, "PR": _precision}
    parts = []
    for name, line in lines.items():
        every = np.stack([line(y, p[0], w) for w in weights if 0 < w @ y < w.sum()])
        low, high = np.percentile(every[1:], [2.5, 97.5], axis=0)
        parts.append(pd.DataFrame({"curve": name, "x": GRID, "value": every[0], "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


def _roc(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    false, true, _ = roc_curve(y, p, sample_weight=weights)
    return np.interp(GRID, false, true)


def _precision(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    precision, recall, _ = precision_recall_curve(y, p, sample_weight=weights)
    return np.interp(GRID, recall[::-1], precision[::-1])


def holm(p_values: np.ndarray) -> np.ndarray:
    """P values corrected for making several comparisons (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    raised = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(raised, 1)
    return corrected
