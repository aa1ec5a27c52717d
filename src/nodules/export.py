"""Patches as the classic folders ``train|valid|test/malignant|benign/*.png`` that the 2019 report used."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from nodules import views
from nodules.errors import InputError
from nodules.patches import Patches

CLASSES = ("benign", "malignant")


def to_folders(patches: Patches, split: pd.DataFrame, folder: Path) -> Path:
    """Write each patch as an 8-bit grey PNG, lung window, under its split and class.

    Args:
        patches: N patches.
        split: N rows as :func:`nodules.split.assign` returns them, in the patches' order.
        folder: is made; must not exist yet. A hidden folder beside it is filled first and renamed at the end.

    Raises:
        InputError: the folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already; name a new folder or remove this one")
    pixels = views.window(patches.images.astype(np.float32), *views.default_window(patches.card.unit))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for row, image in tqdm(zip(split.itertuples(), pixels, strict=True), "export", len(split)):
        place = partial / row.split / CLASSES[row.malignant]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(place / f"{row.Index:05d}.png")
    return partial.rename(folder)
