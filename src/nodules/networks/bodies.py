"""Bodies: networks without their classifier, pretrained or random, that return the feature maps of every stage.

ResNets (He et al. 2015, arXiv 1512.03385) come from torchvision, EfficientNet-Lite0 (after Tan & Le 2019, arXiv
1905.11946) and all other architectures from timm.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from nodules.data import transforms
from nodules.errors import InputError, in_brief
from nodules.networks import weights
from nodules.networks.device import device, has_bfloat16
from nodules.networks.weights import ARCHITECTURES, ASTRA_ARCHITECTURES, LITE0, LITE0_IN_TIMM, RESNETS, State

REPORTED = "resnet50"  # the 2019 report's choice
CHEST_CT_WINDOW = (-1000.0, 200.0)  # HU, as in the training of those weights
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Spec:
    """A choice of network.

    Attributes:
        architecture: one of ``weights.ARCHITECTURES`` or any timm name that works with ``features_only``.
        weights: one of ``weights.NAMES``, downloaded if necessary; or ``auto``, the best of those available locally,
            with a warning for each better one that is not.
        size: side to which patches are resized, pixels; 64 leaves them unchanged.
        pool: stages whose features the head sees, ``last`` or ``all``.
    """

    architecture: str
    weights: str = "auto"
    size: int = 64
    pool: str = "all"

    def check(self) -> None:
        """Raise InputError for an unknown name or an unusable size."""
        check(self.architecture)
        if self.weights not in ("auto", *weights.NAMES):
            known = ", ".join(weights.NAMES)
            raise InputError(f"weights={self.weights!r}: no such weights; use auto or one of {known}")
        if self.weights == "chest-ct" and self.architecture not in ASTRA_ARCHITECTURES:
            known = ", ".join(ASTRA_ARCHITECTURES)
            raise InputError(f"weights='chest-ct': none for {self.architecture}; use one of {known}, or other weights")
        if not (isinstance(self.size, int) and 32 <= self.size <= 1024):
            raise InputError(f"size={self.size!r}: networks halve an image five times; use an integer from 32 to 1024")


@dataclass(frozen=True)
class Weights:
    """Where a body's weights come from, and the normalisation that they expect."""

    name: str  # "chest-ct", "imagenet" or "random"
    source: str  # one phrase for captions and tables
    sha256: str  # fingerprint of the tensors in the body
    window: tuple[float, float]  # pixel values mapped to 0..1: HU, or bytes
    mean: Triple  # subtracted after windowing, by channel
    std: Triple  # divisor after that, by channel


class Stages(nn.Sequential):
    """A torchvision ResNet without its classifier, with the same tensor names; returns every stage."""

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
    """A network without its classifier; built by :func:`build`.

    Attributes:
        architecture: its name.
        weights: where its weights come from.
        size: side of its input, pixels.
        channels: of each stage's feature map, from input to output.
    """

    def __init__(self, architecture: str, net: nn.Module, channels: list[int], weights: Weights, size: int) -> None:
        super().__init__()
        self.architecture, self.net, self.channels, self.weights, self.size = architecture, net, channels, weights, size
        # Buffers move to the device with the body, but are not trained or saved
        self.register_buffer("mean", torch.tensor(weights.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(weights.std).view(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn patches into network input: windowed, resized, in three channels, normalised.

        All three channels hold the same grey image, which leaves every pretrained filter unchanged.

        Args:
            images: (N, 64, 64) or (N, 1, 64, 64), pixel values in the source's unit (HU or bytes), any dtype.

        Returns:
            (N, 3, size, size), float32, on the body's device.
        """
        grey = images.unsqueeze(1) if images.ndim == 3 else images
        if grey.ndim != 4 or grey.shape[1] != 1:
            raise InputError(f"images of shape {tuple(images.shape)}: not grey patches; pass (N, 1, 64, 64)")
        grey = transforms.window(grey.to(self.mean), *self.weights.window)
        if grey.shape[-1] != self.size:
            grey = F.interpolate(grey, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return (grey - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (N, channels, height, width) of every stage, from prepared images (N, 3, size, size)."""
        return list(self.net(images.to(next(self.net.parameters()).dtype)))

    def frozen(self) -> "Body":
        """A copy for features alone, on the device; this body is put into evaluation mode, and otherwise left as it is.

        A ResNet's batch norm is folded into the convolutions before it, and all is in bfloat16 where the hardware
        multiplies that: together these save a quarter to a third of the time.
        """
        body = copy.deepcopy(self.eval())
        if isinstance(body.net, Stages):
            body.net = fuse(body.net)
        if has_bfloat16():
            body.net.bfloat16()
        return body.to(device(), memory_format=torch.channels_last)

    def groups(self) -> list[list[nn.Parameter]]:
        """All parameters by stage, from input to output, for discriminative learning rates."""
        ends = Stages.ENDS if isinstance(self.net, Stages) else self.net.feature_info.module_name()
        layers = [(_flat(name), list(layer.parameters(recurse=False))) for name, layer in self.net.named_modules()]
        lasts = [
            [i + 1 for i, (name, _) in enumerate(layers) if f"{name}_".startswith(f"{_flat(end)}_")] for end in ends
        ]
        cuts = [0, *accumulate((max(last, default=0) for last in lasts[:-1]), max), len(layers)]
        groups = [[parameter for _, own in layers[start:end] for parameter in own] for start, end in pairwise(cuts)]
        return [group for group in groups if group]


def build(spec: Spec, unit: str = "HU", seed: int = 0) -> Body:
    """Build a network's body with its weights.

    Args:
        spec: which network.
        unit: of the source's pixel values; ``HU``, else bytes.
        seed: of random weights.

    Raises:
        InputError: an unknown name, weights that are unavailable or don't fit, or an unusable size.
    """
    spec.check()
    names = weights.candidates(spec.architecture) if spec.weights == "auto" else [spec.weights]
    for name in names[:-1]:
        try:
            return _build(spec, name, unit, seed, download=False)
        except InputError as error:
            warnings.warn(f"{error}. Going on without {name} weights", stacklevel=2)
    return _build(spec, names[-1], unit, seed, download=True)


def specs(architectures: list[str], names: list[str], size: int, pool: str) -> list[Spec]:
    """Each combination of architecture and named weights that needs no download.

    Raises:
        InputError: an unknown name, or nothing to compare.
    """
    unknown = set(names) - set(weights.NAMES)
    if unknown:
        raise InputError(f"weights={min(unknown)!r}: no such weights; use one or more of {', '.join(weights.NAMES)}")
    for architecture in architectures:
        check(architecture)
    here = [
        Spec(architecture, name, size, pool)
        for architecture in architectures
        for name in weights.available(architecture)
        if name in names
    ]
    if not here:
        raise InputError(f"architectures={architectures}: none has weights {names} here; add 'random' to the weights")
    return here


def preferred(specs: list[Spec], architecture: str = "") -> Spec:
    """The network to keep unless another is surely better, with the first, which are the best, of its weights.

    Args:
        specs: those that are compared.
        architecture: the one to prefer; if empty, the report's ResNet50 or, where that is missing, the first.

    Raises:
        InputError: the architecture is not compared.
    """
    compared = list(dict.fromkeys(spec.architecture for spec in specs))
    name = architecture or (REPORTED if REPORTED in compared else compared[0])
    if name not in compared:
        raise InputError(f"architecture={name!r}: not compared; add it to architectures, or use one of {compared}")
    return next(spec for spec in specs if spec.architecture == name)


def parameters(body: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in body.parameters())


def stages(body: Body, side: int) -> list[dict[str, object]]:
    """By stage: ``name, channels, side`` of its map (pixels, for an image of ``side``), ``parameters``."""
    with torch.inference_mode():
        maps = body.eval()(torch.zeros(1, 3, side, side, device=body.mean.device))
    counts = [sum(parameter.numel() for parameter in group) for group in body.groups()]
    return [
        {"name": f"stage {i}", "channels": m.shape[1], "side": m.shape[2], "parameters": count}
        for i, (m, count) in enumerate(zip(maps, counts, strict=True), 1)
    ]


def check(architecture: str) -> None:
    """Raise InputError for an unknown architecture."""
    if architecture in ARCHITECTURES:
        return
    import timm

    if not timm.is_model(architecture):
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"architecture={architecture!r}: no such network; use one of {known} or any name in timm")


def _build(spec: Spec, name: str, unit: str, seed: int, download: bool) -> Body:
    state, source = None, f"random, seed {seed}"
    if name != "random":
        state, source = weights.load(spec.architecture, name, download)
    net, channels = _network(spec.architecture, state, spec.size, seed)
    window, (mean, std) = transforms.default_window(unit), _normalisation(spec.architecture, net)
    if name == "chest-ct":
        window, mean, std = CHEST_CT_WINDOW if unit == "HU" else window, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    described = Weights(name, source, weights.fingerprint(net.state_dict()), window, mean, std)
    return Body(spec.architecture, net, channels, described, spec.size)


def _network(architecture: str, state: State | None, size: int, seed: int) -> tuple[nn.Module, list[int]]:
    """The network with the tensors of ``state`` or random ones, and the channels of each stage."""
    from torchvision.models import get_model

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # torch.manual_seed would also reset the generators of accelerators, which are not forked here
            torch.default_generator.manual_seed(seed)
            if architecture in RESNETS:
                net = Stages(get_model(architecture))
            else:
                import timm

                net = timm.create_model(LITE0_IN_TIMM if architecture == LITE0 else architecture, features_only=True)
            if state is None:
                _calibrate(net, size)
            else:
                flat = {_flat(name): tensor for name, tensor in state.items()}
                net.load_state_dict({name: flat[_flat(name)] for name in net.state_dict() if _flat(name) in flat})
            channels = [features.shape[1] for features in net.eval()(torch.zeros(1, 3, size, size))]
    except Exception as error:  # timm's networks fail in many different ways
        kind = "random weights" if state is None else "the weights found for it"
        raise InputError(
            f"architecture={architecture!r}: fails at size={size} with {kind} ({in_brief(error)}); use another"
        ) from error
    if not isinstance(net, Stages) and channels != net.feature_info.channels():
        raise InputError(f"architecture={architecture!r}: its maps are not (N, channels, height, width); use another")
    return net.train(), channels


def _calibrate(net: nn.Module, size: int) -> None:
    """Set the batch-norm statistics of random weights from noise, in one pass.

    With the initial statistics (mean 0, variance 1), each residual block doubles the variance, and the features of a
    frozen ResNet-152 would overflow float16.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # cumulative average
    net.train()(torch.randn(32, 3, size, size))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _flat(name: str) -> str:
    """A layer's or tensor's name in one form, since timm's wrappers turn stages.0 into stages_0 or model.stages.0."""
    return re.sub(r"\W", "_", name).removeprefix("model_")


def _normalisation(architecture: str, net: nn.Module) -> tuple[Triple, Triple]:
    if architecture in RESNETS:
        from torchvision.models import get_model_weights

        expected = get_model_weights(architecture).DEFAULT.transforms()
        return tuple(expected.mean), tuple(expected.std)
    return tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])
