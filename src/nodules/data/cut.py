"""Cuts patches out of scans: around places of a table, or the nodules that LIDC-IDRI's radiologists outlined.

A folder of scans is one of three kinds, told by what lies in it: a table with columns ``x, y, z`` makes it a folder of
one's own scans; LUNA16's ``annotations.csv`` or ``candidates.csv`` makes it LUNA16; else its series are looked up among
those of LIDC-IDRI. Patches keep the scan's pixels: nothing is resampled, since size tells much about a nodule.
"""

import hashlib
import hmac
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from tqdm import tqdm

from nodules import paths
from nodules.data import files, lidc, scans
from nodules.data.scans import AIR, Found, Scan
from nodules.data.sources import SIDE
from nodules.errors import InputError
from nodules.workers import processes

REACH = 2  # slices below and above a place, of which the outermost do not count
UNITS = ("mm", "voxel")
LUNA16 = ("annotations.csv", "candidates.csv")
LUNA16_BYTES = 200_000_000  # of candidates.csv, at most
HALF_MM = 30.0  # of a plane, from its middle
NEAR_MM = 5.0  # between a place of LUNA16 and the middle of the nodule that it is
SHOWN = 3  # names in a message
MOST_WORKERS = 8  # unless told: each holds a scan
KEY_BYTES = 16  # of a key for pseudonyms, at least
PLACES = ["series", "x", "y", "z"]
KEPT = ["nodule", "patient", "malignant"]  # of a table of places: nothing else leaves it
CARRIED = ["ratings", "median_rating", "diameter_mm", *lidc.ATTRIBUTES]


class Job(NamedTuple):
    """One scan, and what to cut out of it."""

    found: Found
    places: pd.DataFrame  # a row per nodule
    cutter: Callable[[Scan, pd.DataFrame], "Cut"]


class Cut(NamedTuple):
    """Patches of a scan: images (N, 64, 64) int16 in HU, outlines (N, 64, 64) where known, and a table of N rows."""

    images: np.ndarray
    masks: np.ndarray | None
    table: pd.DataFrame


def corner(voxel: np.ndarray) -> tuple[int, int]:
    """Column and row of the first pixel of a patch whose middle is nearest to a voxel (x, y, ...)."""
    column, row = np.ceil(np.asarray(voxel[:2]) - SIDE / 2).astype(int)
    return int(column), int(row)


def window(plane: np.ndarray, voxel: np.ndarray, outside: int = AIR) -> np.ndarray:
    """The square (..., 64, 64) of planes (..., rows, columns) around a voxel; ``outside`` beyond them."""
    column, row = corner(voxel)
    rows, columns = plane.shape[-2:]
    out = np.full((*plane.shape[:-2], SIDE, SIDE), outside, plane.dtype)
    inside_r, inside_c = (slice(max(0, -at), min(SIDE, most - at)) for at, most in ((row, rows), (column, columns)))
    taken_r, taken_c = (slice(part.start + at, part.stop + at) for part, at in ((inside_r, row), (inside_c, column)))
    out[..., inside_r, inside_c] = plane[..., taken_r, taken_c]
    return out


def voxel_of(scan: Scan, place: dict[str, Any]) -> np.ndarray:
    """The voxel (x, y, z), not rounded, of a place: ``x, y, z, unit, nodule``.

    Raises:
        InputError: it is not in the scan.
    """
    given = np.array([place["x"], place["y"], place["z"]], dtype=float)
    voxel, last = scan.voxel(given) if place["unit"] == "mm" else given, np.array(scan.hu.shape[::-1]) - 1
    if ((voxel > -0.5) & (voxel < last + 0.5)).all():
        return voxel
    ends = scan.mm(np.stack([np.zeros(3), last]))
    voxels, mm = (
        ", ".join(f"{low:.0f} to {high:.0f}" for low, high in zip(*pair, strict=True))
        for pair in (([0] * 3, last), ends)
    )
    at = ", ".join(f"{value:g}" for value in given)
    raise InputError(
        f"{place['nodule']}: {at} ({place['unit']}) is not in the scan; give x, y, z within voxels {voxels}, or "
        f"within {mm} mm"
    )


def planes(scan: Scan, voxel: np.ndarray) -> tuple[list[np.ndarray], list[list[float]]]:
    """The axial, coronal and sagittal plane through a voxel (x, y, z), the head up, and their sides.

    Returns:
        Three pictures that reach at least ``HALF_MM`` to each side, ``AIR`` beyond the scan; width and height of each
        in mm.
    """
    middle, spacing = np.rint(voxel).astype(int), np.array(scan.spacing)
    reach = np.ceil(HALF_MM / spacing).astype(int)
    x, y, z = (np.arange(at - far, at + far + 1) for at, far in zip(middle, reach, strict=True))
    sides = (2 * reach + 1) * spacing

    def taken(plane: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        inside = np.outer((rows >= 0) & (rows < plane.shape[0]), (columns >= 0) & (columns < plane.shape[1]))
        return np.where(inside, plane.take(rows, 0, mode="clip").take(columns, 1, mode="clip"), AIR)

    axial = taken(scan.hu[middle[2]], y, x)
    coronal, sagittal = taken(scan.hu[:, middle[1]], z[::-1], x), taken(scan.hu[:, :, middle[0]], z[::-1], y)
    return [axial, coronal, sagittal], [[sides[0], sides[1]], [sides[0], sides[2]], [sides[1], sides[2]]]


def at_places(scan: Scan, places: pd.DataFrame) -> Cut:
    """Patches around places: for each row (``x, y, z, unit, nodule`` and further columns) a few slices."""
    images, rows = [], []
    for place in places.to_dict("records"):
        voxel = voxel_of(scan, place)
        middle = int(np.rint(voxel[2]))
        slices = np.arange(max(0, middle - REACH), min(len(scan.hu), middle + REACH + 1))
        images.append(window(scan.hu[slices], voxel))
        about = {name: place[name] for name in KEPT if name in place}
        rows += [about | {"slice_index": k} for k in slices]
    return _cut(scan, images, None, rows)


def of_lidc(scan: Scan, places: pd.DataFrame) -> Cut:
    """All slices of nodules of LIDC-IDRI, with the outline that at least half of their radiologists drew.

    Args:
        scan: of LIDC-IDRI.
        places: the rows of :func:`nodules.data.lidc.nodules` to cut.
    """
    images, masks, rows = [], [], []
    for nodule in places.to_dict("records"):
        levels = {_slice(scan, z, nodule["nodule"]): drawings for z, drawings in lidc.drawn(nodule["nodule"]).items()}
        points = np.concatenate([p for drawings in levels.values() for drawing in drawings for _, p in drawing])
        middle = _stored(scan, (points.min(axis=0) + points.max(axis=0)) / 2)
        slices = np.arange(min(levels), max(levels) + 1)
        images.append(window(scan.hu[slices], middle))
        masks.append(np.stack([_outline(scan, levels.get(k, []), middle, nodule["radiologists"]) for k in slices]))
        about = {name: nodule[name] for name in ("patient", "nodule", "malignant", *CARRIED)}
        rows += [about | {"slice_index": k} for k in slices]
    return _cut(scan, images, masks, rows)


def _stored(scan: Scan, points: np.ndarray) -> np.ndarray:
    """Columns and rows (..., 2) in the scan of those in the file it is from."""
    return np.where(scan.turned, np.array(scan.hu.shape[:0:-1]) - 1 - points, points)


def _slice(scan: Scan, z: float, name: str) -> int:
    """The slice nearest to a position z in mm."""
    k = int(np.rint((z - scan.origin[2]) / scan.spacing[2]))
    if not 0 <= k < len(scan.hu):
        last = scan.origin[2] + (len(scan.hu) - 1) * scan.spacing[2]
        raise InputError(
            f"{scan.series}: reaches from z {scan.origin[2]:.1f} to {last:.1f} mm, but nodule {name} is at {z:.1f}; "
            "get all slices of the series"
        )
    return k


def _outline(scan: Scan, drawings: list, middle: np.ndarray, radiologists: int) -> np.ndarray:
    """Pixels (64, 64) that at least half of the radiologists drew around, in the patch around ``middle``."""
    votes, first = np.zeros((SIDE, SIDE)), np.array(corner(middle))
    for drawing in drawings:
        inside = np.zeros((SIDE, SIDE), dtype=bool)
        for included, points in drawing:
            image = Image.new("1", (SIDE, SIDE))
            # an LIDC contour runs just outside of the nodule: it does not belong to it
            ImageDraw.Draw(image).polygon((_stored(scan, points) - first).ravel().tolist(), fill=1, outline=0)
            inside = inside | np.asarray(image) if included else inside & ~np.asarray(image)
        votes += inside
    return votes >= max(radiologists / 2, 1)


def of_luna16(scan: Scan, places: pd.DataFrame) -> Cut:
    """The nodules of LIDC-IDRI at the places of LUNA16 (``x, y, z`` in mm), as :func:`of_lidc` cuts them."""
    known = _rated().loc[lambda rated: rated["series"] == scan.series]
    heights = (known["z"].to_numpy() - scan.origin[2]) / scan.spacing[2]
    middles = np.column_stack([_stored(scan, known[["x", "y"]].to_numpy()), heights])
    spots = scan.voxel(places[["x", "y", "z"]].to_numpy(float))
    reach = np.maximum(NEAR_MM, places.get("diameter_mm", pd.Series(0.0, places.index)).fillna(0).to_numpy() / 2)
    apart = np.linalg.norm((spots[:, None] - middles) * scan.spacing, axis=2)
    return of_lidc(scan, known[(apart <= reach[:, None]).any(axis=0)])


@lru_cache(maxsize=1)
def _rated() -> pd.DataFrame:
    """The nodules of LIDC-IDRI with their scan (``series, study``) and middle (``x, y`` in pixels, ``z`` in mm)."""
    marks, outlines, points = lidc.contours()
    outlines = outlines.assign(low=[p.min(axis=0) for p in points], high=[p.max(axis=0) for p in points])
    marks = lidc.annotations()[["scan", "annotation", "nodule"]].merge(outlines, on="annotation")
    spans = marks.groupby("nodule").agg(
        scan=("scan", "first"),
        low=("low", lambda v: np.min([*v], axis=0)),
        high=("high", lambda v: np.max([*v], axis=0)),
        z_low=("z", "min"),
        z_high=("z", "max"),
    )
    middle = np.stack((spans["low"] + spans["high"]).to_numpy()) / 2
    spans = spans.assign(x=middle[:, 0], y=middle[:, 1], z=(spans["z_low"] + spans["z_high"]) / 2)
    scan = lidc.scans()[["scan", "series", "study"]]
    return lidc.nodules().merge(spans[["scan", "x", "y", "z"]].reset_index(), on="nodule").merge(scan, on="scan")


def _cut(scan: Scan, images: list[np.ndarray], masks: list[np.ndarray] | None, rows: list[dict]) -> Cut:
    """Put the patches of a scan together."""
    if not rows:
        return Cut(np.zeros((0, SIDE, SIDE), np.int16), None, pd.DataFrame())
    table = pd.DataFrame(rows).assign(
        series=scan.series, pixel_spacing_mm=float(scan.spacing[0]), slice_spacing_mm=float(scan.spacing[2])
    )
    if "patient" not in table:
        table["patient"] = scan.patient
    table.insert(0, "id", [f"{row.nodule}_z{row.slice_index:03d}" for row in table.itertuples()])
    if not np.isclose(*scan.spacing[:2], rtol=0.01):
        x, y = scan.spacing[:2]
        raise InputError(f"{scan.series}: its pixels are {x:g} x {y:g} mm; resample it to square ones")
    return Cut(np.concatenate(images), None if masks is None else np.concatenate(masks), table)


# --- Folders of scans ----------------------------------------------------------------------------------


def jobs(folder: Path) -> tuple[list[Job], str, list[str]]:
    """What to cut out of a folder's scans, the source they are of, and sentences about what is missing.

    The source is a key of :data:`nodules.data.sources.SOURCES`, or empty for scans of one's own.

    Raises:
        InputError: no scans, or no place in any of them.
    """
    found = scans.find(folder)
    if not found:
        raise InputError(
            f"{folder}: no scan in it; give a folder with DICOM series, or {', '.join(scans.VOLUMES)} files"
        )
    for path in sorted(folder.glob("*.csv")):
        if len(_columns(path) & {"x", "y", "z"}) > 1:
            return _own_jobs(_apart(found), path, files.spreadsheet(path, text=True))
    for name in LUNA16:
        for path in sorted(folder.rglob(name)):
            if "seriesuid" in _columns(path):
                # lungs drawn by a program lie beside the scans, under the same names
                scans_alone = [scan for scan in found if "seg-lungs" not in str(scan.files[0].parent)]
                return _jobs_of_luna16(_apart(scans_alone), path)
    return _jobs_of_lidc(folder, _apart(found))


def _apart(found: list[Found]) -> list[Found]:
    """The scans, if no series occurs twice."""
    names = pd.Series([scan.series for scan in found])
    if names.duplicated().any():
        first, second, *_ = (scan.files[0] for scan in found if scan.series == names[names.duplicated()].iloc[0])
        raise InputError(f"{first}: the same series as in {second}; keep one of the two in this folder")
    return found


def _columns(path: Path) -> set[str]:
    """What the first lines of a CSV name."""
    with files.opening(path, "CSV"), path.open("rb") as file:
        start = file.read(2000)
    text = start.decode("utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="ignore")
    return set(re.split(r"[^a-z]+", " ".join(text.splitlines()[:2]).lower()))


def _own_jobs(found: list[Found], path: Path, table: pd.DataFrame) -> tuple[list[Job], str, list[str]]:
    table = places(path, table)
    if "series" not in table:
        raise InputError(f"{path}: no column 'series' (found: {', '.join(table)}); name the scan of each place")
    work = [
        Job(chosen(path, name, found), rows.drop(columns="series").reset_index(drop=True), at_places)
        for name, rows in table.groupby("series", sort=False)
    ]
    used = [job.found for job in work]
    if "patient" not in table and (unnamed := [scan for scan in used if not scan.patient]):
        raise InputError(f"{unnamed[0].files[0]}: its patient has no id; add a column 'patient' to {path.name}")
    volumes = sum(scan.patient == scan.series for scan in used) if "patient" not in table else 0
    alone = [f"{volumes} volumes count as a patient each; a column 'patient' would tell."] if volumes > 1 else []
    return work, "", alone + _without_places(found, used)


def listed(at: str) -> pd.DataFrame:
    """Places given as text, ``x,y,z``, several apart by semicolons: ``x, y, z, nodule``.

    Raises:
        InputError: not three numbers for each.
    """
    places = [place.strip() for place in at.split(";")]
    numbers = [pd.to_numeric(pd.Series(place.split(",")), errors="coerce") for place in places]
    if not all(len(three) == 3 and np.isfinite(three).all() for three in numbers):
        raise InputError(f"at={at!r}: not three numbers for each place; write x,y,z as in 210.5,180,64")
    return pd.DataFrame(numbers).set_axis(["x", "y", "z"], axis=1).assign(nodule=[f"at {place}" for place in places])


def places(path: Path, table: pd.DataFrame, unit: str = "") -> pd.DataFrame:
    """A table of places, checked.

    Args:
        path: its file, for messages.
        table: ``x, y, z``; ``unit`` (``mm`` or ``voxel``) unless given; perhaps ``series, nodule, patient, malignant``.
        unit: of all places.

    Raises:
        InputError: a column is missing or holds something else.
    """
    table = table.reset_index(drop=True)
    if table.empty:
        raise InputError(f"{path}: no place in it; give x, y, z of at least one nodule")
    if missing := [name for name in ("x", "y", "z") if name not in table]:
        listed = ", ".join(map(repr, list(table)[:6]))
        raise InputError(f"{path}: no column {missing[0]!r} (found: {listed}); give columns x, y, z")
    if unit:
        table = table.assign(unit=unit)
    if "unit" not in table or not table["unit"].isin(UNITS).all():
        raise InputError(f"{path}: not said what x, y, z are; add a column 'unit' that holds mm or voxel in every row")
    for name in ("x", "y", "z"):
        numbers = pd.to_numeric(table[name].astype(str).str.replace(",", "."), errors="coerce")
        if not np.isfinite(numbers).all():
            row = int((~np.isfinite(numbers)).to_numpy().argmax())
            raise InputError(f"{path}: '{name}' is {table[name][row]} in row {row + 1}; write a number")
        table[name] = numbers
    if "malignant" in table:
        given, table["malignant"] = table["malignant"], pd.to_numeric(table["malignant"], errors="coerce")
        if (wrong := ~table["malignant"].isin([0, 1])).any():
            row = int(wrong.to_numpy().argmax())
            raise InputError(f"{path}: 'malignant' is {given[row]} in row {row + 1}; write 0 or 1, or leave it out")
    for name in ("series", "patient", "nodule"):
        if name in table and table[name].isna().any():
            row = int(table[name].isna().to_numpy().argmax())
            raise InputError(f"{path}: '{name}' is empty in row {row + 1}; fill it in for every row")
    if "malignant" in table:
        table["malignant"] = table["malignant"].astype(int)
    names = table.get("nodule", pd.Series(range(1, len(table) + 1)).map("{:04d}".format)).astype(str)
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        raise InputError(f"{path}: the nodule {name!r} occurs twice; give each place a name of its own")
    return table.assign(
        nodule=names, **{name: table[name].astype(str) for name in ("series", "patient") if name in table}
    )


def chosen(path: Path, name: str, found: list[Found]) -> Found:
    """The scan that a table names by its series, or by the end of it."""
    fits = scans.named(found, name)
    if len(fits) != 1:
        listed = ", ".join(scan.series for scan in found[:SHOWN])
        raise InputError(
            f"{path}: {len(fits)} scans here are of the series {name!r}; name one of them (found: {listed})"
        )
    return fits[0]


def _jobs_of_lidc(folder: Path, found: list[Found]) -> tuple[list[Job], str, list[str]]:
    known = lidc.scans().set_index(["series", "study"])
    here = [scan for scan in found if (scan.series, scan.study) in known.index]
    if not here:
        raise InputError(
            f"{folder}: none of its {len(found)} scans is of LIDC-IDRI; add a table of places, a CSV with the columns "
            f"{', '.join(PLACES)} and unit (mm or voxel)"
        )
    rated = _rated().groupby("series")
    work = [Job(scan, rated.get_group(scan.series), of_lidc) for scan in here if scan.series in rated.groups]
    return work, "lidc-idri", _missing(len(known), len(here), known, here) + _without_places(found, here)


def _jobs_of_luna16(found: list[Found], path: Path) -> tuple[list[Job], str, list[str]]:
    table = files.spreadsheet(path, LUNA16_BYTES)
    table = table.rename(columns={"seriesuid": "series", "coordx": "x", "coordy": "y", "coordz": "z"})
    if not set(PLACES) <= set(table):
        raise InputError(f"{path}: lacks seriesuid, coordX, coordY, coordZ; get LUNA16's own file again")
    by_series = (table[table["class"] == 1] if "class" in table else table).groupby("series")
    _rated()  # once, before there are several processes
    here = [scan for scan in found if scan.series in by_series.groups]
    work = [Job(scan, by_series.get_group(scan.series), of_luna16) for scan in here]
    known = pd.DataFrame({"patient": list(by_series.groups)})
    if not work:
        raise InputError(f"{path}: names none of the {len(found)} scans here; put LUNA16's .mhd and .raw beside it")
    return work, "luna16", _missing(len(known), len(here), known, here) + _without_places(found, here)


def _missing(total: int, count: int, known: pd.DataFrame, here: list[Found]) -> list[str]:
    """A sentence about annotated scans that are not here, if there are any."""
    if count == total:
        return []
    absent = sorted(set(known["patient"]) - {scan.patient for scan in here} - {scan.series for scan in here})
    named = f", such as {', '.join(absent[:SHOWN])}" if absent else ""
    return [f"{total - count} of {total} annotated scans are not here{named}."]


def _without_places(found: list[Found], used: list[Found]) -> list[str]:
    """A sentence about scans that nothing is cut out of, if there are any."""
    rest = sorted({scan.series for scan in found} - {scan.series for scan in used})
    return [f"{len(rest)} scans here have no known nodule, such as {rest[0]}."] if rest else []


# --- A data set ----------------------------------------------------------------------------------------


def dataset(folder: Path, out: Path, parts: Path, workers: int = 0, pseudonym: Path | None = None) -> list[str]:
    """Cut all known places of a folder's scans into one npz file in the format of :mod:`nodules.data.patches`.

    A cutting that is stopped goes on where it was. At any time a worker holds one scan.

    Args:
        folder: of scans.
        out: the npz file to write.
        parts: a folder for what has been cut, removed in the end.
        workers: processes; 0 for one per core.
        pseudonym: a file with a secret key, with which ids of patients and series are replaced by keyed hashes.

    Returns:
        Sentences on what was cut, and what is missing.

    Raises:
        InputError: no scans, no places, or none that could be read.
    """
    key = _key(pseudonym)
    work, source, notes = jobs(folder)
    workers = min(workers or min(os.cpu_count() or 1, MOST_WORKERS), len(work))
    bar = {"total": len(work), "desc": "cutting", "unit": "scan"}
    if workers > 1:
        try:
            with processes(workers) as executor:
                done = list(tqdm(executor.map(partial(_part, parts, key), work), **bar))
        except BrokenProcessPool as error:
            raise InputError(f"{folder}: a process died, perhaps for want of memory; use fewer --workers") from error
    else:
        done = [_part(parts, key, job) for job in tqdm(work, **bar)]
    refused = [str(part) for part in done if isinstance(part, InputError)]
    tables = {part: _table(part) for part in done if isinstance(part, Path)}
    held = [part for part, table in tables.items() if len(table)]
    if not held and refused:
        raise InputError(refused[0])
    if not held:
        shutil.rmtree(parts, ignore_errors=True)
        raise InputError(f"{folder}: no nodule with a label in its scans; add scans, or a table of places")
    table = pd.concat([tables[part] for part in held], ignore_index=True)
    _write(out, held, table, source)
    if not refused:  # else only those that were are read again
        shutil.rmtree(parts)
    asked = [len(job.places) for job in work]
    wanted = sum(n for n, part in zip(asked, done, strict=True) if isinstance(part, Path))
    cut = table["nodule"].nunique()
    told = [f"{len(table)} patches of {cut} nodules, {len(tables)} scans."]
    told += [f"{wanted - cut} of {wanted} places are not a nodule with a label."] * (cut < wanted)
    left_out = f"{len(refused)} scans are left out, with {sum(asked) - wanted} places"
    told += [f"{left_out}, such as {scan}." for scan in refused[:1]]
    named = re.compile(", such as .*")
    return [named.sub(".", note) if key else note for note in told + notes]


def listing(folder: Path) -> list[list]:
    """Every file of a folder with its size and time of change: changes when the folder does."""
    walked = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sorted([str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in walked if path.is_file())


def version() -> str:
    """Short SHA-256 of the code that reads and cuts, part of the key of what is cut."""
    sources = Path(__file__), Path(scans.__file__), Path(lidc.__file__)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _part(parts: Path, key: bytes, job: Job) -> Path | InputError:
    """Cut one scan, unless that is done, into a file of its own; or why that is not possible."""
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in job.found.files]
    about = json.dumps([stamps, job.places.to_csv(index=False), job.cutter.__name__, version()])
    path = parts / f"{hmac.new(key, about.encode(), 'sha256').hexdigest()[:32]}.npz"
    if not path.exists():
        try:
            cut = job.cutter(scans.read(job.found), job.places)
        except InputError as error:
            return error
        if key and len(cut.table):
            cut = cut._replace(table=_pseudonyms(cut.table, key))
        stored = {} if cut.masks is None else {"masks": cut.masks}
        with paths.replacing(path) as temporary:
            np.savez(
                temporary, images=cut.images, **stored, table=np.array(cut.table.to_json(orient="table", index=False))
            )
    return path


def _table(part: Path) -> pd.DataFrame:
    with np.load(part, allow_pickle=False) as archive:
        return pd.DataFrame(json.loads(str(archive["table"]))["data"])


def _write(out: Path, parts: list[Path], table: pd.DataFrame, source: str) -> None:
    """Join parts into one npz, scan by scan, so that no more than one is in memory."""

    def arrays(name: str) -> Iterator[np.ndarray]:
        for part in parts:
            with np.load(part, allow_pickle=False) as archive:
                yield archive[name]

    with np.load(parts[0], allow_pickle=False) as archive:
        has_masks = "masks" in archive
    columns = {
        name: column.to_numpy() if column.dtype.kind in "iufb" else column.to_numpy(str)
        for name, column in table.items()
    }
    shape = (len(table), SIDE, SIDE)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        _member(archive, "images", np.dtype(np.int16), shape, arrays("images"))
        if has_masks:
            _member(archive, "masks", np.dtype(bool), shape, arrays("masks"))
        facts = {"unit": np.array("HU")} | ({"source": np.array(source)} if source else {})
        for name, values in (columns | facts).items():
            _member(archive, name, values.dtype, values.shape, [values])


def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> None:
    """Write one array of an npz, chunk by chunk."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for chunk in chunks:
            member.write(np.ascontiguousarray(chunk, dtype).tobytes())


def _key(path: Path | None) -> bytes:
    """The secret of a key file; empty without one."""
    if path is None:
        return b""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); name a file with a secret key") from error
    if len(key) < KEY_BYTES:
        raise InputError(f"{path}: holds {len(key)} bytes, too few for a key; write at least {KEY_BYTES} random ones")
    return key


def _pseudonyms(table: pd.DataFrame, key: bytes) -> pd.DataFrame:
    """The table with keyed hashes (HMAC-SHA256) in place of the ids of patients, series and nodules."""

    def hidden(name: str) -> str:
        return hmac.new(key, str(name).encode(), "sha256").hexdigest()[:16]

    named = table.assign(**{name: table[name].map(hidden) for name in ("patient", "series", "nodule")})
    return named.assign(id=[f"{row.nodule}_z{row.slice_index:03d}" for row in named.itertuples()])
