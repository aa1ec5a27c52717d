"""Array files opened by their headers: shapes and types are known before a byte of content is read.

Nothing here unpickles, and whatever a library says of a damaged file becomes one line.
"""

import io
import logging
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds is said in one line by us


class Array(NamedTuple):
    """An array whose shape and dtype are known before a byte of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@contextmanager
def opening(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library says of a damaged file into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each library fails in many ways of its own
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a readable {kind} ({reason}); get or write the file again") from error


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
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        return {key: Array(*header(archive, f"{key}.npy"), reader(key)) for key in keys}


def hdf5(path: Path) -> dict[str, Array]:
    """The data sets at the top of an HDF5 file; what it takes from other files is left out."""

    def is_text(item: h5py.Dataset) -> bool:
        return h5py.check_string_dtype(item.dtype) is not None

    def names(item: h5py.Dataset) -> np.ndarray:
        found: list[str] = []
        for start in range(0, len(item), SLICE):
            found += item.asstr("utf-8")[start : start + SLICE].tolist()
            if max(map(len, found[start:])) > CHARACTERS:
                raise ValueError(f"text of more than {CHARACTERS} characters")
        return np.array(found, dtype=str)

    def reader(key: str) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            with opening(path, "HDF5 file"), h5py.File(path) as file:
                return names(file[key]) if is_text(file[key]) else file[key][()]

        return load

    with opening(path, "HDF5 file"), h5py.File(path) as file:
        own = [key for key in file if isinstance(file.get(key, getlink=True), h5py.HardLink)]
        items = [(key, file[key]) for key in own if isinstance(file[key], h5py.Dataset)]
        return {
            key: Array(item.shape or (), np.dtype(str) if is_text(item) else item.dtype, reader(key))
            for key, item in items
            if not (item.external or item.is_virtual)
        }


READERS = {".npz": npz, ".hdf5": hdf5, ".h5": hdf5}


def tiles(tiff: Path, csv: Path) -> dict[str, Array]:
    """Kaggle's other form: a multipage TIFF with the images, a CSV with index and ``malignancy``."""
    with opening(tiff, "TIFF"), tifffile.TiffFile(tiff) as file:
        shape, dtype = file.series[0].shape, file.series[0].dtype
    with opening(csv, "CSV"):
        if csv.stat().st_size > CSV_BYTES:
            raise ValueError(f"more than {CSV_BYTES} bytes")
        labels = pd.read_csv(csv, index_col=0)
    if "malignancy" not in labels:
        raise InputError(f"{csv}: no column 'malignancy'; get the file again")
    if list(labels.index) != list(range(len(labels))):
        raise InputError(f"{csv}: its rows are not numbered 0, 1, 2, ...; get the file again")
    values = labels["malignancy"].to_numpy()

    def pixels() -> np.ndarray:
        with opening(tiff, "TIFF"):
            return tifffile.imread(tiff)

    return {
        "images": Array(shape, dtype, pixels),
        "malignant": Array(values.shape, values.dtype, lambda: values),
    }
