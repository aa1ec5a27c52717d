"""Training of all layers on images: sampling by nodule, augmentation, warm-up, divergence checks.

Trainings differ only in the fields of :class:`Recipe`, so a notebook can change one factor at a time. An epoch shows
each nodule once, by a slice drawn at random: otherwise large nodules, which have many slices, would dominate.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import no_random
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nodules.data import split, transforms
from nodules.data.split import Part, Parts
from nodules.networks import bodies, heads
from nodules.networks.bank import Bank
from nodules.networks.device import device
from nodules.networks.heads import Learner, Training
from nodules.networks.network import SYMMETRIES, Mixed, Network, predict

CHECK_BATCH = 256  # patches per forward pass of a validation
LIMIT = 4 * math.log(2)  # smoothed training loss that counts as divergence, four times that of guessing
# The head alone, before all layers; many more epochs overfit
PROBE = heads.Recipe(epochs=5, lr=heads.LR, augment=True)


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
    bfloat16: bool = True  # where the hardware supports it

    def rate(self, groups: int) -> Callable[[float], np.ndarray]:
        """Learning rate of each layer group as a function of training progress, 0 to 1."""
        highest = np.geomspace(self.lr / self.spread, self.lr, groups)

        def at(done: float) -> np.ndarray:
            if done < self.warmup:
                return highest * done / self.warmup
            return SchedCos(highest, 0.0)((done - self.warmup) / (1 - self.warmup))

        return at


# The best of those tried on real patches
DEFAULT = Recipe(lr=3e-4, spread=5.0, warmup=0.25, smoothing=0.1)
SCRATCH = Recipe(lr=3e-3, batch=64, warmup=0.25, smoothing=0.1)


def one_of_each(nodules: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows of one patch of each nodule, patches and order at random; ``nodules`` has the nodule of each, (N,)."""
    order = rng.permutation(len(nodules))
    _, first = np.unique(nodules[order], return_index=True)
    return order[rng.permutation(first)]


class ImageLoader(DataLoader):
    """Batches of images (B, 1, 64, 64) and their labels; with a ``seed``, sampled by nodule and augmented."""

    def __init__(self, part: Part, batch: int, batches: int, seed: int | None = None) -> None:
        super().__init__(range(batches), bs=1, device=device())
        self.images, self.y, self.nodules = part.images, torch.tensor(part.y), part.nodules
        self.batch, self.batches = batch, batches
        self.draws = None if seed is None else np.random.default_rng(seed)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole batches at once."""
        rows = np.arange(len(self.y))
        if self.draws:
            most, epochs = self.batches * self.batch, []
            while sum(map(len, epochs)) < most:
                epochs.append(one_of_each(self.nodules, self.draws))
            rows = np.concatenate(epochs)[:most]
        for chunk in np.array_split(rows, self.batches):
            images = torch.from_numpy(self.images[chunk].astype(np.float32))[:, None]
            yield transforms.augment(images, self.draws) if self.draws else images, self.y[chunk]


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

    def __init__(self, name: str, steps: int) -> None:
        self.bar, self.stopped = tqdm(total=steps, desc=name, unit="step"), ""

    def after_batch(self) -> None:
        """Check the smoothed training loss."""
        if not self.training:
            return
        self.bar.update()
        loss = float(self.recorder.smooth_loss.value)
        if not loss < LIMIT:  # true for NaN too
            self.stopped = f"diverged at step {self.bar.n}: training loss {loss:.3g} is not below {LIMIT:.2f}"
            raise CancelFitException

    def after_fit(self) -> None:
        """Close the bar, even after a stop."""
        self.bar.close()


@dataclass(frozen=True)
class Trained(Training):
    """A trained network; ``stopped`` says where and why it diverged, or is empty."""

    stopped: str


def train(
    network: nn.Module, parts: Parts, recipe: Recipe, *, epochs: float, name: str, checks: int = 3, seed: int = 0
) -> Trained:
    """Train all layers of ``network``, in place.

    Args:
        network: maps pixel values (N, 1, 64, 64) to logits (N, 2); may have a method ``groups`` that returns its layer
            groups.
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
    groups = getattr(network, "groups", lambda: [list(network.parameters())])()
    model = Mixed(network, recipe.bfloat16)

    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        shares = F.one_hot(target, 2).float()
        return recipe.loss(logits, shares * (1 - recipe.smoothing) + recipe.smoothing / 2 if model.training else shares)

    watch = Watch(name, checks * batches)
    callbacks = [watch, ParamScheduler({"lr": recipe.rate(len(groups))})]
    callbacks += [FrozenStatistics()] * recipe.frozen_statistics
    with no_random(seed):
        learn = Learner(loaders, model, smoothed, Adam, splitter=lambda _: groups, metrics=accuracy, cbs=callbacks)
        started = time.perf_counter()
        learn.fit(checks)
        seconds = time.perf_counter() - started
    training = heads.recorded(learn, seconds)
    scale = recipe.batch / nodules
    history = training.history.assign(epoch=scale * batches * training.history["epoch"])
    recorded = training.steps.assign(epoch=scale * np.arange(len(training.steps)))
    return Trained(training.model, history, recorded, seconds, watch.stopped)


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
    kept_together: np.ndarray,
    recipe: Recipe,
    *,
    folds: int,
    epochs: float,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Train once per fold and predict the held-out patches.

    Args:
        make: returns a network to start from, given the patches to train and validate on.
        part: all N patches.
        kept_together: the unit of each patch, such as the patient, that no two folds share, (N,).
        recipe: how to train.
        folds: number of folds.
        epochs: passes over the training nodules of a fold.
        seed: of the folds and the trainings.

    Returns:
        Probabilities (N, 8) as from :func:`nodules.networks.network.predict`, and the fold of each patch, (N,).
    """
    p, fold = np.empty((len(part), SYMMETRIES)), np.empty(len(part), dtype=int)
    for k, left_out in enumerate(split.folds(part.y, kept_together, folds, seed)):
        train_rows, none = np.setdiff1d(np.arange(len(part)), left_out), np.array([], dtype=int)
        parts = Parts(part.take(train_rows), part.take(left_out), part.take(none))
        name = f"fold {k + 1} of {folds}"
        trained = train(make(parts), parts, recipe, epochs=epochs, name=name, checks=1, seed=seed)
        p[left_out], fold[left_out] = predict(trained.model, parts.valid.images), k
    return p, fold
