"""Near-duplicates: patches so similar that a split must not separate them, for sources without patients.

Candidates are neighbours in the feature space of a network; a pair counts if its pixels agree too (normalised
cross-correlation at the best shift).
"""

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10  # candidates per patch
LINE = 0.9  # minimum correlation of a pair that counts; 85% of such pairs of real LIDC patches show one nodule
CHUNK = 2048  # pairs at a time


def candidates(features: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of patches that are cosine neighbours by ``features`` (N, D); the smaller index comes first."""
    count = min(NEIGHBOURS, len(features) - 1)
    near = NearestNeighbors(n_neighbors=count, metric="cosine").fit(features).kneighbors(return_distance=False)
    pairs = np.column_stack([np.repeat(np.arange(len(features)), count), near.ravel()])
    return np.unique(np.sort(pairs, axis=1), axis=0)


@torch.inference_mode()
def correlation(images: np.ndarray, pairs: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Normalised cross-correlation of the pixels of each pair at the best circular shift, (P,), at most 1.

    Args:
        images: (N, H, W), pixel values.
        pairs: (P, 2).
        window: pixel values outside it are clipped, so that bone does not dominate the nodule.
    """
    highest = np.empty(len(pairs))
    for start in range(0, len(pairs), CHUNK):
        part = images[pairs[start : start + CHUNK]].clip(*window)
        seen = torch.from_numpy(part.astype(np.float32))
        seen = seen - seen.mean((2, 3), keepdim=True)
        seen = seen / seen.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-6)
        first, second = torch.fft.rfft2(seen).unbind(1)
        shifted = torch.fft.irfft2(first * second.conj(), s=part.shape[2:])
        highest[start : start + CHUNK] = shifted.amax((1, 2)).numpy()
    return highest


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """Cluster of each of ``count`` patches, (count,): connected components of the pairs (P, 2)."""
    links = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(count, count))
    return connected_components(links, directed=False)[1]


def kinship(table: pd.DataFrame, pairs: np.ndarray) -> np.ndarray:
    """What each pair (P, 2) shares in ``table``, (P,) text.

    ``same nodule``, ``same patient``, ``different patients``, or ``unknown`` where patients are.
    """
    first, second = (table.iloc[pairs[:, side]].reset_index(drop=True) for side in (0, 1))
    kin = np.full(len(pairs), "different patients" if "patient" in table else "unknown", dtype=object)
    for column, name in (("patient", "same patient"), ("nodule", "same nodule")):
        if column in table:
            kin[(first[column] == second[column]).to_numpy()] = name
    return kin
