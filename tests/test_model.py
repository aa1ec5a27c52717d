import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import expit, logit
from scipy.stats import t as student

from nodules import model, teaching
from nodules.data import patches, split
from nodules.data.pixels import GREY, HU
from nodules.data.split import Part
from nodules.errors import InputError
from nodules.evaluation import decisions, metrics
from nodules.networks import small
from nodules.networks.device import tensor
from nodules.networks.small import NoduleNet
from nodules.tools import teach

LIDC = model.DEFAULT


def nodules(count=60, slices=3, seed=0):
    """Slices of discs, bright if malignant, in noise; every tenth slice has no outline."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64] - 31.5
    nodule, k = np.repeat(np.arange(count), slices), np.tile(np.arange(slices), count)
    malignant = nodule % 2
    disc = np.stack([x**2 + y**2 < (6 + 2 * m) ** 2 for m in malignant])
    images = rng.normal(-800, 60, (len(nodule), 64, 64)) + disc * (400 + 300 * malignant[:, None, None])
    table = pd.DataFrame(
        {
            "id": [f"n{n:03d}_{i}" for n, i in zip(nodule, k, strict=True)],
            "patient": [f"p{n // 2:03d}" for n in nodule],
            "nodule": [f"n{n:03d}" for n in nodule],
            "slice_index": k,
            "pixel_spacing_mm": 0.7,
            "diameter_mm": 0.7 * 2 * (6 + 2 * malignant),
        }
    )
    return Part(images.astype(np.int16), malignant, np.arange(len(nodule)), table, table["patient"].to_numpy(), disc)


@pytest.fixture(scope="module")
def taught():
    part = nodules()
    options = {"folds": 3, "epochs": 12, "seed": 0, "name": "t"}
    return teaching.teach(part, None, HU, **options, about={"name": "t", "data": {"title": "discs"}})


@pytest.fixture(scope="module")
def kept(taught, tmp_path_factory):
    return teaching.save(taught, tmp_path_factory.mktemp("model") / "discs.safetensors")


def test_a_model_says_the_same_after_it_was_written_and_read(taught, kept):
    part = nodules(10, seed=1)
    before, after = taught.answers(part), model.load(kept).answers(part)
    assert np.allclose(before["p"], after["p"], atol=0.01), "half precision"
    assert model.load(kept.parent).about == model.load(kept).about == json.loads(kept.with_suffix(".json").read_text())
    assert after.equals(model.load(kept).answers(part))
    assert metrics.score(part.y, after["p"].to_numpy(), part.units)["auc"] > 0.9
    assert kept.read_bytes()[:1] != b"\x80", "no pickle"


def test_a_model_keeps_the_unit_that_taught_it(tmp_path, kept):
    part = nodules(12)
    grey = replace(part, source=np.clip((part.source + 1000) // 6, 0, 255).astype(np.uint8))
    options = {"folds": 2, "epochs": 1, "seed": 0, "name": "t"}
    path = teaching.save(teaching.teach(grey, None, GREY, **options, about={}), tmp_path / "grey.safetensors")
    of_grey, of_hu = model.load(path), model.load(kept)
    assert (of_grey.about["input"]["unit"], of_hu.about["input"]["unit"]) == (GREY, HU)
    lighter = model.part_of(part.source + 100, part.table)
    numbers = ["p", "distance", *model.GROUPS]
    (one, other), (light, dense) = ([of.answers(each)[numbers] for each in (part, lighter)] for of in (of_grey, of_hu))
    assert np.allclose(one, other, atol=1e-2), "whatever the grey levels are stretched to"
    assert not np.allclose(light, dense, atol=1e-2), "densities count"


def test_patches_of_one_nodule_share_one_opinion_and_labels_are_not_looked_at(taught):
    part = nodules(8, slices=5, seed=2)
    answers = taught.answers(part)
    assert answers["id"].tolist() == part.table["id"].tolist()
    assert (answers.groupby("nodule")[["p", "p_low", "set", "remark"]].nunique() == 1).all().all()
    blind = model.part_of(part.source, part.table)
    assert taught.answers(blind).equals(answers)
    alone = taught.answers(model.part_of(part.source, part.table[["id"]]))
    assert alone["p"].nunique() > 8 and alone["size_mm"].isna().all() and alone["patient"].isna().all()


def test_the_interval_is_where_a_further_network_would_answer(taught):
    part = nodules(4, slices=1, seed=3)
    answers = taught.answers(part)
    views = np.stack([member.look(part.images)[model.VIEWS] for member in taught.members])  # member, patch, view
    p = views.mean((0, 2))
    of_views = views.var(2, ddof=1).mean(0) / 8 / (p * (1 - p)) ** 2
    spread = np.sqrt(logit(views.mean(2)).var(0, ddof=1) * (1 + 1 / 3) + of_views)
    ends = logit(p) + np.outer([-1, 0, 1], student.ppf(0.95, 2) * spread)
    low, middle, high = expit(ends / taught.about["temperature"])
    assert np.allclose(answers[["p_low", "p", "p_high"]].T, [low, middle, high], atol=1e-5)


def test_intervals_hold_what_further_networks_say():
    """The formula, on simulated opinions: how often does a sixth lie in the interval of five?"""
    rng = np.random.default_rng(0)
    opinions = rng.normal(0.5, 0.7, (4000, 6))
    five, sixth = opinions[:, :5], opinions[:, 5]
    half = student.ppf((1 + model.LEVEL) / 2, 4) * five.std(1, ddof=1) * np.sqrt(1 + 1 / 5)
    assert abs((abs(sixth - five.mean(1)) <= half).mean() - model.LEVEL) < 0.02


def test_sets_name_what_remains_possible(taught):
    part = nodules(30, seed=4)
    answers = taught.answers(part)
    line = max(taught.about["conformal_line"], 0.5)
    for row in answers.itertuples():
        possible = [name for name, against in (("benign", row.p), ("malignant", 1 - row.p)) if against <= line]
        assert answers["set"][row.Index] == (possible[0] if len(possible) == 1 else "either")
    assert ((answers["called"] == "malignant") == (answers["p"] >= taught.about["threshold"])).all()


def test_what_is_unlike_is_marked_and_so_are_pixels_of_another_width(taught):
    part = nodules(30, seed=5)
    assert (taught.answers(part)["remark"] != "").mean() < 0.2
    noise = np.random.default_rng(0).normal(0, 300, part.source.shape).astype(np.int16)
    assert taught.answers(model.part_of(noise, part.table))["remark"].str.contains("unlike").all()
    wide = taught.answers(model.part_of(part.source, part.table.assign(pixel_spacing_mm=1.2)))["remark"]
    assert wide.str.contains("pixels of 1.20 mm, but 0.70 to 0.70 mm were seen").all()


def test_the_parts_of_the_logit_add_up(taught):
    member = taught.members[0]
    images = nodules(3, slices=1, seed=6).images
    with torch.inference_mode():
        logits, features, _, _ = member(tensor(images))
        average = member.network.head(member.average[None]).diff(dim=1)[0, 0]
        assert torch.allclose(member.parts(features).sum(1) + average, logits, atol=1e-4)
        assert member.distance(member.mean[None]).item() == 0


def test_a_model_taught_on_grey_levels_reads_hounsfield_units_too():
    part, taught = nodules(10, seed=7), model.load(LIDC)
    images = part.source.astype(float)
    low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    grey = np.rint(255 * (images - low) / (high - low)).astype(np.uint8)
    in_hu, in_bytes = taught.answers(part)["p"], taught.answers(model.part_of(grey, part.table))["p"]
    assert np.abs(in_hu - in_bytes).max() < 0.02


def test_size_is_measured_in_millimetres(taught):
    part = nodules(20, seed=8)
    answers = taught.answers(part)
    assert np.corrcoef(answers["size_mm"], part.diameters)[0, 1] > 0.9
    first = taught._found(part)["cells"].iloc[0]  # of 4 pixels of 0.7 mm a side
    assert answers["size_mm"].iloc[0] == pytest.approx(2 * np.sqrt(first * (4 * 0.7) ** 2 / np.pi))
    wider = replace(part, table=part.table.assign(pixel_spacing_mm=1.4))
    assert np.allclose(taught.answers(wider)["size_mm"], 2 * answers["size_mm"])


def test_what_turns_opinions_into_an_answer_is_from_patients_left_out(taught):
    part = nodules()
    fold = split.folds(part.y, part.units, 3, 0)
    left = teaching.left_out(part, fold, list(taught.members))
    y, p, about = left["y"].to_numpy(), left["p"].to_numpy(), taught.about
    assert about["temperature"] == pytest.approx(decisions.temperature(y, p), rel=1e-3)
    calm = decisions.tempered(p, about["temperature"])
    assert about["conformal_line"] == pytest.approx(min(decisions.conformal_line(y, calm), 1), abs=1e-3)
    assert about["scores"]["auc"] == metrics.score(y, calm, left["unit"].to_numpy(), fold=left["fold"])["auc"]


def test_a_model_is_measured_on_patients_who_taught_none_of_its_networks(tmp_path, monkeypatch):
    part = nodules(24)
    columns = {name: column.to_numpy(str if column.dtype.kind not in "if" else None) for name, column in
               part.table.items()}  # fmt: skip
    np.savez(tmp_path / "own.npz", images=part.source, masks=part.masks, malignant=part.y, **columns)
    taught_by, asked, teaching_once, answering = [], [], teaching.teach, model.Model.answers
    monkeypatch.setattr(
        teaching,
        "teach",
        lambda own, *rest, **options: taught_by.append(set(own.units)) or teaching_once(own, *rest, **options),
    )
    monkeypatch.setattr(model.Model, "answers", lambda self, own: asked.append(set(own.units)) or answering(self, own))
    options = {"credit": "discs", "folds": 2, "epochs": 1, "phantom": 0, "seed": 0}
    path = teach.teach(str(tmp_path / "own.npz"), tmp_path / "m.safetensors", **options)
    everybody, *without = taught_by
    assert len(without) == 2 and everybody == set(part.units)
    assert asked[::2] == [everybody - kept for kept in without], "the answers that are scored"
    assert not (everybody - without[0]) & (everybody - without[1])
    about = model.load(path).about
    assert 0 <= about["measured"]["scores"]["auc"] <= 1 and about["data"]["title"] == "discs"
    assert "discs" in path.with_suffix(".md").read_text(encoding="utf-8")


DAMAGED = {
    "no description": lambda folder: (folder / "m.json").unlink(),
    "no tensors": lambda folder: (folder / "m.safetensors").unlink(),
    "cut off": lambda folder: (folder / "m.safetensors").write_bytes((folder / "m.safetensors").read_bytes()[:-100]),
    "a field missing": lambda folder: changed(folder, lambda about: about.pop("temperature")),
    "text for a number": lambda folder: changed(folder, lambda about: about.update(threshold="high")),
    "a billion networks": lambda folder: changed(folder, lambda about: about.update(members=10**9)),
    "another number of networks": lambda folder: changed(folder, lambda about: about.update(members=2)),
    "another unit": lambda folder: changed(folder, lambda about: about["input"].update(unit="mm")),
    "no unit": lambda folder: changed(folder, lambda about: about["input"].pop("unit")),
    "no JSON": lambda folder: (folder / "m.json").write_text("{"),
    "other tensors": lambda folder: save_file(
        {name: tensor + 1 for name, tensor in load_file(folder / "m.safetensors").items()}, folder / "m.safetensors"
    ),
}


def changed(folder, change):
    about = json.loads((folder / "m.json").read_text())
    change(about)
    (folder / "m.json").write_text(json.dumps(about))


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(kept, tmp_path, damage):
    for suffix in (".safetensors", ".json"):
        shutil.copy(kept.with_suffix(suffix), tmp_path / f"m{suffix}")
    damage(tmp_path)
    with pytest.raises(InputError, match="get both files again") as refusal:
        model.load(tmp_path / "m.safetensors")
    assert "\n" not in str(refusal.value)


def test_a_folder_with_several_models_or_none_is_refused(tmp_path):
    for count in (0, 2):
        for i in range(count):
            (tmp_path / f"{i}.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match=f"holds {count} safetensors files"):
            model.load(tmp_path)


def test_company_leaves_out_the_patients_that_are_left_out():
    part = nodules(6)
    other = nodules(4)
    joined = teaching.in_company(part, other, part.units[:3])
    assert len(joined) == len(part) + len(other) - 2 * 3, "a patient has two nodules"
    assert teaching.in_company(part, None) is part


def test_real_patches_have_company_if_their_patients_can_be_left_out_of_it():
    simulated = patches.read("phantom", 300)
    assert teaching.company(simulated, 300) is None, "a simulation needs no company"
    real = replace(simulated, card=replace(simulated.card, simulation=False, name="lidc-idri"))
    assert len(teaching.company(real, 300)) == 300
    hashed = replace(real, table=real.table.assign(patient="a" + real.table["patient"]))
    assert teaching.company(hashed, 300) is None, "nobody knows which of the phantom's patients these are"
    assert len(teaching.company(replace(hashed, card=replace(real.card, name="own")), 300)) == 300


# --- The model in the repository -----------------------------------------------------------------------


def test_the_model_in_the_repository_is_small_and_described():
    about = model.load(LIDC).about
    assert LIDC.stat().st_size < 4e6 and about["members"] == 5
    assert (
        about["data"]["patients"] == 579
        and about["data"]["nodules"] == 1243
        and "CC BY 3.0" in about["data"]["licence"]
    )
    measured = about["measured"]
    assert measured["scores"]["auc_low"] > 0.88 and measured["scores"]["n"] == 1243
    assert abs(measured["shares"]["truth in the set"]["value"] - (1 - about["alpha"])) < 0.03
    assert measured["shares"]["one more network in the interval"]["value"] > 0.85
    assert about["marked"]["false"]["value"] < 0.05 < 0.9 < about["marked"]["caught"]["noise alone"]
    assert about["marked"]["caught"]["the nodule at the patch's edge"] > 0.4


def test_a_place_beside_the_nodule_is_told_from_a_nodule_in_the_middle():
    held = patches.read("phantom", 300)
    taught, table = model.load(LIDC), held.table.drop_duplicates("nodule").drop(columns="slice_index")
    images = held.images[table.index]
    places = {"middle": images, "beside": np.roll(images, 12, axis=2)}
    marked = {
        name: taught.answers(model.part_of(moved, table))["remark"].str.contains(model.EMPTY).mean()
        for name, moved in places.items()
    }
    assert marked["middle"] < 0.1 < 0.4 < marked["beside"], marked


def test_the_model_in_the_repository_knows_real_patches_in_hounsfield_units(real):
    """Each patch is judged by the networks that did not see its patient; nodules of the same scans, other slices."""
    taught = model.load(LIDC)
    with np.load(real("lidc_stacks_dev.npz")) as stacks:
        y, units = stacks["malignant"], stacks["patient"]
    fold = dict(zip(units, split.folds(y, units, taught.about["members"], taught.about["recipe"]["seed"]), strict=True))
    with np.load(real("lidc_hu_dev.npz")) as held:
        images, labels, patients = held["ct_slices"], held["malignant"].astype(int), held["patient"]
    low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    grey = np.rint(255.0 * (images - low) / (high - low)).astype(np.uint8)
    of_patient = np.array([fold[patient] for patient in patients])
    p = {name: unseen(taught, source, of_patient) for name, source in {"HU": images, "bytes": grey}.items()}
    score = metrics.score(labels, p["HU"], patients)
    assert score["auc_low"] > 0.85, score
    assert np.abs(p["HU"] - p["bytes"]).max() < 0.02


def unseen(taught, images, fold):
    """Probability of each patch by the network that left its patient out."""
    part, p = model.part_of(images, pd.DataFrame({"id": [f"{i}" for i in range(len(images))]})), np.empty(len(images))
    for k, member in enumerate(taught.members):
        rows = np.flatnonzero(fold == k)
        p[rows] = member.look(part.take(rows).images)[model.VIEWS].mean(axis=1)
    return expit(logit(p.clip(1e-6, 1 - 1e-6)) / taught.about["temperature"])


def test_networks_of_the_same_kind_are_rebuilt_from_their_description():
    about = model.load(LIDC).about
    assert about["architecture"] == NoduleNet.__name__ and about["input"]["side"] == patches.SIDE == model.SIDE
    assert model.CELL == (64 - 2 * small.MARGIN) / small.GRID


def test_the_card_in_the_repository_is_that_of_its_model():
    assert teach.card_of(model.load(LIDC)) == LIDC.with_suffix(".md").read_text(encoding="utf-8")
