"""Teaches a model to hand over, by cross-validation.

Whatever turns logits into an answer (temperature, conformal line, the lines beyond which it is remarked on) comes from
the answers to patients left out.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from torch import nn

from nodules import paths
from nodules.data import patches, split
from nodules.data.sources import CLASSES, CUT
from nodules.data.split import Part
from nodules.data.transforms import LUNG_WINDOW
from nodules.evaluation import decisions, metrics
from nodules.model import BATCH, COMPONENTS, VIEWS, Member, Model
from nodules.networks import finetune, weights
from nodules.networks.device import device, tensor
from nodules.networks.small import NoduleNet
from nodules.record import git_revision, write_json

THRESHOLD = 0.5  # of the call: where accuracy is measured, and never at odds with the conformal set
LEAST_NOISE = 1e-6  # variance
OF_LIDC = "LIDC-IDRI-"  # begins the names of its patients
FALSE_ALARMS = 0.02  # share of nodules that cross a line for no reason
LOOKED_AT = 1500  # patches, at most, that tell what a network was taught with
NOT_FOR = (
    "Not a medical device. Not for diagnosis, treatment, screening or advice. The labels are radiologists' opinions of "
    "how suspicious a nodule looks; no disease was proven. It finds no nodules: whatever lies at a place is judged as "
    "if it were one."
)


@torch.inference_mode()
def fitted(network: NoduleNet, images: np.ndarray) -> Member:
    """A network with what patches (N, 64, 64), those that taught it, look like to it; of many, every so many-th."""
    member = Member(network).to(device(), memory_format=torch.channels_last).eval()
    images = images[:: -(-len(images) // LOOKED_AT)]  # neighbours are alike
    chunks = np.array_split(images, -(-len(images) // BATCH))
    features, statistics = zip(*(member(tensor(chunk))[1:3] for chunk in chunks), strict=True)
    few = min(COMPONENTS, len(images) - 1)
    pca = PCA(few, svd_solver="full").fit(torch.cat(statistics).cpu().numpy())
    member.average.copy_(torch.cat(features).mean(0))
    member.mean.copy_(torch.as_tensor(pca.mean_))
    member.axes[:few] = torch.as_tensor(pca.components_)
    member.variance[:few] = torch.as_tensor(pca.explained_variance_).clamp(min=LEAST_NOISE)
    member.noise.fill_(max(pca.noise_variance_, LEAST_NOISE))
    return member


def save(model: Model, path: Path) -> Path:
    """Write ``path`` (``NAME.safetensors``) and the JSON beside it; matrices in half precision, vectors in full."""
    state = {name: value if value.ndim < 2 else value.half() for name, value in model.members.state_dict().items()}
    with paths.replacing(path.with_suffix(".json")) as description:  # both files, or none
        weights.save(state, path)
        write_json(description, model.about | {"sha256": paths.sha256(path)})
    return path


def company(held: patches.Patches, n_patches: int) -> Part | None:
    """Phantom patches to learn from beside real ones whose patients are known; None beside others.

    Patients of LIDC-IDRI are in the phantom too: leave out those that are left out. Where they have other names, as
    after cutting with pseudonyms, that is impossible, so there is no company.
    """
    card = held.card
    if card.simulation or card.patients is None or not n_patches:
        return None
    if card.name in CUT and not held.table["patient"].str.startswith(OF_LIDC).all():
        return None
    phantom = split.whole(patches.read("phantom", n_patches))
    if card.unit == "HU":
        return phantom
    return replace(phantom, source=phantom.source.clip(*map(int, LUNG_WINDOW)))  # as far as grey levels show them


def in_company(part: Part, phantom: Part | None, without: np.ndarray | tuple = ()) -> Part:
    """A part and, where there is one, the phantom without some patients."""
    return split.joined(part, phantom.take(~np.isin(phantom.units, without))) if phantom else part


def assembled(part: Part, fold: np.ndarray, networks: list[NoduleNet], about: dict[str, Any], seed: int) -> Model:
    """A model of the networks of a cross-validation, each of which left out one fold.

    Args:
        part: N patches.
        fold: of each patch, (N,).
        networks: of each fold.
        about: what else to note of it.
        seed: of the bootstrap.
    """
    members = [fitted(net, part.take(np.flatnonzero(fold != k)).images) for k, net in enumerate(networks)]
    nodules = left_out(part, fold, members)
    y, p, units = (nodules[name].to_numpy() for name in ("y", "p", "unit"))
    temperature = decisions.temperature(y, p)
    calm = decisions.tempered(p, temperature)
    scored = {"seed": seed, "fold": nodules["fold"].to_numpy(), "diameters": nodules["diameter"].to_numpy()}
    spacing = part.table.get("pixel_spacing_mm")
    about = {
        "architecture": "NoduleNet",
        "classes": list(CLASSES),
        "input": {
            "side": patches.SIDE,
            "pixel_spacing_mm": None if spacing is None else [float(spacing.min()), float(spacing.max())],
            "unit": networks[0].body[0].unit,
        },
        "members": len(members),
        "temperature": temperature,
        "threshold": THRESHOLD,
        "alpha": decisions.ALPHA,
        "conformal_line": min(decisions.conformal_line(y, calm), 1.0),
        "false_alarms": FALSE_ALARMS,
        **lines(nodules),
        "scores": metrics.score(y, calm, units, **scored),
        "not_for": NOT_FOR,
        "git_revision": git_revision(),
        **about,
    }
    return Model(nn.ModuleList(members), about)


def left_out(part: Part, fold: np.ndarray, members: list[Member]) -> pd.DataFrame:
    """What the network that left a nodule out finds in it, mean over the slices that count, :func:`metrics.counted`.

    Returns:
        One row per nodule: ``p, distance, centre``, and ``y, unit, fold, nodule, diameter``.
    """
    counts = metrics.counted(part.table.assign(nodule=part.nodules))
    rows = [np.flatnonzero(counts & (fold == k)) for k in range(len(members))]
    looks = [member.look(part.take(left).images) for member, left in zip(members, rows, strict=True)]
    order = np.concatenate(rows)
    left = part.take(order)
    found = pd.concat(looks, ignore_index=True).assign(
        p=lambda look: look[VIEWS].mean(axis=1),
        y=left.y,
        fold=fold[order],
        nodule=left.nodules,
        unit=left.units,
        diameter=left.diameters,
    )
    means = found.groupby("nodule")[["p", "distance", "centre"]].transform("mean")
    return found.assign(**means).drop_duplicates("nodule")


def lines(nodules: pd.DataFrame) -> dict[str, float]:
    """The lines of :func:`nodules.model.marks`, from nodules left out; each is crossed by ``FALSE_ALARMS`` of them."""
    distance, centre = nodules["distance"], nodules["centre"]
    quantiles = np.quantile(distance, 1 - FALSE_ALARMS), np.quantile(centre, FALSE_ALARMS)
    return dict(zip(("unlike_line", "centre_line"), map(float, quantiles), strict=True))


def teach(
    part: Part, phantom: Part | None, unit: str, *, folds: int, epochs: int, seed: int, name: str, about: dict[str, Any]
) -> Model:
    """Teach a model by cross-validation.

    Args:
        part: patches.
        phantom: further patches to learn from, as from :func:`company`.
        unit: of the pixels.
        folds: of units: as many networks.
        epochs: passes over the nodules.
        seed: of folds, weights and trainings.
        name: label of the progress bars.
        about: what else to note of it.
    """
    fold = split.folds(part.y, part.units, folds, seed)
    everything = in_company(part, phantom)
    of_each = np.concatenate([fold, np.full(len(everything) - len(part), -1)])
    _, networks = finetune.cross_validate(
        lambda _: NoduleNet(unit),
        everything,
        of_each,
        finetune.NODULE,
        epochs=epochs,
        name=name,
        seed=seed,
    )
    return assembled(part, fold, networks, about, seed)
