"""One table for every source: 64x64 CT patches with their labels, read, verified and described.

Whatever the source, :func:`read` returns :class:`Patches`. A file of your own (npz or HDF5) contains

=================  ==================  =====================================================================
key                shape, dtype        meaning
=================  ==================  =====================================================================
``images``         (N, 64, 64)         Hounsfield units, or grey levels 0 to 255 (marked "not HU"), of any integer
                                       or floating-point type. ``ct_slices`` is accepted too.
                                       :mod:`nodules.data.pixels` says how the two are told apart.
``malignant``      (N,) or (N, 1)      0 benign, 1 malignant. ``slice_class`` is accepted too.
``unit``           text, optional      of the pixels, ``HU`` or ``8-bit``, if the values alone do not settle it; in
                                       HDF5 also an attribute
``id``             (N,), optional      unique name of each patch; the row number if missing
``patient``        (N,), optional      whom it shows; without it patches can't be split by patient
``nodule``         (N,), optional      which nodule it shows
``source``         text, optional      ``lidc-idri`` or ``luna16``, as written by :mod:`nodules.data.cut`
``masks``          (N, 64, 64) bool,   inside the nodule's outline
                   optional
others             (N,), optional      columns of the table: ``diameter_mm``, ``median_rating``, ``ratings``, ...
=================  ==================  =====================================================================
"""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from nodules import cache, paths
from nodules.data import columns, files, phantom, pixels
from nodules.data.files import OPENERS, Stored
from nodules.data.sources import CLASSES, CUT, KAGGLE_COUNTS, KAGGLE_REMEDY, OWN, SIDE, SOURCES, Card
from nodules.errors import InputError, in_brief, within

MOST_PATCHES = 200_000  # 1.6 GB of int16; a header that gives more is taken for damaged
LISTED = (*OPENERS, ".tif", ".tiff", ".csv")  # files that a message may name
SHOWN = 3  # files in a message
CARD_NAMES = 12  # of columns on a card
BINS = 140  # of the histogram of pixel values, about


@dataclass(frozen=True)
class Patches:
    """Images (N, 64, 64) int16, a table with a row for each (``id, malignant, ...``), masks if known, and the card."""

    images: np.ndarray
    table: pd.DataFrame
    masks: np.ndarray | None
    card: Card

    def __len__(self) -> int:
        return len(self.images)

    @property
    def units(self) -> np.ndarray:
        """What is independent and so resampled, (N,): the patient, or the patch itself where patients are unknown."""
        return self.table["patient" if "patient" in self.table else "id"].to_numpy()


def read(source: str, n_patches: int = KAGGLE_COUNTS["patches"], seed: int = 0, *, labelled: bool = True) -> Patches:
    """Read and verify a source.

    Args:
        source: ``phantom``; ``kaggle`` (files in ``data/``); a folder with Kaggle's files, or with scans to cut
            patches out of; or the path of an npz or HDF5 file in this module's format, absolute or relative to the
            project's root.
        n_patches: how many patches the phantom renders; other sources ignore it.
        seed: of the phantom.
        labelled: whether labels are needed; without, they are not read, and the table has none.

    Raises:
        InputError: the source is missing, damaged, or not in this format.
    """
    if source == "phantom":
        path = _phantom_file(n_patches, seed)
        return _verified(path, files.npz(path), "phantom", labelled)
    try:
        path = paths.DATA if source == "kaggle" else paths.resolve(source)
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null character
        reason = in_brief(error)
        raise InputError(f"data={source[:80]!r}: not a valid path ({reason}); give a file or a folder") from error
    if path.is_dir():
        found = None if source == "kaggle" or has_kaggle(path) else _cut_file(path)
        if found is None:
            return _kaggle(path)
        arrays = files.npz(found[0])
        if labelled and "malignant" not in arrays:
            raise InputError(f"{path}: its table of places has no column 'malignant'; add it, or ask predict, without")
        held = _verified(found[0], arrays, labelled=labelled)
        about = {} if held.card.name in CUT else {"name": path.name, "title": path.name}
        return replace(held, card=replace(held.card, notes=[*found[1], *held.card.notes], **about))
    if not there:
        raise InputError(f"{path}: no such file; set data= to phantom, kaggle, a folder, or an npz or HDF5 file")
    if path.suffix.lower() not in OPENERS:
        raise InputError(f"{path}: unknown file type; use one of {', '.join(OPENERS)}")
    return _verified(path, OPENERS[path.suffix.lower()](path), labelled=labelled)


def has_kaggle(folder: Path) -> bool:
    """Whether a folder has a file of Kaggle's set."""
    return (folder / "all_patches.hdf5").exists() or (folder / "ct_tiles.tif").exists()


def _cut_file(folder: Path) -> tuple[Path, list[str]] | None:
    """Patches of the scans in a folder, from the cache, and what was cut or is missing; None without scans."""
    from nodules.data import cut, scans  # their libraries take long to import

    key = {"files": cut.listing(folder), "version": cut.version()}
    known = cache.place("scans", "npz", key).exists()
    if not known and not scans.find(folder):
        return None
    parts = cache.place("scans", "parts", {"folder": str(folder)})
    with nullcontext() if known else paths.alone(parts.with_suffix(".lock")):  # another run may want the same
        path, note = cache.kept("scans", "npz", key, lambda path: {"told": cut.dataset(folder, path, parts=parts)})
    return path, note["told"]


def _kaggle(folder: Path) -> Patches:
    hdf5, tiff, csv = (folder / name for name in ("all_patches.hdf5", "ct_tiles.tif", "malignancy.csv"))
    if hdf5.exists():
        path, arrays = hdf5, files.hdf5(hdf5)
    elif tiff.exists() and csv.exists():
        path, arrays = tiff, files.tiles(tiff, csv)
    else:
        names = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix.lower() in LISTED)[:SHOWN])
        instead = f" (found: {names})" if names else ""
        raise InputError(f"{folder}: Kaggle's files are missing{instead}; {KAGGLE_REMEDY}")
    patches = _verified(path, arrays, "kaggle")
    counts = {key: getattr(patches.card, key) for key in KAGGLE_COUNTS}
    if counts == KAGGLE_COUNTS:
        return patches
    if folder == paths.DATA or len(patches) == KAGGLE_COUNTS["patches"]:
        raise InputError(f"{path}: contains {counts}, but Kaggle's set has {KAGGLE_COUNTS}; {KAGGLE_REMEDY}")
    return _verified(path, arrays)


def _phantom_file(n_patches: int, seed: int) -> Path:
    """The rendered phantom in this module's own format, from the cache."""
    within(1, MOST_PATCHES, n_patches=n_patches)

    def render(path: Path) -> None:
        try:
            images, masks, table = phantom.render(*_phantom_counts(n_patches), seed)
        except ValueError as error:
            raise InputError(f"n_patches={n_patches}: {error}; use fewer") from error
        stored = {
            name: column.to_numpy(str if column.dtype.kind not in "iufb" else None) for name, column in table.items()
        }
        np.savez(path, images=images, masks=masks, **stored)

    key = {"n_patches": n_patches, "seed": seed, "version": phantom.version()}
    return cache.kept("phantom", "npz", key, render)[0]


def _phantom_counts(n_patches: int) -> tuple[int, int]:
    """Malignant and benign patches of the phantom, in Kaggle's proportion."""
    malignant = round(n_patches * KAGGLE_COUNTS["malignant"] / KAGGLE_COUNTS["patches"])
    return malignant, n_patches - malignant


def rescan(ids: list[str], n_patches: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Patches of the phantom as other scanners would have imaged them; see :func:`nodules.data.phantom.rescan`."""
    return phantom.rescan(ids, *_phantom_counts(n_patches), seed=0)


def _verified(path: Path, arrays: dict[str, Stored], source: str | None = None, labelled: bool = True) -> Patches:
    """Check everything that can be wrong with a file's arrays, from their headers as far as possible."""
    arrays, renamed = columns.renamed(arrays)
    images, unit, notes = _images(path, arrays)
    notes = notes + renamed
    n = len(images)
    table = columns.read(path, arrays, n, labelled)
    for key in columns.NAMES:
        notes += columns.alike(key, table[key]) if key in table else []
    if source is None:
        unused = ", ".join(columns.unused(arrays)[:CARD_NAMES])
        notes += [f"Not used: {unused}."] if unused else []
    masks = None
    if "masks" in arrays:
        stored = arrays["masks"]
        if _plain(stored.shape) != images.shape or stored.dtype != bool:
            raise InputError(
                f"{path}: 'masks' is {stored.dtype} with shape {stored.shape}; store bool, in the shape of the images"
            )
        masks = files.load(path, "masks", stored).reshape(images.shape)

    digest = hashlib.sha256(np.ascontiguousarray(images, dtype="<i2"))
    for column in sorted(table):
        digest.update("\n".join([column, *map(str, table[column])]).encode())
    digest.update(b"" if masks is None else np.packbits(masks))
    malignant = int(table["malignant"].sum()) if labelled else None
    written = _word(path, "source", arrays["source"]) if "source" in columns.alone(arrays) else None
    source = source or (written if written in CUT else None)
    card = Card(
        name=source or path.stem,
        unit=unit,
        patches=n,
        malignant=malignant,
        benign=n - malignant if labelled else None,
        patients=table["patient"].nunique() if "patient" in table else None,
        nodules=table["nodule"].nunique() if "nodule" in table else None,
        notes=notes,
        sha256=digest.hexdigest(),
        **(SOURCES[source] if source else OWN | {"title": path.name}),
    )
    return Patches(images, table, masks, card)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of 1, such as a single channel, after the first."""
    return (*shape[:1], *(side for side in shape[1:] if side != 1))


def _images(path: Path, arrays: dict[str, Stored]) -> pixels.Pixels:
    """The images as int16, the unit of the pixels, and what was converted."""
    key, stored = files.choose(path, arrays, *columns.IMAGES)
    if _plain(stored.shape)[1:] != (SIDE, SIDE):
        raise InputError(f"{path}: '{key}' has shape {stored.shape}; it must be (N, {SIDE}, {SIDE})")
    n = stored.shape[0]
    if not 0 < n <= MOST_PATCHES:
        raise InputError(f"{path}: '{key}' contains {n} patches; provide 1 to {MOST_PATCHES}")
    if stored.dtype.kind not in "iuf":
        raise InputError(f"{path}: '{key}' is {stored.dtype}, not numeric; store Hounsfield units as int16")
    images = files.load(path, key, stored).reshape(n, SIDE, SIDE)  # drops a single channel
    low, high = images.min(), images.max()  # both let NaN and infinity through
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path}: '{key}' contains NaN or infinite values; remove those patches")
    unit = arrays.get("unit")
    return pixels.convert(images, f"{path}: '{key}'", unit and _word(path, "unit", unit))


def _word(path: Path, key: str, stored: Stored) -> str:
    """The single text in an array."""
    if stored.dtype.kind not in "SU" or stored.size != 1:
        raise InputError(f"{path}: '{key}' is {stored.dtype} with shape {stored.shape}; store one word, such as 'HU'")
    return str(columns.text(path, key, np.atleast_1d(files.load(path, key, stored)).ravel())[0])


def intensity_histogram(patches: Patches) -> pd.DataFrame:
    """Density of pixel values by class: ``value`` (bin centre), ``class``, ``density`` (empty bins are left out)."""
    low, high = np.percentile(patches.images, [0, 99.9]).astype(int)
    # Bins are a whole number wide, since pixel values are whole
    edges = np.arange(low, high, max(1, (high - low) // BINS)) - 0.5
    tables = []
    for label, name in enumerate(CLASSES):
        values = patches.images[patches.table["malignant"] == label]
        density, _ = np.histogram(values, bins=edges, density=True)
        centres = (edges[:-1] + edges[1:]) / 2
        tables.append(pd.DataFrame({"value": centres, "class": name, "density": density}))
    table = pd.concat(tables, ignore_index=True)
    return table[table["density"] > 0]
