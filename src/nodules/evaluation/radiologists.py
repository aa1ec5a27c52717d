"""Each radiologist against the others, and a model against the same targets."""

from functools import partial

import numpy as np
import pandas as pd

from nodules.evaluation import metrics

FEWEST = 3  # radiologists per nodule: one to judge, at least two to judge by
UNDECIDED = 3  # the middle of the scale of malignancy, 1 to 5


def votes(nodules: pd.DataFrame) -> pd.DataFrame:
    """Leave one radiologist out: every opinion with the median of the others on the same nodule.

    LIDC-IDRI does not identify its radiologists, so opinions are pooled. Where the others' median is the middle of the
    scale there is no target, and the opinion is left out.

    Args:
        nodules: one row per nodule, with ``ratings`` ("5;4;4") and any other columns.

    Returns:
        The same columns and ``rating`` (1 to 5), ``y`` (whether the others' median is above 3), one row per opinion.
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

    Shapes as for :func:`nodules.evaluation.metrics.auc`.
    """
    total = weights.sum(axis=1)
    agreed, called, true = (weights @ part / total for part in (1 - np.abs(call - y), call, y))
    chance = called * true + (1 - called) * (1 - true)
    return (agreed - chance) / np.where(chance < 1, 1 - chance, np.nan)


def agreement(y: np.ndarray, call: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy of calls in [0, 1]; arguments as for :func:`kappa`."""
    return weights @ (1 - np.abs(call - y)) / weights.sum(axis=1)


def compare(table: pd.DataFrame, p: np.ndarray, line: float, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Radiologists and a model against the same targets, on the same nodules.

    Ratings 1 to 5 are converted to probabilities 0 to 1 in steps of a quarter; a 3 is half a call.

    Args:
        table: opinions as from :func:`votes`.
        p: the model's probability for the nodule of each opinion, (N,).
        line: threshold at which the model calls a nodule malignant.
        units: what the bootstrap resamples, such as the patient of each opinion, (N,).
        seed: of the bootstrap.

    Returns:
        ``name`` (a metric), ``part`` (``a radiologist``, ``the model``, ``model minus radiologist``),
        ``value, low, high``.
    """
    y, rating = table["y"].to_numpy(), table["rating"].to_numpy()
    weights = metrics.bootstrap_weights(units, seed)
    said = {"the model": p, "a radiologist": (rating - 1) / 4}
    calls = {"the model": (p >= line).astype(float), "a radiologist": np.sign(rating - UNDECIDED) / 2 + 0.5}
    measures = {
        "AUC": (metrics.auc, said),
        "accuracy": (agreement, calls),
        "kappa": (kappa, calls),
        "calibration error": (partial(metrics.calibration_error, units=units), said),
    }
    rows = []
    for name, (measure, values) in measures.items():
        draws_of = {part: measure(y, value, weights) for part, value in values.items()}
        draws_of["model minus radiologist"] = draws_of["the model"] - draws_of["a radiologist"]
        rows += [{"name": name, "part": part, **metrics.interval(draws)} for part, draws in draws_of.items()]
    return pd.DataFrame(rows)
