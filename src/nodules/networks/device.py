"""Which device computes, whether it multiplies bfloat16, and patches on it."""

import functools
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def device() -> torch.device:
    """The GPU if this torch can use it, else the CPU; a tiny convolution decides.

    CUDA also lists cards that torch no longer supports, such as Paperspace's M4000, P4000 and P5000.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        tried = F.conv2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda"))
        reason = "" if tried.sum().item() == 36 else "its results are wrong"
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
    if not reason:
        return torch.device("cuda")
    warnings.warn(f"{_card()} can't be used, falling back to the CPU: {reason}", RuntimeWarning, stacklevel=2)
    return torch.device("cpu")


def described() -> str:
    """The GPU's name, or the CPU with its threads."""
    return _card() if device().type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def has_bfloat16() -> bool:
    """Whether the hardware multiplies bfloat16; emulated, it is slower than float32."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def tensor(images: np.ndarray) -> Tensor:
    """Patches (N, 64, 64), or (N, C, 64, 64), as network input: (N, C, 64, 64) float32 on the device."""
    batch = torch.from_numpy(images.astype(np.float32)).to(device())
    return batch[:, None] if batch.ndim == 3 else batch


def _card() -> str:
    try:
        return torch.cuda.get_device_name()
    except RuntimeError:
        return "The GPU"
