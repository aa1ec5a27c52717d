"""A whole CT scan to practise on: nodules of one phantom patient in a schematic chest, as a DICOM series.

The nodules and what lies close to them are the phantom's (:mod:`nodules.data.phantom`); lungs, heart, spine, ribs and
vessels around them are drawn from a few ellipses and tubes, and say nothing about the nodules.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy.ndimage import gaussian_filter

from nodules.data.patches import SIDE, Patches
from nodules.data.scans import AIR, Scan

ROWS = 512  # and columns
SLICES = 64
MARGIN = 12  # slices without nodules at both ends
RAMP = 8  # pixels over which a patch is blended into the chest around it
TISSUE_HU, FAT_HU, BONE_HU, HEART_HU, NOISE_HU = 45, -95, 380, 60, 60
VESSELS, STEPS = 260, 60  # in both lungs, points of each
MOST = 4  # nodules of the patient
WHOLE = 2 / 3  # height of a nodule's slices, as a share of its diameter, from which it looks round
ROOT = "2.25.20190521"  # of its instance UIDs


def patient_of(source: Patches) -> str:
    """The patient with most nodules that touch no chest wall, of both classes where there is one; the last of several.

    All of them fit into the chest: at most ``MOST`` count. Where there is one, a patient is taken whose nodules are
    shown nearly whole: the phantom has their middle slices alone, which of a large nodule are a flat slab.
    """
    free = source.table[~source.table.groupby("nodule")["wall"].transform("any")]
    height = free.groupby("nodule")["slice_thickness_mm"].transform("sum")
    counted = (
        free.assign(whole=height >= WHOLE * free["diameter_mm"])
        .groupby("patient")
        .agg(classes=("malignant", "nunique"), whole=("whole", "all"), nodules=("nodule", "nunique"))
    )
    ranked = counted[counted["nodules"] <= MOST].sort_values(["classes", "whole", "nodules"], kind="stable")
    return str(ranked.index[-1])


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (1, ROWS) and (ROWS, 1) as shares of the field of view, 0 in its middle."""
    along = (np.arange(ROWS) - (ROWS - 1) / 2) / ROWS
    return along[None], along[:, None]


def _lungs() -> np.ndarray:
    """Inside the lungs, (SLICES, ROWS, ROWS)."""
    x, y = _grid()
    planes = []
    for height in np.linspace(-1, 1, SLICES):  # from the bottom to the top
        size = 1 - 0.45 * height**2
        sides = [((x - side * 0.2) / 0.145) ** 2 + ((y + 0.01) / 0.215) ** 2 < size for side in (-1, 1)]
        heart = ((x - 0.05) / 0.13) ** 2 + ((y + 0.07) / 0.12) ** 2 < 0.6 * (0.9 - height)
        planes.append((sides[0] | sides[1]) & ~heart)
    return np.stack(planes)


def _vessels(rng: np.random.Generator, lungs: np.ndarray) -> np.ndarray:
    """Share (SLICES, ROWS, ROWS) of each voxel within vessels, which run from the hila into the lungs."""
    share = np.zeros(lungs.shape, dtype=np.float32)
    side, step = rng.choice([-1, 1], VESSELS), rng.uniform(0.4, 2.6, VESSELS)[:, None]
    turns = rng.uniform(-1.7, 1.7, (VESSELS, 1)) + rng.normal(0, 0.06, (VESSELS, STEPS)).cumsum(1)
    x = ROWS * (0.5 + side * rng.uniform(0.07, 0.14, VESSELS))[:, None] + side[:, None] * (step * np.cos(turns)).cumsum(
        1
    )
    y = ROWS * rng.uniform(0.4, 0.56, (VESSELS, 1)) + (step * np.sin(turns)).cumsum(1)
    z = rng.uniform(0, SLICES, (VESSELS, 1)) + rng.normal(0, 0.35, (VESSELS, 1)) * np.arange(STEPS)
    radius = np.linspace(3.2, 0.6, STEPS) * rng.uniform(0.3, 1, (VESSELS, 1))
    near = np.arange(-4, 5)
    for at_x, at_y, at_z, wide in zip(x.ravel(), y.ravel(), z.ravel(), radius.ravel(), strict=True):
        k, row, column = np.floor([at_z, at_y, at_x]).astype(int)
        if 0 <= k < SLICES and max(row, column) < ROWS and min(row, column) >= 0 and lungs[k, row, column]:
            away = (near[:, None] - at_y + row) ** 2 + (near - at_x + column) ** 2
            block = share[k, row - 4 : row + 5, column - 4 : column + 5]
            np.maximum(block, min(1.0, wide) * np.exp(-0.5 * away / (wide / 2 + 0.3) ** 2), out=block)
    return share


def _chest(rng: np.random.Generator, lungs: np.ndarray, lung_hu: float) -> np.ndarray:
    """The chest without nodules, (SLICES, ROWS, ROWS) float, HU."""
    x, y = _grid()
    body, around = (x / 0.46) ** 2 + (y / 0.33) ** 2, np.arctan2(y + 0.01, x)
    spine = (x / 0.05) ** 2 + ((y - 0.2) / 0.055) ** 2 < 1
    canal = (x / 0.016) ** 2 + ((y - 0.255) / 0.018) ** 2 < 1
    windpipe = (x / 0.024) ** 2 + ((y + 0.02) / 0.024) ** 2 < 1
    hu = np.select([canal, spine, body < 0.84, body < 1], [TISSUE_HU, BONE_HU, TISSUE_HU, FAT_HU], AIR).astype(
        np.float32
    )
    hu = np.repeat(hu[None], SLICES, 0)
    for k, plane in enumerate(hu):
        plane[(np.sin(9 * around + 0.25 * k) > 0.75) & (body > 0.62) & (body < 0.74)] = BONE_HU  # ribs
    texture = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (1, 1.5, 1.5))
    hu[lungs] = lung_hu + 25 * texture[lungs] / texture.std()
    hu += (HEART_HU - hu) * _vessels(rng, lungs)
    hu[:, windpipe] = AIR
    return gaussian_filter(hu, (0, 0.8, 0.8))


def _places(rng: np.random.Generator, lungs: np.ndarray, depths: list[int]) -> list[tuple[int, int, int]]:
    """First slice, row and column of a block of each depth, inside the lungs and apart from the others."""
    found: list[tuple[int, int, int]] = []
    while len(found) < len(depths):
        depth = depths[len(found)]
        k, row, column = rng.integers([MARGIN, 0, 0], [SLICES - depth - MARGIN, ROWS - SIDE, ROWS - SIDE])
        inside = slice(RAMP, SIDE - RAMP)
        block = lungs[k : k + depth, row : row + SIDE, column : column + SIDE][:, inside, inside]
        apart = all(max(abs(row - r), abs(column - c)) > SIDE or abs(k - z) > 14 for z, r, c in found)
        if block.all() and apart:
            found.append((int(k), int(row), int(column)))
    return found


def scan(source: Patches, seed: int = 0) -> tuple[Scan, pd.DataFrame]:
    """A scan of one phantom patient, and where its nodules are.

    Args:
        source: the phantom.
        seed: of the chest and the places.

    Returns:
        The scan; a table with one row per nodule: ``nodule``, ``x, y, z`` (voxels of its middle), ``unit``,
        ``malignant``, ``median_rating``, ``diameter_mm``.
    """
    rng, lungs = np.random.default_rng(seed), _lungs()
    patient = patient_of(source)
    table = source.table[(source.table["patient"] == patient)].sort_values(["nodule", "slice_index"])
    stacks = [rows for _, rows in table.groupby("nodule") if not rows["wall"].any()]
    edge = np.minimum(np.arange(SIDE), np.arange(SIDE)[::-1])
    blend = np.clip(np.minimum.outer(edge, edge) / RAMP, 0, 1)
    level = np.median(np.concatenate([source.images[rows.index][:, blend < 1].ravel() for rows in stacks]))
    hu, spots = _chest(rng, lungs, float(level)), []
    hu += gaussian_filter(rng.normal(0, 1, hu.shape).astype(np.float32), (0, 0.8, 0.8)) * NOISE_HU
    for rows, (k, row, column) in zip(stacks, _places(rng, lungs, [len(rows) for rows in stacks]), strict=True):
        block = hu[k : k + len(rows), row : row + SIDE, column : column + SIDE]
        block += blend * (source.images[rows.index] - block)
        about = rows.iloc[0][["nodule", "malignant", "median_rating", "diameter_mm"]].to_dict()
        half, central = (SIDE - 1) / 2, (len(rows) - 1) // 2
        off = rows.iloc[central][["offset_x_px", "offset_y_px"]]
        middle = column + half + off.iloc[0], row + half + off.iloc[1], k + central
        spots.append(dict(zip("xyz", middle, strict=True)) | {"unit": "voxel"} | about)
    first = table.iloc[0]
    spacing = (float(first["pixel_spacing_mm"]),) * 2 + (float(first["slice_thickness_mm"]),)
    origin = -np.array([ROWS, ROWS, SLICES]) * spacing / 2
    voxels = np.clip(np.rint(hu), AIR, 3071).astype(np.int16)
    return Scan(voxels, spacing, origin, np.eye(3), f"{ROOT}.{seed}.2", f"{ROOT}.{seed}.1", patient), pd.DataFrame(
        spots
    )


def write(made: Scan, folder: Path) -> Path:
    """Write a scan as a DICOM series, one file per slice, under names that tell nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(0).permutation(len(made.hu))
    for k, plane in enumerate(made.hu):
        header = FileMetaDataset()
        header.MediaStorageSOPClassUID, header.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        header.MediaStorageSOPInstanceUID = f"{made.series}.{k + 1}"
        slice_ = Dataset()
        slice_.file_meta = header
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, header.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = made.study, made.series
        slice_.PatientID, slice_.PatientName = made.patient, "Phantom^Simulated"
        slice_.Modality, slice_.ImageType = "CT", ["DERIVED", "SECONDARY", "AXIAL"]
        slice_.SeriesDescription, slice_.InstanceNumber = "simulated chest", k + 1
        slice_.ImagePositionPatient = made.mm(np.array([0, 0, k])).tolist()
        slice_.ImageOrientationPatient = made.direction.T[:2].ravel().tolist()
        slice_.PixelSpacing, slice_.SliceThickness = [made.spacing[1], made.spacing[0]], made.spacing[2]
        slice_.Rows, slice_.Columns = plane.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, AIR, "HU"
        slice_.PixelData = (plane - AIR).astype("<u2").tobytes()
        slice_.save_as(folder / f"{names[k]:04d}.dcm", enforce_file_format=True)
    return folder
