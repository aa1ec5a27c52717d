"""The phantom against real patches in HU, where they are: values, spectrum, what networks tell apart, and transfer.

Where they are compared, both sides show nodules of the same patients and ratings, in the middle: the phantom's are
off-centre on purpose, so its patches are cut around them.
"""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from torch.nn import functional as F

from nodules import teaching
from nodules.data import patches, phantom, pixels, split
from nodules.evaluation import metrics
from nodules.networks import finetune, small
from nodules.networks.network import predict

WINDOW = (-1000, 400)  # HU
SIDE, MARGIN = 52, 6  # pixels of what is compared, and around it in a patch


@pytest.fixture
def pairs(real):
    """Real patches, and the middle slices of simulated nodules of the same patients with the same rating."""
    with np.load(real("lidc_hu_dev.npz")) as file:
        images, wanted = file["ct_slices"], list(zip(file["patient"], file["median_rating"].astype(float), strict=True))
    table = phantom._choose(2526, 4165, seed=0)
    middle = table.groupby("nodule")["slice_index"].transform("median")
    table = table.iloc[(table["slice_index"] - middle).abs().argsort(kind="stable")].drop_duplicates("nodule")
    order = table.groupby(["patient", "median_rating"]).cumcount()
    available = {key: wanted.count(key) for key in set(wanted)}
    keys = list(zip(table["patient"], table["median_rating"], strict=True))
    taken = np.array([n < available.get(key, 0) for key, n in zip(keys, order, strict=True)])
    table = table[taken].sort_values(["patient", "nodule"], ignore_index=True)
    rendered = [phantom._render_nodule(job) for job in phantom._jobs(table, seed=0)]
    offsets = [[row["offset_y_px"], row["offset_x_px"]] for *_, rows in rendered for row in rows]
    starts = MARGIN + np.rint(offsets).astype(int)
    whole = np.concatenate([images for images, *_ in rendered])
    simulated = np.stack([image[y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(whole, starts, strict=True)])
    patients = np.array([patient for patient, _ in wanted])
    return images[:, MARGIN:-MARGIN, MARGIN:-MARGIN], simulated, patients, table["patient"].to_numpy(str)


def spectrum(images):
    """Mean radial power of windowed patches in bands of 0.1 cycles per pixel, from 0.05 on."""
    taper = np.outer(np.hanning(SIDE), np.hanning(SIDE))
    images = np.clip(images, *WINDOW).astype(float)
    power = np.abs(np.fft.fft2((images - images.mean((1, 2), keepdims=True)) * taper)) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    bands = [(radius >= low) & (radius < low + 0.1) for low in (0.05, 0.15, 0.25, 0.35)]
    return np.array([np.median(power[:, band].mean(axis=1)) for band in bands])


def test_values_and_spectrum_are_those_of_real_patches(pairs):
    images, simulated, *_ = pairs
    grades = [5, 25, 50, 75]
    ours, theirs = (np.median(np.percentile(side, grades, axis=(1, 2)), axis=1) for side in (simulated, images))
    assert np.abs(ours - theirs)[:3].max() < 10, "as the card says"
    ratio = spectrum(simulated) / spectrum(images)
    assert (np.abs(ratio - 1) < 0.2).all(), ratio


@pytest.mark.slow
def test_a_small_network_has_trouble_telling_them_apart(pairs):
    images, simulated, patients, others = pairs
    values = torch.from_numpy((np.clip(np.concatenate([images, simulated]), *WINDOW) / 400.0 + 1.75).astype(np.float32))
    real, patient = np.arange(len(values)) < len(images), np.r_[patients, others]
    aucs = []
    for train, test in GroupKFold(3).split(values, real, patient):
        net = fitted(values[train, None], torch.from_numpy(real[train]).long())
        with torch.no_grad():
            logits = net(values[test, None])
        aucs.append(roc_auc_score(real[test], logits[:, 1] - logits[:, 0]))
    # The card says 0.84, with 0.01 from training to training; it was 0.97 before vessels, noise and bone were matched
    assert np.mean(aucs) < 0.88, aucs


def fitted(values, target, epochs=20):
    """The plain network, for values that are scaled already, in evaluation mode."""
    net = small.seeded(partial(small.Plain, pixels.GREY), 0)
    net.body = net.body[1:]
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = epochs * (len(values) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(values), generator=generator)[: len(values) // 64 * 64].view(-1, 64):
            turned = torch.rot90(values[batch], int(torch.randint(4, (1,), generator=generator)), (2, 3))
            optimiser.zero_grad()
            F.cross_entropy(net(turned), target[batch], label_smoothing=0.05).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


@pytest.mark.slow
def test_what_the_phantom_alone_teaches_holds_for_real_patches(real):
    """The phantom's data card has these numbers: real patients are left out, and units are compared in pairs."""
    with np.load(real("lidc_hu_dev.npz")) as file:
        images, y, patients = file["ct_slices"], file["malignant"].astype(int), file["patient"]
    part = split.whole(patches.read("phantom", 6691))
    simulated = part.take(np.flatnonzero(~np.isin(part.units, patients)))
    p = {unit: predict(taught(simulated, unit), images).mean(1) for unit in pixels.UNITS}
    assert all(metrics.score(y, q, patients)["auc_low"] > 0.85 for q in p.values())
    gain = metrics.paired(y, p[pixels.HU], p[pixels.GREY], patients)
    assert gain["low"] < 0, "the card says that densities may gain nothing here"


@pytest.mark.slow
def test_what_one_teaches_holds_for_nodules_of_the_other(real):
    """The data card has these numbers, too; a patient who is asked about is left out of the phantom."""
    scores = transfer(real("lidc_stacks_dev.npz"))
    assert scores["phantom to real"]["auc_low"] > 0.85 and scores["real to phantom"]["auc_low"] > 0.85, scores


def transfer(path):
    """Scores per nodule of networks that were taught by the other source alone, each patch standardised."""
    held = patches.read(str(path))
    nodules, simulated = split.whole(held), teaching.company(held, 6691)
    fold, p = split.folds(nodules.y, nodules.units, 5, 0), np.empty(len(nodules))
    for k in np.unique(fold):
        left = nodules.take(np.flatnonzero(fold == k))
        others = simulated.take(np.flatnonzero(~np.isin(simulated.units, left.units)))
        p[fold == k] = predict(taught(others, pixels.GREY), left.images).mean(1)
    q = predict(taught(nodules, pixels.GREY), simulated.images).mean(1)
    return {"phantom to real": ranked(nodules, p), "real to phantom": ranked(simulated, q)}


def taught(part, unit):
    """A nodule network taught by all patches of a part."""
    parts = split.Parts(part, part.take(np.arange(64)), part.take(np.arange(0)))
    network = small.seeded(partial(small.NoduleNet, unit), 0)
    return finetune.train(network, parts, finetune.NODULE, epochs=20, name=unit, checks=1).model


def ranked(part, p):
    """Scores of one opinion a nodule."""
    table = part.table.assign(nodule=part.nodules, y=part.y, unit=part.units, p=p)
    nodules = metrics.over_slices(table, ["p"]).drop_duplicates("nodule")
    return metrics.score(*(nodules[name].to_numpy() for name in ("y", "p", "unit")))
