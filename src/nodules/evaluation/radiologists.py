"""Each radiologist against the others, and a model against the same targets."""

import numpy as np
import pandas as pd

from nodules.evaluation import metrics

FEWEST = 3  # readers of a nodule: one to judge, at least two to judge by
UNDECIDED = 3  # the middle of the scale of malignancy, 1 to 5


def votes(nodules: pd.DataFrame) -> pd.DataFrame:
    """Leave one reader out: every opinion with the median of the other readers of the same nodule.

    LIDC-IDRI does not record which reader is which, so opinions are pooled. Where the others' median is the middle of
    the scale there is no target, and the opinion is left out.

    Args:
        nodules: a row each, with ``ratings`` ("5;4;4") and any further columns.

    Returns:
        The same columns and ``rating`` (1 to 5), ``y`` (whether the others' median is above 3), a row an opinion.
    """
    rows = []
    for nodule in nodules.to_dict("records"):
        ratings = [int(rating) for rating in nodule["ratings"].split(";")]
        for i, rating in enumerate(ratings if len(ratings) >= FEWEST else []):
            median = np.median(ratings[:i] + ratings[i + 1 :])
            if median != UNDECIDED:
                rows.append(nodule | {"rating": rating, "y": int(median > UNDECIDED)})
    return pd.DataFrame(rows, columns=list(dict.fromkeys([*nodules.columns, "rating", "y"])))


def kappa(y: np.ndarray, call: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Agreement beyond chance (Cohen 1960) of calls in [0, 1] with labels; 0.5 is undecided, half right either way.

    Args:
        y: labels in {0, 1}, (N,).
        call: (N,).
        weights: (R, N).

    Returns:
        (R,).
    """
    total = weights.sum(axis=1)
    agreed, called, true = (weights @ part / total for part in (1 - np.abs(call - y), call, y))
    chance = called * true + (1 - called) * (1 - true)
    return (agreed - chance) / np.where(chance < 1, 1 - chance, np.nan)


def agreement(y: np.ndarray, call: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy of calls in [0, 1]; arguments as for :func:`kappa`."""
    return weights @ (1 - np.abs(call - y)) / weights.sum(axis=1)


def compare(table: pd.DataFrame, p: np.ndarray, line: float, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Readers and a model against the same targets, on the same nodules.

    A reader's rating 1 to 5 is read as the probability 0 to 1 in quarters; a 3 is half a call.

    Args:
        table: opinions as of :func:`votes`.
        p: the model's probability of the nodule of each opinion, (N,).
        line: from which on the model calls it malignant.
        units: what is resampled, such as the patient of each opinion, (N,).
        seed: of the bootstrap over them.

    Returns:
        ``name`` (a metric), ``part`` (``a radiologist``, ``the model``, ``model minus radiologist``),
        ``value, low, high``.
    """
    y, rating = table["y"].to_numpy(), table["rating"].to_numpy()
    resampled = metrics.bootstrap_weights(units, seed)
    weights = np.vstack([np.ones(len(y)), resampled])
    said = {"a radiologist": (rating - 1) / 4, "the model": p}
    calls = {"a radiologist": np.sign(rating - UNDECIDED) / 2 + 0.5, "the model": (p >= line).astype(float)}
    measures = {
        "AUC": (metrics.auc, said),
        "accuracy": (agreement, calls),
        "kappa": (kappa, calls),
        "calibration error (ECE)": (metrics.ece, said),
    }
    rows = []
    for name, (measure, values) in measures.items():
        draws_of = {part: measure(y, value, weights) for part, value in values.items()}
        draws_of["model minus radiologist"] = draws_of["the model"] - draws_of["a radiologist"]
        rows += [{"name": name, "part": part, **metrics.interval(draws)} for part, draws in draws_of.items()]
    return pd.DataFrame(rows)
