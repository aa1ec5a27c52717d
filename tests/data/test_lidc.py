import numpy as np
import pytest

from nodules.data import lidc


def test_annotations_have_ratings_and_one_scan_per_nodule():
    marks = lidc.annotations()
    assert len(marks) == 6859 and marks["patient"].nunique() == 875 and marks["annotation"].is_unique
    assert (marks.groupby("nodule")["scan"].nunique() == 1).all()
    assert marks["malignancy"].value_counts().sort_index().tolist() == [1020, 1580, 2606, 962, 691]
    assert marks["calcification"].between(1, 6).all() and marks["texture"].between(1, 5).all()
    assert (marks["z_max_mm"] >= marks["z_min_mm"]).all() and marks["diameter_mm"].between(0.4, 120).all()


def test_clusters_contain_each_radiologist_about_once():
    marks = lidc.annotations()
    radiologists = marks.groupby("nodule").size()
    assert 2550 < len(radiologists) < 2750
    assert (radiologists > lidc.RADIOLOGISTS).mean() < 0.01
    # annotations of one nodule overlap in z, up to a slice
    z = marks.groupby("nodule").agg(
        low=("z_min_mm", "max"), high=("z_max_mm", "min"), gap=("slice_thickness_mm", "max")
    )
    assert (z["low"] - z["high"] <= z["gap"] + 1e-6).mean() > 0.98


@pytest.mark.parametrize(("gaps", "expected"), [([1, 1, 1], 1), ([1, 9, 1], 2), ([0.5, 0.5, 1.9, 0.5, 0.5], 2)])
def test_cluster_links_the_close_and_splits_the_crowded(gaps, expected):
    position = np.r_[0, np.cumsum(gaps)]
    closest = np.abs(position[:, None] - position)
    label = lidc._cluster(closest, tolerance=2.0)
    assert label.max() + 1 == expected
    assert (np.diff(label) >= 0).all()


def test_closest_distance_equals_brute_force():
    rng = np.random.default_rng(0)
    points = [rng.uniform(0, 10, (40, 3)) + shift for shift in ([0, 0, 0], [9, 0, 0], [11, 8, 0], [90, 0, 0])]
    closest = lidc._closest(points, reach=3.0)
    for i, j in zip(*np.triu_indices(4, 1), strict=True):
        exact = np.linalg.norm(points[i][:, None] - points[j], axis=2).min()
        assert closest[i, j] == (pytest.approx(exact) if exact <= 3 else np.inf)


def test_widest_is_the_longest_diameter():
    assert lidc.widest(np.array([[0, 0], [10, 0], [10, 2], [0, 2]])) == pytest.approx(np.hypot(10, 2), rel=0.01)


def test_nodules_label_by_the_median():
    table = lidc.nodules()
    assert table["nodule"].is_unique and 450 < table["malignant"].sum() < 650 and len(table) > 1500
    median = table["ratings"].map(lambda text: np.median([int(r) for r in text.split(";")]))
    assert (median == table["median_rating"]).all() and (median != 3).all()
    assert ((median > 3) == (table["malignant"] == 1)).all()
    assert (table["ratings"].str.count(";") + 1 == table["radiologists"]).all()
