"""Heads trained with fastai on a feature bank: schedules, the learning-rate finder, test-time augmentation."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai import learner as fastai
from fastai.callback.schedule import LRFinder, ParamScheduler, SchedCos, minimum, slide, steep, valley
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import no_random
from fastcore.basics import noop
from torch import Tensor, nn

from nodules.data.split import Part, Parts
from nodules.errors import InputError, within
from nodules.networks import RULES
from nodules.networks.bank import Bank
from nodules.networks.bodies import parameters
from nodules.networks.device import device

HEAD_BATCH = 256  # feature vectors per step
HIDDEN = 128
LR = 1e-3  # suits the heads of all banks here
BETA = 0.25
SUGGESTIONS = {"valley": valley, "slide": slide, "minimum": minimum, "steep": steep}


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    Attributes:
        epochs: passes over the training patches.
        lr: the learning rate.
        augment: whether each epoch draws one of the bank's views of each patch, or uses the plain one.

    Raises:
        InputError: invalid epochs or learning rate.
    """

    epochs: int
    lr: float
    augment: bool = False

    def __post_init__(self) -> None:
        within(1, 100_000, epochs=self.epochs)
        if not self.lr > 0:
            raise InputError(f"lr={self.lr}: must be above 0; use one such as 0.001")


class BankLoader(DataLoader):
    """Batches of a bank's features and labels; with ``augment``, a random view of each patch in each epoch."""

    def __init__(self, bank: Bank, part: Part, train: bool, augment: bool, seed: int) -> None:
        full = train and len(part) > HEAD_BATCH
        super().__init__(np.arange(len(part)), bs=HEAD_BATCH, shuffle=train, drop_last=full, device=device())
        self.bank, self.rows, self.y, self.augment = bank, part.rows, torch.tensor(part.y), augment
        self.rng = random.Random(seed)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole batches at once."""
        views = np.random.default_rng(self.rng.getrandbits(32))
        for chunk in self.chunkify(samples):
            places = self.dataset[chunk]
            view = np.zeros(len(places), int)
            if self.augment:
                view = views.integers(self.bank.features.shape[1], size=len(places))
            yield self.bank.gathered(self.rows[places], view).float(), self.y[places]


class MemoryLRFinder(LRFinder):
    """fastai's finder, but the initial state stays in memory instead of a pickled file."""

    def before_fit(self) -> None:
        """Remember the weights and the optimizer's state."""
        ParamScheduler.before_fit(self)
        self.start = copy.deepcopy((self.learn.model.state_dict(), self.learn.opt.state_dict()))
        self.best_loss = float("inf")

    def after_fit(self) -> None:
        """Put them back."""
        weights, optimizer = self.start
        self.learn.model.load_state_dict(weights)
        self.learn.opt.load_state_dict(optimizer)


class Learner(fastai.Learner):
    """fastai's learner, but silent, with a finder that writes no file and restarts that allow equal cycles."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = noop
        if hasattr(self, "progress"):
            self.remove_cb(self.progress)

    def lr_find(self, start_lr: float = 1e-7, end_lr: float = 10, num_it: int = 100) -> dict[str, float]:
        """Raise the rate with each batch (Smith 2017); return fastai's four suggestions."""
        self.fit(num_it // len(self.dls.train) + 1, cbs=MemoryLRFinder(start_lr, end_lr, num_it))
        # As in fastai, without the first tenth and the last five steps
        recorded = (np.array(values, dtype=float) for values in (self.recorder.lrs, self.recorder.losses))
        lrs, losses = (torch.tensor(values[num_it // 10 : -5]) for values in recorded)
        return {name: float(suggest(lrs, losses, num_it)[0]) for name, suggest in SUGGESTIONS.items()}

    def fit_sgdr(self, n_cycles: int, cycle_len: int, lr_max: float, cycle_mult: int = 1) -> None:
        """Cosine annealing with restarts; fastai's version divides by zero if ``cycle_mult`` is 1.

        Args:
            n_cycles: number of cycles.
            cycle_len: epochs of the first cycle.
            lr_max: initial rate of each cycle.
            cycle_mult: length of each cycle relative to the previous one.
        """
        lengths = [cycle_len * cycle_mult**i for i in range(n_cycles)]
        self.fit(sum(lengths), cbs=ParamScheduler({"lr": falling(lengths, lr_max)}))


@dataclass(frozen=True)
class Training:
    """A trained model and its history.

    ``history`` has one row per epoch (``epoch, train_loss, valid_loss, accuracy``), ``steps`` one row per batch
    (fractional ``epoch``, ``loss``, ``lr``). ``stopped`` says where and why it diverged, or is empty.
    """

    model: nn.Module
    history: pd.DataFrame
    steps: pd.DataFrame
    seconds: float
    stopped: str = ""


def cycles(epochs: int, cycle_len: int, cycle_mult: int) -> list[int]:
    """Lengths of the cycles of cosine annealing with restarts (Loshchilov & Hutter 2017), in epochs.

    The first is ``cycle_len`` long, each of the others ``cycle_mult`` times as long as the previous one.

    Raises:
        InputError: they don't add up to ``epochs``.
    """
    within(1, 100_000, cycle_len=cycle_len, cycle_mult=cycle_mult)
    lengths = [cycle_len]
    while sum(lengths) < epochs:
        lengths.append(lengths[-1] * cycle_mult)
    if sum(lengths) > epochs:
        cycle = f"cycle_len={cycle_len}, cycle_mult={cycle_mult}"
        raise InputError(f"epochs={epochs}: not a whole number of cycles of {cycle}; use epochs={sum(lengths)}")
    return lengths


def falling(lengths: list[int], lr: float) -> Callable[[float], float]:
    """A cosine from ``lr`` to 0 in each cycle, as a function of training progress, 0 to 1.

    fastai's ``combine_scheds`` rejects shares whose floating-point sum is not 1, such as ten tenths.
    """
    ends = np.cumsum(lengths)

    def rate(done: float) -> float:
        epoch = done * ends[-1]
        cycle = np.searchsorted(ends, epoch + 1e-6, side="right")  # else rounding could end a cycle one batch late
        return SchedCos(lr, 0.0)(1 + (epoch - ends[cycle]) / lengths[cycle])

    return rate


def head(features: int) -> nn.Module:
    """A head like fastai's, without pooling: batch norm, 128 hidden units, dropout 0.5 before two logits."""
    from fastai.vision.learner import create_head  # imports torchvision, which takes long

    return create_head(features, 2, lin_ftrs=[HIDDEN], ps=[0.0, 0.5], pool=False)


def describe_head(features: int) -> dict[str, object]:
    """The head as the last row of :func:`nodules.networks.bodies.stages`."""
    return {"name": "head", "channels": features, "side": float("nan"), "parameters": parameters(head(features))}


def dataloaders(bank: Bank, parts: Parts, augment: bool = False, seed: int = 0) -> DataLoaders:
    """Batches of features to train and validate on; ``augment`` as in :class:`Recipe`, ``seed`` of the batches."""
    train = BankLoader(bank, parts.train, train=True, augment=augment, seed=seed)
    valid = BankLoader(bank, parts.valid, train=False, augment=False, seed=seed)
    return DataLoaders(train, valid, device=device())


def learner(bank: Bank, parts: Parts, augment: bool = False, seed: int = 0) -> Learner:
    """A learner with a new head, initialised by torch's generator; arguments as for :func:`dataloaders`."""
    dls, model = dataloaders(bank, parts, augment, seed), head(bank.width).to(device())
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy)


def steps(learn: Learner) -> pd.DataFrame:
    """A learner's record of each step: fractional ``epoch``, smoothed ``loss``, ``lr``."""
    table = pd.DataFrame({"loss": np.array(learn.recorder.losses, dtype=float), "lr": learn.recorder.lrs})
    table.insert(0, "epoch", np.arange(len(table)) / len(learn.dls.train))
    return table


def recorded(learn: Learner, seconds: float) -> Training:
    """A learner's model with its history; ``seconds`` is the training time."""
    values = np.array(learn.recorder.values, dtype=float).reshape(-1, 3)
    history = pd.DataFrame(values, columns=["train_loss", "valid_loss", "accuracy"])
    history.insert(0, "epoch", np.arange(1, len(history) + 1))
    return Training(learn.model.eval(), history, steps(learn), seconds)


def train(bank: Bank, parts: Parts, recipe: Recipe, seed: int = 0) -> Training:
    """Train a head on a bank's features at a constant rate; the same seed gives the same head."""
    with no_random(seed):
        learn = learner(bank, parts, recipe.augment, seed)
        started = time.perf_counter()
        learn.fit(recipe.epochs, recipe.lr)
        seconds = time.perf_counter() - started
    return recorded(learn, seconds)


def repeat(bank: Bank, parts: Parts, recipe: Recipe, seeds: list[int]) -> tuple[pd.DataFrame, np.ndarray, float]:
    """Train one head per seed.

    Returns:
        Their histories in one table with a column ``seed``; probabilities of malignancy of every patch in the bank,
        view 0, (seeds, N); the median training time in seconds.
    """
    trainings = [train(bank, parts, recipe, seed) for seed in seeds]
    histories = [training.history.assign(seed=seed) for seed, training in zip(seeds, trainings, strict=True)]
    plain = Bank(bank.features[:, :1], bank.key, bank.patches_per_second)
    p = np.stack([predict(training.model, plain, np.arange(len(plain.features)))[:, 0] for training in trainings])
    return pd.concat(histories, ignore_index=True), p, float(np.median([training.seconds for training in trainings]))


@torch.inference_mode()
def predict(model: nn.Module, bank: Bank, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Probability of malignancy of each view of each patch, (len(rows), V).

    Raises:
        InputError: as for :func:`finite`.
    """
    out = np.empty((len(rows), bank.features.shape[1]))
    for start in range(0, len(rows), HEAD_BATCH):
        part = rows[start : start + HEAD_BATCH]
        views = torch.from_numpy(bank.features[part]).to(device()).float()
        logits = model(views.flatten(0, 1)).view(len(part), -1, 2)
        out[start : start + HEAD_BATCH] = logits.double().softmax(-1)[..., 1].cpu()
    return finite(out)


def finite(p: np.ndarray) -> np.ndarray:
    """Return probabilities unchanged.

    Raises:
        InputError: some are not finite, because the training diverged.
    """
    if not np.isfinite(p).all():
        raise InputError("the network's output is not finite: its training diverged; use a lower learning rate")
    return p


def average(p: np.ndarray, rule: str) -> np.ndarray:
    """Average over views (test-time augmentation), (N, V) to (N,); view 0 is the plain patch.

    ``mean`` averages probabilities; ``log`` averages their logarithms, as fastai 0.7's ``TTA`` returned them; ``beta``
    is fastai 2's ``tta``: a quarter plain, three quarters the mean of the augmented views.
    """
    if rule not in RULES:
        raise InputError(f"rule={rule!r}: no such rule; use one of {', '.join(RULES)}")
    if p.shape[1] == 1:
        return p[:, 0]
    if rule == "beta":
        return BETA * p[:, 0] + (1 - BETA) * p[:, 1:].mean(axis=1)
    if rule == "mean":
        return p.mean(axis=1)
    smallest = np.finfo(float).tiny
    malignant, benign = (np.exp(np.log(np.maximum(q, smallest)).mean(axis=1)) for q in (p, 1 - p))
    return malignant / (malignant + benign)
