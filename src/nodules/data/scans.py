"""A CT scan on disk, a DICOM series or a volume file, read into one array in Hounsfield units.

DICOM: CT slices in one file each, in any layout and under any names; a file counts as DICOM if it has the preamble.
Volumes: MetaImage, NRRD and NIfTI, whose values are Hounsfield units already. Whatever cannot be placed in the patient
without a guess is refused.
"""

import gzip
import itertools
import logging
import math
import os
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.pixels import get_decoder
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEG2000TransferSyntaxes
from tqdm import tqdm

from nodules.data.files import MOST_TIMES, opening
from nodules.errors import InputError

VOLUMES = {
    ".mhd": "MetaImage",
    ".mha": "MetaImage",
    ".nrrd": "NRRD",
    ".nhdr": "NRRD",
    ".nii": "NIfTI",
    ".nii.gz": "NIfTI",
}
READERS = {"MetaImage": "MetaImageIO", "NRRD": "NrrdImageIO", "NIfTI": "NiftiImageIO"}
# Of NIfTI: the codes of its types of numbers
TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
# The least that 12 bits hold with the usual intercept, as in most of LIDC-IDRI. Lower values, such as -2000 or -3024,
# are no measurement but fill what lies outside the field of view
AIR = -1024
LUNG = -300  # HU; lung is below, soft tissue above
SHARE_OF_LUNG = 0.001  # of the voxels, at least
MOST_SLICES, MOST_ROWS, MOST_VOXELS = 2000, 2048, 2**30
MOST_MM = 20  # between voxels
ROUNDING = 0.001  # in direction vectors, and between the headers of slices
SAME_MM = 0.01  # slices closer than this are at one position
GAP = 1.5  # times the usual distance between slices
UNEVEN = 0.25  # of the slice spacing, by which a slice may be off an even grid: positions are rounded
MANY = 50  # files whose reading takes long enough for a progress bar
SHOWN, SHOWN_GAPS = 6, 3  # scans, and missing slices, in a message
CHARACTERS = 40  # of a description
HEADER_BYTES = 65536  # of a volume
MULTIFRAME = "1.2.840.10008.5.1.4.1.1.2.1"  # Enhanced CT Image Storage
DICOMDIR = "1.2.840.10008.1.3.10"
KNOWN_BY = [
    Tag(name)
    for name in ("ImageType", "Modality", "SeriesDescription", "PatientID", "StudyInstanceUID", "SeriesInstanceUID")
]
NEEDED = ("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope")
NEEDED += ("RescaleIntercept", "PixelRepresentation", "BitsAllocated", "BitsStored", "PhotometricInterpretation")
OPTIONAL = ("SOPClassUID", "Modality", "ImageType", "InstanceNumber", "NumberOfFrames", "SamplesPerPixel", "HighBit")
OPTIONAL += ("RescaleType",)
ALIKE = {"image size": slice(0, 2), "pixel spacing": slice(2, 4), "orientation": slice(4, 10)}  # parts of a grid
BYTES = {sitk.sitkInt8: 1, sitk.sitkInt16: 2, sitk.sitkInt32: 4, sitk.sitkInt64: 8, sitk.sitkFloat32: 4}
BYTES |= {sitk.sitkUInt8: 1, sitk.sitkUInt16: 2, sitk.sitkUInt32: 4, sitk.sitkUInt64: 8, sitk.sitkFloat64: 8}
DATA_FILE = {  # the line of a header that names another file with the data, or LOCAL
    "MetaImage": rb"^[ \t]*ElementDataFile[ \t]*[=:](.*)$",
    "NRRD": rb"(?i)^data ?file:(.*)$",
}
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # our own messages say it in one line
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # what is used of a header is checked here


class Found(NamedTuple):
    """A scan on disk, known by its headers alone."""

    files: tuple[Path, ...]  # of a DICOM series, in any order; or the one file of a volume
    series: str  # SeriesInstanceUID; of a volume its name without suffix
    study: str  # StudyInstanceUID, or ""
    patient: str  # PatientID as the source has it; of a volume the series
    described: str  # for lists of several: "120 slices, CHEST LUNG 1.25", or ""


class _Voxels(NamedTuple):
    """An array (z, y, x) and where it lies: the fields of a :class:`Scan`."""

    hu: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray


@dataclass(frozen=True)
class Scan:
    """A CT scan: columns run to the patient's left, rows to the back, slices towards the head.

    ``hu`` (slices, rows, columns) int16, Hounsfield units, at least ``AIR``; ``spacing`` in mm between columns, rows
    and slices (x, y, z); ``origin`` (3,) in mm, the middle of voxel (0, 0, 0) in DICOM patient coordinates (LPS);
    ``direction`` (3, 3), whose columns are unit vectors along x, y and z of the array; ``turned``, whether columns and
    rows are stored the other way round, as for a patient on the belly.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    origin: np.ndarray
    direction: np.ndarray
    series: str
    study: str
    patient: str
    turned: tuple[bool, bool] = (False, False)

    def voxel(self, mm: np.ndarray) -> np.ndarray:
        """Voxel coordinates x, y, z (..., 3) of patient coordinates in mm (..., 3)."""
        return (np.asarray(mm) - self.origin) @ np.linalg.inv(self.direction * self.spacing).T

    def mm(self, voxel: np.ndarray) -> np.ndarray:
        """Patient coordinates in mm (..., 3) of voxel coordinates x, y, z (..., 3)."""
        return self.origin + np.asarray(voxel) @ (self.direction * self.spacing).T


def find(path: Path) -> list[Found]:
    """The scans in a file or a folder, sorted by series.

    Folders are searched to any depth; links to folders are not followed. Where there are scans, series of other
    modalities, localisers and single slices are left out; where there are none, they are listed, so that :func:`read`
    can say what they are. Files that are neither DICOM nor a volume are skipped.

    Raises:
        InputError: no such file, a single file of another type, or a DICOM file whose header is damaged.
    """
    with opening(path, "CT"):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give DICOM slices, or one of {', '.join(VOLUMES)}")
        walked = ((at, names) for at, _, names in os.walk(path, onerror=_refused))
        files = [path] if path.is_file() else sorted(Path(at, name) for at, names in walked for name in names)
        names = {file: _name(file) for file in files if file.is_file()}
    volumes = [Found((file,), name, "", name, "") for file, name in names.items() if name]
    scans, others = _series([file for file, name in names.items() if not name])
    found = volumes + scans or others
    if path.is_file() and not found:
        raise InputError(f"{path}: neither a DICOM file nor one of {', '.join(VOLUMES)}; convert it, e.g. to .nii.gz")
    return sorted(found, key=lambda scan: (scan.series, scan.files))


def _refused(error: OSError) -> None:
    raise error  # a folder that can't be read might hold the other scans


def only(path: Path, series: str = "") -> Scan:
    """Read the only scan in a file or a folder, or the one whose series is, or ends in, ``series``.

    Raises:
        InputError: no scan, several without a choice, a choice that fits none or several, or an unusable scan.
    """
    found = find(path)
    if not found:
        raise InputError(f"{path}: contains no CT scan; give a folder of DICOM slices, or one of {', '.join(VOLUMES)}")
    chosen = named(found, series)
    if len(chosen) == 1:
        return read(chosen[0])
    listed = _listed(chosen or found)
    if not chosen:
        raise InputError(f"{path}: no series ends in {series[-64:]!r} (found: {listed}); choose one of them")
    raise InputError(
        f"{path}: contains {len(chosen)} scans ({listed}); choose one by its series, or the end of it (--series)"
    )


def named(found: list[Found], series: str) -> list[Found]:
    """The scans whose series is this one or, if there is none, ends in it."""
    ends = [scan for scan in found if scan.series.endswith(series)]
    return [scan for scan in ends if scan.series == series] or ends


def read(found: Found) -> Scan:
    """Read a scan, one slice at a time, and turn it so that x runs to the left, y to the back, z to the head.

    Raises:
        InputError: the scan is damaged, incomplete, no chest CT, or its place in the patient is not certain.
    """
    file = found.files[0]
    path = file if _name(file) else file.parent
    with _silent():
        voxels = _volume(file) if path == file else _slices(found.files)
    lung = sum(np.count_nonzero((plane > AIR) & (plane < LUNG)) for plane in voxels.hu)
    if lung < SHARE_OF_LUNG * voxels.hu.size:
        low, high = voxels.hu.min(), voxels.hu.max()
        raise InputError(
            f"{path}: no lung, since hardly any value from {low} to {high} lies between air and {LUNG} HU; "
            "give a chest CT in Hounsfield units"
        )
    turned = voxels.direction[0, 0] < 0, voxels.direction[1, 1] < 0
    hu, spacing, origin, direction = _upright(voxels)
    spacing = tuple(map(float, spacing))
    return Scan(hu, spacing, origin, direction, found.series, found.study, found.patient, turned)


def _name(path: Path) -> str:
    """Name of a volume file without its suffix; empty for any other file."""
    suffix = next((suffix for suffix in VOLUMES if path.name.lower().endswith(suffix)), "")
    return path.name[: -len(suffix)] if suffix and not path.name.startswith(".") else ""


def _series(files: list[Path]) -> tuple[list[Found], list[Found]]:
    """DICOM files grouped by series: those with at least two CT slices, and all others."""
    members, slices, first = defaultdict(list), defaultdict(int), {}
    for file in tqdm(files, "headers", unit="file", disable=len(files) < MANY, leave=False):
        if header := _known(file):
            series, is_slice, *rest = header
            members[series].append(file)
            slices[series] += is_slice
            first.setdefault(series, rest)
    scans, others = [], []
    for series, (study, patient, text) in first.items():
        described = f"{len(members[series])} slices" + (f", {text}" if text else "")
        found = Found(tuple(members[series]), series, study, patient, described)
        (scans if slices[series] > 1 else others).append(found)
    return scans, others


def _known(file: Path) -> tuple[str, bool, str, str, str] | None:
    """Series, whether it is a CT slice, study, patient and description of a DICOM file; None for any other file."""
    with opening(file, "DICOM"), file.open("rb") as opened, warnings.catch_warnings(action="ignore"):
        if opened.read(132)[128:] != b"DICM" or _meta(file).get("MediaStorageSOPClassUID") == DICOMDIR:
            return None
        opened.seek(0)
        # Quicker than reading up to the pixels, and much so where long sequences follow
        header = read_partial(opened, lambda tag, *_: tag > KNOWN_BY[-1], specific_tags=KNOWN_BY)
        is_slice = _plain(header.get("Modality")) == "CT" and "LOCALIZER" not in _plain(header.get("ImageType"))
        study, patient, text, series = (
            _plain(header.get(name))
            for name in ("StudyInstanceUID", "PatientID", "SeriesDescription", "SeriesInstanceUID")
        )
    if not series:
        raise InputError(f"{file}: no SeriesInstanceUID in its header; remove the file, or download it again")
    return series, is_slice, study, patient, text[:CHARACTERS]


def _plain(value: object) -> str:
    """A header's text on one line, without control characters; empty for None."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())


def _listed(found: list[Found]) -> str:
    """The ends of several scans' series that tell them apart, and what is known of each."""
    series = {scan.series for scan in found}
    end = next((n for n in range(6, 65) if len({name[-n:] for name in series}) == len(series)), 64)
    texts = [scan.series[-end:] + (f" ({scan.described})" if scan.described else "") for scan in found[:SHOWN]]
    return ", ".join(texts) + (", ..." if len(found) > SHOWN else "")


@contextmanager
def _silent() -> Iterator[None]:
    """Discard warnings, also those that libraries in C++ write straight to standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _upright(voxels: _Voxels) -> _Voxels:
    """Reorder and flip the axes so that x, y, z run as close as possible to the left, the back and the head."""
    hu, spacing, origin, direction = voxels
    axes = list(max(itertools.permutations(range(3)), key=lambda axes: abs(direction[range(3), axes]).sum()))
    hu = hu.transpose([2 - axis for axis in reversed(axes)])
    spacing, direction = spacing[axes], direction[:, axes]
    signs = np.where(direction[range(3), range(3)] < 0, -1, 1)
    last = np.where(signs < 0, np.array(hu.shape[::-1]) - 1, 0)
    origin = origin + (direction * spacing) @ last
    return _Voxels(
        np.ascontiguousarray(hu[tuple(slice(None, None, s) for s in signs[::-1])]), spacing, origin, direction * signs
    )


def _whole(values: np.ndarray) -> np.ndarray:
    """Values rounded to int16, at least ``AIR``."""
    return np.clip(np.rint(values), AIR, np.iinfo(np.int16).max).astype(np.int16)


def _check_size(path: Path, slices: int, rows: int, columns: int) -> None:
    if slices < 2:
        raise InputError(f"{path}: a single slice, not a scan; give the folder with the whole series")
    if not (slices <= MOST_SLICES and min(rows, columns) > 1 and max(rows, columns) <= MOST_ROWS) or (
        slices * rows * columns > MOST_VOXELS
    ):
        raise InputError(
            f"{path}: {slices} slices of {rows} x {columns} pixels; a scan has 2 to {MOST_SLICES} slices of at most "
            f"{MOST_ROWS} x {MOST_ROWS}, and at most {MOST_VOXELS} voxels"
        )


class _Slice(NamedTuple):
    """The header of a DICOM slice."""

    file: Path
    instance: int
    place: np.ndarray  # (3,) mm: the middle of its first pixel
    grid: np.ndarray  # (10,): rows, columns, mm between rows and between columns, directions of a row and of a column


def _meta(file: Path) -> pydicom.Dataset:
    """The part of a DICOM header that says how the rest is stored."""
    meta = read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:  # a bomb would unfold before a check
        raise InputError(f"{file}: deflated as a whole, which is not supported; convert it with dcmconv +te")
    return meta


def _slices(files: tuple[Path, ...]) -> _Voxels:
    """The CT slices of a DICOM series, sorted by their positions along the normal of the slices."""
    folder = files[0].parent
    slices = [header for file in files if (header := _header(file))]
    if not slices:
        raise InputError(f"{folder}: a localiser, not a scan; choose a series of slices")
    grids = np.array([header.grid for header in slices])
    for name, part in ALIKE.items():
        differs = (abs(grids - grids[0]) > ROUNDING)[:, part].any(axis=1)
        if differs.any():
            other = slices[differs.argmax()].file
            raise InputError(f"{other}: its {name} is not that of {slices[0].file.name}; remove what is another scan's")
    rows, columns, *spacing = grids[0][:4]
    direction = _direction(slices[0])
    slices = _ordered(slices, direction[:, 2])
    _check_size(files[0] if len(files) == 1 else folder, len(slices), int(rows), int(columns))
    step = _step(folder, slices, direction, min(spacing))
    hu = np.empty((len(slices), int(rows), int(columns)), np.int16)
    for plane, header in zip(hu, slices, strict=True):
        plane[:] = _pixels(header.file)
    return _Voxels(hu, np.array([*spacing[::-1], step]), slices[0].place, direction)


def _header(file: Path) -> _Slice | None:
    """What the header of a CT slice says, checked; None for a localiser."""
    with opening(file, "DICOM"):
        syntax = UID(_meta(file).get("TransferSyntaxUID", ""))
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*NEEDED, *OPTIONAL])
        if "LOCALIZER" in _plain(header.get("ImageType")):
            return None
        _check_kind(file, header, syntax)
        spacing, place, axes = (
            np.array(header[name].value, float)
            for name in ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
        )
        if (spacing.shape, place.shape, axes.shape) != ((2,), (3,), (6,)) or not np.isfinite([*place, *axes]).all():
            raise InputError(
                f"{file}: PixelSpacing, ImagePositionPatient or ImageOrientationPatient is damaged; download it again"
            )
        _check_spacing(file, spacing)
        instance = int(header.get("InstanceNumber") or 0)
        return _Slice(file, instance, place, np.array([header.Rows, header.Columns, *spacing, *axes], float))


def _check_kind(file: Path, header: pydicom.Dataset, syntax: UID) -> None:
    """Refuse what is not a CT slice in Hounsfield units that can be decoded."""
    modality = _plain(header.get("Modality"))[:CHARACTERS] or "unknown"
    if modality != "CT":
        raise InputError(f"{file}: its modality is {modality}, not CT; choose a CT series")
    if header.get("SOPClassUID") == MULTIFRAME or int(header.get("NumberOfFrames") or 1) > 1:
        raise InputError(
            f"{file}: many slices in one DICOM file, which is not supported; convert it with dcm2niix -z y"
        )
    tags = [name for name in NEEDED if header.get(name) in (None, "")] + ([] if syntax else ["TransferSyntaxUID"])
    if tags:
        raise InputError(f"{file}: {', '.join(tags)} missing in its header; export or download the series again")
    unit = _plain(header.get("RescaleType"))[:CHARACTERS] or "HU"
    if unit != "HU":
        raise InputError(f"{file}: its pixels are {unit!r}, not Hounsfield units; choose another series")
    form = [header.BitsAllocated, header.get("SamplesPerPixel", 1), header.PhotometricInterpretation]
    # Programs do not agree whether MONOCHROME1 turns the values or only how they are shown
    if form != [16, 1, "MONOCHROME2"] or header.get("HighBit", header.BitsStored - 1) != header.BitsStored - 1:
        kind = f"{form[0]} bits, {_plain(form[2])[:CHARACTERS]}"
        raise InputError(f"{file}: pixels of {kind}, not of 16 bits, MONOCHROME2, as in CT; export the original series")
    if not _decodable(syntax):
        raise InputError(
            f"{file}: stored as {syntax.name}, which can't be decoded here; convert it with gdcmconv --raw"
        )


def _decodable(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _check_spacing(path: Path, spacing: np.ndarray) -> None:
    if not ((spacing > 0) & (spacing <= MOST_MM)).all():
        listed = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise InputError(f"{path}: voxels {listed} mm apart, which is not between 0 and {MOST_MM}; correct its header")


def _direction(header: _Slice) -> np.ndarray:
    """Unit vectors along a row, a column and the normal of a slice, as the columns of a matrix."""
    x, y = header.grid[4:7], header.grid[7:]
    if max(abs(x @ x - 1), abs(y @ y - 1), abs(x @ y)) > 2 * ROUNDING:
        raise InputError(
            f"{header.file}: ImageOrientationPatient is not a pair of perpendicular unit vectors; "
            "export or download the series again"
        )
    x, normal = x / np.linalg.norm(x), np.cross(x, y) / np.linalg.norm(np.cross(x, y))
    return np.stack([x, np.cross(normal, x), normal], axis=1)


def _ordered(slices: list[_Slice], normal: np.ndarray) -> list[_Slice]:
    """Slices sorted along the normal; of several at one position that with the lowest number, as in pylidc."""
    kept = {}
    for header in sorted(slices, key=lambda header: (header.instance, header.file)):
        kept.setdefault(round(header.place @ normal / SAME_MM), header)
    return [kept[at] for at in sorted(kept)]


def _step(folder: Path, slices: list[_Slice], direction: np.ndarray, pixel: float) -> float:
    """The distance in mm between slices; refuse gaps, uneven distances and slices that shift sideways."""
    places = np.array([header.place for header in slices]) @ direction
    depth = places[:, 2]
    gaps = np.diff(depth)
    least, most = gaps.min(), gaps.max()
    usual, step = np.median(gaps), (depth[-1] - depth[0]) / len(gaps)
    wide = [f"{gaps[i]:.2f} mm after {slices[i].file.name}" for i in np.flatnonzero(gaps > GAP * usual)]
    missing = ", ".join(wide[:SHOWN_GAPS])
    if missing:
        raise InputError(
            f"{folder}: slices are missing ({missing}, where {usual:.2f} mm are usual); download the series again"
        )
    if (abs(depth - depth[0] - step * np.arange(len(depth))) > UNEVEN * step).any():
        raise InputError(
            f"{folder}: slices are unevenly spaced, {least:.2f} to {most:.2f} mm; "
            "choose a series with one slice spacing"
        )
    shift = np.ptp(places[:, :2], axis=0).max()
    if shift > pixel:
        raise InputError(
            f"{folder}: slices shift sideways by {shift:.1f} mm, as with a tilted gantry; "
            "choose a series without tilt, or resample it"
        )
    _check_spacing(folder, np.array([step]))
    return step


def _pixels(file: Path) -> np.ndarray:
    """The pixels of a slice in HU."""
    with opening(file, "DICOM"):
        dataset = pydicom.dcmread(file)
        if dataset.file_meta.TransferSyntaxUID in JPEG2000TransferSyntaxes:
            dataset.pixel_array_options(decoding_plugin="pillow")  # GDCM's ends the process on damaged pixels
        stored = dataset.pixel_array
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
            raise InputError(
                f"{file}: RescaleSlope {slope:g} or RescaleIntercept {intercept:g} is damaged; download it again"
            )
        hu = stored * slope + intercept
        padding = dataset.get("PixelPaddingValue")
        if padding is not None:
            # In the type of the pixels, since many files give -2000 as 63536
            ends = np.array([padding, dataset.get("PixelPaddingRangeLimit", padding)]).astype(stored.dtype)
            hu[(stored >= ends.min()) & (stored <= ends.max())] = AIR
        return _whole(hu)


def _volume(path: Path) -> _Voxels:
    """A volume file in Hounsfield units."""
    suffix = path.name[len(_name(path)) :].lower()
    kind = VOLUMES[suffix]
    with opening(path, "gzip" if suffix == ".nii.gz" else kind), tempfile.TemporaryDirectory() as folder:
        data = _data_file(path, kind)
        size = path.stat().st_size + (data.stat().st_size if data else 0)
        # The library for NIfTI reads x.nii for x.nii.gz if there are both
        source = _unpacked(path, Path(folder, "unpacked.nii")) if suffix == ".nii.gz" else path
        reader = sitk.ImageFileReader()
        reader.SetImageIO(READERS[kind])
        reader.SetFileName(str(source))
        try:
            reader.ReadImageInformation()
            geometry = _geometry(path, reader)
            if kind == "NIfTI":
                _check_nifti(path, source, reader)
            claimed = math.prod(reader.GetSize()) * BYTES[reader.GetPixelID()]
            if claimed > MOST_TIMES * size:
                raise InputError(f"{path}: claims {claimed} bytes in a file of {size}; download or write it again")
            image = reader.Execute()
        except RuntimeError as error:
            raise InputError(f"{path}: damaged, cut off, or not {kind}; download or write it again") from error
        hu = np.empty(image.GetSize()[::-1], np.int16)
        for plane, values in zip(hu, sitk.GetArrayViewFromImage(image), strict=True):
            _check_finite(path, values)
            plane[:] = _whole(values)
    return _Voxels(hu, *geometry)


def _data_file(path: Path, kind: str) -> Path | None:
    """The file with the data of a volume whose header stands alone; None if they are in one file."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if kind == "NRRD":
        header = re.split(rb"\r?\n\r?\n", header)[0]
    named = re.search(DATA_FILE.get(kind, rb"(?!)"), header, re.MULTILINE)
    name = _plain(named[1].decode(errors="replace")) if named else "LOCAL"
    if name == "LOCAL":
        return None
    if Path(name).name != name:
        raise InputError(f"{path}: its data are in another folder, {name!r}; save it as one file")
    data = path.with_name(name)
    if not data.is_file():
        raise InputError(f"{path}: the file with its data, {name!r}, is missing; put it beside it")
    return data


def _unpacked(path: Path, target: Path) -> Path:
    """A gzip archive's content, in ``target``."""
    most = MOST_TIMES * path.stat().st_size
    with gzip.open(path) as packed, target.open("wb") as file:
        while block := packed.read(2**20):
            file.write(block)
            if file.tell() > most:
                raise InputError(f"{path}: unfolds to more than {MOST_TIMES} times its size; save it uncompressed")
    return target


def _geometry(path: Path, reader: sitk.ImageFileReader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing, origin and direction of a volume, after all checks that its header allows."""
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in BYTES:
        form = f"{reader.GetDimension()} dimensions, {reader.GetNumberOfComponents()} values of a voxel"
        raise InputError(f"{path}: {form}, not one number in each voxel of a 3D volume; save the CT alone")
    columns, rows, slices = reader.GetSize()
    _check_size(path, slices, rows, columns)
    spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    _check_spacing(path, spacing)
    if not _is_placed(path, reader):
        raise InputError(f"{path}: its header does not say how wide its voxels are and where they lie; save it anew")
    if not (np.isfinite(origin).all() and np.allclose(direction.T @ direction, np.eye(3), atol=2 * ROUNDING)):
        raise InputError(f"{path}: its axes are not perpendicular, or not finite; resample it to a straight grid")
    return spacing, origin, direction


def _is_placed(path: Path, reader: sitk.ImageFileReader) -> bool:
    """Whether a volume's header says where it lies; otherwise the library assumes something."""
    if "qform_code" in reader.GetMetaDataKeys():  # NIfTI
        return any(int(reader.GetMetaData(code)) for code in ("qform_code", "sform_code"))
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        return b"space directions:" in header
    return all(re.search(names, header) for names in (rb"ElementSpacing|ElementSize", rb"Offset|Position|Origin"))


def _check_nifti(path: Path, source: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse what the library reads as zeros: NaN, and what is missing at the end of a file."""
    with source.open("rb") as file:
        order = "<" if int.from_bytes(file.read(4), "little") in (348, 540) else ">"
    start, dtype = float(reader.GetMetaData("vox_offset")), TYPES[int(reader.GetMetaData("datatype"))]
    for plane in np.memmap(source, order + dtype, "r", int(start), reader.GetSize()[::-1]):
        _check_finite(path, plane)


def _check_finite(path: Path, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{path}: contains NaN or infinite values; write air as {AIR}")
