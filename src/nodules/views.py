"""What the network sees of a patch: windowed, rotated."""

from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

LUNG_WINDOW = (-1000.0, 400.0)  # HU; air to bone, the range in which LUNA16 patches are usually shown
BYTE_WINDOW = (0.0, 255.0)
CHUNK = 1024  # images at once
Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor)


def default_window(unit: str) -> tuple[float, float]:
    """The window for a source's unit as its card says it."""
    return LUNG_WINDOW if unit == "HU" else BYTE_WINDOW


def window(images: Pixels, low: float, high: float) -> Pixels:
    """Map pixel values ``low``..``high`` to 0..1 and clip the rest; any shape, array or tensor."""
    return ((images - low) / (high - low)).clip(0.0, 1.0)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Rotate each image counterclockwise about its centre, bilinear, the border mirrored.

    Args:
        images: (N, C, H, W), H = W, float.
        degrees: (N,).
    """
    angle = torch.deg2rad(degrees.to(images))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def dihedral(images: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight symmetries of the square, exact: quarter turns 0 to 3, from 4 on mirrored too; (..., H, W)."""
    turned = images.rot90(which % 4, (-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Show each image (N, 1, H, W), H = W, in one of the eight symmetries of the square, drawn by ``rng``.

    Free angles would need interpolation, which blurs: a network trained on nothing else does worse on sharp patches.
    """
    which = torch.from_numpy(rng.integers(8, size=len(images))).to(images.device)
    seen = images.clone()
    for symmetry in range(8):
        seen[which == symmetry] = dihedral(images[which == symmetry], symmetry)
    return seen


def rescale(images: np.ndarray, spacing_mm: np.ndarray, to_mm: float) -> np.ndarray:
    """Zoom each image about its centre, so that its pixels are ``to_mm`` wide: size in pixels is size in the lung.

    Args:
        images: (N, H, W), H = W, integers.
        spacing_mm: width of a pixel of each, (N,).
        to_mm: width of a pixel of all in the result.

    Returns:
        Same shape and type, bilinear, the border mirrored.
    """
    zoom = torch.from_numpy(to_mm / np.asarray(spacing_mm, dtype=np.float32))
    zero = torch.zeros_like(zoom)
    matrix = torch.stack([torch.stack([zoom, zero, zero], 1), torch.stack([zero, zoom, zero], 1)], 1)
    out = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = torch.from_numpy(images[start : start + CHUNK].astype(np.float32))[:, None]
        grid = F.affine_grid(matrix[start : start + CHUNK], list(part.shape), align_corners=False)
        seen = F.grid_sample(part, grid, padding_mode="reflection", align_corners=False)
        out[start : start + CHUNK] = seen[:, 0].round().numpy()
    return out
