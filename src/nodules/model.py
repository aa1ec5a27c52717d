"""A model to hand over: nodule networks that answer together, and how their answer is to be read.

It was taught by cross-validation (:mod:`nodules.teaching`): each network has left out one fold of patients. On disk it
is ``NAME.safetensors``, the tensors, and ``NAME.json``, what they are and how they were measured; nothing is unpickled.
Importing this module takes seconds less than importing what trains networks.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.special import expit, logit, stdtrit
from torch import Tensor, nn

from nodules import paths
from nodules.data import transforms
from nodules.data.sources import CLASSES, SIDE
from nodules.data.split import Part
from nodules.data.transforms import SYMMETRIES
from nodules.errors import InputError, in_brief
from nodules.evaluation import metrics
from nodules.networks import small
from nodules.networks.device import device, tensor
from nodules.networks.small import GRID, MARGIN, WIDTHS, NoduleNet

DEFAULT = paths.ROOT / "weights" / "lidc-small.safetensors"
BATCH = 32  # patches per forward pass, in all views
COMPONENTS = 64  # of the statistics of the patches seen
LEVEL = 0.9  # of the interval around a probability
EITHER = "either"  # the set of both classes
GROUPS = {"the patch as a whole": 2 * WIDTHS[-1], "inside the nodule": WIDTHS[-1], "its size": 1}  # features
VIEWS = [f"view {view}" for view in range(SYMMETRIES)]
ANSWER = ["id", "patient", "nodule", "p", "p_low", "p_high", "set", "called", "remark"]
NEEDED = {
    "temperature": float,
    "threshold": float,
    "conformal_line": float,
    "unlike_line": float,
    "centre_line": float,
    "sha256": str,
}  # in the description
MOST = 100  # networks
LEAST = 1e-6  # probability
GROWN = 4  # of them a side of a cell of the maps
CELL = (SIDE - 2 * MARGIN) / GRID  # side of a cell of the attention, pixels
CENTRE = slice(GRID // 2 - 1, GRID // 2 + 1)  # the two cells on both sides of the middle
UNLIKE, EMPTY = "unlike what the model has seen", "no nodule seen in the middle"  # remarks


class Member(nn.Module):
    """A nodule network, and what the patches that taught it look like to it.

    Of each patch it keeps the mean and the standard deviation of every channel after each of its blocks. Their
    distribution is a Gaussian with ``COMPONENTS`` directions of its own and equal variance in all others
    (probabilistic PCA, Tipping & Bishop 1999). The Mahalanobis distance under it tells how unlike those a patch is (Lee
    et al. 2018, arXiv 1807.03888).
    """

    def __init__(self, network: NoduleNet) -> None:
        super().__init__()
        self.network = network
        size = 2 * sum(WIDTHS)
        self.register_buffer("average", torch.zeros(sum(GROUPS.values())))  # features
        self.register_buffer("mean", torch.zeros(size))  # statistics
        self.register_buffer("axes", torch.zeros(COMPONENTS, size))  # unit vectors
        self.register_buffer("variance", torch.ones(COMPONENTS))
        self.register_buffer("noise", torch.ones(()))

    def forward(self, images: Tensor, first: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logit (N,) of malignant against benign, features (N, 385), statistics (N, 704), attention (N, 12, 12).

        Args:
            images: (N, 1, 64, 64).
            first: how many of them statistics are wanted of; all by default.
        """
        maps, statistics = small.middle(images), []
        for layer in self.network.body:
            maps = layer(maps)
            if isinstance(layer, nn.ReLU):  # the end of a block
                statistics += [maps[:first].mean((2, 3)), maps[:first].std((2, 3))]
        inside = self.network.outline(maps).sigmoid()
        features = self.network.pooled(maps, inside)
        logits = self.network.head(features).diff(dim=1)[:, 0]
        return logits, features, torch.cat(statistics, 1), inside[:, 0]

    def distance(self, statistics: Tensor) -> Tensor:
        """Squared Mahalanobis distance (N,) of statistics (N, 704), per statistic: about 1 for what was seen."""
        off = statistics - self.mean
        along = off @ self.axes.T
        rest = off.square().sum(1) - along.square().sum(1)
        return ((along.square() / self.variance).sum(1) + rest / self.noise) / len(self.mean)

    def parts(self, features: Tensor) -> Tensor:
        """What each of ``GROUPS`` adds to the logit, compared with the average patch seen: (N, 3)."""
        added = (features - self.average) * self.network.head.weight.diff(dim=0)[0]
        return torch.stack([group.sum(1) for group in added.split(list(GROUPS.values()), dim=1)], 1)

    @torch.inference_mode()
    def look(self, images: np.ndarray) -> pd.DataFrame:
        """What this network finds in patches (N, 64, 64).

        Returns:
            Probabilities ``view 0`` .. ``view 7`` in the symmetries of the square; and of the patch as it is
            ``distance``, ``cells`` inside, ``centre`` (the highest attention to the four cells in the middle) and
            ``GROUPS``.
        """
        found = []
        for start in range(0, len(images), BATCH):
            batch = tensor(images[start : start + BATCH])
            count, turned = len(batch), torch.cat([transforms.dihedral(batch, view) for view in range(SYMMETRIES)])
            logits, features, statistics, inside = self.eval()(turned, count)
            views, inside = logits.view(SYMMETRIES, count).T.double().sigmoid(), inside[:count]
            cells, centre = inside.sum((1, 2)), inside[:, CENTRE, CENTRE].amax((1, 2))
            rest = torch.column_stack([self.distance(statistics), cells, centre, self.parts(features[:count])])
            found.append(torch.cat([views, rest], 1).cpu().numpy())
        return pd.DataFrame(np.concatenate(found), columns=[*VIEWS, "distance", "cells", "centre", *GROUPS])


def marks(found: pd.DataFrame, lines: dict[str, float]) -> pd.DataFrame:
    """Which of what :meth:`Member.look` finds in patches crosses a line, a column for each remark on it.

    Args:
        found: ``distance`` and ``centre``.
        lines: ``unlike_line`` and ``centre_line``.
    """
    return pd.DataFrame(
        {UNLIKE: found["distance"] > lines["unlike_line"], EMPTY: found["centre"] < lines["centre_line"]}
    )


@dataclass(frozen=True)
class Model:
    """Networks that answer together; ``about`` is the content of the model's JSON file."""

    members: nn.ModuleList
    about: dict[str, Any]

    def __post_init__(self) -> None:
        # With the channels last, convolutions of few patches take half the time
        self.members.to(device(), memory_format=torch.channels_last).eval()

    def answers(self, part: Part) -> pd.DataFrame:
        """One opinion a nodule, from all its slices; patches of one nodule share it.

        Args:
            part: N patches; labels are not looked at.

        Returns:
            N rows: ``id, patient, nodule``; ``p``, the probability of malignancy after temperature; ``p_low, p_high``,
            within which ``LEVEL`` of further networks, with other patients left out, would answer; ``set``, a
            conformal set of classes; ``called``; ``remark``, empty if nothing odd was found; ``distance``,
            ``size_mm`` (diameter of a disc of the size that they see, NaN without pixel spacing) and ``GROUPS``.
        """
        found = self._found(part)
        about, members = self.about, found.filter(regex=r"^member \d+$")
        middle, opinions = (logit(p.clip(LEAST, 1 - LEAST)) for p in (found["p"], members))
        views = found["views"] / (found["p"] * (1 - found["p"])).clip(lower=LEAST) ** 2  # a variance of logits
        count = len(self.members)
        spread = np.sqrt(opinions.var(axis=1, ddof=1) * (1 + 1 / count) + views)
        half = stdtrit(count - 1, (1 + LEVEL) / 2) * spread
        p, low, high = (expit(value / about["temperature"]) for value in (middle, middle - half, middle + half))
        possible = np.column_stack([p, 1 - p]) <= max(about["conformal_line"], 0.5)  # never neither
        sets = np.select([possible.all(axis=1), possible[:, 0]], [EITHER, CLASSES[0]], CLASSES[1])
        size = 2 * np.sqrt(found["cells"] / np.pi) * CELL * found["pixel_spacing_mm"]
        called = np.where(p >= about["threshold"], CLASSES[1], CLASSES[0])
        told = {"p": p, "p_low": low, "p_high": high, "set": sets, "called": called, "size_mm": size}
        told = found.assign(**told, remark=self._remarks(found))
        return told[[*ANSWER, "distance", "size_mm", *GROUPS]]

    def _found(self, part: Part) -> pd.DataFrame:
        """What the networks find in N patches, mean over the slices of each nodule that count: N rows.

        ``p`` is their mean probability, ``member 0`` .. the probability of each, ``views`` the variance of a mean over
        symmetries; the rest is as from :meth:`Member.look`.
        """
        known = part.table.assign(nodule=part.nodules).reset_index(drop=True)
        known = known.assign(**{name: np.nan for name in ("patient", "pixel_spacing_mm") if name not in known})
        counted = metrics.counted(known)
        looks = [member.look(part.take(np.flatnonzero(counted)).images) for member in self.members]
        members = {f"member {i}": look[VIEWS].mean(axis=1) for i, look in enumerate(looks)}
        views = sum(look[VIEWS].var(axis=1, ddof=1) for look in looks) / len(looks) / SYMMETRIES
        rest = sum(look.drop(columns=VIEWS) for look in looks) / len(looks)
        numbers = {"p": sum(members.values()) / len(looks), "views": views, **members, **rest}
        named = known["nodule"]
        means = pd.DataFrame(numbers).groupby(named[counted].to_numpy()).mean().loc[named]
        return known[["id", "patient", "nodule", "pixel_spacing_mm"]].assign(**means.set_index(known.index))

    def _remarks(self, found: pd.DataFrame) -> list[str]:
        """What is odd about patches: their :func:`marks`, and pixels of another width than those seen."""
        low, high = self.about["input"]["pixel_spacing_mm"] or (0, math.inf)
        marked, remarks = marks(found, self.about), []
        for crossed, mm in zip(marked.to_numpy(), found["pixel_spacing_mm"], strict=True):
            odd = not (np.isnan(mm) or 0.99 * low <= mm <= 1.01 * high)
            width = f"pixels of {mm:.2f} mm, but {low:.2f} to {high:.2f} mm were seen"
            remarks.append("; ".join([*marked.columns[crossed], *[width] * odd]))
        return remarks

    def maps(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attention and evidence as from :func:`nodules.networks.small.attention`, mean over the networks."""
        both = [small.attention(member.network, images) for member in self.members]
        return tuple(np.mean(each, 0) for each in zip(*both, strict=True))


def part_of(images: np.ndarray, table: pd.DataFrame) -> Part:
    """Patches (N, 64, 64) without labels, in the order of their table, as a part."""
    rows = np.arange(len(table))
    units = table["patient" if "patient" in table else "id"].to_numpy()
    return Part(images, np.full(len(table), -1), rows, table.set_axis(rows), units)


def pictured(
    taught: Model,
    part: Part,
    answer: dict[str, Any],
    pictures: list[np.ndarray],
    sides_mm: list[list[float]],
    names: list[str],
    window: list[float],
) -> dict[str, Any]:
    """What :func:`nodules.plots.opinion` draws of a nodule.

    Args:
        taught: the model that answered.
        part: the patches that it was asked about.
        answer: a row of its answers, and ``row``, the number of it.
        pictures: three of the nodule, such as planes through it.
        sides_mm: width and height of each, empty where unknown.
        names: of each.
        window: pixel values shown as black and white.
    """
    seen = part.take(np.array([answer["row"]])).images
    scaled = taught.members[0].network.body[0](small.middle(tensor(seen))).cpu().numpy()
    grown = np.ones((GROWN, GROWN))
    attention, evidence = (small.middle(np.kron(each[0], grown)) for each in taught.maps(seen))
    return {
        **dict(zip(("first", "second", "third"), pictures, strict=True)),
        "names": names,
        "sides_mm": sides_mm,
        "patch": scaled[0, 0],  # Hounsfield units in the lung window
        "attention": attention,
        "evidence": evidence,
        "parts": pd.DataFrame({"name": list(GROUPS), "value": [answer[name] for name in GROUPS]}),
        "window": window,
        "heading": f"{answer['nodule']}: {answer['p']:.0%} malignant ({answer['p_low']:.0%} to {answer['p_high']:.0%})",
    }


def load(path: Path) -> Model:
    """Read a model: a safetensors file, or the folder that holds one.

    Raises:
        InputError: missing, damaged or not such a model.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(f"{path}: holds {len(found)} safetensors files; name the one to use")
        (path,) = found
    beside = path.with_suffix(".json")
    try:
        about = json.loads(beside.read_text(encoding="utf-8"))
        if wrong := [name for name, kind in NEEDED.items() if not isinstance(about[name], kind)]:
            raise TypeError(f"{wrong[0]} is {type(about[wrong[0]]).__name__}")
        if not 2 <= about["members"] <= MOST:
            raise ValueError(f"{about['members']} networks")
        members = nn.ModuleList(Member(NoduleNet(about["input"]["unit"])) for _ in range(about["members"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise InputError(
            f"{beside}: not the description of a model ({in_brief(error)}); get both files again"
        ) from error
    try:
        members.load_state_dict(load_file(path))
        if paths.sha256(path) != about["sha256"]:
            raise ValueError("another SHA-256 than its description gives")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: not the tensors of this model ({in_brief(error)}); get both files again") from error
    return Model(members, about)
