"""Teaches a model to hand over on a file of patches, and measures it on patients that no part of it has seen."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from torch import nn

from nodules import model, paths, study, teaching
from nodules.data import patches, split
from nodules.data.split import Part
from nodules.errors import InputError, within
from nodules.evaluation import metrics
from nodules.model import Model
from nodules.report import text

SHOWN = 400  # patches that are made unlike, in each fold
# What a nodule's patch (N, 64, 64) is turned into, to see whether it is called unlike
UNLIKE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nothing": lambda images: images,
    "noise alone": lambda images: np.random.default_rng(0).normal(images.mean(), images.std(), images.shape),
    "inverted grey levels": lambda images: 2 * images.mean() - images,
    "blurred by 4 pixels": lambda images: gaussian_filter(images, (0, 4, 4)),
    "the nodule 12 pixels off the middle": lambda images: np.roll(images, 12, axis=-1),
    "the nodule at the patch's edge": lambda images: np.roll(images, patches.SIDE // 2, axis=-1),
}


def teach(data: str, path: Path, *, credit: str, folds: int, epochs: int, phantom: int, seed: int) -> Path:
    """Teach a model and write it; its card says how it was measured.

    Args:
        data: a source as for :func:`nodules.data.patches.read`.
        path: of the safetensors file to write.
        credit: whose data these are and their licence, for the card; empty: as the source's own card says.
        folds: networks, each of which leaves out one fold of patients.
        epochs: passes over the nodules.
        phantom: simulated patches to learn from too, where patients are known; 0 for none.
        seed: of everything random.

    Raises:
        InputError: unreadable data, a number out of range, or a class with fewer patients than folds.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: not the name of a model; let it end in .safetensors")
    within(2, model.MOST, folds=folds)
    within(*study.RANGES["scratch_epochs"], epochs=epochs)
    within(*study.RANGES["seed"], seed=seed)
    held = patches.read(data)
    part, card = split.whole(held), held.card
    if (fewest := split.distinct(part.y, part.units)) < folds:
        raise InputError(f"{data}: a class has {fewest} patients, too few for {folds} folds; use fewer with --folds")
    fold = split.folds(part.y, part.units, folds, seed)
    if (fewest := min(len(np.unique(part.units[fold != k])) for k in range(folds))) < folds:
        raise InputError(f"{data}: without one fold {fewest} patients are left; use fewer folds than that with --folds")
    others = teaching.company(held, phantom)
    options = {"folds": folds, "epochs": epochs, "seed": seed}
    about = {
        "name": path.stem,
        "data": asdict(card) | (dict.fromkeys(("title", "licence", "citation"), credit) if credit else {}),
        "units": "patients" if card.patients else "patches",
        "rated": "ratings" in held.table,
        "phantom": 0 if others is None else len(others),
        "recipe": options,
    }
    taught = teaching.teach(part, others, card.unit, **options, name=path.stem, about=about)
    taught.about["measured"] = measured(taught, part, others, options)
    taught.about["marked"] = marked(taught, part, options)
    teaching.save(taught, path)
    paths.write(path.with_suffix(".md"), card_of(taught))
    return path


def card_of(taught: Model) -> str:
    """The model's card, in Markdown."""
    recipe = taught.about["recipe"]
    options = " ".join(f"--{name} {value}" for name, value in (recipe | {"phantom": taught.about["phantom"]}).items())
    values = {
        "about": taught.about,
        "level": model.LEVEL,
        "parameters": f"{sum(tensor.numel() for tensor in taught.members[0].network.parameters()):,}",
        "command": f"python -m nodules teach DATA -o {taught.about['name']}.safetensors {options}",
    }
    return text.render("handed_model.md", values)


def measured(taught: Model, part: Part, phantom: Part | None, options: dict[str, Any]) -> dict[str, Any]:
    """How models like this one do on patients that none of their networks has seen.

    The patients of each fold in turn are kept from a model, taught by the same procedure on all others. Beside it
    stands one more network that did not see them either: does its answer lie in the model's interval?

    Returns:
        Scores per nodule, and shares with their intervals.
    """
    unit, told = taught.about["input"]["unit"], []
    fold = split.folds(part.y, part.units, options["folds"], options["seed"])
    for k in range(options["folds"]):
        left, rest = part.take(np.flatnonzero(fold == k)), part.take(np.flatnonzero(fold != k))
        others = phantom and phantom.take(~np.isin(phantom.units, left.units))
        inner = teaching.teach(rest, others, unit, **options, name=f"without fold {k + 1}", about={})
        one_more = replace(inner, members=nn.ModuleList([taught.members[k]]))
        answers = inner.answers(left).assign(fold=k, y=left.y, unit=left.units, diameter=left.diameters)
        answers["one more"] = one_more.answers(left)["p"].to_numpy()
        told.append(answers.assign(nodule=left.nodules))
    nodules = pd.concat(told).drop_duplicates("nodule")
    y, p, units = (nodules[name].to_numpy() for name in ("y", "p", "unit"))
    scored = {"seed": options["seed"], "fold": nodules["fold"].to_numpy(), "diameters": nodules["diameter"].to_numpy()}
    named = np.where(y == 1, "malignant", "benign")
    shares = {
        "one more network in the interval": nodules["one more"].between(nodules["p_low"], nodules["p_high"]),
        "truth in the set": (nodules["set"] == named) | (nodules["set"] == model.EITHER),
        "one class in the set": nodules["set"] != model.EITHER,
    }
    sizes = nodules["size_mm"].corr(nodules["diameter"], method="spearman")
    return {
        "scores": metrics.score(y, p, units, **scored),
        "shares": {name: metrics.mean(held.to_numpy(float), units, options["seed"]) for name, held in shares.items()},
        **({"size_correlation": float(sizes)} if np.isfinite(sizes) else {}),
    }


def marked(taught: Model, part: Part, options: dict[str, Any]) -> dict[str, Any]:
    """What is remarked on, of the patches of each fold and of what they are turned into.

    Each fold is judged by the network that left it out, by lines from the other folds.

    Returns:
        ``false``, the share of nodules with its interval; ``caught``, the share of patches by what was done to them.
    """
    fold, seed = split.folds(part.y, part.units, options["folds"], options["seed"]), options["seed"]
    nodules = teaching.left_out(part, fold, list(taught.members))
    false, caught = [], []
    for k, member in enumerate(taught.members):
        own = nodules["fold"] == k
        lines = teaching.lines(nodules[~own])
        false.append(model.marks(nodules[own], lines).any(axis=1))
        left = part.take(np.flatnonzero(fold == k))
        few = left.images[:: -(-len(left) // SHOWN)].astype(np.float32)
        looks = {name: member.look(made(few)) for name, made in UNLIKE.items()}
        caught.append({name: model.marks(look, lines).any(axis=1).mean() for name, look in looks.items()})
    held = pd.concat(false).reindex(nodules.index).to_numpy(float)
    return {
        "false": metrics.mean(held, nodules["unit"].to_numpy(), seed),
        "caught": pd.DataFrame(caught).mean().to_dict(),
    }
