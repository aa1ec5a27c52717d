"""The same patches shown in another way: what an ingredient of the nodule network is worth, is measured with these.

Each function takes a part that holds all patches of its source, in order, and returns them changed, in the same order.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from nodules.data import transforms
from nodules.data.split import Part

WIDTH = 0.7  # mm, about the median width of LIDC-IDRI's pixels
FINER = 1.5  # times as many pixels along a side
CHUNK = 1024  # patches


def framed(part: Part, margin: int) -> Part:
    """Each patch in a frame of zeros, ``margin`` pixels wide, for a network that cuts off as much."""

    def wider(pixels: np.ndarray) -> np.ndarray:
        return np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))

    return replace(part, source=wider(part.source), masks=None if part.masks is None else wider(part.masks))


def of_one_width(part: Part) -> Part:
    """All pixels brought to ``WIDTH``, bilinear; patches whose pixels have no known width stay as they are."""
    widths = part.table["pixel_spacing_mm"].fillna(WIDTH).to_numpy()
    return _redrawn(part, lambda images, rows: transforms.zoom(images, torch.as_tensor(widths[rows] / WIDTH)))


def finer(part: Part, margin: int) -> Part:
    """Patches in ``FINER`` times the resolution, bilinear, for a network that cuts off ``margin`` pixels.

    They show no more, but a network looks closer at the same middle.
    """
    cut = round((FINER - 1) * margin)
    return _redrawn(
        part, lambda images, _: F.interpolate(images, scale_factor=FINER, mode="bilinear")[..., cut:-cut, cut:-cut]
    )


def slice_by_slice(part: Part) -> Part:
    """Each slice counts as a nodule of its own, so that an epoch shows all of them."""
    return replace(part, table=part.table.assign(nodule=part.table["id"]))


def by_readers(part: Part) -> Part:
    """Nodules count as often in an epoch as radiologists rated them, if they have as many slices."""
    nodules = pd.Series(part.nodules, part.table.index).astype(str)
    nth = _reader(part).astype(str)
    return replace(part, table=part.table.assign(nodule=nodules + " " + nth))


def of_single_readers(part: Part) -> Part:
    """Each slice has the label of one radiologist, in turn, so that an average nodule's is soft; a 3 tells nothing."""
    nth = _reader(part)
    own = np.array([float(ratings.split(";")[n]) for ratings, n in zip(part.table["ratings"], nth, strict=True)])
    return replace(part, y=np.where(own == 3, part.y, (own > 3).astype(part.y.dtype)))


def _reader(part: Part) -> np.ndarray:
    """To which of the radiologists who rated its nodule each slice falls, in turn: 0, 1, ..., (N,)."""
    readers = part.table["ratings"].str.count(";") + 1
    return (part.table.groupby(part.nodules).cumcount() % readers).to_numpy()


def _redrawn(part: Part, change: Callable[[torch.Tensor, slice], torch.Tensor]) -> Part:
    """Images and outlines changed alike, (n, 1, 64, 64) at a time; a pixel lies inside if half of it does."""

    def changed(pixels: np.ndarray) -> np.ndarray:
        starts = range(0, len(pixels), CHUNK)
        chunks = [slice(start, start + CHUNK) for start in starts]
        return np.concatenate(
            [change(torch.as_tensor(pixels[rows], dtype=torch.float32)[:, None], rows)[:, 0].numpy() for rows in chunks]
        )

    masks = None if part.masks is None else changed(part.masks) >= 0.5
    return replace(part, source=changed(part.source), masks=masks)
