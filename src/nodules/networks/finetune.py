"""All layers trained on images: augmented, warmed up, watched for divergence, within a budget of computation.

Two recipes differ in what :class:`Recipe` names and in nothing else, so a notebook can change one factor at a time and
say which one mattered.
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nodules.data import split, transforms
from nodules.data.split import Part, Parts
from nodules.errors import InputError
from nodules.networks import bodies, heads
from nodules.networks.bank import Bank
from nodules.networks.device import device
from nodules.networks.heads import Learner, Training
from nodules.networks.network import SYMMETRIES, Mixed, Network, predict

STEP_BATCH = 32  # patches in a step
CHECKS = 3  # validations in a training
LIMIT = 4 * math.log(2)  # a smoothed training loss above it, four times that of a fair coin, is divergence
# The head before all layers; with many more epochs it overfits
PROBE = heads.Recipe(epochs=5, lr=heads.LR, augment=True)


@dataclass(frozen=True)
class Recipe:
    """How all layers are trained: Adam, the rate warmed up linearly, then down to 0 along a cosine."""

    lr: float  # the highest, of the last layer group
    spread: float = 1.0  # how much smaller the rate of the first group is (discriminative learning rates)
    warmup: float = 0.0  # share of the training in which the rate rises
    frozen_statistics: bool = False  # batch norm in the body keeps its means and variances
    smoothing: float = 0.0  # of labels
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # of logits and the shares of both classes (N, 2)
    bfloat16: bool = True  # where the machine multiplies it in hardware

    def rate(self, groups: int) -> Callable[[float], np.ndarray]:
        """Learning rate of each layer group, as a function of the share of the training that is done."""
        highest = np.geomspace(self.lr / self.spread, self.lr, groups)

        def at(done: float) -> np.ndarray:
            if done < self.warmup:
                return highest * done / self.warmup
            return SchedCos(highest, 0.0)((done - self.warmup) / (1 - self.warmup))

        return at


# The best on real patches of those tried; the rates are per layer group
DEFAULT = Recipe(lr=3e-4, spread=5.0, warmup=0.25, smoothing=0.1)
SCRATCH = Recipe(lr=3e-3, warmup=0.25, smoothing=0.1)


class Budget:
    """Time to train in, shared out before anything is trained, so that the same parameters give the same training.

    How many steps a share pays for follows from the multiplications that a network needs and from ``gflops``, what the
    profile says that its machine does; what the clock says changes only what is shown.
    """

    def __init__(self, minutes: float, gflops: float) -> None:
        if not (minutes > 0 and gflops > 0):
            raise InputError(f"budget_min={minutes}, gflops={gflops}: both are above 0; take 5 and 150 to begin with")
        self.minutes, self.gflops, self.started = minutes, gflops, time.monotonic()

    def steps(self, network: nn.Module, share: float, checked: int) -> int:
        """Steps that this share of the budget pays for, the validations on ``checked`` patches paid first."""
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            network.eval()(torch.zeros(2, 1, 64, 64, device=device()))
        patches = share * self.minutes * 60 * self.gflops * 1e9 / (counter.get_total_flops() / 2)
        # Backward takes twice as long as forward
        return max(CHECKS, int((patches - CHECKS * checked) / 3 / STEP_BATCH) // CHECKS * CHECKS)

    def left(self) -> str:
        """Minutes left, to show."""
        left = max(0.0, self.minutes - (time.monotonic() - self.started) / 60)
        return f"{left:.1f} of {self.minutes:g} min left"


class ImageLoader(DataLoader):
    """Batches of images (B, 1, 64, 64) and their labels; with a ``seed`` shuffled and augmented in each epoch."""

    def __init__(self, part: Part, batches: int, seed: int | None = None) -> None:
        super().__init__(range(batches), bs=1, device=device())
        self.images, self.y, self.batches = part.images, torch.tensor(part.y), batches
        self.draws = None if seed is None else np.random.default_rng(seed)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole batches at once."""
        rows = np.arange(len(self.y))
        if self.draws:
            passes, most = -(-self.batches * STEP_BATCH // len(rows)), self.batches * STEP_BATCH
            rows = np.concatenate([self.draws.permutation(rows) for _ in range(passes)])[:most]
        for chunk in np.array_split(rows, self.batches):
            images = torch.from_numpy(self.images[chunk].astype(np.float32))[:, None]
            yield transforms.augment(images, self.draws) if self.draws else images, self.y[chunk]


class FrozenStatistics(Callback):
    """Keep every two-dimensional batch norm in evaluation mode; fastai has set training mode just before."""

    def before_train(self) -> None:
        """Before each epoch."""
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class Watch(Callback):
    """Show progress; stop a training that diverges, and say where."""

    order = 60  # after fastai's recorder

    def __init__(self, name: str, steps: int) -> None:
        self.bar, self.stopped = tqdm(total=steps, desc=name, unit="step"), ""

    def after_batch(self) -> None:
        """Look at the smoothed training loss."""
        if not self.training:
            return
        self.bar.update()
        loss = float(self.recorder.smooth_loss.value)
        if not loss < LIMIT:  # NaN is not either
            self.stopped = f"diverged at step {self.bar.n}: training loss {loss:.3g} is not below {LIMIT:.2f}"
            raise CancelFitException

    def after_fit(self) -> None:
        """Close the bar, also after a stop."""
        self.bar.close()


@dataclass(frozen=True)
class Trained(Training):
    """A trained network; ``stopped`` says where and why it diverged, or is empty."""

    stopped: str


def train(network: nn.Module, parts: Parts, recipe: Recipe, *, steps: int, name: str, seed: int = 0) -> Trained:
    """Train all layers of ``network``, in place.

    Args:
        network: takes (N, 1, 64, 64) pixel values, gives logits (N, 2); with a method ``groups`` where its layers are
            to have rates of their own.
        parts: patches to train and to validate on.
        recipe: how.
        steps: batches of ``STEP_BATCH`` patches, a multiple of ``CHECKS``: after each ``1 / CHECKS`` it is validated.
        name: shown with the progress.
        seed: of batches, augmentation and dropout.

    Returns:
        The network with its history; ``epoch`` counts passes over the training patches.
    """
    batches = steps // CHECKS
    valid = ImageLoader(parts.valid, -(-len(parts.valid) // (8 * STEP_BATCH)))
    loaders = DataLoaders(ImageLoader(parts.train, batches, seed), valid, device=device())
    groups = getattr(network, "groups", lambda: [list(network.parameters())])()
    model = Mixed(network, recipe.bfloat16)

    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        shares = F.one_hot(target, 2).float()
        return recipe.loss(logits, shares * (1 - recipe.smoothing) + recipe.smoothing / 2 if model.training else shares)

    watch = Watch(name, steps)
    callbacks = [watch, ParamScheduler({"lr": recipe.rate(len(groups))})]
    callbacks += [FrozenStatistics()] * recipe.frozen_statistics
    with no_random(seed):
        learn = Learner(loaders, model, smoothed, Adam, splitter=lambda _: groups, metrics=accuracy, cbs=callbacks)
        started = time.perf_counter()
        learn.fit(CHECKS)
        seconds = time.perf_counter() - started
    training = heads.recorded(learn, seconds)
    scale = STEP_BATCH / len(parts.train)
    history = training.history.assign(epoch=scale * batches * training.history["epoch"])
    recorded = training.steps.assign(epoch=scale * np.arange(len(training.steps)))
    return Trained(training.model, history, recorded, seconds, watch.stopped)


def head_first(spec: bodies.Spec, unit: str, bank: Bank, parts: Parts, seed: int = 0) -> tuple[Network, pd.DataFrame]:
    """A network whose head has been trained on the bank of its frozen body, and the history of that head.

    The first half of LP-FT, "linear probing, then fine-tuning" (Kumar et al. 2022, arXiv 2202.10054).

    Args:
        spec: of the bank's body.
        unit: of the pixels.
        bank: features of the patches in several views.
        parts: patches to train and to validate on.
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
    """Train once for each fold and predict the patches that were left out.

    Args:
        make: a network to start from, given the patches to train and to validate on.
        part: all N patches.
        kept_together: what no two folds share, such as the patient of each patch, (N,).
        recipe: how.
        folds: how many.
        epochs: passes over the training patches of a fold.
        seed: of the folds and the trainings.

    Returns:
        Probabilities (N, 8) as of :func:`nodules.networks.network.predict`, and the fold of each patch, (N,).
    """
    p, fold = np.empty((len(part), SYMMETRIES)), np.empty(len(part), dtype=int)
    for k, left_out in enumerate(split.folds(part.y, kept_together, folds, seed)):
        train_rows, none = np.setdiff1d(np.arange(len(part)), left_out), np.array([], dtype=int)
        parts = Parts(part.take(train_rows), part.take(left_out), part.take(none))
        steps = max(CHECKS, round(epochs * len(train_rows) / STEP_BATCH) // CHECKS * CHECKS)
        trained = train(make(parts), parts, recipe, steps=steps, name=f"fold {k + 1} of {folds}", seed=seed)
        p[left_out], fold[left_out] = predict(trained.model, parts.valid.images), k
    return p, fold
