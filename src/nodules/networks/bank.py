"""The feature bank: a frozen body's features, computed once and cached, so that a head trains in seconds.

fastai 0.7's ``precompute=True`` kept only the features of the plain images and so lost augmentation. Here the bank
holds several views of each patch, and a head draws one of them per patch and epoch.
"""

import hashlib
import inspect
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nodules import cache
from nodules.data import transforms
from nodules.errors import InputError, within
from nodules.networks import POOLS, bodies
from nodules.networks.device import device, has_bfloat16

VIEWS = ("none", "dihedral", "all", *transforms.AUGMENTATIONS)
FORWARD_BATCH = 128  # images per forward pass


@dataclass(frozen=True)
class Bank:
    """Features (N, V, D) float16, memory-mapped; view 0 is the plain patch."""

    features: np.ndarray
    key: str
    patches_per_second: float  # measured when the bank was made; each view counts as a patch

    @property
    def width(self) -> int:
        """D, the number of features per view."""
        return self.features.shape[2]

    def gathered(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Features of some patches, each in one view, (B, D) float16 on the device; ``rows`` and ``views`` (B,)."""
        if self.resident is None:
            return torch.from_numpy(self.features[rows, views]).to(device())
        return self.resident[tuple(torch.from_numpy(places).to(device()) for places in (rows, views))]

    @cached_property
    def resident(self) -> Tensor | None:
        """A copy on the GPU, where a batch is gathered in no time; None without a GPU that has room for it."""
        if device().type != "cuda" or self.features.nbytes > torch.cuda.mem_get_info()[0] / 2:
            return None
        return torch.from_numpy(np.array(self.features)).to(device())


def check(pool: str, kind: str, k: int) -> None:
    """Raise InputError for an unknown pooling or kind of views, or ``k`` out of range where views are drawn."""
    if pool not in POOLS:
        raise InputError(f"pool={pool!r}: no such pooling; use one of {', '.join(POOLS)}")
    if kind not in VIEWS:
        raise InputError(f"views={kind!r}: no such views; use one of {', '.join(VIEWS)}")
    if kind not in ("none", "dihedral"):
        within(1, 1000, k=k)


def pooled(maps: list[torch.Tensor], pool: str) -> torch.Tensor:
    """Maximum and mean over space (fastai's concat pooling) of the last or all stages, (N, D) float32."""
    chosen = maps[-1:] if pool == "last" else maps
    return torch.cat([part for m in chosen for part in (m.amax((2, 3)).float(), m.mean((2, 3), dtype=torch.float))], 1)


def width(body: bodies.Body, pool: str) -> int:
    """D, the number of features per view."""
    return 2 * (body.channels[-1] if pool == "last" else sum(body.channels))


def compute(
    body: bodies.Body, images: np.ndarray, pool: str = "all", kind: str = "none", k: int = 0, seed: int = 0
) -> Bank:
    """The features of every patch in every view, from the cache if possible.

    Args:
        body: put into evaluation mode, and otherwise left as it is.
        images: (N, 64, 64), pixel values in the unit that the body was built for.
        pool: ``last`` stage or ``all`` stages; at 64 pixels, ``all`` is markedly better.
        kind: ``none``, ``dihedral`` (the seven other symmetries of the square), or a kind of
            :func:`nodules.data.transforms.vary`, such as ``rotate``: ``k`` views with random amounts for each patch.
        k: number of augmented views.
        seed: of the random amounts.

    Raises:
        InputError: unknown pooling or views, or k out of range where views are drawn.
    """
    check(pool, kind, k)
    shape = (len(images), {"none": 1, "dihedral": 8}.get(kind, 1 + k), width(body, pool))

    def make(path: Path) -> dict[str, float]:
        started = time.perf_counter()
        # A copy: the layout of the caller's weights, and so rounding, must not depend on what is in the cache
        _fill(path, shape, body.frozen(), images, pool, kind, seed)
        return {"patches_per_second": shape[0] * shape[1] / (time.perf_counter() - started)}

    key = _key(body, images) | {"pool": pool, "views": kind, "count": shape[1], "seed": seed}
    path, note = cache.kept(f"bank-{body.architecture}-{body.weights.name}", "npy", key, make)
    return Bank(np.load(path, mmap_mode="r", allow_pickle=False), path.stem, note["patches_per_second"])


@torch.inference_mode()
def strongest(body: bodies.Body, image: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` feature maps with the highest mean in each stage, for one patch (64, 64).

    Returns:
        (stages, count, side, side), upsampled (nearest neighbour) to the side of the largest.
    """
    maps = body.eval()(body.prepare(torch.from_numpy(image.astype(np.float32))[None].to(body.mean.device)))
    side = maps[0].shape[-1]
    best = [m[0, m.mean((0, 2, 3)).topk(count).indices] for m in maps]
    return torch.stack([F.interpolate(m[None], size=(side, side))[0] for m in best]).cpu().numpy()


@torch.inference_mode()
def first_filter(body: bodies.Body, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The filter of the first layer whose map of a patch (64, 64) varies most, summed over the channels, and that map.

    All channels show the same grey image, so the sum is the filter that the image meets, (K, K).
    """
    layer = next(layer for layer in body.modules() if isinstance(layer, torch.nn.Conv2d))
    maps = layer(body.eval().prepare(torch.from_numpy(image.astype(np.float32))[None].to(body.mean.device)))[0]
    most = int(maps.std((1, 2)).argmax())
    return layer.weight[most].sum(0).cpu().numpy(), maps[most].cpu().numpy()


def _key(body: bodies.Body, images: np.ndarray) -> dict[str, Any]:
    """Everything that features depend on, except pooling and views."""
    code = "".join(inspect.getsource(module) for module in (bodies, transforms, sys.modules[__name__]))
    return {
        **asdict(body.weights),
        "architecture": body.architecture,
        "size": body.size,
        "data": hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
        "code": code,
        "torch": torch.__version__,
        "device": device().type,
        "bfloat16": has_bfloat16(),
    }


@torch.inference_mode()
def _fill(
    path: Path, shape: tuple[int, int, int], body: bodies.Body, images: np.ndarray, pool: str, kind: str, seed: int
) -> None:
    """Write the features batch by batch: memory does not grow with the number of patches."""
    low, high = body.weights.window
    count, views_of_each, width_of_each = shape
    # One per view, used in the order of the patches
    draws = [np.random.default_rng([seed, view]) for view in range(views_of_each)]
    bar = tqdm(total=count * views_of_each, desc=f"{body.architecture} ({body.weights.name})", unit="patch")
    # Not a memory map: writing to one on a full disk kills the process silently
    with path.open("wb") as file, bar:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for start in range(0, count, FORWARD_BATCH):
            batch = torch.from_numpy(images[start : start + FORWARD_BATCH].astype(np.float32))[:, None].to(device())
            out = np.empty((len(batch), views_of_each, width_of_each), "<f2")
            for view in range(views_of_each):
                seen = batch
                if kind == "dihedral":
                    seen = transforms.dihedral(batch, view)
                elif view:
                    seen = transforms.vary(batch, kind, draws[view], high - low)
                maps = body(body.prepare(seen).contiguous(memory_format=torch.channels_last))
                out[:, view] = pooled(maps, pool).clamp(max=torch.finfo(torch.float16).max).cpu().half().numpy()
                bar.update(len(batch))
            file.write(out.data)
