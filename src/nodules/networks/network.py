"""Body and head in one: from pixel values to the probability of malignancy."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nodules.data import transforms
from nodules.data.transforms import SYMMETRIES
from nodules.errors import InputError, in_brief
from nodules.networks import bodies
from nodules.networks.bank import pooled, width
from nodules.networks.device import device, has_bfloat16, tensor
from nodules.networks.heads import finite, head

IMAGE_BATCH = 256  # patches per forward pass


class Network(nn.Module):
    """Body and head in one, from pixel values (N, 1, 64, 64) to two logits.

    ``taps`` are identities after each stage, where activation maps are read.
    """

    def __init__(self, body: bodies.Body, pool: str, head: nn.Module) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, pool, head
        self.taps = nn.ModuleList(nn.Identity() for _ in body.channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2)."""
        maps = self.body(self.body.prepare(images).contiguous(memory_format=torch.channels_last))
        return self.head(pooled([tap(m) for tap, m in zip(self.taps, maps, strict=True)], self.pool))

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters by layer group, from input to output, the head last."""
        return [*self.body.groups(), list(self.head.parameters())]


class Mixed(nn.Module):
    """A network computed in bfloat16 where the hardware supports it; logits in float32."""

    def __init__(self, network: nn.Module, bfloat16: bool = True) -> None:
        super().__init__()
        self.network = network.to(device(), memory_format=torch.channels_last)
        self.bfloat16 = bfloat16 and has_bfloat16()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (N, 2); in training a network may give more, such as :class:`nodules.networks.small.NoduleNet`."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.network(images)
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)


def loaded(module: nn.Module, path: Path, name: str) -> nn.Module:
    """The module with weights from a safetensors file, in evaluation mode and on the device.

    Args:
        module: as it was saved, with any weights.
        path: the file.
        name: what the module is, for messages.

    Raises:
        InputError: the file is missing, damaged, or of another module.
    """
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: not {name} ({in_brief(error)}); run {path.parent.name} again") from error
    return module.to(device()).eval()


def restore(spec: bodies.Spec, unit: str, path: Path) -> Network:
    """A network with a saved head, in evaluation mode and on the device.

    Args:
        spec: which network.
        unit: of the pixels.
        path: the head, a safetensors file.

    Raises:
        InputError: as for :func:`loaded`.
    """
    body = bodies.build(spec, unit)
    last = loaded(head(width(body, spec.pool)), path, f"a head of {spec.architecture}")
    return Network(body, spec.pool, last).to(device()).eval()


@torch.inference_mode()
def predict(network: nn.Module, images: np.ndarray, symmetries: int = SYMMETRIES) -> np.ndarray:
    """Probability of malignancy of each patch in the symmetries of the square, (N, symmetries); the first is plain.

    Raises:
        InputError: as for :func:`nodules.networks.heads.finite`.
    """
    out = np.empty((len(images), symmetries))
    for start in range(0, len(images), IMAGE_BATCH):
        batch = tensor(images[start : start + IMAGE_BATCH])
        for view in range(symmetries):
            logits = network.eval()(transforms.dihedral(batch, view))
            out[start : start + IMAGE_BATCH, view] = logits.double().softmax(1)[:, 1].cpu()
    return finite(out)
