"""The columns of a file, one value per patch: names put right, values verified, text cleaned."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from nodules.data import files, lidc
from nodules.data.files import Stored
from nodules.errors import InputError

IMAGES, LABELS = ("images", "ct_slices"), ("malignant", "slice_class")  # what they may be called
RATINGS = re.compile(r"[1-5](;[1-5])*")
LENGTHS = ("diameter_mm", "pixel_spacing_mm")
LONGEST = 1000  # mm
NUMBERS = ("slice_index", *LENGTHS, *lidc.ATTRIBUTES)  # columns for computing
NAMES = ("id", "patient", "nodule")  # columns that name things: text, never empty
USED = (*NAMES, *NUMBERS, "ratings")  # columns that notebooks look at
# How programs write a missing value, and how people may
MISSING = ("", "nan", "none", "<na>", "nat", "#n/a", "n/a", "null", str(-(2**63)))
UNSURE = ("na", "unknown", "missing", "-", "?", "-1")
ALIASES = {  # what people call a column, letters only
    **dict.fromkeys(("patient", "patients", "patientid", "patientids"), "patient"),
    **dict.fromkeys(("nodule", "nodules", "noduleid", "noduleids"), "nodule"),
    **dict.fromkeys(("unit", "units"), "unit"),
}
BLANKS = " \t\r\n\x00\x0b\x0c\xa0\u200b\u200c\u200d\u2060\ufeff"  # around a name, visible or not
SHOWN = 3  # groups of similar names in a note


def renamed(arrays: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """The arrays under the names that this package uses, and a sentence about each column that had another."""
    out, notes = dict(arrays), []
    for key in sorted(arrays):
        name = ALIASES.get(re.sub(r"[^a-z]", "", key.lower())) if "/" not in key and "(" not in key else None
        if name and key != name and name not in out:
            out[name] = out.pop(key)
            notes += [f"Column {key} is read as {name}."] if name != "unit" else []
    return out, notes


def read(path: Path, arrays: dict[str, Stored], n: int, labelled: bool = True) -> pd.DataFrame:
    """Labels, unless they are not asked for, ids and all further columns of the ``n`` patches in a file."""
    columns = {"id": np.array([f"{i:05d}" for i in range(n)])}
    if labelled:
        columns["malignant"] = _labels(path, arrays, n)
    for key in sorted(arrays.keys() - {*LABELS, *IMAGES, *alone(arrays)}):
        stored = arrays[key]
        if stored.shape not in ((n,), (n, 1), (1, n)):
            if key in USED:
                raise InputError(f"{path}: {n} images, but '{key}' has shape {stored.shape}; store one value per image")
        elif key in USED or stored.dtype.kind in "iufbUSO":
            columns[key] = _column(path, key, stored, n)
    ids, counts = np.unique(columns["id"], return_counts=True)
    if counts.max() > 1:
        name, times = str(ids[counts.argmax()]), counts.max()
        raise InputError(f"{path}: the id {name!r} occurs {times} times; make ids unique")
    if {"patient", "nodule"} <= columns.keys():
        shared = pd.DataFrame(columns).groupby("nodule")["patient"].nunique()
        if shared.max() > 1:
            name, times = shared.idxmax(), shared.max()
            raise InputError(f"{path}: the nodule {name!r} is of {times} patients; give each nodule a name of its own")
    return pd.DataFrame(columns)


def _labels(path: Path, arrays: dict[str, Stored], n: int) -> np.ndarray:
    label, stored = files.choose(path, arrays, *LABELS)
    if stored.shape not in ((n,), (n, 1), (1, n)):
        raise InputError(f"{path}: {n} images, but '{label}' has shape {stored.shape}; store one label per image")
    if stored.dtype.kind not in "iufb":
        raise InputError(f"{path}: '{label}' is {stored.dtype}, not numeric; labels must be 0 or 1")
    labels = files.load(path, label, stored).reshape(n)
    files.check_labels(path, label, labels)
    if len(np.unique(labels)) == 1:
        raise InputError(f"{path}: '{label}' is {labels[0]:g} for every patch; include both classes")
    return labels.astype(np.int64)


def alone(arrays: dict[str, Stored]) -> set[str]:
    """Names of arrays that are no columns; ``source`` is one unless it is a single word."""
    return {"masks", "unit"} | {key for key in ("source",) if key in arrays and not arrays[key].shape}


def unused(arrays: dict[str, Stored]) -> list[str]:
    """Names of the arrays that nothing in this package uses, sorted."""
    return sorted(arrays.keys() - {*USED, *IMAGES, *LABELS, *alone(arrays)})


def _column(path: Path, key: str, stored: Stored, n: int) -> np.ndarray:
    """One column, (n,): text without blanks around it, or numbers."""
    is_name = key in NAMES
    if stored.dtype.kind not in ("iufUS" if is_name else "iuf" if key in NUMBERS else "iufbUS"):
        kinds = "numbers" if key in NUMBERS else "numbers or text (pickles are never read)"
        raise InputError(f"{path}: '{key}' is {stored.dtype}; store {kinds}")
    values = files.load(path, key, stored).reshape(n)
    if key in USED and stored.dtype.kind == "f" and not np.isfinite(values).all():
        row = np.isfinite(values).argmin()
        value = values[row]
        raise InputError(f"{path}: '{key}' is {value} in row {row}; fill it in, or leave out the column")
    if is_name or key == "ratings" or stored.dtype.kind in "US":
        values = text(path, key, values)
    if is_name and (missing := np.isin(np.char.lower(values), MISSING)).any():
        row, value = missing.argmax(), str(values[missing.argmax()])
        raise InputError(f"{path}: '{key}' is empty ({value!r}) in row {row}; fill it in for every patch")
    if key in LENGTHS and (wrong := (values <= 0) | (values > LONGEST)).any():
        row, value = wrong.argmax(), values[wrong.argmax()]
        raise InputError(f"{path}: '{key}' is {value:g} in row {row}; it must be above 0 and at most {LONGEST} mm")
    if key == "ratings" and (wrong := [ratings for ratings in values.tolist() if not RATINGS.fullmatch(ratings)]):
        raise InputError(
            f"{path}: 'ratings' contains {wrong[0]!r}; write a number 1 to 5 for each radiologist, such as 5;4;4"
        )
    return values


def text(path: Path, key: str, values: np.ndarray) -> np.ndarray:
    """Values as text that UTF-8 can encode, without blanks around it; whole numbers without a decimal point.

    Where a value is missing, tables turn whole numbers into floating-point ones, so those are read as whole.
    """
    if values.dtype.kind == "f":
        exact = 2.0 ** (np.finfo(values.dtype).nmant + 1)  # whole numbers beyond this are rounded
        broken = (values != np.rint(values)) | (np.abs(values) >= exact)
        if broken.any():
            row, value = broken.argmax(), values[broken.argmax()]
            raise InputError(f"{path}: '{key}' is {value} in row {row}, not an exact whole number; store it as text")
        values = values.astype(np.int64)
    try:
        texts = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)
        "".join(texts).encode()
    except (ValueError, SystemError) as error:  # the latter for numbers beyond Unicode
        raise InputError(f"{path}: '{key}' contains invalid text; store it as UTF-8") from error
    return np.char.strip(texts, BLANKS)


def alike(key: str, names: pd.Series) -> list[str]:
    """Sentences about names that may mean the same, or that may each stand for several things."""
    groups: dict[str, list[str]] = {}
    for name in names.unique():
        plain = re.sub(r"^b'(.*)'$", r"\1", unicodedata.normalize("NFKC", name).casefold())
        plain = re.sub(r"\s+|\.0+$|(?<!\d)0+(?=\d)", "", plain)
        groups.setdefault(plain, []).append(name)
    similar = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    more = f" and {len(similar) - SHOWN} more" if len(similar) > SHOWN else ""
    listed = ", ".join(similar[:SHOWN]) + more
    notes = [f"Column {key}: {listed} differ only in case, blanks or zeros; are they the same?"] if similar else []
    unsure = [name for name in names.unique() if name.casefold() in UNSURE]
    return notes + [
        f"Column {key}: {name!r} occurs {(names == name).sum()} times; is it a single {key}?" for name in unsure
    ]
