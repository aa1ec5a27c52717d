"""Patches as folders of images, ``train|valid|test/malignant|benign/*.png``, the layout of the 2019 report."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from nodules.data import transforms
from nodules.data.patches import Patches
from nodules.data.sources import CLASSES
from nodules.errors import InputError


def to_folders(patches: Patches, split: pd.DataFrame, folder: Path) -> Path:
    """Write each patch as an 8-bit greyscale PNG in the window of its unit, under its split and class.

    Args:
        patches: N patches.
        split: N rows from :func:`nodules.data.split.assign`, in the order of the patches.
        folder: must not exist; a hidden folder beside it is filled first, then renamed.

    Raises:
        InputError: the folder already exists.
    """
    if folder.exists():
        raise InputError(f"{folder}: already exists; choose another folder or remove this one")
    pixels = transforms.window(patches.images.astype(np.float32), *transforms.default_window(patches.card.unit))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for row, image in tqdm(zip(split.itertuples(), pixels, strict=True), "export", len(split)):
        class_folder = partial / row.split / CLASSES[row.malignant]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(class_folder / f"{row.Index:05d}.png")
    return partial.rename(folder)
