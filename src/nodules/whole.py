"""All layers trained on pictures: augmented, warmed up, watched for divergence, within a budget of time.

A recipe differs from another in what :class:`Recipe` names and in nothing else, so that notebooks can change one factor
at a time and say which one mattered.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import no_random
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nodules import learners, models, views
from nodules.device import device, has_bfloat16
from nodules.errors import InputError
from nodules.features import Bank, pooled, width
from nodules.learners import Training, finite, head

BATCH = 32  # patches in a step
CHECKS = 3  # validations in a training
LIMIT = 4 * math.log(2)  # a smoothed training loss above it, four times that of a fair coin, is divergence
SYMMETRIES = 8
HEAD_EPOCHS, HEAD_LR = 5, 1e-3  # of the head alone; many more and it knows its patches by heart


class Network(nn.Module):
    """Body and head in one, from pixel values (N, 1, 64, 64) to two logits.

    ``taps`` does nothing to the feature maps of each stage: they are where activation maps are read.
    """

    def __init__(self, body: models.Body, pool: str, head: nn.Module) -> None:
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


@dataclass(frozen=True)
class Recipe:
    """How all layers are trained: Adam, the rate warmed up linearly, then down to 0 along a cosine."""

    lr: float  # the highest, of the last layer group
    spread: float = 1.0  # how much smaller the rate of the first group is (discriminative learning rates)
    warmup: float = 0.0  # share of the training in which the rate rises
    frozen_statistics: bool = False  # batch norm in the body keeps its means and variances
    smoothing: float = 0.0  # of labels

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
        return max(CHECKS, int((patches - CHECKS * checked) / 3 / BATCH) // CHECKS * CHECKS)

    def left(self) -> str:
        """Minutes left, to show."""
        left = max(0.0, self.minutes - (time.monotonic() - self.started) / 60)
        return f"{left:.1f} of {self.minutes:g} min left"


class ImageLoader(DataLoader):
    """Batches of pictures (B, 1, 64, 64) and their labels; with a ``seed`` shuffled and augmented in each epoch."""

    def __init__(self, images: np.ndarray, y: np.ndarray, rows: np.ndarray, batches: int, seed: int | None) -> None:
        super().__init__(range(batches), bs=1, device=device())
        self.images, self.y, self.rows, self.batches = images, torch.tensor(y), rows, batches
        self.draws = None if seed is None else np.random.default_rng(seed)

    def create_batches(self, samples: Iterator[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole batches at once."""
        rows = self.rows
        if self.draws:
            passes = -(-self.batches * BATCH // len(rows))
            rows = np.concatenate([self.draws.permutation(rows) for _ in range(passes)])[: self.batches * BATCH]
        for chunk in np.array_split(rows, self.batches):
            images = torch.from_numpy(self.images[chunk].astype(np.float32))[:, None]
            yield views.augment(images, self.draws) if self.draws else images, self.y[chunk]


class FrozenStatistics(Callback):
    """Keep every two-dimensional batch norm in evaluation mode; fastai has set training mode just before."""

    def before_train(self) -> None:
        """Before each epoch."""
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class Watch(Callback):
    """Show progress and the budget left; stop a training that diverges, and say where."""

    order = 60  # after fastai's recorder

    def __init__(self, name: str, steps: int, budget: Budget) -> None:
        self.bar, self.budget, self.stopped = tqdm(total=steps, desc=name, unit="step"), budget, ""

    def after_batch(self) -> None:
        """Look at the smoothed training loss."""
        if not self.training:
            return
        self.bar.set_postfix_str(self.budget.left(), refresh=False)
        self.bar.update()
        loss = float(self.recorder.smooth_loss.value)
        if not loss < LIMIT:  # NaN is not either
            self.stopped = f"diverged at step {self.bar.n}: training loss {loss:.3g} is not below {LIMIT:.2f}"
            raise CancelFitException

    def after_fit(self) -> None:
        """Close the bar, also after a stop."""
        self.bar.close()


class Mixed(nn.Module):
    """A network computed in bfloat16 where the machine multiplies it in hardware; float32 logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(device(), memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16()):
            return self.network(images).float()


@dataclass(frozen=True)
class Trained(Training):
    """A trained network; ``stopped`` says where and why it diverged, or is empty."""

    stopped: str


def train(
    network: nn.Module,
    images: np.ndarray,
    y: np.ndarray,
    split: np.ndarray,
    recipe: Recipe,
    *,
    steps: int,
    budget: Budget,
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    seed: int = 0,
) -> Trained:
    """Train all layers of ``network``, in place.

    Args:
        network: takes (N, 1, 64, 64) pixel values, gives logits (N, 2); with a method ``groups`` where its layers are
            to have rates of their own.
        images: N patches, (N, 64, 64).
        y: labels, (N,).
        split: ``train``, ``valid`` or ``test`` of each patch, (N,).
        recipe: how.
        steps: batches of ``BATCH`` patches, a multiple of ``CHECKS``: after each ``1 / CHECKS`` it is validated.
        budget: shown beside the progress.
        name: shown likewise.
        loss: of logits and the shares of both classes (N, 2).
        seed: of batches, augmentation and dropout.

    Returns:
        The network with its history; ``epoch`` counts passes over the training patches.
    """
    train, valid = (np.flatnonzero(split == part) for part in ("train", "valid"))
    batches = steps // CHECKS
    loaders = DataLoaders(
        ImageLoader(images, y, train, batches, seed),
        ImageLoader(images, y, valid, -(-len(valid) // (8 * BATCH)), None),
        device=device(),
    )
    groups = getattr(network, "groups", lambda: [list(network.parameters())])()
    model = Mixed(network)

    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        shares = F.one_hot(target, 2).float()
        return loss(logits, shares * (1 - recipe.smoothing) + recipe.smoothing / 2 if model.training else shares)

    watch = Watch(name, steps, budget)
    callbacks = [watch, ParamScheduler({"lr": recipe.rate(len(groups))})]
    callbacks += [FrozenStatistics()] * recipe.frozen_statistics
    with no_random(seed):
        learn = Learner(loaders, model, smoothed, Adam, splitter=lambda _: groups, metrics=accuracy, cbs=callbacks)
        started = time.perf_counter()
        with learn.no_bar(), learn.no_logging():
            learn.fit(CHECKS)
        seconds = time.perf_counter() - started
    scale = BATCH / len(train)
    history = pd.DataFrame(learn.recorder.values, columns=["train_loss", "valid_loss", "accuracy"], dtype=float)
    history.insert(0, "epoch", scale * batches * np.arange(1, len(history) + 1))
    recorded = pd.DataFrame({"loss": np.array(learn.recorder.losses, dtype=float), "lr": learn.recorder.lrs})
    recorded.insert(0, "epoch", scale * np.arange(len(recorded)))
    return Trained(model.eval(), history, recorded, seconds, watch.stopped)


@torch.inference_mode()
def predict(model: nn.Module, images: np.ndarray, symmetries: int = SYMMETRIES) -> np.ndarray:
    """Probability of malignancy of each patch in the symmetries of the square, (N, symmetries); the first is plain.

    Raises:
        InputError: as of :func:`nodules.learners.finite`.
    """
    out = np.empty((len(images), symmetries))
    for start in range(0, len(images), 8 * BATCH):
        batch = torch.from_numpy(images[start : start + 8 * BATCH].astype(np.float32))[:, None].to(device())
        for view in range(symmetries):
            logits = model.eval()(views.dihedral(batch, view))
            out[start : start + 8 * BATCH, view] = logits.double().softmax(1)[:, 1].cpu()
    return finite(out)


def head_first(
    network: dict[str, Any],
    unit: str,
    bank: Bank,
    y: np.ndarray,
    split: np.ndarray,
    seed: int = 0,
) -> tuple[Network, pd.DataFrame]:
    """A network whose head has been trained on the bank of its frozen body, and the history of that head.

    The first half of LP-FT, "linear probing, then fine-tuning" (Kumar et al. 2022, arXiv 2202.10054).

    Args:
        network: ``architecture, weights, size, pool`` of the bank's body.
        unit: of the pixels.
        bank: features of N patches in several views.
        y: labels, (N,).
        split: ``train``, ``valid`` or ``test`` of each patch, (N,).
        seed: of the head.
    """
    body = models.body(network["architecture"], network["weights"], network["size"], unit)
    trained = learners.train(bank, y, split, epochs=HEAD_EPOCHS, lr=HEAD_LR, draw=True, seed=seed)
    return Network(body, network["pool"], trained.model), trained.history


def restore(network: dict[str, Any], unit: str, path: Path) -> Network:
    """A network with the head that ``04_training`` kept, in evaluation mode and on the device.

    Args:
        network: ``architecture, weights, size, pool``.
        unit: of the pixels.
        path: the head, a safetensors file.

    Raises:
        InputError: the file is not there, damaged, or the head of another network.
    """
    body = models.body(network["architecture"], network["weights"], network["size"], unit)
    last = head(width(body, network["pool"]))
    try:
        last.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: no head of {network['architecture']} ({reason}); run 04_training again") from error
    return Network(body, network["pool"], last).to(device()).eval()


def cross_validate(
    make: Callable[[np.ndarray], nn.Module],
    images: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None,
    recipe: Recipe,
    *,
    folds: int,
    epochs: float,
    budget: Budget,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Train once for each fold and predict the patches that were left out.

    Args:
        make: a network to start from, given the split of all patches into ``train`` and ``valid`` (what is left out,
            only watched).
        images: (N, 64, 64).
        y: labels, (N,).
        groups: patient of each patch, none of whom stands on two sides; None where unknown.
        recipe: how.
        folds: how many.
        epochs: passes over the training patches of a fold.
        budget: shown beside the progress.
        seed: of the folds and the trainings.

    Returns:
        Probabilities (N, 8) as of :func:`predict`, and the fold of each patch, (N,).
    """
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    p, fold = np.empty((len(y), SYMMETRIES)), np.empty(len(y), dtype=int)
    for k, (train_rows, left_out) in enumerate(kind(folds, shuffle=True, random_state=seed).split(images, y, groups)):
        split = np.full(len(y), "train", dtype=object)
        split[left_out] = "valid"
        steps = max(CHECKS, round(epochs * len(train_rows) / BATCH) // CHECKS * CHECKS)
        name = f"fold {k + 1} of {folds}"
        found = train(make(split), images, y, split, recipe, steps=steps, budget=budget, name=name, seed=seed)
        p[left_out], fold[left_out] = predict(found.model, images[left_out]), k
    return p, fold


def phases(trained: dict[str, Trained], head: pd.DataFrame | None = None) -> pd.DataFrame:
    """Losses of several trainings: ``arm, part, done, loss``, for :func:`nodules.plots.phases`.

    ``done`` is the share of the training that is done, 0 to 1. The history of the ``head`` that all started from, if
    any, runs from -1 to 0.
    """
    parts = []
    for arm, found in trained.items():
        length = found.steps["epoch"].iloc[-1] or 1
        histories = [found.history[["epoch", "valid_loss"]], found.steps[["epoch", "loss"]]]
        histories = [h.assign(epoch=(h["epoch"] / length).clip(upper=1)) for h in histories]
        if head is not None:
            histories.append(head.assign(epoch=head["epoch"] / head["epoch"].iloc[-1] - 1))
        for history in histories:
            named = history.rename(
                columns={"epoch": "done", "valid_loss": "valid", "train_loss": "train", "loss": "train"}
            )
            long = named.melt("done", [c for c in ("train", "valid") if c in named], "part", "loss")
            parts.append(long.assign(arm=arm))
    return pd.concat(parts, ignore_index=True).sort_values("done", kind="stable")


class GroupRates(Callback):
    """Record what learning rate the optimizer really used in each layer group, step by step."""

    def before_fit(self) -> None:
        """Start anew."""
        self.rates = []

    def after_batch(self) -> None:
        """Read the optimizer."""
        if self.training:
            self.rates.append([hyper["lr"] for hyper in self.opt.hypers])


def group_rates(body: models.Body, images: np.ndarray, y: np.ndarray, pool: str, lr: slice, steps: int) -> pd.DataFrame:
    """Learning rates of a short one-cycle training of the whole network on a few patches: ``step, group, lr``."""
    pairs = [(image.astype(np.float32), int(label)) for image, label in zip(images, y, strict=True)]
    loader = DataLoader(pairs, bs=-(-len(pairs) // steps), device=device())
    network, rates = Network(body, pool, head(width(body, pool))).to(device()), GroupRates()
    learn = Learner(DataLoaders(loader, loader), network, nn.CrossEntropyLoss(), splitter=Network.groups, cbs=rates)
    with no_random(), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, lr)
    wide = pd.DataFrame(rates.rates).rename_axis("step").rename_axis(columns="group")
    return wide.stack().rename("lr").reset_index()
