"""Baselines without a network: the floor and the ceiling of every table."""

import numpy as np
import pandas as pd
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from nodules.data import lidc
from nodules.data.patches import Patches
from nodules.data.split import Part, Parts

# What a network can measure is the outline on its slice; the nodule's diameter is that of its widest slice
RULERS = {
    "ruler on the slice, pixels": ["extent_px"],
    "ruler on the slice, mm": ["extent_mm"],
    "ruler on the whole nodule": ["diameter_mm"],
}
FEATURES = {
    "prevalence": [],
    "mean intensity": ["mean_intensity"],
    **RULERS,
    "eight ratings and diameter": [*lidc.ATTRIBUTES, "diameter_mm"],
}


def logistic(features: pd.DataFrame, train: Part, C: float = 1.0) -> np.ndarray:
    """Probability of malignancy of every patch, by logistic regression on some of them.

    Args:
        features: of all N patches, (N, F); without columns, the result is the training prevalence.
        train: those to fit on.
        C: inverse regularisation strength.
    """
    if features.empty:
        return np.full(len(features), train.y.mean())
    return _fitted(features.iloc[train.rows], train.y, C).predict_proba(features)[:, 1]


def _fitted(features: pd.DataFrame, y: np.ndarray, C: float = 1.0) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500)).fit(features, y)


def extents(masks: np.ndarray) -> np.ndarray:
    """Longest extent of each outline (N, 64, 64), its widest projection, (N,), pixels; NaN where there is none."""
    out = np.full(len(masks), np.nan)
    for i, mask in enumerate(masks):
        points = np.argwhere(mask)
        if len(points):
            out[i] = lidc.widest(points) + 1
    return out


def laid(extents: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Extents (N,) in which a slice without one takes that of the next slice of its nodule, below or else above.

    0 where none has one.

    Radiologists may disagree about a nodule's outer slices, so that no outline is common to them. A size of 0 would
    call such slices of large nodules benign, and make a ruler look worse than it is.
    """
    if not {"nodule", "slice_index"} <= set(table):
        return np.nan_to_num(extents)
    rows = table[["nodule"]].assign(extent=extents).reset_index(drop=True)
    rows = rows.iloc[np.argsort(table["slice_index"], kind="stable")]
    rows["extent"] = rows.groupby("nodule")["extent"].ffill()
    return rows.groupby("nodule")["extent"].bfill().fillna(0).sort_index().to_numpy()


def features(patches: Patches) -> pd.DataFrame:
    """The table of the patches with ``mean_intensity`` and, where outlines are known, ``extent_px`` and ``extent_mm``.

    The latter also needs the width of the pixels. For a slice without an outline see :func:`laid`.
    """
    table = patches.table.assign(mean_intensity=patches.images.mean(axis=(1, 2)))
    if patches.masks is not None:
        table["extent_px"] = laid(extents(patches.masks), table)
        if "pixel_spacing_mm" in table:
            table["extent_mm"] = table["extent_px"] * table["pixel_spacing_mm"]
    return table


def predictions(patches: Patches, parts: Parts) -> pd.DataFrame:
    """Probabilities by each baseline whose features the source provides, fitted on train.

    Args:
        patches: all of them.
        parts: their split.

    Returns:
        One column of probabilities per baseline, one row per patch.
    """
    table = features(patches)
    known = {name: columns for name, columns in FEATURES.items() if set(columns) <= set(table)}
    return pd.DataFrame(
        {name: logistic(table[columns], parts.train) for name, columns in known.items()}, index=table.index
    )


def out_of_fold(features: pd.DataFrame, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Probability of malignancy, (N,), by logistic regression on the other folds.

    Args:
        features: (N, F).
        y: labels, (N,).
        fold: of each row, (N,).
    """
    out = np.empty(len(y))
    for k in np.unique(fold):
        out[fold == k] = _fitted(features[fold != k], y[fold != k]).predict_proba(features[fold == k])[:, 1]
    return out


def gradients(images: np.ndarray) -> pd.DataFrame:
    """Histograms of oriented gradients (Dalal & Triggs 2005) of patches (N, 64, 64): 1764 features per patch."""
    rows = [hog(image.astype(float), cells_per_block=(2, 2)) for image in tqdm(images, "gradients", unit="patch")]
    return pd.DataFrame(np.stack(rows))
