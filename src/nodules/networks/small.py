"""Networks trained from scratch on one grey channel: the data set author's two, and a plain control.

They take pixel values (N, 1, 64, 64), standardise each patch, and return two logits.
"""

from collections.abc import Callable

import torch
from fastai.torch_core import no_random
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import squeezenet1_1

WIDTHS = (32, 64, 128, 128)
ROUTINGS = 3


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network made by ``make``, with initial weights that depend only on ``seed``."""
    with no_random(seed):
        return make()


class Standardise(nn.Module):
    """Mean 0 and variance 1 in every patch, whatever the unit of the source."""

    def forward(self, images: Tensor) -> Tensor:
        """Any shape (N, 1, height, width)."""
        return F.layer_norm(images, images.shape[1:])


class Plain(nn.Module):
    """Four blocks of convolution, batch norm, ReLU and max pooling; global mean and max pooling; one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Standardise()]
        for before, after in zip((1, *WIDTHS), WIDTHS, strict=False):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            blocks += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.head = nn.Sequential(*blocks), nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * WIDTHS[-1], 2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2)."""
        maps = self.body(images)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360) for one channel, batch norm on the input.

    The convolutional network of the data set's author (the report's 0.68).
    """
    net = squeezenet1_1(num_classes=2)
    net.features[0] = nn.Conv2d(1, 64, 3, stride=2)
    return nn.Sequential(Standardise(), nn.BatchNorm2d(1), net)


class CapsuleNet(nn.Module):
    """Capsules with dynamic routing (Sabour, Frosst & Hinton 2017, arXiv 1710.09829).

    The original is for digits of 28 x 28 pixels. Here the first convolution has stride 2 and both have 64 channels
    instead of 256: the primary capsules form a 10 x 10 grid of 8 types, 8D each. No reconstruction.

    A capsule's length measures the presence of its class; ``forward`` returns its logarithm, so that softmax gives
    relative lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Sequential(Standardise(), nn.Conv2d(1, 64, 9, stride=2), nn.ReLU())
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
