"""Heads trained through fastai on a feature bank: schedules, the learning-rate finder, test-time augmentation."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401  gives learners no_bar
from fastai.callback.schedule import LRFinder, ParamScheduler, SchedCos, minimum, slide, steep, valley
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import no_random
from fastai.vision.learner import create_head
from torch import Tensor, nn

from nodules.device import device
from nodules.errors import InputError, within
from nodules.features import Bank
from nodules.models import parameters

BATCH = 256
HIDDEN = 128
BETA = 0.25
FINDER = (1e-7, 10, 100)  # first and last rate, steps
SCHEDULES = ("constant", "restarts", "one-cycle", "flat-cosine")
RULES = ("mean", "log", "beta")
SUGGESTIONS = {"valley": valley, "slide": slide, "minimum": minimum, "steep": steep}


class BankLoader(DataLoader):
    """Batches of a bank's features and labels; in training a fresh view of each patch is drawn in each epoch."""

    def __init__(
        self, bank: Bank, rows: np.ndarray, y: np.ndarray, batch: int, train: bool, draw: bool, seed: int
    ) -> None:
        super().__init__(rows, bs=batch, shuffle=train, drop_last=train and len(rows) > batch, device=device())
        self.bank, self.y, self.draw = bank.features, torch.tensor(y), draw
        self.rng = random.Random(seed)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole batches at once."""
        views = np.random.default_rng(self.rng.getrandbits(32))
        for chunk in self.chunkify(samples):
            rows = self.dataset[chunk]
            view = views.integers(self.bank.shape[1], size=len(rows)) if self.draw else np.zeros(len(rows), int)
            yield torch.from_numpy(self.bank[rows, view]).float(), self.y[rows]


class MemoryLRFinder(LRFinder):
    """fastai's finder keeps the model in a pickled file meanwhile; this one keeps it in memory."""

    def before_fit(self) -> None:
        """Remember the weights."""
        ParamScheduler.before_fit(self)
        self.start, self.best_loss = copy.deepcopy(self.learn.model.state_dict()), float("inf")

    def after_fit(self) -> None:
        """Put the weights back."""
        self.learn.model.load_state_dict(self.start)


@dataclass(frozen=True)
class Training:
    """A trained head with what was recorded.

    ``history`` has a row an epoch (``epoch, train_loss, valid_loss, accuracy``), ``steps`` a row a batch
    (``epoch`` as a fraction, ``loss``, ``lr``).
    """

    model: nn.Module
    history: pd.DataFrame
    steps: pd.DataFrame
    seconds: float


def check(epochs: int, lr: float, schedule: str, cycle_len: int = 1, cycle_mult: int = 1) -> None:
    """Refuse numbers of epochs, learning rates and schedules that can't be trained with, before any work."""
    within(1, 100_000, epochs=epochs)
    if not lr > 0:
        raise InputError(f"lr={lr}: a learning rate is above 0; take one such as 0.001")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: no such schedule; take one of {', '.join(SCHEDULES)}")
    if schedule == "restarts":
        cycles(epochs, cycle_len, cycle_mult)


def cycles(epochs: int, cycle_len: int, cycle_mult: int) -> list[int]:
    """Lengths of the cycles of cosine annealing with restarts (Loshchilov & Hutter 2017), in epochs.

    The first takes ``cycle_len``, each further one ``cycle_mult`` times the one before. fastai's ``fit_sgdr`` does the
    same but divides by zero where ``cycle_mult`` is 1.

    Raises:
        InputError: they do not add up to ``epochs``.
    """
    within(1, 100_000, cycle_len=cycle_len, cycle_mult=cycle_mult)
    lengths = [cycle_len]
    while sum(lengths) < epochs:
        lengths.append(lengths[-1] * cycle_mult)
    if sum(lengths) > epochs:
        cycle, whole = f"cycle_len={cycle_len}, cycle_mult={cycle_mult}", sum(lengths)
        raise InputError(f"epochs={epochs}: no whole cycles of {cycle}; take epochs={whole}")
    return lengths


def falling(lengths: list[int], lr: np.ndarray) -> Callable[[float], np.ndarray]:
    """A cosine from ``lr`` to 0 in each cycle, as a function of the share of the training that is done.

    fastai's ``combine_scheds`` refuses shares whose sum rounding keeps from 1, such as ten tenths.
    """
    ends = np.cumsum(lengths)

    def rate(done: float) -> np.ndarray:
        epoch = done * ends[-1]
        cycle = np.searchsorted(ends, epoch + 1e-6, side="right")  # rounding must not end a cycle a batch late
        return SchedCos(lr, 0.0)(1 + (epoch - ends[cycle]) / lengths[cycle])

    return rate


def fit(learn: Learner, epochs: int, lr: float | slice, schedule: str, cycle_len: int = 1, cycle_mult: int = 1) -> None:
    """Train with a schedule by name; ``lr`` is the highest rate, a slice gives each layer group its own."""
    if schedule == "one-cycle":
        learn.fit_one_cycle(epochs, lr)
    elif schedule == "flat-cosine":
        learn.fit_flat_cos(epochs, lr)
    elif schedule == "restarts":
        learn.create_opt()
        learn.opt.set_hyper("lr", lr)  # a slice becomes one rate for each layer group
        highest = np.array([hyper["lr"] for hyper in learn.opt.hypers])
        falls = falling(cycles(epochs, cycle_len, cycle_mult), highest)
        learn.fit(epochs, cbs=ParamScheduler({"lr": falls}))
    else:
        learn.fit(epochs, lr)


def head(features: int) -> nn.Module:
    """A head like fastai's, without pooling: batch norm, 128 hidden units, dropout 0.5 before two logits."""
    return create_head(features, 2, lin_ftrs=[HIDDEN], ps=[0.0, 0.5], pool=False)


def describe_head(features: int) -> dict[str, object]:
    """The head as a last stage of :func:`nodules.models.stages`."""
    return {"name": "head", "channels": features, "side": float("nan"), "parameters": parameters(head(features))}


def learner(bank: Bank, y: np.ndarray, split: np.ndarray, draw: bool, seed: int) -> Learner:
    """A fastai ``Learner`` of a fresh head.

    Args:
        bank: features of N patches.
        y: labels, (N,).
        split: ``train``, ``valid`` or ``test`` of each patch, (N,).
        draw: whether each epoch draws one of the bank's views of each patch (augmentation), or takes the plain one.
        seed: of the batches; the head's weights come from torch's generator.
    """
    rows = {part: np.flatnonzero(split == part) for part in ("train", "valid")}
    train, valid = (
        BankLoader(bank, rows[part], y, BATCH, train=part == "train", draw=draw and part == "train", seed=seed)
        for part in rows
    )
    model = head(bank.features.shape[2]).to(device())
    dls = DataLoaders(train, valid, device=device())
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=Adam, metrics=accuracy)


def train(
    bank: Bank,
    y: np.ndarray,
    split: np.ndarray,
    *,
    epochs: int,
    lr: float,
    schedule: str = "constant",
    cycle_len: int = 1,
    cycle_mult: int = 1,
    draw: bool = False,
    seed: int = 0,
) -> Training:
    """Train a head; the arguments are those of :func:`learner` and :func:`fit`. The same seed gives the same head."""
    check(epochs, lr, schedule, cycle_len, cycle_mult)
    with no_random(seed):
        learn = learner(bank, y, split, draw, seed)
        started = time.perf_counter()
        with learn.no_bar(), learn.no_logging():
            fit(learn, epochs, lr, schedule, cycle_len, cycle_mult)
        seconds = time.perf_counter() - started
    names = ["train_loss", "valid_loss", "accuracy"]
    history = pd.DataFrame(np.array(learn.recorder.values, dtype=float), columns=names)
    history.insert(0, "epoch", np.arange(1, epochs + 1))
    steps = pd.DataFrame({"loss": np.array(learn.recorder.losses, dtype=float), "lr": learn.recorder.lrs})
    steps.insert(0, "epoch", np.arange(len(steps)) / len(learn.dls.train))
    return Training(learn.model.eval(), history, steps, seconds)


def repeat(
    bank: Bank, y: np.ndarray, split: np.ndarray, seeds: list[int], **options: Any
) -> tuple[pd.DataFrame, np.ndarray, float]:
    """Train one head for each seed; ``options`` are those of :func:`train`.

    Returns:
        Their histories in one table with a column ``seed``; probabilities of malignancy of every patch, view 0,
        (seeds, N); the median of their training times in seconds.
    """
    trained = [train(bank, y, split, seed=seed, **options) for seed in seeds]
    history = pd.concat(
        [one.history.assign(seed=seed) for seed, one in zip(seeds, trained, strict=True)], ignore_index=True
    )
    plain = Bank(bank.features[:, :1], bank.key, bank.patches_per_second)
    p = np.stack([predict(one.model, plain, np.arange(len(y)))[:, 0] for one in trained])
    return history, p, float(np.median([one.seconds for one in trained]))


def find_lr(
    bank: Bank, y: np.ndarray, split: np.ndarray, draw: bool, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Run fastai's learning-rate finder (Smith 2017): a table ``lr, loss`` and the four suggestions by name."""
    with no_random(seed):
        learn = learner(bank, y, split, draw, seed)
        start, end, steps = FINDER
        with learn.no_bar(), learn.no_logging():
            learn.fit(steps // len(learn.dls.train) + 1, cbs=MemoryLRFinder(start, end, steps))
    table = pd.DataFrame({"lr": learn.recorder.lrs, "loss": np.array(learn.recorder.losses, dtype=float)})
    # fastai leaves out the first tenth and the last five steps before it suggests
    lrs, losses = (torch.tensor(table[name].to_numpy()[steps // 10 : -5]) for name in ("lr", "loss"))
    return table, {name: float(suggest(lrs, losses, steps)[0]) for name, suggest in SUGGESTIONS.items()}


@torch.inference_mode()
def predict(model: nn.Module, bank: Bank, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Probability of malignancy of each view of each patch, (len(rows), V).

    Raises:
        InputError: as of :func:`finite`.
    """
    out = np.empty((len(rows), bank.features.shape[1]))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        views = torch.from_numpy(bank.features[part]).to(device()).float()
        logits = model(views.flatten(0, 1)).view(len(part), -1, 2)
        out[start : start + BATCH] = logits.double().softmax(-1)[..., 1].cpu()
    return finite(out)


def finite(p: np.ndarray) -> np.ndarray:
    """Probabilities as they are.

    Raises:
        InputError: the network gives no numbers, since its training diverged.
    """
    if not np.isfinite(p).all():
        raise InputError("the network gives no numbers any more: its training diverged; take a lower learning rate")
    return p


def check_rule(rule: str) -> None:
    """Refuse an unknown rule of test-time augmentation."""
    if rule not in RULES:
        raise InputError(f"rule={rule!r}: no such rule; take one of {', '.join(RULES)}")


def average(p: np.ndarray, rule: str) -> np.ndarray:
    """Average over views (test-time augmentation), (N, V) to (N,); view 0 is the plain patch.

    ``mean`` averages probabilities; ``log`` averages their logarithms, as fastai 0.7's ``TTA`` returned them; ``beta``
    is fastai 2's ``tta``: a quarter plain, three quarters the mean of the augmented views.
    """
    check_rule(rule)
    if p.shape[1] == 1:
        return p[:, 0]
    if rule == "beta":
        return BETA * p[:, 0] + (1 - BETA) * p[:, 1:].mean(axis=1)
    if rule == "mean":
        return p.mean(axis=1)
    smallest = np.finfo(float).tiny
    malignant, benign = (np.exp(np.log(np.maximum(q, smallest)).mean(axis=1)) for q in (p, 1 - p))
    return malignant / (malignant + benign)
