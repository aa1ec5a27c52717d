"""Baselines without a network: the floor and the ceiling of every table."""

import numpy as np
import pandas as pd
from skimage.feature import hog
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from nodules.data import lidc
from nodules.data.split import Part, Parts

FEATURES = {
    "prevalence": [],
    "mean intensity": ["mean_intensity"],
    "diameter": ["diameter_mm"],
    "eight ratings and diameter": [*lidc.ATTRIBUTES, "diameter_mm"],
}


def logistic(features: pd.DataFrame, parts: Parts, C: float = 1.0) -> np.ndarray:
    """Probability of malignancy of every patch, by logistic regression on the training patches.

    Args:
        features: of all N patches, (N, F); without columns, the result is the training prevalence.
        parts: their split.
        C: inverse regularisation strength.
    """
    if features.empty:
        return np.full(len(features), parts.train.y.mean())
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500))
    return model.fit(features.iloc[parts.train.rows], parts.train.y).predict_proba(features)[:, 1]


def predictions(everything: Part, parts: Parts) -> pd.DataFrame:
    """Test predictions of each baseline whose features the source provides, fitted on train.

    Args:
        everything: all patches.
        parts: their split.

    Returns:
        One column of probabilities per baseline, one row per test patch.
    """
    features = everything.table.assign(mean_intensity=everything.source.mean(axis=(1, 2)))
    known = {name: columns for name, columns in FEATURES.items() if set(columns) <= set(features)}
    predicted = {name: logistic(features[columns], parts) for name, columns in known.items()}
    return pd.DataFrame(predicted, index=features.index).iloc[parts.test.rows]


def gradients(images: np.ndarray) -> pd.DataFrame:
    """Histograms of oriented gradients (Dalal & Triggs 2005) of patches (N, 64, 64): 1764 features per patch."""
    rows = [hog(image.astype(float), cells_per_block=(2, 2)) for image in tqdm(images, "gradients", unit="patch")]
    return pd.DataFrame(np.stack(rows))
