"""What a pixel value means: Hounsfield units, grey levels, or something that has to be converted first.

Decided from the values of each patch. A lung nodule has air beside it, so that nearly every patch in Hounsfield units
(HU) holds values near -850; grey levels are never negative; and a nodule is brighter than the lung around it.
"""

import re
from typing import NamedTuple

import numpy as np

from nodules.errors import InputError

HU, GREY, NEGATIVE = "HU", "8-bit, not HU", "negative of HU"
STATED = {  # by their letters and digits
    **dict.fromkeys(("hu", "hounsfield", "hounsfieldunit", "hounsfieldunits", "hounsfieldunitshu"), HU),
    **dict.fromkeys(("8bit", "uint8", "grey", "gray", "greylevels", "graylevels", "8bitnothu"), GREY),
}
HU_RANGE = (-4096, 16383)  # padding of some scanners .. metal on the extended 14-bit scale
LUNG = -300  # HU; a patch with nothing below it shows neither lung nor air (all 472 real patches reach -797)
NEARLY = 0.95  # share of patches that must show lung; a few may lie in the chest wall
BRIGHTEST = 255  # grey level
LEAST_SPAN = 50  # between the darkest and the brightest pixel of a set; less is no picture
AIR = (-1200, -600)  # HU, where the darkest pixel of the median patch lies: noise around lung at -850, padding
DARK = 0.8  # share of dark centres that makes a set a negative (in real sets of grey levels it is 0.11)
FEWEST = 20  # patches to tell a negative by
CENTRE = 6  # pixels, the side of the square in the middle of the nodule
OFFSETS = (1024, 1000, 2048, 8192, 32768)  # that scanners and programs add to store HU without a sign


class Pixels(NamedTuple):
    """Pixel values, (N, 64, 64) int16, their unit, and what was done to them, a sentence each."""

    values: np.ndarray
    unit: str
    notes: list[str]


def convert(images: np.ndarray, where: str, stated: str | None = None) -> Pixels:
    """Tell the unit of a set, and convert its values where there is no doubt.

    Args:
        images: (N, H, W), any integer or floating type, finite.
        where: the file and the key, for messages.
        stated: the unit by the word of whoever wrote the file, one of ``STATED``; it is believed.

    Raises:
        InputError: there is doubt.
    """
    unit = STATED.get(re.sub(r"[^a-z0-9]", "", stated.lower())) if stated else None
    if stated and unit is None:
        raise InputError(f"{where}: has the unit {stated!r}; take 'HU' or '8-bit'")
    notes: list[str] = []
    low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    if low.min() >= 0 and 2**15 <= high.max() < 2**16:
        signed = images.astype(np.uint16).view(np.int16)
        if _is_hu(signed.min(axis=(1, 2)), signed.max(axis=(1, 2))):
            images, notes = signed, ["Stored as 16 bits without their sign, which was put back."]
            low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
    if (blank := low == high).any() and not blank.all():
        row = blank.argmax()
        raise InputError(f"{where}: {blank.sum()} patches are blank, the first in row {row}; fill or remove them")
    if unit is None:
        unit = _told(images, where, low, high)
        notes += _without_lung(low) if unit == HU else []
    span, values = f"{low.min():g} to {high.max():g}", images
    if unit == HU:
        _check_range(where, low, high)
    elif unit == GREY:
        values, notes = _grey(images, where, low, high)
    elif unit == NEGATIVE:
        values, notes = -images.astype(np.float32), [f"A negative of Hounsfield units ({span}): the sign was turned."]
    if np.ptp(values) < LEAST_SPAN:
        raise InputError(f"{where}: spans only {span}; store Hounsfield units, or grey levels 0 to {BRIGHTEST}")
    if values.dtype.kind == "f":
        values = np.rint(values)
    return Pixels(values.astype(np.int16, copy=False), GREY if unit == GREY else HU, notes)


def _check_range(where: str, low: np.ndarray, high: np.ndarray) -> None:
    """Refuse what is no HU, and what only some patches hold as such."""
    beyond = (low < HU_RANGE[0]) | (high > HU_RANGE[1])
    if beyond.mean() > 0.5:
        span = f"{low.min():g} to {high.max():g}"
        raise InputError(f"{where}: spans {span}, far outside Hounsfield units; rescale it")
    if beyond.any():
        row = beyond.argmax()
        raise InputError(
            f"{where}: {beyond.sum()} patches hold what is no HU, such as {low[row]:g} or {high[row]:g} in row {row}; "
            "if that is padding, set it to -1024"
        )


def _is_hu(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether nearly every patch shows lung, and nothing is out of range."""
    return bool((low < LUNG).mean() >= NEARLY and low.min() >= HU_RANGE[0] and high.max() <= HU_RANGE[1])


def _told(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> str:
    """The unit by the darkest and the brightest pixel of each patch, (N,) each."""
    if (low < LUNG).mean() >= NEARLY:
        _check_hu(images, where, low, high)
        return HU
    if low.min() >= 0 and high.max() <= BRIGHTEST:
        return GREY
    if high.max() - low.min() < LEAST_SPAN:
        span = f"{low.min():g} to {high.max():g}"
        raise InputError(f"{where}: spans only {span}; store Hounsfield units, or grey levels 0 to {BRIGHTEST}")
    if low.min() < 0 and _is_negative(images, high):
        return NEGATIVE
    grey = (low >= 0) & (high <= BRIGHTEST)
    if (low < LUNG).any():
        raise _mixture(where, low, high, low >= LUNG, "without air or lung")
    if grey.any() and high.max() > 2 * BRIGHTEST:
        raise _mixture(where, low, high, grey, f"of 0 to {BRIGHTEST}")
    raise _neither(where, low, high)


def _check_hu(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> None:
    """Refuse what reaches down as Hounsfield units do, and is none."""
    odd = (low >= 0) | ((low >= LUNG) & (high - low < LEAST_SPAN))
    if odd.any():
        raise _mixture(where, low, high, odd, "without air or lung")
    darkest = float(np.median(low))
    if not AIR[0] <= darkest <= AIR[1] and low.min() >= HU_RANGE[0]:
        raise InputError(
            f"{where}: the darkest pixel of the median patch is {darkest:g}, where lung and air have {AIR[0]} to "
            f"{AIR[1]} HU; undo what the values were shifted or scaled by, or state them by a key unit='HU' if they are"
        )
    if len(images) >= FEWEST and _dark_centres(images) >= DARK:
        raise InputError(f"{where}: nodules are darker than the lung around them; turn the negatives into HU")


def _neither(where: str, low: np.ndarray, high: np.ndarray) -> InputError:
    """What to do about values that are neither Hounsfield units nor grey levels depends on their range."""
    fitting = [offset for offset in OFFSETS if _fits(low, offset)]
    if high.max() > HU_RANGE[1] and not fitting:
        hint = f"scale them to grey levels 0 to {BRIGHTEST}"
    elif low.min() > -BRIGHTEST and high.max() < 2 * BRIGHTEST:
        hint = f"clip them to grey levels 0 to {BRIGHTEST}"
    else:
        hint = f"subtract {(fitting or OFFSETS)[0]}, as the rescale intercept of stored values says"
    return InputError(
        f"{where}: spans {low.min():g} to {high.max():g}, no Hounsfield units, since lung is missing (nothing below "
        f"{LUNG}), and no grey levels 0 to {BRIGHTEST}; {hint}, or state them by a key unit='HU' if they are"
    )


def _without_lung(low: np.ndarray) -> list[str]:
    """A sentence about patches in Hounsfield units that show neither air nor lung, if there are some."""
    odd = low >= LUNG
    return [f"{odd.sum()} patches show neither air nor lung, the first in row {odd.argmax()}."] if odd.any() else []


def _grey(images: np.ndarray, where: str, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Grey levels 0 to 255, of 0 to 1 or negatives too, and what was done to them."""
    if low.min() < 0 or high.max() > BRIGHTEST:
        raise InputError(f"{where}: spans {low.min():g} to {high.max():g}; grey levels are 0 to {BRIGHTEST}")
    values, notes = images, []
    fractions = (low < high) & (high <= 1)
    if images.dtype.kind == "f" and high.max() <= 1:
        values, notes = images.astype(np.float32) * BRIGHTEST, [f"Values of 0 to 1 were multiplied by {BRIGHTEST}."]
    elif images.dtype.kind == "f" and fractions.any():
        raise _mixture(where, low, high, fractions, "of 0 to 1")
    elif images.dtype != np.uint8:
        notes = [f"Grey levels 0 to {BRIGHTEST} stored as {images.dtype.name}."]
    if len(values) >= FEWEST and _dark_centres(values) >= DARK:
        values = BRIGHTEST - values.astype(np.float32)
        notes.append(f"Negatives, dark nodules in bright lung: subtracted from {BRIGHTEST}.")
    return values, notes


def _fits(low: np.ndarray, offset: int) -> bool:
    """Whether values less ``offset`` would be Hounsfield units: lung in nearly every patch, and nothing below air."""
    least = low.astype(float) - offset
    return bool((least < LUNG).mean() >= NEARLY and AIR[0] <= np.median(least) <= AIR[1])


def _is_negative(images: np.ndarray, high: np.ndarray) -> bool:
    """Whether these are Hounsfield units of the other sign: lung far above 0, air the highest, dark nodules."""
    lung = (high > -LUNG).mean() >= NEARLY and AIR[0] <= -np.median(high) <= AIR[1]
    return bool(lung and len(images) >= FEWEST and _dark_centres(images) >= DARK)


def _dark_centres(images: np.ndarray) -> float:
    """Share of patches, of a thousand of them, whose middle is darker than the patch; the nodule stands there."""
    images = images[:: max(1, len(images) // 1000)]
    middle = slice((images.shape[1] - CENTRE) // 2, (images.shape[1] + CENTRE) // 2)
    centre = images[:, middle, middle].mean(axis=(1, 2))
    return float((centre < np.median(images, axis=(1, 2))).mean())


def _mixture(where: str, low: np.ndarray, high: np.ndarray, odd: np.ndarray, what: str) -> InputError:
    row = int(odd.argmax())
    return InputError(
        f"{where}: mixes units: {odd.sum()} of {len(odd)} patches {what}, the first in row {row} ({low[row]:g} to "
        f"{high[row]:g}); bring all to Hounsfield units, or state it by a key unit='HU' if they are"
    )
