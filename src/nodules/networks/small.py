"""Networks trained from scratch: one for nodules, a plain control, and the data set author's two.

They take pixel values (N, 1, 64, 64) and return two logits. The network for nodules can also take neighbouring slices
as channels.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nodules.data.pixels import HU, UNITS
from nodules.data.transforms import LUNG_WINDOW, window
from nodules.networks.device import tensor

SOFT_WINDOW = (-200.0, 600.0)  # HU, fat to calcium; in the lung window, what lies beyond 400 HU is all white
MEAN, DEVIATION = 0.3, 1 / 3  # about those of patches in the lung window, 0 black and 1 white
WIDTHS = (32, 64, 128, 128)
ROUTINGS = 3
MARGIN = 8  # pixels
GRID = 12  # cells
ATTENTION_BATCH = 64  # patches


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network made by ``make``, with initial weights that depend only on ``seed``."""
    from fastai.torch_core import no_random  # takes seconds, which a finished network does not need

    with no_random(seed):
        return make()


class Scale(nn.Module):
    """Bring pixel values to a size of about 1, around 0.

    Hounsfield units are seen in two windows, as a radiologist sees them: one for the lung, which shows ground glass and
    the edge, and one for soft tissue, which tells calcium from it. All patches are scaled alike, since density counts.
    Grey levels are often stretched slice by slice, so there each patch is standardised, its slices together.

    Args:
        unit: of the pixel values, one of :data:`nodules.data.pixels.UNITS`.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        if unit not in UNITS:
            raise ValueError(f"pixels in {unit!r}")
        self.unit, self.views = unit, 2 if unit == HU else 1  # of each slice

    def forward(self, images: Tensor) -> Tensor:
        """(N, views x slices, height, width) from (N, slices, height, width), all slices of a window together."""
        if self.unit == HU:
            seen = torch.cat([window(images, *LUNG_WINDOW), window(images, *SOFT_WINDOW)], 1)
            return (seen - MEAN) / DEVIATION
        return F.layer_norm(images, images.shape[1:])


def blocks(channels: int, pooled: int, unit: str) -> nn.Sequential:
    """Four blocks of convolution, batch norm and ReLU, with max pooling in the first ``pooled`` of them."""
    scale = Scale(unit)
    layers = [scale]
    for i, (before, after) in enumerate(zip((scale.views * channels, *WIDTHS), WIDTHS, strict=False)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
        layers += [nn.MaxPool2d(2)] * (i < pooled)  # before batch norm, which then has a quarter of the work
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Plain(nn.Module):
    """Four blocks, each with max pooling; global mean and max pooling; one linear layer."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.body, self.head = blocks(1, 4, unit), nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * WIDTHS[-1], 2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2)."""
        maps = self.body(images)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


def middle(images: Tensor) -> Tensor:
    """Without the outer ``MARGIN`` pixels, which show little of a nodule, (..., 48, 48)."""
    return images[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


class NoduleNet(nn.Module):
    """A small network for nodules: it estimates the outline, and weighs what lies inside.

    The same blocks as :class:`Plain`, but only two of them pooled, on the middle of the patch: ``GRID`` cells a side.
    One more convolution estimates how much of each cell lies inside the nodule. These shares are the attention with
    which features are averaged; their sum is the nodule's size. In training the outline is a further target: what the
    network must know for it helps with malignancy (multi-task learning, Caruana 1997).

    Args:
        unit: of the pixel values, as for :class:`Scale`.
        slices: of an image: 1, or 3 with those below and above.
    """

    def __init__(self, unit: str, slices: int = 1) -> None:
        super().__init__()
        self.body, self.outline = blocks(slices, 2, unit), nn.Conv2d(WIDTHS[-1], 1, 1)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(3 * WIDTHS[-1] + 1, 2)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, 2) from (N, slices, 64, 64); in training also the logits of the outline, (N, 1, 12, 12)."""
        maps = self.body(middle(images))
        outline = self.outline(maps)
        logits = self.head(self.dropout(self.pooled(maps, outline.sigmoid())))
        return (logits, outline) if self.training else logits

    def attended(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to each cell, and what its features add to the logit of malignant against benign: (N, 12, 12)."""
        maps = self.body(middle(images))
        inside = self.outline(maps).sigmoid()
        weights = self.head.weight.diff(dim=0)[0].split(WIDTHS[-1])[2]  # of the features averaged inside
        return inside[:, 0], torch.einsum("nchw,c->nhw", maps * inside, weights) / self.size(inside)[:, :, None]

    def pooled(self, maps: Tensor, inside: Tensor) -> Tensor:
        """Mean, maximum, mean inside, and the logarithm of the size: (N, 385)."""
        size = self.size(inside)
        # One product for both means, on cells in the order in memory: sums of maps take a sixth of a training step more
        cells, shares = maps.permute(0, 2, 3, 1).flatten(1, 2), inside.flatten(2) / size[:, None]
        mean, attended = (torch.cat([torch.full_like(shares, 1 / shares.shape[2]), shares], 1) @ cells).unbind(1)
        return torch.cat([mean, F.adaptive_max_pool2d(maps, 1).flatten(1), attended, size.log()], 1)

    @staticmethod
    def size(inside: Tensor) -> Tensor:
        """Number of cells inside, (N, 1), never 0."""
        return inside.sum((2, 3)) + 0.1


class Unattended(NoduleNet):
    """The same network without attention: features are averaged over all cells once more, and there is no size."""

    def pooled(self, maps: Tensor, inside: Tensor) -> Tensor:
        """As for :class:`NoduleNet`, with everything inside."""
        return super().pooled(maps, torch.ones_like(inside))


@torch.inference_mode()
def attention(network: NoduleNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the network looks, and the evidence for malignant that it finds there.

    Attention as an explanation, as in Ilse, Tomczak & Welling 2018 (arXiv 1802.04712). The evidence of all cells
    together is exactly what the features averaged under attention add to the logit.

    Args:
        network: for nodules.
        images: (N, 64, 64) or (N, slices, 64, 64), pixel values.

    Returns:
        Attention, 0 to 1, and evidence, of either sign, (N, 16, 16) each; 0 in the margin that the network cuts off.
    """
    batches = np.array_split(images, -(-len(images) // ATTENTION_BATCH))
    both = [network.eval().attended(tensor(batch)) for batch in batches]
    cells = MARGIN * GRID // (images.shape[-1] - 2 * MARGIN)
    frame = (0, 0), (cells, cells), (cells, cells)
    return tuple(np.pad(torch.cat(maps).cpu().numpy(), frame) for maps in zip(*both, strict=True))


def outline_loss(outline: Tensor, inside: Tensor) -> Tensor:
    """Cross-entropy of the outline that :class:`NoduleNet` estimates, over the patches where it is known.

    Args:
        outline: logits, (N, 1, 12, 12).
        inside: 1 for each pixel inside the nodule, 0 outside, NaN where unknown, (N, 1, 64, 64).
    """
    shares = F.adaptive_avg_pool2d(middle(inside), outline.shape[2:])
    known = ~shares.isnan()
    # The sum over nothing is 0; the mean would be NaN
    total = F.binary_cross_entropy_with_logits(outline[known], shares[known], reduction="sum")
    return total / known.sum().clamp(min=1)


def squeezenet(unit: str) -> nn.Module:
    """SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360) for one slice, batch norm on the input.

    The convolutional network of the data set's author (the report's 0.68).
    """
    from torchvision.models import squeezenet1_1  # takes seconds, which the other networks do not need

    scale, net = Scale(unit), squeezenet1_1(num_classes=2)
    net.features[0] = nn.Conv2d(scale.views, 64, 3, stride=2)
    return nn.Sequential(scale, nn.BatchNorm2d(scale.views), net)


class CapsuleNet(nn.Module):
    """Capsules with dynamic routing (Sabour, Frosst & Hinton 2017, arXiv 1710.09829).

    The original is for digits of 28 x 28 pixels. Here the first convolution has stride 2 and both have 64 channels
    instead of 256: the primary capsules form a 10 x 10 grid of 8 types, 8D each. No reconstruction.

    A capsule's length measures the presence of its class; ``forward`` returns its logarithm, so that softmax gives
    relative lengths.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        scale = Scale(unit)
        self.convolution = nn.Sequential(scale, nn.Conv2d(scale.views, 64, 9, stride=2), nn.ReLU())
        self.primary = nn.Conv2d(64, 64, 9, stride=2)
        self.votes = nn.Parameter(0.05 * torch.randn(2, 800, 16, 8))  # class, capsule, out, in

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of the two capsules' lengths, (N, 2)."""
        maps = self.primary(self.convolution(images)).float()
        capsules = squash(maps.view(len(maps), 8, 8, -1).permute(0, 1, 3, 2).flatten(1, 2))
        return route(torch.einsum("ckoi,nki->ncko", self.votes, capsules)).norm(dim=-1).clamp(min=1e-6).log()


def squash(vectors: Tensor) -> Tensor:
    """Shorten each vector (last axis) to a length below 1, keeping its direction (equation 1 of Sabour et al.)."""
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * square / (1 + square) / (square + 1e-8).sqrt()


def route(votes: Tensor) -> Tensor:
    """Routing by agreement (procedure 1 of Sabour et al.): votes (N, classes, capsules, D) to (N, classes, D)."""
    agreement = torch.zeros(votes.shape[:3], device=votes.device)
    for _ in range(ROUTINGS - 1):  # gradients flow through the last step alone
        out = squash((agreement.softmax(1)[..., None] * votes.detach()).sum(2))
        agreement = agreement + torch.einsum("ncko,nco->nck", votes.detach(), out)
    return squash((agreement.softmax(1)[..., None] * votes).sum(2))


def margin_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Margin loss of capsule lengths (equation 4 of Sabour et al.); ``target`` holds soft labels, (N, 2)."""
    length = logits.exp()
    return (target * F.relu(0.9 - length).square() + 0.5 * (1 - target) * F.relu(length - 0.1).square()).sum(1).mean()
