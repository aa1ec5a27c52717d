"""What the network sees of a patch: windowed, rotated, augmented."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

LUNG_WINDOW = (-1000.0, 400.0)  # HU, air to bone: the range in which LUNA16 patches are usually displayed
BYTE_WINDOW = (0.0, 255.0)
GAIN, OFFSET = 0.15, 0.1  # intensity jitter: largest change of contrast, and of brightness as a share of the window
NOISE = 0.06  # largest standard deviation, as a share of the window
BLUR = 1.5  # largest standard deviation, pixels
SYMMETRIES = 8  # of the square
ZOOM = 1.4  # largest magnification; its inverse is the smallest
Images = TypeVar("Images", np.ndarray, torch.Tensor)


def default_window(unit: str) -> tuple[float, float]:
    """The display window for a card's unit."""
    return LUNG_WINDOW if unit == "HU" else BYTE_WINDOW


def window(images: Images, low: float, high: float) -> Images:
    """Map pixel values ``low``..``high`` to 0..1 and clip the rest; any shape, array or tensor."""
    return ((images - low) / (high - low)).clip(0.0, 1.0)


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Rotate each image counterclockwise about its centre, bilinear, with a mirrored border.

    Args:
        images: (N, C, H, W), H = W, float.
        degrees: (N,).
    """
    angle = torch.deg2rad(degrees.to(images))
    return _about_centre(images, angle.cos(), angle.sin())


def zoom(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Magnify each image (N, C, H, W), H = W, about its centre by its ``factor`` (N,), bilinear, mirrored border."""
    scale = 1 / factor.to(images)
    return _about_centre(images, scale, torch.zeros_like(scale))


def _about_centre(images: torch.Tensor, along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Each image read at places mapped by its matrix ``[[along, -across], [across, along]]``, (N,) each."""
    zero = torch.zeros_like(along)
    matrix = torch.stack([torch.stack([along, -across, zero], 1), torch.stack([across, along, zero], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image (N, 1, H, W) with a Gaussian of its own standard deviation ``sigma`` (N,), in pixels."""
    reach = int(3 * BLUR)
    along = torch.arange(-reach, reach + 1).to(images)
    kernel = torch.exp(-0.5 * (along / sigma.to(images)[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None, :, None]
    blurred = F.pad(images[:, 0][None], [reach] * 4, mode="reflect")
    for weight in (kernel, kernel.transpose(2, 3)):
        blurred = F.conv2d(blurred, weight, groups=len(images))
    return blurred[0][:, None]


def _turned(images: torch.Tensor, rng: np.random.Generator, span: float) -> torch.Tensor:
    return rotate(images, torch.from_numpy(rng.uniform(0, 360, len(images))))


def _zoomed(images: torch.Tensor, rng: np.random.Generator, span: float) -> torch.Tensor:
    return zoom(images, torch.from_numpy(ZOOM ** rng.uniform(-1, 1, len(images))))


def _blurred(images: torch.Tensor, rng: np.random.Generator, span: float) -> torch.Tensor:
    return blur(images, torch.from_numpy(rng.uniform(0, BLUR, len(images))))


def _noisy(images: torch.Tensor, rng: np.random.Generator, span: float) -> torch.Tensor:
    strength = NOISE * span * rng.uniform(0, 1, (len(images), 1, 1, 1))
    return images + torch.from_numpy(strength * rng.standard_normal(images.shape)).to(images)


def _jittered(images: torch.Tensor, rng: np.random.Generator, span: float) -> torch.Tensor:
    gain, offset = torch.from_numpy(rng.uniform(-1, 1, (2, len(images), 1, 1, 1))).to(images)
    mean = images.mean((2, 3), keepdim=True)
    return mean + (images - mean) * (1 + GAIN * gain) + OFFSET * span * offset


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, np.random.Generator, float], torch.Tensor]] = {
    "rotate": _turned,
    "zoom": _zoomed,
    "blur": _blurred,
    "noise": _noisy,
    "jitter": _jittered,
}


def vary(images: torch.Tensor, kind: str, rng: np.random.Generator, span: float) -> torch.Tensor:
    """Augment each image by its own random amount.

    Args:
        images: (N, 1, H, W), H = W, float, pixel values.
        kind: ``rotate`` (any angle), ``zoom``, ``blur``, ``noise``, ``jitter`` (contrast and brightness), or ``all``.
        rng: draws the amounts.
        span: width of the network's window, in the unit of the pixels.
    """
    for name, change in AUGMENTATIONS.items():
        if kind in (name, "all"):
            images = change(images, rng, span)
    return images


def dihedral(images: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight exact symmetries of the square, (..., H, W): ``which % 4`` quarter turns, mirrored from 4 on."""
    turned = images.rot90(which % 4, (-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn each image (N, C, H, W), H = W, by one of the eight symmetries of the square, drawn by ``rng``.

    Other angles need interpolation, which blurs; a network trained only on blurred images does worse on sharp ones.
    """
    which = torch.from_numpy(rng.integers(SYMMETRIES, size=len(images))).to(images.device)
    seen = images.clone()
    for symmetry in range(SYMMETRIES):
        seen[which == symmetry] = dihedral(images[which == symmetry], symmetry)
    return seen
