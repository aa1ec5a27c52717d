"""The unit of the pixels: Hounsfield units, grey levels, or something that must be converted first.

It is told from the values of each patch. A lung nodule has air beside it, so nearly every patch in Hounsfield units
(HU) contains values near -850; grey levels are never negative; and a nodule is brighter than the lung around it.
"""

import re
from typing import NamedTuple

import numpy as np

from nodules.errors import InputError

UNITS = HU, GREY = "HU", "8-bit, not HU"
STATED = {  # how a file may state the unit, letters and digits only
    **dict.fromkeys(("hu", "hounsfield", "hounsfieldunit", "hounsfieldunits", "hounsfieldunitshu"), HU),
    **dict.fromkeys(("8bit", "uint8", "grey", "gray", "greylevels", "graylevels", "8bitnothu"), GREY),
}
HU_RANGE = (-4096, 16383)  # padding of some scanners to metal on the extended 14-bit scale
LUNG = -300  # HU; a patch with nothing below shows neither lung nor air (all 472 real patches reach -797)
NEARLY = 0.95  # share of patches that must show lung; a few may lie within the chest wall
BRIGHTEST = 255  # grey level
LEAST_SPAN = 50  # between the darkest and the brightest pixel of a set; with less there is nothing to see
AIR = (-1200, -600)  # HU, of the darkest pixel of the median patch: lung at -850 with noise, or padding
DARK = 0.8  # share of dark centres from which a set counts as inverted (0.11 in real sets of grey levels)
FEWEST = 20  # patches needed to recognise inverted values
CENTRE = 6  # pixels, side of the square at the centre of the nodule
OFFSETS = (1024, 1000, 2048, 8192, 32768)  # that scanners and programs add to store HU as unsigned integers


class Pixels(NamedTuple):
    """Pixel values, (N, 64, 64) int16, the unit of the pixels, and a sentence on each conversion."""

    values: np.ndarray
    unit: str
    notes: list[str]


def convert(images: np.ndarray, where: str, stated: str | None = None) -> Pixels:
    """Tell the unit of the pixels of a set, and convert its values where there is no doubt.

    Args:
        images: (N, H, W), any integer or floating type, finite.
        where: the file and the key, for messages.
        stated: the unit of the pixels as the file states it, one of ``STATED``; it is trusted.

    Raises:
        InputError: there is doubt.
    """
    unit = STATED.get(re.sub(r"[^a-z0-9]", "", stated.lower())) if stated else None
    if stated and unit is None:
        raise InputError(f"{where}: unknown unit {stated!r}; use 'HU' or '8-bit'")
    notes: list[str] = []
    low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    if low.min() >= 0 and 2**15 <= high.max() < 2**16:
        signed = images.astype(np.uint16).view(np.int16)
        if _is_hu(signed.min(axis=(1, 2)), signed.max(axis=(1, 2))):
            images, notes = signed, ["Signed 16-bit values had been stored as unsigned: the sign was restored."]
            low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    if (blank := low == high).any() and not blank.all():
        row = blank.argmax()
        raise InputError(f"{where}: {blank.sum()} patches are blank, the first in row {row}; remove them")
    if unit is None and _is_inverted(images, low, high):
        note = f"Inverted Hounsfield units ({_span(low, high)}): the sign was changed."
        return Pixels(_whole(-images.astype(np.float32)), HU, [note])
    if unit is None:
        unit = _told(images, where, low, high)
        notes += _without_lung(low) if unit == HU else []
    values = images
    if unit == HU:
        _check_range(where, low, high)
    else:
        values, notes = _grey(images, where, low, high)
    if np.ptp(values) < LEAST_SPAN:
        raise _narrow(where, low, high)
    return Pixels(_whole(values), unit, notes)


def _whole(values: np.ndarray) -> np.ndarray:
    """Values rounded to int16."""
    return (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int16, copy=False)


def _span(low: np.ndarray, high: np.ndarray) -> str:
    """The range of values as text, from the lowest and highest of each patch, or of one."""
    return f"{low.min():g} to {high.max():g}"


def _check_range(where: str, low: np.ndarray, high: np.ndarray) -> None:
    """Refuse values outside Hounsfield units, in most patches or in some."""
    beyond = (low < HU_RANGE[0]) | (high > HU_RANGE[1])
    if beyond.mean() > 0.5:
        span = _span(low, high)
        raise InputError(f"{where}: values span {span}, far outside Hounsfield units; rescale them")
    if beyond.any():
        row = beyond.argmax()
        span = _span(low[row], high[row])
        raise InputError(
            f"{where}: {beyond.sum()} patches have values outside Hounsfield units, the first in row {row} ({span}); "
            "if they are padding, set them to -1024"
        )


def _is_hu(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether nearly every patch shows lung and no value is out of range."""
    return bool((low < LUNG).mean() >= NEARLY and low.min() >= HU_RANGE[0] and high.max() <= HU_RANGE[1])


def _told(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> str:
    """The unit of the pixels, told by the darkest and the brightest pixel of each patch, (N,) each."""
    if (low < LUNG).mean() >= NEARLY:
        _check_hu(images, where, low, high)
        return HU
    if low.min() >= 0 and high.max() <= BRIGHTEST:
        return GREY
    if high.max() - low.min() < LEAST_SPAN:
        raise _narrow(where, low, high)
    grey = (low >= 0) & (high <= BRIGHTEST)
    if (low < LUNG).any():
        raise _mixture(where, low, high, low >= LUNG, "show neither air nor lung")
    if grey.any() and high.max() > 2 * BRIGHTEST:
        raise _mixture(where, low, high, grey, f"span 0 to {BRIGHTEST}")
    raise _neither(where, low, high)


def _check_hu(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> None:
    """Refuse values that reach as low as Hounsfield units but are something else."""
    odd = (low >= 0) | ((low >= LUNG) & (high - low < LEAST_SPAN))
    if odd.any():
        raise _mixture(where, low, high, odd, "show neither air nor lung")
    darkest = float(np.median(low))
    if not AIR[0] <= darkest <= AIR[1] and low.min() >= HU_RANGE[0]:
        raise InputError(
            f"{where}: the darkest pixel of the median patch is {darkest:g}, but air and lung are at {AIR[0]} to "
            f"{AIR[1]} HU; undo any shift or scaling, or add a key unit='HU' if these are HU"
        )
    if len(images) >= FEWEST and _dark_centres(images) >= DARK:
        raise InputError(
            f"{where}: nodules are darker than the lung around them; invert the values and convert them to HU"
        )


def _neither(where: str, low: np.ndarray, high: np.ndarray) -> InputError:
    """The error for values that are neither Hounsfield units nor grey levels; the remedy depends on their range."""
    fitting = [offset for offset in OFFSETS if _fits(low, offset)]
    if high.max() > HU_RANGE[1] and not fitting:
        hint = f"scale them to grey levels 0 to {BRIGHTEST}"
    elif low.min() > -BRIGHTEST and high.max() < 2 * BRIGHTEST:
        hint = f"clip them to grey levels 0 to {BRIGHTEST}"
    else:
        hint = f"apply the rescale intercept of stored values (subtract {(fitting or OFFSETS)[0]})"
    span = _span(low, high)
    return InputError(
        f"{where}: values span {span}, which is neither Hounsfield units, since lung is missing (nothing below "
        f"{LUNG}), nor grey levels 0 to {BRIGHTEST}; {hint}, or add a key unit='HU' if these are HU"
    )


def _without_lung(low: np.ndarray) -> list[str]:
    """A sentence about patches in Hounsfield units that show neither air nor lung, if there are any."""
    odd = low >= LUNG
    return [f"{odd.sum()} patches show neither air nor lung, the first in row {odd.argmax()}."] if odd.any() else []


def _grey(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Grey levels 0 to 255, converted from 0 to 1 or from inverted values, and a sentence on each conversion."""
    if low.min() < 0 or high.max() > BRIGHTEST:
        span = _span(low, high)
        raise InputError(f"{where}: values span {span}; grey levels must be 0 to {BRIGHTEST}")
    values, notes = images, []
    fractions = (low < high) & (high <= 1)
    if images.dtype.kind == "f" and high.max() <= 1:
        values, notes = images.astype(np.float32) * BRIGHTEST, [f"Values 0 to 1 were multiplied by {BRIGHTEST}."]
    elif images.dtype.kind == "f" and fractions.any():
        raise _mixture(where, low, high, fractions, "span 0 to 1")
    elif images.dtype != np.uint8:
        notes = [f"Grey levels 0 to {BRIGHTEST} were stored as {images.dtype.name}."]
    if len(values) >= FEWEST and _dark_centres(values) >= DARK:
        values = BRIGHTEST - values.astype(np.float32)
        notes.append(f"Inverted grey levels, with dark nodules in bright lung: subtracted from {BRIGHTEST}.")
    return values, notes


def _fits(low: np.ndarray, offset: int) -> bool:
    """Whether values minus ``offset`` would be Hounsfield units: lung in nearly every patch, nothing below air."""
    least = low.astype(float) - offset
    return bool((least < LUNG).mean() >= NEARLY and AIR[0] <= np.median(least) <= AIR[1])


def _is_inverted(images: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether these are Hounsfield units of the opposite sign: lung far above 0, air highest, dark nodules."""
    lung = (high > -LUNG).mean() >= NEARLY and AIR[0] <= -np.median(high) <= AIR[1]
    signs = low.min() < 0 and (low < LUNG).mean() < NEARLY  # else unsigned, or lung is where HU have it
    return bool(lung and signs and len(images) >= FEWEST and _dark_centres(images) >= DARK)


def _dark_centres(images: np.ndarray) -> float:
    """Share of about a thousand patches whose centre, where the nodule lies, is darker than the patch."""
    images = images[:: max(1, len(images) // 1000)]
    middle = slice((images.shape[1] - CENTRE) // 2, (images.shape[1] + CENTRE) // 2)
    centre = images[:, middle, middle].mean(axis=(1, 2))
    return float((centre < np.median(images, axis=(1, 2))).mean())


def _mixture(where: str, low: np.ndarray, high: np.ndarray, odd: np.ndarray, what: str) -> InputError:
    row, n, total = int(odd.argmax()), odd.sum(), len(odd)
    span = _span(low[row], high[row])
    return InputError(
        f"{where}: mixed units: {n} of {total} patches {what}, the first in row {row} ({span}); convert all "
        "to Hounsfield units, or add a key unit='HU' if all are in HU"
    )


def _narrow(where: str, low: np.ndarray, high: np.ndarray) -> InputError:
    span = _span(low, high)
    return InputError(f"{where}: values span only {span}; store Hounsfield units, or grey levels 0 to {BRIGHTEST}")
