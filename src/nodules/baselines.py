"""What can be had without looking at a single pixel pattern: the floor and the ceiling of every table."""

import numpy as np
import pandas as pd
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from nodules import lidc, metrics

FEATURES = {
    "prevalence": [],
    "mean intensity": ["mean_intensity"],
    "diameter": ["diameter_mm"],
    "eight ratings and diameter": [*lidc.ATTRIBUTES, "diameter_mm"],
}


def logistic(features: pd.DataFrame, y: np.ndarray, train: np.ndarray, C: float = 1.0) -> np.ndarray:
    """Probability of malignancy for every row, by logistic regression on the rows where ``train`` is true.

    Without a feature it is the training prevalence. ``features`` (N, F), ``y`` and ``train`` (N,); a smaller ``C``
    keeps the weights of many features closer to 0.
    """
    if features.empty:
        return np.full(len(y), y[train].mean())
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500))
    return model.fit(features[train], y[train]).predict_proba(features)[:, 1]


def predictions(patches: pd.DataFrame, split: pd.DataFrame, images: np.ndarray) -> pd.DataFrame:
    """What each baseline whose features the source knows, fitted on train, says of the test patches.

    Returns:
        ``id`` and a column of probabilities a baseline.
    """
    features = patches.assign(mean_intensity=images.mean(axis=(1, 2)))
    y, train = split["malignant"].to_numpy(), (split["split"] == "train").to_numpy()
    known = {name: columns for name, columns in FEATURES.items() if set(columns) <= set(features)}
    said = {name: logistic(features[columns], y, train) for name, columns in known.items()}
    return patches[["id"]].assign(**said)[(split["split"] == "test").to_numpy()]


def table(patches: pd.DataFrame, split: pd.DataFrame, images: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Score the :func:`predictions` of each baseline on test."""
    test = split[split["split"] == "test"]
    groups = test["patient"].to_numpy() if test["patient"].notna().all() else None
    said = predictions(patches, split, images).drop(columns="id")
    return {name: metrics.score(test["malignant"].to_numpy(), said[name].to_numpy(), groups, seed) for name in said}


def gradients(images: np.ndarray) -> pd.DataFrame:
    """Histograms of oriented gradients (Dalal & Triggs 2005) of patches (N, 64, 64): 1764 features each."""
    found = [hog(image.astype(float), cells_per_block=(2, 2)) for image in tqdm(images, "gradients", unit="patch")]
    return pd.DataFrame(np.stack(found))
