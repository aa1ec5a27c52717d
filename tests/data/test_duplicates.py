import numpy as np
import pandas as pd
import pytest

from nodules.data import duplicates

WINDOW = (-1000.0, 400.0)


@pytest.fixture(scope="module")
def images():
    """Four smooth pictures, each with a shifted and noisy twin: 0 and 4, 1 and 5, ..."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 1, (4, 16, 16)).repeat(4, 1).repeat(4, 2)
    pictures = (300 * coarse - 300).round()
    twins = np.roll(pictures, (5, -3), (1, 2)) + rng.normal(0, 30, pictures.shape)
    return np.concatenate([pictures, twins]).astype(np.int16)


def test_the_pixels_of_a_shifted_twin_agree_and_those_of_others_do_not(images):
    pairs = np.array([(i, k) for i in range(8) for k in range(i + 1, 8)])
    correlation = duplicates.correlation(images, pairs, WINDOW)
    twins = pairs[:, 1] - pairs[:, 0] == 4
    assert correlation[twins].min() > duplicates.LINE > 0.6 > correlation[~twins].max()
    assert correlation.max() <= 1 + 1e-5


def test_the_correlation_is_that_of_numpy_at_the_best_shift(images):
    value = duplicates.correlation(images, np.array([[0, 5]]), WINDOW)[0]
    first, second = images[0].clip(*WINDOW).astype(float), images[5].clip(*WINDOW).astype(float)
    shifts = [np.roll(second, (y, x), (0, 1)) for y in range(64) for x in range(64)]
    best = max(np.corrcoef(first.ravel(), shifted.ravel())[0, 1] for shifted in shifts)
    assert value == pytest.approx(best, abs=1e-4)


def test_brightness_and_contrast_do_not_matter_and_a_constant_patch_is_like_none(images):
    changed = np.stack([images[0], images[0] // 2 - 100, np.full((64, 64), 7)])
    brighter, constant = duplicates.correlation(changed, np.array([[0, 1], [0, 2]]), (-4000, 4000))
    assert brighter > 0.999 and constant == pytest.approx(0, abs=1e-6)


def test_candidates_are_pairs_of_neighbours_once():
    x = np.random.default_rng(0).normal(size=(50, 8))
    x[7] = 2 * x[3]  # cosine: length does not count
    pairs = duplicates.candidates(x)
    assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs)
    assert [3, 7] in pairs.tolist() and set(np.unique(pairs)) == set(range(50))


def test_linked_pairs_and_pairs_of_pairs_share_a_cluster():
    cluster = duplicates.clusters(6, np.array([[0, 2], [2, 5], [1, 3]]))
    assert cluster[0] == cluster[2] == cluster[5] != cluster[1] == cluster[3]
    assert len(np.unique(cluster)) == 3
    assert len(np.unique(duplicates.clusters(3, np.empty((0, 2), int)))) == 3


def test_kin_is_the_closest_that_is_known():
    table = pd.DataFrame({"patient": list("aab"), "nodule": ["a1", "a2", "b1"]})
    pairs = np.array([[0, 1], [0, 2], [1, 1]])
    assert duplicates.kinship(table, pairs).tolist() == ["same patient", "different patients", "same nodule"]
    assert set(duplicates.kinship(table[[]], pairs)) == {"unknown"}
