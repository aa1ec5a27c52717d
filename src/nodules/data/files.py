"""Array files opened by their headers: shapes and types are known before a byte of content is read.

Nothing here unpickles, and whatever error a library raises for a damaged file becomes one line.
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

from nodules.errors import InputError, in_brief

HEADER_BYTES = 65536  # of an array in an npz file; anything longer is not a header
CHARACTERS = 256  # of a name; anything longer is not a name
SLICE = 64  # names read at a time, so that a few bytes cannot expand into gigabytes
CSV_BYTES = 10_000_000  # of a file of labels
MOST_TIMES = 100  # size of an array over the size of its file; more is a decompression bomb
# What often turns up under another file's name: how it begins (in lower case), what it is, what to do
MISTAKEN = (
    (b"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (b"<!doctype html", "a web page", "log in and download the file itself"),
    (b"<html", "a web page", "log in and download the file itself"),
    (b"pk\x03\x04", "a zip archive (npz, xlsx or a download)", "unpack it, or export it in the right format"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x89hdf", "an HDF5 file", "rename it to end in .hdf5"),
    (b"\x93numpy", "a single array", "save images and labels in one file with numpy.savez"),
)
FILTERS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}  # of HDF5
NESTED = 30  # data sets of a group that a message may list
SHOWN = 6  # names in a message
CODECS = {
    tifffile.COMPRESSION[name] for name in ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "ZSTD", "LZMA")
}
SEPARATORS = ",;\t"  # of a CSV
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # our own messages say it in one line


class Stored(NamedTuple):
    """An array in a file, whose shape and dtype are known before a byte of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """How many values it claims to hold."""
        return math.prod(self.shape)


UNREAD = Stored((), np.dtype(object), lambda: np.array(None))  # never read, but a message can name it


@contextmanager
def opening(path: Path, kind: str) -> Iterator[None]:
    """Turn any error of a library into one line with the cause and the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library has its own ways to fail
        raise _failure(path, kind, error) from error


def _failure(path: Path, kind: str, error: Exception) -> InputError:
    """Why a file could not be read, and what to do about that."""
    reason = in_brief(error)
    if isinstance(error, PermissionError):
        return InputError(f"{path}: no permission to read it; grant it, for example with chmod u+r")
    if isinstance(error, MemoryError):
        return InputError(f"{path}: does not fit into memory; close other programs, or use fewer patches")
    if "unable to lock file" in reason:
        return InputError(f"{path}: in use by another process; close the program or notebook that has it open")
    if "already open for" in reason:
        return InputError(f"{path}: not closed by the program that wrote it; end that and run h5clear -s on the file")
    if mistaken := _mistaken(path, kind):
        return mistaken
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"{path}: its text is not UTF-8 ({reason}); save it as UTF-8")
    if isinstance(error, NotImplementedError):
        return InputError(f"{path}: unsupported compression ({reason}); save it uncompressed")
    return InputError(f"{path}: not a readable {kind} file ({reason}); download or write it again")


def _mistaken(path: Path, kind: str) -> InputError | None:
    """The error for a file that begins like another kind of file; None if it does not."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return None
    for begins, what, remedy in MISTAKEN:
        if kind not in what and start.startswith(begins):
            return InputError(f"{path}: contains {what}, not {kind} data; {remedy}")
    return None


def npz(path: Path) -> dict[str, Stored]:
    """The arrays of an npz file."""

    def header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype]:
        entry = archive.getinfo(member)
        with archive.open(entry) as packed:
            file = io.BytesIO(packed.read(HEADER_BYTES))
        version = np.lib.format.read_magic(file)
        parse = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = parse[version](file)
        # The checksum is verified only when a member is read to its end
        if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise ValueError(f"{member} does not have the length that its header gives")
        return shape, dtype

    def reader(key: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with opening(path, "npz"), np.load(path, allow_pickle=False) as archive:
                return archive[key]

        return load

    with opening(path, "npz"), zipfile.ZipFile(path) as archive:
        # Programs that repack a folder add members of their own
        keys = [name.removesuffix(".npy") for name in archive.namelist() if re.fullmatch(r"[^/]+\.npy", name)]
        return {key: Stored(*header(archive, f"{key}.npy"), reader(key)) for key in keys}


def hdf5(path: Path) -> dict[str, Stored]:
    """The data sets at the top of an HDF5 file, and ``unit`` where an attribute states it.

    Data sets in groups or in other files are listed too, under names that say so, but can't be read.
    """

    def is_text(item: h5py.Dataset) -> bool:
        return h5py.check_string_dtype(item.dtype) is not None

    def names(item: h5py.Dataset) -> np.ndarray:
        texts: list[str] = []
        stored = item.asstr("utf-8")
        if item.shape == ():
            return np.array(stored[()])
        is_row = len(item.shape) == 2 and item.shape[0] == 1  # as MATLAB writes a column
        for start in range(0, item.size, SLICE):
            part = stored[0, start : start + SLICE] if is_row else stored[start : start + SLICE]
            texts += part.ravel().tolist()
            if max(map(len, texts[start:])) > CHARACTERS:
                raise ValueError(f"text of more than {CHARACTERS} characters")
        return np.array(texts, dtype=str)

    def reader(key: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with opened() as file:
                _check_filters(path, key, file[key])
                return names(file[key]) if is_text(file[key]) else file[key][()]

        return load

    @contextmanager
    def opened() -> Iterator[h5py.File]:
        # Network drives may have no locks; the file is then read without one
        with opening(path, "HDF5"), h5py.File(path, locking="best-effort") as file:
            yield file

    with opened() as file:
        unit = _stated_unit(file)
        arrays = {} if unit is None else {"unit": Stored((), unit.dtype, lambda: unit)}
        for key in file:
            is_inside = isinstance(file.get(key, getlink=True), h5py.HardLink)
            item = file[key] if is_inside else None
            if isinstance(item, h5py.Group):
                arrays |= {f"{key}/{name}": UNREAD for name in _inside(item)}
            elif item is None or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
                arrays[f"{key} (a link, never followed)"] = UNREAD
            elif isinstance(item, h5py.Dataset):
                dtype = np.dtype(str) if is_text(item) else item.dtype
                arrays[key] = Stored(item.shape or (), dtype, reader(key))
        return arrays


def _stated_unit(file: h5py.File) -> np.ndarray | None:
    """The attribute ``unit`` or ``units`` of the images, else of the file; None if there is none."""
    images = [file[key] for key in ("images", "ct_slices") if isinstance(file.get(key, getlink=True), h5py.HardLink)]
    stated = [item.attrs[name] for item in (*images, file) for name in item.attrs if name.lower() in ("unit", "units")]
    texts = [value for attribute in stated for value in np.ravel(attribute)[:1]]
    return np.array([text.decode() if isinstance(text, bytes) else str(text) for text in texts[:1]]) if texts else None


def _inside(group: h5py.Group) -> list[str]:
    """Names of the data sets in a group and in the groups below it."""
    names: list[str] = []

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> bool | None:
        names.extend([name] if isinstance(item, h5py.Dataset) else [])
        return len(names) >= NESTED or None

    group.visititems(visit)
    return names


def _check_filters(path: Path, key: str, item: h5py.Dataset) -> None:
    """Refuse a data set that needs a compression filter which is not installed."""
    plan = item.id.get_create_plist()
    for number, _, _, name in map(plan.get_filter, range(plan.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            with suppress(ImportError):
                importlib.import_module("hdf5plugin")  # registers its filters
        if not h5py.h5z.filter_avail(number):
            title = FILTERS.get(number) or name.decode(errors="replace") or "unknown"
            raise InputError(
                f"{path}: '{key}' needs the HDF5 filter {number} ({title}), which is not installed; run pip "
                "install hdf5plugin, or rewrite the file with h5repack -f GZIP=4"
            )


OPENERS = {".npz": npz, ".hdf5": hdf5, ".h5": hdf5}


def tiles(tiff: Path, csv: Path) -> dict[str, Stored]:
    """Kaggle's other form: a TIFF with a patch per page, and a CSV with a row per page, its label in ``malignancy``."""
    with opening(tiff, "TIFF"), tifffile.TiffFile(tiff) as file:
        shape, dtype = _pages(tiff, file)
    values = _labels(csv)
    if len(values) != shape[0]:
        raise InputError(f"{csv}: {len(values)} rows, but {tiff.name} has {shape[0]} pages; provide one row per page")

    def pixels() -> np.ndarray:
        with opening(tiff, "TIFF"), tifffile.TiffFile(tiff) as file:
            # ImageJ writes large files with a single page entry for all
            return np.stack([_shown(page) for page in file.pages]) if len(file.pages) > 1 else file.series[0].asarray()

    return {
        "images": Stored(shape, dtype, pixels),
        "malignant": Stored(values.shape, values.dtype, lambda: values),
    }


def _shown(page: tifffile.TiffPage) -> np.ndarray:
    """A page's values, low where it is dark; signed values are left to :mod:`nodules.data.pixels`."""
    values = page.asarray()
    is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind == "u"
    return np.iinfo(values.dtype).max - values if is_inverted else values


def _pages(path: Path, file: tifffile.TiffFile) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of all pages together, in file order; refuse pages that can't be read as patches."""
    codecs = {page.compression for page in file.pages}
    if not codecs <= CODECS:
        (codec, *_) = codecs - CODECS
        name = getattr(codec, "name", codec)
        raise InputError(f"{path}: compressed with {name}, which is not supported; save it uncompressed, or with LZW")
    if any(page.photometric == tifffile.PHOTOMETRIC.PALETTE for page in file.pages):
        raise InputError(f"{path}: its pixels are indices into a colour palette; save it in greyscale")
    if len(file.pages) == 1:
        return file.series[0].shape, file.series[0].dtype
    kinds = {(page.shape, page.dtype) for page in file.pages}
    if len(kinds) > 1:
        listed, count = ", ".join(f"{series.shape} {series.dtype}" for series in file.series[:SHOWN]), len(file.series)
        raise InputError(f"{path}: contains {count} series ({listed}); save the patches alone, one per page")
    ((side, dtype),) = kinds
    return (len(file.pages), *side), dtype


def spreadsheet(path: Path, most: int = CSV_BYTES, text: bool = False) -> pd.DataFrame:
    """A CSV as spreadsheets write it, at most ``most`` bytes: without empty rows and columns, names in lower case.

    With ``text``, every value is left as it is written: 007 is no number, and NA is a name.
    """
    with opening(path, "CSV"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # for rows that are longer than the header
        if mistaken := _mistaken(path, "CSV"):
            raise mistaken
        if path.stat().st_size > most:
            raise ValueError(f"more than {most} bytes")
        content = path.read_bytes()
        lines = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if lines.startswith("sep="):  # a line that spreadsheets write and read
            lines = lines.partition("\n")[2]
        separator = max(SEPARATORS, key=lines.partition("\n")[0].count)
        decimal = "," if separator == ";" and "," in lines else "."
        as_written = {"dtype": str, "keep_default_na": False, "na_values": [""]}
        options = as_written if text else {"decimal": decimal}
        table = pd.read_csv(io.StringIO(lines), sep=separator, index_col=False, skipinitialspace=True, **options)
        table = table.dropna(how="all").dropna(how="all", axis=1)
        table.columns = [str(name).strip().lower() for name in table.columns]
    return table


def _labels(path: Path) -> np.ndarray:
    """The column ``malignancy`` of a CSV as spreadsheets write it, (N,).

    Other columns number the rows if they come first, have no name, or contain all of 0, 1, 2, ...; the numbers must be
    in order.
    """
    table = spreadsheet(path)
    if "malignancy" not in table:
        listed = ", ".join(map(repr, table.columns[:SHOWN]))
        raise InputError(f"{path}: no column 'malignancy' (found: {listed}); give the labels that column name")
    if "malignancy.1" in table:  # as pandas calls a second one
        raise InputError(f"{path}: several columns are called 'malignancy'; keep only the one with the labels")
    numbers = list(range(len(table)))
    for i, name in enumerate(table):
        numbering = i == 0 or name == "index" or name.startswith("unnamed") or set(table[name]) == set(numbers)
        if name != "malignancy" and numbering and list(table[name]) != numbers:
            raise InputError(
                f"{path}: its rows are not numbered 0, 1, 2, ... (column {name!r}); sort and number them like "
                "the pages of the TIFF"
            )
    labels = table["malignancy"].to_numpy()
    check_labels(path, "malignancy", labels)
    return labels


def check_labels(path: Path, key: str, labels: np.ndarray) -> None:
    """Refuse labels other than 0 and 1."""
    wrong = [label for label in labels.tolist() if label not in (0, 1)]
    if wrong:
        raise InputError(f"{path}: '{key}' contains {wrong[0]!r}; labels must be 0 or 1")


def choose(path: Path, arrays: dict[str, Stored], *keys: str) -> tuple[str, Stored]:
    """The first of some keys that a file has, and its array."""
    for key in keys:
        if key in arrays:
            return key, arrays[key]
    raise InputError(f"{path}: no '{keys[0]}' in it (found: {', '.join(arrays) or 'nothing'}); add it")


def load(path: Path, key: str, stored: Stored) -> np.ndarray:
    """Read an array, in this machine's byte order, if the size in its header is in proportion to its file."""
    size, claimed = path.stat().st_size, stored.size * stored.dtype.itemsize
    if claimed > MOST_TIMES * size:
        raise InputError(f"{path}: '{key}' claims {claimed} bytes in a file of {size}; store it uncompressed")
    values = stored.read()
    return values.astype(values.dtype.newbyteorder("="), copy=False)
