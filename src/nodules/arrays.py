"""Array files opened by their headers: shapes and types are known before a byte of content is read.

Nothing here unpickles, and whatever a library says of a damaged file becomes one line.
"""

import importlib
import io
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import tifffile

from nodules.errors import InputError

HEADER_BYTES = 65536  # of an array in an npz file; a longer one is no header
CHARACTERS = 256  # of a name; a longer one is no name
SLICE = 64  # names read at once, so that a few bytes cannot unfold into gigabytes
CSV_BYTES = 10_000_000  # of a file of labels
# What people have under the name of another file: how it begins (in small letters), what it is, what to do
MISTAKEN = (
    (b"version https://git-lfs", "a pointer of Git LFS", "run git lfs pull"),
    (b"<!doctype html", "a web page", "log in, and download the file itself"),
    (b"<html", "a web page", "log in, and download the file itself"),
    (b"pk\x03\x04", "a zip archive (npz, xlsx, a download)", "unpack it, or save it in that form"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x89hdf", "an HDF5 file", "name it .hdf5"),
    (b"\x93numpy", "a single array", "store images and labels in one file, by numpy.savez"),
)
FILTERS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}  # of HDF5
NESTED = 30  # data sets in groups that are listed
SHOWN = 6  # names in a message
CODECS = {
    tifffile.COMPRESSION[name] for name in ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "ZSTD", "LZMA")
}
SEPARATORS = ",;\t"  # of a CSV
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds is said in one line by us


class Array(NamedTuple):
    """An array whose shape and dtype are known before a byte of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


UNREAD = Array((), np.dtype(object), lambda: np.array(None))  # listed, so that a message can name it


@contextmanager
def opening(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library says of a file into one line with the cause and the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library fails in many ways of its own
        raise _failure(path, kind, error) from error


def _failure(path: Path, kind: str, error: Exception) -> InputError:
    """What to do about a file that could not be read depends on why."""
    reason = " ".join(str(error).split())[:120]
    if isinstance(error, PermissionError):
        return InputError(f"{path}: you may not read it; give yourself the right, as by chmod u+r")
    if isinstance(error, MemoryError):
        return InputError(f"{path}: does not fit into memory; close other programs, or bring fewer patches")
    if "unable to lock file" in reason:
        return InputError(f"{path}: in use by another process; close the program or notebook that has it open")
    if "already open for" in reason:
        return InputError(f"{path}: not closed by the program that wrote it; end that, then run h5clear -s on the file")
    if mistaken := _mistaken(path, kind):
        return mistaken
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"{path}: its text is not UTF-8 ({reason}); save it in UTF-8")
    if isinstance(error, NotImplementedError):
        return InputError(f"{path}: compressed in a way that can't be read ({reason}); write it uncompressed")
    return InputError(f"{path}: not a readable {kind} ({reason}); get or write the file again")


def _mistaken(path: Path, kind: str) -> InputError | None:
    """What to say of a file that begins as another kind does; None where it does not."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return None
    for begins, what, remedy in MISTAKEN:
        if kind not in what and start.startswith(begins):
            return InputError(f"{path}: not a {kind} but {what}; {remedy}")
    return None


def npz(path: Path) -> dict[str, Array]:
    """The arrays of an npz file."""

    def header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype]:
        about = archive.getinfo(member)
        with archive.open(about) as packed:
            file = io.BytesIO(packed.read(HEADER_BYTES))
        version = np.lib.format.read_magic(file)
        parse = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = parse[version](file)
        # Only what is read to its end is checked against its checksum
        if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != about.file_size:
            raise ValueError(f"{member} is not as long as its header says")
        return shape, dtype

    def reader(key: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with opening(path, "npz"), np.load(path, allow_pickle=False) as archive:
                return archive[key]

        return load

    with opening(path, "npz"), zipfile.ZipFile(path) as archive:
        # Programs that pack a folder anew add members of their own
        keys = [name.removesuffix(".npy") for name in archive.namelist() if re.fullmatch(r"[^/]+\.npy", name)]
        return {key: Array(*header(archive, f"{key}.npy"), reader(key)) for key in keys}


def hdf5(path: Path) -> dict[str, Array]:
    """The data sets at the top of an HDF5 file, and ``unit`` where an attribute states it.

    Those in groups, and what lies in other files, stand among them by a name that says so, and can't be read.
    """

    def is_text(item: h5py.Dataset) -> bool:
        return h5py.check_string_dtype(item.dtype) is not None

    def names(item: h5py.Dataset) -> np.ndarray:
        found: list[str] = []
        text = item.asstr("utf-8")
        if item.shape == ():
            return np.array(text[()])
        row = len(item.shape) == 2 and item.shape[0] == 1  # as MATLAB writes a column
        for start in range(0, item.size, SLICE):
            part = text[0, start : start + SLICE] if row else text[start : start + SLICE]
            found += part.ravel().tolist()
            if max(map(len, found[start:])) > CHARACTERS:
                raise ValueError(f"text of more than {CHARACTERS} characters")
        return np.array(found, dtype=str)

    def reader(key: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with opened() as file:
                _check_filters(path, key, file[key])
                return names(file[key]) if is_text(file[key]) else file[key][()]

        return load

    @contextmanager
    def opened() -> Iterator[h5py.File]:
        # Network drives may have no locks: the file is then read without
        with opening(path, "HDF5 file"), h5py.File(path, locking="best-effort") as file:
            yield file

    with opened() as file:
        unit = _stated_unit(file)
        held = {} if unit is None else {"unit": Array((), unit.dtype, lambda: unit)}
        for key in file:
            own = isinstance(file.get(key, getlink=True), h5py.HardLink)
            item = file[key] if own else None
            if isinstance(item, h5py.Group):
                held |= {f"{key}/{name}": UNREAD for name in _inside(item)}
            elif item is None or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
                held[f"{key} (a link, never followed)"] = UNREAD
            elif isinstance(item, h5py.Dataset):
                dtype = np.dtype(str) if is_text(item) else item.dtype
                held[key] = Array(item.shape or (), dtype, reader(key))
        return held


def _stated_unit(file: h5py.File) -> np.ndarray | None:
    """What the attribute ``unit`` or ``units``, of the images or of the file, says; None without one."""
    images = [file[key] for key in ("images", "ct_slices") if isinstance(file.get(key, getlink=True), h5py.HardLink)]
    named = [item.attrs[name] for item in (*images, file) for name in item.attrs if name.lower() in ("unit", "units")]
    texts = [value for attribute in named for value in np.ravel(attribute)[:1]]
    return np.array([text.decode() if isinstance(text, bytes) else str(text) for text in texts[:1]]) if texts else None


def _inside(group: h5py.Group) -> list[str]:
    """Names of the data sets in a group, and in those below it."""
    found: list[str] = []

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> bool | None:
        found.extend([name] if isinstance(item, h5py.Dataset) else [])
        return len(found) >= NESTED or None

    group.visititems(visit)
    return found


def _check_filters(path: Path, key: str, item: h5py.Dataset) -> None:
    """Refuse a data set that is compressed by what is not installed."""
    made = item.id.get_create_plist()
    for number, _, _, name in map(made.get_filter, range(made.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            with suppress(ImportError):
                importlib.import_module("hdf5plugin")  # makes its filters known
        if not h5py.h5z.filter_avail(number):
            title = FILTERS.get(number) or name.decode(errors="replace") or "unknown"
            raise InputError(
                f"{path}: '{key}' needs the HDF5 filter {number} ({title}), which is not installed; pip install "
                "hdf5plugin, or rewrite the file by h5repack -f GZIP=4"
            )


READERS = {".npz": npz, ".hdf5": hdf5, ".h5": hdf5}


def tiles(tiff: Path, csv: Path) -> dict[str, Array]:
    """Kaggle's other form: a TIFF of one patch a page, and a CSV with ``malignancy``, a row a page."""
    with opening(tiff, "TIFF"), tifffile.TiffFile(tiff) as file:
        shape, dtype = _pages(tiff, file)
    values = _labels(csv)
    if len(values) != shape[0]:
        raise InputError(f"{csv}: {len(values)} rows, but {tiff.name} has {shape[0]} pages; bring a row for each")

    def pixels() -> np.ndarray:
        with opening(tiff, "TIFF"), tifffile.TiffFile(tiff) as file:
            # One page may stand for all, as ImageJ writes large files
            return np.stack([_shown(page) for page in file.pages]) if len(file.pages) > 1 else file.series[0].asarray()

    return {
        "images": Array(shape, dtype, pixels),
        "malignant": Array(values.shape, values.dtype, lambda: values),
    }


def _shown(page: tifffile.TiffPage) -> np.ndarray:
    """A page's values, dark ones low; what has a sign is left to :mod:`nodules.units`."""
    values = page.asarray()
    negative = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind == "u"
    return np.iinfo(values.dtype).max - values if negative else values


def _pages(path: Path, file: tifffile.TiffFile) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of all pages together, in the order of the file; refuse what can't be read as patches."""
    codecs = {page.compression for page in file.pages}
    if not codecs <= CODECS:
        (codec, *_) = codecs - CODECS
        name = getattr(codec, "name", codec)
        raise InputError(f"{path}: compressed by {name}, which can't be read; save it uncompressed, or by LZW")
    if any(page.photometric == tifffile.PHOTOMETRIC.PALETTE for page in file.pages):
        raise InputError(f"{path}: its pixels are numbers of colours in a palette; save it as grey levels")
    if len(file.pages) == 1:
        return file.series[0].shape, file.series[0].dtype
    kinds = {(page.shape, page.dtype) for page in file.pages}
    if len(kinds) > 1:
        found = ", ".join(f"{series.shape} {series.dtype}" for series in file.series[:SHOWN])
        raise InputError(f"{path}: holds {len(file.series)} series ({found}); save the patches alone, a page each")
    ((side, dtype),) = kinds
    return (len(file.pages), *side), dtype


def _labels(path: Path) -> np.ndarray:
    """The column ``malignancy`` of a CSV as spreadsheets write it, (N,).

    The first column, if it is another, and any without a name or that holds all of 0, 1, 2, ... number the rows.
    """
    with opening(path, "CSV"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows that are longer than the header
        if mistaken := _mistaken(path, "CSV"):
            raise mistaken
        if path.stat().st_size > CSV_BYTES:
            raise ValueError(f"more than {CSV_BYTES} bytes")
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if text.startswith("sep="):  # a line that spreadsheets write and read
            text = text.partition("\n")[2]
        separator = max(SEPARATORS, key=text.partition("\n")[0].count)
        decimal = "," if separator == ";" and "," in text else "."
        table = pd.read_csv(io.StringIO(text), sep=separator, decimal=decimal, index_col=False)
        table = table.dropna(how="all").dropna(how="all", axis=1)
        table.columns = [str(name).strip().lower() for name in table.columns]
    if "malignancy" not in table:
        found = ", ".join(map(repr, table.columns[:SHOWN]))
        raise InputError(f"{path}: no column 'malignancy' (found: {found}); name the column of labels so")
    if "malignancy.1" in table:  # as pandas calls a second one
        raise InputError(f"{path}: several columns 'malignancy'; leave the one with the labels")
    numbers = list(range(len(table)))
    for i, name in enumerate(table):
        numbering = i == 0 or name == "index" or name.startswith("unnamed") or set(table[name]) == set(numbers)
        if name != "malignancy" and numbering and list(table[name]) != numbers:
            raise InputError(
                f"{path}: its rows are not numbered 0, 1, 2, ... (column {name!r}); sort and number them as the pages "
                "of the TIFF"
            )
    wrong = [value for value in table["malignancy"] if value not in (0, 1)]
    if wrong:
        raise InputError(f"{path}: 'malignancy' holds {wrong[0]!r}; labels are 0 and 1")
    return table["malignancy"].to_numpy()
