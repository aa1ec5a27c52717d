"""Seeded, stratified 80/10/10 splits into train, valid and test."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from nodules.errors import SEEDS, InputError, within

if TYPE_CHECKING:  # importing what reads files takes long, and a model needs none of it
    from nodules.data.patches import Patches

KINDS = ("auto", "patient", "random")
SPLITS = ("train", "valid", "test")
FOLDS = 10  # one for test, one for valid, eight for train; small data sets have fewer
FEWEST = 3  # folds
LEAST = 20  # patches in a data set
LARGEST = 2  # times its fair share that a fold for test or valid may hold


@dataclass(frozen=True)
class Part:
    """Some of the patches, such as those to train on."""

    source: np.ndarray  # (M, 64, 64), pixel values of all patches, shared by all parts
    y: np.ndarray  # (N,), 1 malignant, 0 benign; -1 where labels were not asked for
    rows: np.ndarray  # (N,), where this part's patches are in it
    table: pd.DataFrame  # N rows, indexed by ``rows``
    units: np.ndarray  # (N,), what is independent and so resampled: the patient, or the patch if unknown
    masks: np.ndarray | None = None  # (M, 64, 64), outlines of all patches, where the source knows them
    around: np.ndarray | None = None  # (M, C), rows of the slices to show as the channels of each patch; None: itself

    def __len__(self) -> int:
        return len(self.y)

    @property
    def images(self) -> np.ndarray:
        """Pixel values, (N, 64, 64), or (N, C, 64, 64) with slices around; copied from the source each time."""
        return self.source[self.rows if self.around is None else self.around[self.rows]]

    @property
    def outlines(self) -> np.ndarray:
        """1 inside the nodule, 0 outside, (N, 64, 64) float32; NaN where unknown."""
        if self.masks is None:
            return np.full((len(self), *self.source.shape[1:]), np.nan, dtype=np.float32)
        return self.masks[self.rows].astype(np.float32)

    @property
    def nodules(self) -> np.ndarray:
        """Nodule of each patch, (N,); where nodules are unknown, each patch counts as one."""
        return self.table.get("nodule", self.table["id"]).to_numpy()

    @property
    def diameters(self) -> np.ndarray:
        """Of each patch's nodule, (N,), mm; NaN where unknown."""
        return self.table.get("diameter_mm", pd.Series(np.nan, self.table.index)).to_numpy()

    def take(self, positions: np.ndarray) -> "Part":
        """The patches at some positions in this part, (M,), in that order."""
        return replace(
            self,
            y=self.y[positions],
            rows=self.rows[positions],
            table=self.table.iloc[positions],
            units=self.units[positions],
        )


class Parts(NamedTuple):
    """The three parts of a split."""

    train: Part
    valid: Part
    test: Part


def whole(patches: "Patches") -> Part:
    """All patches as one part."""
    y = patches.table["malignant"].to_numpy() if "malignant" in patches.table else np.full(len(patches), -1)
    return Part(patches.images, y, np.arange(len(y)), patches.table, patches.units, patches.masks)


def stacked(part: Part) -> Part:
    """All patches with the slices below and above as their first and last channel.

    At the end of a nodule, and where slices are unknown, the patch itself is repeated.
    """
    rows = np.arange(len(part))
    below, above = rows.copy(), rows.copy()
    if {"nodule", "slice_index"} <= set(part.table):
        order = np.lexsort((part.table["slice_index"], part.nodules))
        same = part.nodules[order][1:] == part.nodules[order][:-1]
        below[order[1:][same]], above[order[:-1][same]] = order[:-1][same], order[1:][same]
    return replace(part, around=np.stack([below, rows, above], 1))


def joined(part: Part, other: Part) -> Part:
    """All patches of two sources as one part, the second's after the first's.

    Outlines are known if both sources know them, slices around if both parts have them. A nodule of the same name in
    the other source is another picture, so it gets another name.
    """
    count, parts = len(part.source), (part, other)
    tables = [
        each.table.assign(nodule=f"{i} " + pd.Series(each.nodules).astype(str).array) for i, each in enumerate(parts)
    ]
    known = all(each.masks is not None for each in parts)
    stacks = all(each.around is not None for each in parts)
    rows = np.concatenate([part.rows, count + other.rows])
    return Part(
        source=np.concatenate([part.source, other.source]),
        y=np.concatenate([part.y, other.y]),
        rows=rows,
        table=pd.concat(tables).set_axis(rows),
        units=np.concatenate([part.units.astype(str), other.units.astype(str)]),
        masks=np.concatenate([part.masks, other.masks]) if known else None,
        around=np.concatenate([part.around, count + other.around]) if stacks else None,
    )


def divide(part: Part, sides: np.ndarray) -> Parts:
    """Divide a part by ``sides``, (N,): ``train``, ``valid`` or ``test`` for each patch."""
    return Parts(*(part.take(np.flatnonzero(sides == side)) for side in SPLITS))


def thinned(parts: Parts, most: int, seed: int) -> Parts:
    """The same parts with at most ``most`` training patches, drawn at random, and a source of their patches alone.

    What is computed for the whole source, such as a feature bank, is computed for these patches only. Slices around
    are left out.
    """
    drawn = np.random.default_rng(seed).permutation(len(parts.train))[:most]
    parts = parts._replace(train=parts.train.take(np.sort(drawn)))
    kept = np.concatenate([part.rows for part in parts])
    source, masks = (None if pixels is None else pixels[kept] for pixels in (parts.train.source, parts.train.masks))
    rows = np.split(np.arange(len(source)), np.cumsum([len(part) for part in parts[:-1]]))
    return Parts(
        *(
            replace(part, source=source, masks=masks, around=None, rows=r, table=part.table.set_axis(r))
            for part, r in zip(parts, rows, strict=True)
        )
    )


def assign(table: pd.DataFrame, kind: str = "auto", seed: int = 0) -> pd.DataFrame:
    """Assign each patch to train, valid or test.

    Args:
        table: one row per patch with ``id``, ``malignant`` and, where the source knows them, ``patient``.
        kind: ``random`` shuffles patches, as the 2019 report did; ``patient`` keeps all patches of a patient
            in one part; ``auto`` is ``patient`` where patients are known, else ``random``.
        seed: of the shuffle.

    Returns:
        The columns ``id, patient, malignant, split, split_kind``, in the order of ``table``.

    Raises:
        InputError: unknown kind, a seed out of range, a patient split without patients, or too few patches or patients
            of a class to have both in all parts.
    """
    within(0, SEEDS, seed=seed)
    if kind not in KINDS:
        raise InputError(f"split={kind!r}: no such split; use one of {', '.join(KINDS)}")
    has_patients = "patient" in table
    if kind == "auto":
        kind = "patient" if has_patients else "random"
    if kind == "patient" and not has_patients:
        raise InputError("split='patient': this source has no patients; use split='random'")

    if len(table) < LEAST:
        raise InputError(f"split={kind!r}: {len(table)} patches are too few; provide at least {LEAST}")

    units = table["patient" if kind == "patient" else "id"].to_numpy()
    names = next(_tried(table["malignant"].to_numpy(), units, seed), None)
    if names is None:
        fewest = distinct(table["malignant"], units)
        raise InputError(
            f"split={kind!r}: no split has both classes in all parts, since a class has only {fewest} "
            f"{'patients' if kind == 'patient' else 'patches'} or one has most of it; provide more"
        )
    out = table.reindex(columns=["id", "patient", "malignant"]).assign(split=names, split_kind=kind)
    if kind == "patient":
        assert out.groupby("patient")["split"].nunique().max() == 1, "a patient is in two parts"
    return out.reset_index(drop=True)


def distinct(y: np.ndarray | pd.Series, units: np.ndarray) -> int:
    """Number of distinct units (N,), such as patients, in the class, by labels (N,), that has fewer of them."""
    return int(pd.Series(units).groupby(np.asarray(y)).nunique().min())


def folds(y: np.ndarray, units: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The fold of each patch, 0 to ``count`` - 1, (N,): stratified by label, all patches of a unit in one fold.

    Args:
        y: labels, (N,).
        units: what is kept together, (N,): patients, clusters, or patches.
        count: number of folds.
        seed: of the shuffle.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes seconds

    alone = len(np.unique(units)) == len(units)
    kfold, groups = (StratifiedKFold, None) if alone else (StratifiedGroupKFold, units)
    out = np.empty(len(y), dtype=int)
    for k, (_, rows) in enumerate(kfold(count, shuffle=True, random_state=seed).split(y, y, groups)):
        out[rows] = k
    return out


def _tried(y: np.ndarray, units: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Splits with both classes in all parts, those in more folds first.

    A fold dominated by one large unit is used only to train.
    """
    for count in range(min(FOLDS, distinct(y, units)), FEWEST - 1, -1):
        assigned = folds(y, units, count, seed)
        each = [np.flatnonzero(assigned == k) for k in range(count)]
        fit = [rows for rows in each if len(set(y[rows])) == 2 and len(rows) <= LARGEST * len(y) / count]
        if len(fit) < 2:
            continue
        names = np.full(len(y), "train", dtype=object)
        names[fit[0]], names[fit[1]] = "test", "valid"
        if len(set(y[names == "train"])) == 2:
            yield names


def dealt(parts: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A random split that matches another: patches are shuffled within each class, so all counts stay the same.

    Args:
        parts: ``train``, ``valid`` or ``test`` of each patch, (N,).
        y: labels, (N,).
        seed: of the shuffle.
    """
    rng, out = np.random.default_rng(seed), parts.copy()
    for label in np.unique(y):
        out[y == label] = rng.permutation(parts[y == label])
    return out


def counts(assigned: pd.DataFrame) -> pd.DataFrame:
    """Patches, malignant patches, prevalence, and patients (NaN where unknown) by split."""
    grouped = assigned.groupby("split", sort=False)
    out = pd.DataFrame(
        {
            "patches": grouped.size(),
            "malignant": grouped["malignant"].sum(),
            "prevalence": grouped["malignant"].mean(),
            "patients": grouped["patient"].nunique().where(grouped["patient"].count() > 0),
        }
    )
    return out.reindex(SPLITS)
