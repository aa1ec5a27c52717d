"""One table for every source: 64x64 CT patches with their labels, read, verified and described.

Whatever the source, :func:`read` returns :class:`Patches`. A file of one's own (npz or HDF5) holds

=================  ==================  =====================================================================
key                shape, dtype        meaning
=================  ==================  =====================================================================
``images``         (N, 64, 64)         Hounsfield units, or grey levels 0 to 255 (marked "not HU"), of any integer
                                       or floating type. ``ct_slices`` is taken too. :mod:`nodules.units` says how
                                       the two are told apart.
``malignant``      (N,) or (N, 1)      0 benign, 1 malignant. ``slice_class`` is taken too.
``unit``           text, optional      ``HU`` or ``8-bit``, where the values do not tell; in HDF5 also an attribute
``id``             (N,), optional      unique name of each patch; without it the row number
``patient``        (N,), optional      who it is of; without it no patient-wise split is possible
``nodule``         (N,), optional      which nodule it shows
``masks``          (N, 64, 64) bool,   inside the nodule's outline
                   optional
others             (N,), optional      columns of the table: ``diameter_mm``, ``median_rating``, ``ratings``, ...
=================  ==================  =====================================================================
"""

import hashlib
import math
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nodules import arrays, lidc, paths, phantom, units
from nodules.arrays import READERS, Array
from nodules.errors import InputError, within

SIDE = 64  # pixels
MOST_TIMES = 100  # what an array may hold over what its file takes on disk; more is a decompression bomb
MOST_PATCHES = 200_000  # 1.6 GB of int16; a larger number in a header is taken for a damaged file
SOURCES = {
    "phantom": {
        "title": "LIDC phantom (simulation)",
        "simulation": True,
        "licence": "annotations CC BY 3.0 (LIDC-IDRI), rendering MIT",
        "citation": "Armato et al. 2011, The Lung Image Database Consortium (LIDC) and Image Database Resource "
        "Initiative (IDRI), Medical Physics 38(2), https://doi.org/10.1118/1.3528204; "
        "Hancock & Magnan 2016, pylidc, https://doi.org/10.1117/1.JMI.3.4.044504",
        "limits": [
            "A simulation: no pixel was measured, so a result on it says nothing about patients.",
            "Real: the radiologists' outlines and ratings, and with them each nodule's size, shape and label, its "
            "patient, the pixel spacing and the slice thickness. A patch shows the outline of one reader; label and "
            "ratings are medians over all readers.",
            "Computed: every Hounsfield value (of the nodule from its ratings of texture, calcification, internal "
            "structure, margin, lobulation and spiculation; subtlety is not drawn), the lung, vessels, fissure and "
            "chest wall around it, the scanner's noise and sharpness, the nodule's place in the patch.",
            "Only the outline and what is drawn from the ratings carries the label, so the ratings and the diameter "
            "together are about the most that a picture can hold. Real patches hold clues that nobody rated.",
            "Missing: vertebrae, scars, inflammation, retracted pleura, branching airways, the nodule's place in "
            "the lung. What surrounds a nodule tells nothing about it here; in patients it does.",
            "The labels are radiologists' opinions, not pathology; nodules with a median rating of 3 are left out.",
        ],
    },
    "kaggle": {
        "title": "Kaggle kmader/lungnodemalignancy",
        "simulation": False,
        "licence": "CC BY 3.0 (LUNA16, from LIDC-IDRI)",
        "citation": "Mader 2018, https://www.kaggle.com/datasets/kmader/lungnodemalignancy; "
        "Setio et al. 2017, LUNA16, https://doi.org/10.1016/j.media.2017.06.015",
        "limits": [
            "No patients or nodules are known: patches of one nodule may stand on both sides of any split, so scores "
            "are too good by an unknown amount.",
            "How its labels were made is not documented.",
        ],
    },
}
KINDS = (*READERS, ".tif", ".tiff", ".csv")  # of files that a message may name
RATINGS = re.compile(r"[1-5](;[1-5])*")
LENGTHS = ("diameter_mm", "pixel_spacing_mm")
LONGEST = 1000  # mm
NUMBERS = ("slice_index", *LENGTHS, *lidc.ATTRIBUTES)  # columns that are computed with
NAMES = ("id", "patient", "nodule")  # columns that name things: text, never empty
USED = (*NAMES, *NUMBERS, "ratings")  # columns that notebooks look at
# How tables write what is not known, and how people may
MISSING = ("", "nan", "none", "<na>", "nat", "#n/a", "n/a", "null", str(-(2**63)))
UNSURE = ("na", "unknown", "missing", "-", "?", "-1")
ALIASES = {  # by their letters: what people call a column
    **dict.fromkeys(("patient", "patients", "patientid", "patientids"), "patient"),
    **dict.fromkeys(("nodule", "nodules", "noduleid", "noduleids"), "nodule"),
    **dict.fromkeys(("unit", "units"), "unit"),
}
BLANKS = " \t\r\n\x00\x0b\x0c\xa0\u200b\u200c\u200d\u2060\ufeff"  # around a name, seen or not
CARD_NAMES = 12  # of columns on a card
SHOWN = 3  # groups of names that are alike on a card; files in a message
OWN = {
    "simulation": False,
    "licence": "as its owner says",
    "citation": "a file of your own",
    "limits": ["Where the patches and labels come from is for the owner of the file to say."],
}
KAGGLE_COUNTS = {"patches": 6691, "malignant": 2526, "benign": 4165}  # the 2019 report exchanged the last two
KAGGLE_REMEDY = (
    "download https://www.kaggle.com/datasets/kmader/lungnodemalignancy (free account) and put "
    "all_patches.hdf5, or ct_tiles.tif with malignancy.csv, there"
)


@dataclass(frozen=True)
class Card:
    """What a source is: shown in notebooks, carried by every result."""

    name: str
    title: str
    simulation: bool
    unit: str  # "HU" or "8-bit, not HU"
    patches: int
    malignant: int
    benign: int
    patients: int | None
    nodules: int | None
    licence: str
    citation: str
    limits: list[str]
    notes: list[str]  # what was converted, and what looks odd
    sha256: str

    def table(self) -> pd.DataFrame:
        """The card as a two-column table, without its limits."""
        fields = {name: value for name, value in asdict(self).items() if name != "limits"}
        fields["notes"] = " ".join(self.notes) or "none"
        return pd.Series(fields, name="value", dtype=object).rename_axis("field").to_frame()


@dataclass(frozen=True)
class Patches:
    """Images (N, 64, 64) int16, one table row each (``id, malignant, ...``), masks where known, the card."""

    images: np.ndarray
    table: pd.DataFrame
    masks: np.ndarray | None
    card: Card

    def __len__(self) -> int:
        return len(self.images)

    @property
    def patients(self) -> np.ndarray | None:
        """Patient of each patch, (N,): what intervals resample, whatever the split; None where unknown."""
        return self.table["patient"].to_numpy() if "patient" in self.table else None

    @property
    def nodules(self) -> pd.Series:
        """Nodule of each patch, (N,); where unknown each patch stands for one."""
        return self.table.get("nodule", self.table["id"])

    def patients_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Those of some patches; None where unknown."""
        return None if self.patients is None else self.patients[rows]


def read(source: str, n_patches: int = KAGGLE_COUNTS["patches"], seed: int = 0) -> Patches:
    """Read and verify a source.

    Args:
        source: ``phantom``; ``kaggle`` (files in ``data/``); a folder with Kaggle's files; or the path of an
            npz or HDF5 file in this module's format, relative to the project's root or absolute.
        n_patches: how many patches the phantom renders; other sources have the size that they have.
        seed: of the phantom.

    Raises:
        InputError: the source is missing, damaged, or not what it should be.
    """
    if source == "phantom":
        path = _phantom_file(n_patches, seed)
        return _verified(path, arrays.npz(path), "phantom")
    try:
        path = paths.DATA if source == "kaggle" else paths.resolve(source)
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null byte
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"data={source[:80]!r}: no path ({reason}); name a file or a folder") from error
    if path.is_dir():
        return _kaggle(path)
    if not there:
        raise InputError(f"{path}: no such file; data= takes phantom, kaggle, a folder, or an npz or HDF5 file")
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: unknown kind of file; take one of {', '.join(READERS)}")
    return _verified(path, READERS[path.suffix.lower()](path))


def _kaggle(folder: Path) -> Patches:
    hdf5, tiff, csv = (folder / name for name in ("all_patches.hdf5", "ct_tiles.tif", "malignancy.csv"))
    if hdf5.exists():
        path, held = hdf5, arrays.hdf5(hdf5)
    elif tiff.exists() and csv.exists():
        path, held = tiff, arrays.tiles(tiff, csv)
    else:
        own = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix.lower() in KINDS)[:SHOWN])
        found = f" (found: {own})" if own else ""
        raise InputError(f"{folder}: Kaggle's files are not there{found}; {KAGGLE_REMEDY}")
    patches = _verified(path, held, "kaggle")
    found = {key: getattr(patches.card, key) for key in KAGGLE_COUNTS}
    if found == KAGGLE_COUNTS:
        return patches
    if folder == paths.DATA or len(patches) == KAGGLE_COUNTS["patches"]:
        raise InputError(f"{path}: holds {found}, Kaggle's set has {KAGGLE_COUNTS}; {KAGGLE_REMEDY}")
    return _verified(path, held)


def _phantom_file(n_patches: int, seed: int) -> Path:
    """The rendered phantom in this module's own format, kept under a key of all that it depends on."""
    within(1, MOST_PATCHES, n_patches=n_patches)
    path = paths.CACHE / f"phantom-{n_patches}-{seed}-{phantom.version()}.npz"
    if not path.exists():
        try:
            images, masks, table = phantom.render(*_phantom_counts(n_patches), seed)
        except ValueError as error:
            raise InputError(f"n_patches={n_patches}: {error}; take fewer") from error
        columns = {
            name: column.to_numpy(str if column.dtype.kind not in "iufb" else None) for name, column in table.items()
        }
        with paths.replacing(path) as temporary:
            np.savez(temporary, images=images, masks=masks, **columns)
    return path


def _phantom_counts(n_patches: int) -> tuple[int, int]:
    """Malignant and benign patches of the phantom, in Kaggle's proportion."""
    malignant = round(n_patches * KAGGLE_COUNTS["malignant"] / KAGGLE_COUNTS["patches"])
    return malignant, n_patches - malignant


def rescan(ids: list[str], n_patches: int, seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """Patches of the phantom as other scanners would have seen them; see :func:`nodules.phantom.rescan`."""
    return phantom.rescan(ids, *_phantom_counts(n_patches), seed)


def _verified(path: Path, held: dict[str, Array], source: str | None = None) -> Patches:
    """Check all that can be wrong with a file's arrays, from its headers as far as they tell."""
    held, renamed = _renamed(held)
    images, unit, notes = _images(path, held)
    notes = notes + renamed
    n = len(images)
    table = pd.DataFrame(_columns(path, held, n))
    for key in NAMES:
        notes += _alike(key, table[key]) if key in table else []
    if source is None:
        known = {*USED, "images", "ct_slices", "malignant", "slice_class", "masks", "unit"}
        unused = ", ".join(sorted(held.keys() - known)[:CARD_NAMES])
        notes += [f"Not used: {unused}."] if unused else []
    masks = None
    if "masks" in held:
        array = held["masks"]
        if _plain(array.shape) != images.shape or array.dtype != bool:
            raise InputError(
                f"{path}: 'masks' is {array.dtype} of shape {array.shape}; store bool in the shape of the images"
            )
        masks = _read(path, "masks", array).reshape(images.shape)

    digest = hashlib.sha256(np.ascontiguousarray(images, dtype="<i2"))
    for column in ("id", "malignant", "patient"):
        digest.update("\n".join(map(str, table.get(column, []))).encode())
    malignant = int(table["malignant"].sum())
    card = Card(
        name=source or path.stem,
        unit=unit,
        patches=n,
        malignant=malignant,
        benign=n - malignant,
        patients=table["patient"].nunique() if "patient" in table else None,
        nodules=table["nodule"].nunique() if "nodule" in table else None,
        notes=notes,
        sha256=digest.hexdigest(),
        **(SOURCES[source] if source else OWN | {"title": path.name}),
    )
    return Patches(images, table, masks, card)


def _renamed(held: dict[str, Array]) -> tuple[dict[str, Array], list[str]]:
    """The arrays with names that people have for some of them put right, and a sentence about each."""
    out, notes = dict(held), []
    for key in sorted(held):
        name = ALIASES.get(re.sub(r"[^a-z]", "", key.lower())) if "/" not in key and "(" not in key else None
        if name and key != name and name not in out:
            out[name] = out.pop(key)
            notes += [f"Column {key} is taken for {name}."] if name != "unit" else []
    return out, notes


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of one, such as a channel, after the first."""
    return (*shape[:1], *(side for side in shape[1:] if side != 1))


def _one_of(path: Path, held: dict[str, Array], *keys: str) -> tuple[str, Array]:
    for key in keys:
        if key in held:
            return key, held[key]
    raise InputError(f"{path}: no '{keys[0]}' in it (found: {', '.join(held) or 'nothing'}); add it")


def _read(path: Path, key: str, array: Array) -> np.ndarray:
    """Read an array whose size, as its header says it, is in proportion to its file; this machine's byte order."""
    size, claimed = path.stat().st_size, math.prod(array.shape) * array.dtype.itemsize
    if claimed > MOST_TIMES * size:
        raise InputError(f"{path}: '{key}' claims {claimed} bytes in a file of {size}; store it uncompressed")
    values = array.read()
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _images(path: Path, held: dict[str, Array]) -> units.Pixels:
    """The images as int16, their unit, and what was converted."""
    key, array = _one_of(path, held, "images", "ct_slices")
    if _plain(array.shape)[1:] != (SIDE, SIDE):
        raise InputError(f"{path}: '{key}' has the shape {array.shape}; it must be (N, {SIDE}, {SIDE})")
    n = array.shape[0]
    if not 0 < n <= MOST_PATCHES:
        raise InputError(f"{path}: '{key}' holds {n} patches; from 1 to {MOST_PATCHES} can be read")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: '{key}' is {array.dtype}, not numbers; store Hounsfield units as int16")
    images = _read(path, key, array).reshape(n, SIDE, SIDE)  # a channel of its own is none
    low, high = images.min(), images.max()  # NaN and infinity come through both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{path}: '{key}' holds NaN or infinite values; remove those patches")
    stated = held.get("unit")
    return units.convert(images, f"{path}: '{key}'", stated and _word(path, stated))


def _word(path: Path, array: Array) -> str:
    """The one text that an array holds."""
    if array.dtype.kind not in "SU" or math.prod(array.shape) != 1:
        raise InputError(f"{path}: 'unit' is {array.dtype} of shape {array.shape}; store one word, 'HU' or '8-bit'")
    return str(_text(path, "unit", np.atleast_1d(_read(path, "unit", array)).ravel())[0])


def _columns(path: Path, held: dict[str, Array], n: int) -> dict[str, np.ndarray]:
    """Labels, ids and all further per-patch columns."""
    label, array = _one_of(path, held, "malignant", "slice_class")
    if array.shape not in ((n,), (n, 1), (1, n)):
        raise InputError(f"{path}: {n} images but '{label}' has the shape {array.shape}; one label an image")
    if array.dtype.kind not in "iufb":
        raise InputError(f"{path}: '{label}' is {array.dtype}, not numbers; labels are 0 and 1")
    labels = _read(path, label, array).reshape(n)
    wrong = labels[~np.isin(labels, (0, 1))]
    if len(wrong):
        raise InputError(f"{path}: '{label}' holds {wrong[0]}; labels are 0 and 1")
    if len(np.unique(labels)) == 1:
        raise InputError(f"{path}: '{label}' is {labels[0]:g} throughout; both classes are needed")
    columns = {"id": np.array([f"{i:05d}" for i in range(n)]), "malignant": labels.astype(np.int64)}

    for key in sorted(held.keys() - {label, "images", "ct_slices", "masks", "unit"}):
        array = held[key]
        if array.shape not in ((n,), (n, 1), (1, n)):
            if key in USED:
                raise InputError(f"{path}: {n} images but '{key}' has the shape {array.shape}; one an image")
        elif key in USED or array.dtype.kind in "iufbUSO":
            columns[key] = _column(path, key, array, n)
    ids, counts = np.unique(columns["id"], return_counts=True)
    if counts.max() > 1:
        name, times = str(ids[counts.argmax()]), counts.max()
        raise InputError(f"{path}: the id {name!r} stands {times} times; make ids unique")
    return columns


def _column(path: Path, key: str, array: Array, n: int) -> np.ndarray:
    """One per-patch column, (n,): text without blanks around it, or numbers."""
    named = key in NAMES
    if array.dtype.kind not in ("iufUS" if named else "iuf" if key in NUMBERS else "iufbUS"):
        kinds = "numbers" if key in NUMBERS else "numbers or text (pickles are never read)"
        raise InputError(f"{path}: '{key}' is {array.dtype}; store {kinds}")
    values = _read(path, key, array).reshape(n)
    if key in USED and array.dtype.kind == "f" and not np.isfinite(values).all():
        row = np.isfinite(values).argmin()
        value = values[row]
        raise InputError(f"{path}: '{key}' is {value} in row {row}; fill it in, or leave the column out")
    if named or key == "ratings" or array.dtype.kind in "US":
        values = _text(path, key, values)
    if named and (missing := np.isin(np.char.lower(values), MISSING)).any():
        row, value = missing.argmax(), str(values[missing.argmax()])
        raise InputError(f"{path}: '{key}' is empty ({value!r}) in row {row}; name them all")
    if key in LENGTHS and (wrong := (values <= 0) | (values > LONGEST)).any():
        row, value = wrong.argmax(), values[wrong.argmax()]
        raise InputError(f"{path}: '{key}' is {value:g} in row {row}; it must be above 0 and at most {LONGEST} mm")
    if key == "ratings" and (wrong := [text for text in values if not RATINGS.fullmatch(text)]):
        raise InputError(f"{path}: 'ratings' holds {wrong[0]!r}; write 1 to 5 of each reader, such as 5;4;4")
    return values


def _text(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """Values as text without blanks around it, which UTF-8 must be able to hold; whole numbers without a point.

    Tables make floating numbers of whole ones where one is missing, so the others are read as what they were.
    """
    if values.dtype.kind == "f":
        exact = 2.0 ** (np.finfo(values.dtype).nmant + 1)  # whole numbers beyond are rounded
        broken = (values != np.rint(values)) | (np.abs(values) >= exact)
        if broken.any():
            row, value = broken.argmax(), values[broken.argmax()]
            raise InputError(f"{path}: '{key}' is {value} in row {row}, no whole number; store text")
        values = values.astype(np.int64)
    try:
        found = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)
        "".join(found).encode()
    except (ValueError, SystemError) as error:  # the latter for numbers beyond Unicode
        raise InputError(f"{path}: '{key}' holds what is no text; store it in UTF-8") from error
    return np.char.strip(found, BLANKS)


def _alike(key: str, names: pd.Series) -> list[str]:
    """Sentences about names that may be one, or that may stand for several; none where there are none."""
    groups: dict[str, list[str]] = {}
    for name in names.unique():
        plain = re.sub(r"^b'(.*)'$", r"\1", unicodedata.normalize("NFKC", name).casefold())
        plain = re.sub(r"\s+|\.0+$|(?<!\d)0+(?=\d)", "", plain)
        groups.setdefault(plain, []).append(name)
    alike = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
    text = ", ".join(alike[:SHOWN]) + more
    notes = [f"Column {key}: {text} differ by case, blanks or zeros only; are they the same?"] if alike else []
    unsure = [name for name in names.unique() if name.casefold() in UNSURE]
    return notes + [f"Column {key}: {name!r} stands {(names == name).sum()} times; is it one?" for name in unsure]


def intensity_histogram(patches: Patches, bins: int = 140) -> pd.DataFrame:
    """Density of pixel values of each class: ``value`` (bin centre), ``class``, ``density`` (empty bins left out)."""
    low, high = np.percentile(patches.images, [0, 99.9]).astype(int)
    edges = np.arange(low, high, max(1, (high - low) // bins)) - 0.5  # whole numbers wide, as the pixel values are
    tables = []
    for label, name in enumerate(("benign", "malignant")):
        pixels = patches.images[patches.table["malignant"] == label]
        density, _ = np.histogram(pixels, bins=edges, density=True)
        centres = (edges[:-1] + edges[1:]) / 2
        tables.append(pd.DataFrame({"value": centres, "class": name, "density": density}))
    table = pd.concat(tables, ignore_index=True)
    return table[table["density"] > 0]
