"""Training of all layers on images: sampling by nodule, augmentation, warm-up, divergence checks.

Trainings differ only in the fields of :class:`Recipe`, so a notebook can change one factor at a time. An epoch shows
each nodule once, by a slice drawn at random: otherwise large nodules, which have many slices, would dominate.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import no_random
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nodules.data import transforms
from nodules.data.split import Part, Parts
from nodules.data.transforms import SYMMETRIES
from nodules.networks import bodies, heads, small
from nodules.networks.bank import Bank
from nodules.networks.device import device, tensor
from nodules.networks.heads import Learner, Training
from nodules.networks.network import Mixed, Network, predict

CHECK_BATCH = 256  # patches per forward pass of a validation
LIMIT = 4.0  # smoothed training loss that counts as divergence, as a multiple of that of guessing
# fastai's Adam in one pass over each tensor: its own takes a fifth of a ResNet's step
ADAM = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, fused=True)
# The head alone, before all layers; many more epochs overfit
PROBE = heads.Recipe(epochs=10, lr=heads.LR, augment=True)


@dataclass(frozen=True)
class Recipe:
    """How all layers are trained: Adam, linear warm-up, then cosine annealing to 0."""

    lr: float  # peak learning rate of the last layer group
    batch: int = 32  # patches per step
    spread: float = 1.0  # factor by which the first group's rate is lower (discriminative rates)
    warmup: float = 0.0  # share of the training
    frozen_statistics: bool = False  # batch norm keeps its running means and variances
    smoothing: float = 0.0  # of labels
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # of logits and soft labels, (N, 2) each
    outline: float = 0.0  # weight of the loss of the outline, for a network that estimates it
    bfloat16: bool = True  # where the hardware supports it

    @property
    def limit(self) -> float:
        """Training loss that counts as divergence."""
        return LIMIT * math.log(2) * (1 + self.outline)

    def rate(self, groups: int) -> Callable[[float], np.ndarray]:
        """Learning rate of each layer group as a function of training progress, 0 to 1."""
        highest = np.geomspace(self.lr / self.spread, self.lr, groups)

        def at(done: float) -> np.ndarray:
            if done < self.warmup:
                return highest * done / self.warmup
            return SchedCos(highest, 0.0)((done - self.warmup) / (1 - self.warmup))

        return at


# The best of those tried on real patches, in grey levels
DEFAULT = Recipe(lr=3e-4, spread=5.0, warmup=0.25, smoothing=0.1)
SCRATCH = Recipe(lr=3e-3, batch=64, warmup=0.25, smoothing=0.1)
NODULE = replace(SCRATCH, outline=4.0)


def one_of_each(nodules: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows of one patch of each nodule, patches and order at random; ``nodules`` has the nodule of each, (N,)."""
    order = rng.permutation(len(nodules))
    _, first = np.unique(nodules[order], return_index=True)
    return order[rng.permutation(first)]


class ImageLoader(DataLoader):
    """Batches of images (B, C, 64, 64) and their labels.

    With a ``seed`` they are sampled by nodule and augmented, and come with outlines (B, 1, 64, 64), NaN where unknown.
    """

    def __init__(self, part: Part, batch: int, batches: int, seed: int | None = None) -> None:
        super().__init__(range(batches), bs=1, device=device())
        self.part, self.y, self.batch, self.batches = part, torch.tensor(part.y), batch, batches
        self.draws = None if seed is None else np.random.default_rng(seed)
        self.order = self.epochs()  # goes on where the last validation interrupted an epoch

    def epochs(self) -> Iterator[int]:
        """The rows of one epoch after another, without end."""
        while True:
            yield from one_of_each(self.part.nodules, self.draws)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, ...]]:
        """Gather whole batches at once."""
        rows = np.arange(len(self.y))
        if self.draws:
            rows = np.fromiter(islice(self.order, self.batches * self.batch), int)
        for chunk in np.array_split(rows, self.batches):
            part = self.part.take(chunk)
            images = tensor(part.images)
            if self.draws is None:
                yield images, self.y[chunk]
                continue
            seen = transforms.augment(torch.cat([images, tensor(part.outlines)], 1), self.draws)
            yield seen[:, :-1], self.y[chunk], seen[:, -1:]


class FrozenStatistics(Callback):
    """Keep 2D batch norm in evaluation mode; fastai has just switched it to training mode."""

    def before_train(self) -> None:
        """Before each epoch."""
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class Watch(Callback):
    """Show progress; stop a training that diverges and record where."""

    order = 60  # after fastai's recorder

    def __init__(self, name: str, steps: int, limit: float) -> None:
        self.bar, self.limit, self.stopped = tqdm(total=steps, desc=name, unit="step"), limit, ""

    def after_batch(self) -> None:
        """Check the smoothed training loss."""
        if not self.training:
            return
        self.bar.update()
        loss = float(self.recorder.smooth_loss.value)
        if not loss < self.limit:  # true for NaN too
            self.stopped = f"diverged at step {self.bar.n}: training loss {loss:.3g} is not below {self.limit:.2f}"
            raise CancelFitException

    def after_fit(self) -> None:
        """Close the bar, even after a stop."""
        self.bar.close()


def train(
    network: nn.Module, parts: Parts, recipe: Recipe, *, epochs: float, name: str, checks: int = 3, seed: int = 0
) -> Training:
    """Train all layers of ``network``, in place.

    Args:
        network: maps pixel values (N, C, 64, 64) to logits (N, 2), and in training perhaps also to an outline; may have
            a method ``groups`` that returns its layer groups.
        parts: patches to train and validate on.
        recipe: how to train.
        epochs: passes over the training nodules.
        name: label of the progress bar.
        checks: validations, evenly spread over the training.
        seed: of batches, augmentation and dropout.

    Returns:
        The network with its history.
    """
    nodules = len(np.unique(parts.train.nodules))
    batches = max(1, round(epochs * nodules / recipe.batch / checks))  # per validation
    valid = ImageLoader(parts.valid, CHECK_BATCH, -(-len(parts.valid) // CHECK_BATCH))
    loaders = DataLoaders(ImageLoader(parts.train, recipe.batch, batches, seed), valid, device=device())
    loaders.n_inp = 1  # a batch is images and what to learn from them
    groups = getattr(network, "groups", lambda: [list(network.parameters())])()
    model = Mixed(network, recipe.bfloat16)

    def loss(out: Tensor | tuple[Tensor, Tensor], target: Tensor, inside: Tensor | None = None) -> Tensor:
        logits, outline = (out, None) if isinstance(out, Tensor) else out
        shares = F.one_hot(target, 2).float()
        if model.training:
            shares = shares * (1 - recipe.smoothing) + recipe.smoothing / 2
        further = 0 if outline is None else recipe.outline * small.outline_loss(outline, inside)
        return recipe.loss(logits, shares) + further

    watch = Watch(name, checks * batches, recipe.limit)
    callbacks = [watch, ParamScheduler({"lr": recipe.rate(len(groups))})]
    callbacks += [FrozenStatistics()] * recipe.frozen_statistics
    with no_random(seed):
        learn = Learner(loaders, model, loss, ADAM, splitter=lambda _: groups, metrics=accuracy, cbs=callbacks)
        started = time.perf_counter()
        learn.fit(checks)
        seconds = time.perf_counter() - started
    training = heads.recorded(learn, seconds)
    scale = recipe.batch / nodules
    history = training.history.assign(epoch=scale * batches * training.history["epoch"])
    recorded = training.steps.assign(epoch=scale * np.arange(len(training.steps)))
    return Training(training.model, history, recorded, seconds, watch.stopped)


def head_first(spec: bodies.Spec, unit: str, bank: Bank, parts: Parts, seed: int = 0) -> tuple[Network, pd.DataFrame]:
    """A network with its head trained on the bank of its frozen body, and the head's history.

    The first half of LP-FT, "linear probing, then fine-tuning" (Kumar et al. 2022, arXiv 2202.10054).

    Args:
        spec: of the bank's body.
        unit: of the pixels.
        bank: features of the patches in several views.
        parts: patches to train and validate on.
        seed: of the head.
    """
    trained = heads.train(bank, parts, PROBE, seed)
    return Network(bodies.build(spec, unit), spec.pool, trained.model), trained.history


def cross_validate(
    make: Callable[[Parts], nn.Module],
    part: Part,
    fold: np.ndarray,
    recipe: Recipe,
    *,
    epochs: float,
    name: str,
    seed: int = 0,
) -> tuple[np.ndarray, list[nn.Module]]:
    """Train once per fold on the other folds and predict the patches left out.

    Patches of fold -1 are of another source: only trained on, and not if one of the same unit is left out.

    Args:
        make: returns a network to start from, given the patches to train and validate on.
        part: all N patches.
        fold: of each patch, (N,).
        recipe: how to train.
        epochs: passes over the training nodules of a fold.
        name: label of the progress bar.
        seed: of the networks' first weights and the trainings.

    Returns:
        Probabilities (M, 8) as from :func:`nodules.networks.network.predict`, of the M patches in a fold; the network
        of each fold.
    """
    p, networks = np.empty((len(part), SYMMETRIES)), []
    for k in np.unique(fold[fold >= 0]):
        left_out = np.flatnonzero(fold == k)
        known = (fold == -1) & np.isin(part.units, part.units[left_out])
        rows = np.flatnonzero((fold != k) & ~known)
        parts = Parts(part.take(rows), part.take(left_out), part.take(np.arange(0)))
        with no_random(seed):
            network = make(parts)
        trained = train(network, parts, recipe, epochs=epochs, name=f"{name}, fold {k + 1}", checks=1, seed=seed)
        p[left_out] = predict(trained.model, parts.valid.images)
        networks.append(network)
    return p[fold >= 0], networks
