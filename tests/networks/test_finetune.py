import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from nodules.data import split, transforms
from nodules.errors import InputError
from nodules.networks import bank, bodies, finetune, heads, maps, small
from nodules.networks.bodies import Spec
from nodules.networks.device import device
from nodules.networks.finetune import Recipe
from nodules.networks.network import Mixed, Network, predict

N = 96
rng = np.random.default_rng(0)
Y = np.arange(N) % 2
yy, xx = np.mgrid[:64, :64] - 31.5
DISC = yy**2 + xx**2 < 15**2
IMAGES = (rng.normal(-800, 50, (N, 64, 64)) + 700 * Y[:, None, None] * DISC).astype(np.int16)
SIDES = np.repeat(["train", "valid", "test"], [64, 16, 16])
PATCHES = split.Part(
    IMAGES, Y, np.arange(N), pd.DataFrame({"id": np.arange(N).astype(str), "malignant": Y}), np.arange(N) // 4
)
PARTS = split.divide(PATCHES, SIDES)


def tiny(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(small.Scale("HU"), nn.Conv2d(2, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 15 * 15, 2))  # fmt: skip


def run(network, recipe=None, steps=6, seed=0):
    recipe = recipe or Recipe(lr=1e-2, warmup=0.25)
    return finetune.train(network, PARTS, recipe, epochs=steps * recipe.batch / 64, name="t", seed=seed)


def test_it_learns_what_can_be_seen_and_the_same_seed_gives_the_same_network():
    first, again, other = (run(tiny(), steps=30, seed=seed) for seed in (0, 0, 1))
    p = predict(first.model, IMAGES)
    assert p.shape == (N, 8) and ((p.mean(1) > 0.5) == Y)[SIDES == "test"].all()
    assert (p == predict(again.model, IMAGES)).all() and (p != predict(other.model, IMAGES)).any()
    assert first.stopped == "" and len(first.history) == 3 and len(first.steps) == 30
    assert math.isclose(first.history["epoch"].iloc[-1], 30 * 32 / 64)
    assert np.allclose(first.steps["epoch"], np.arange(30) * 32 / 64)


def test_the_network_is_trained_in_place_and_put_into_evaluation_mode():
    network = tiny()
    before = network[1].weight.detach().clone()
    trained = run(network, steps=3)
    assert trained.model.network is network and not network.training and trained.seconds > 0
    assert not torch.equal(network[1].weight.cpu(), before)


def test_outlines_are_turned_with_their_images():
    corner = np.zeros((64, 64), bool)
    corner[4:20, 8:40] = True  # all symmetries of the square turn it into something else
    outlines = np.repeat(corner[None], N, 0)
    part = replace(PATCHES, source=np.where(outlines, 400, -800), masks=outlines)
    seen = set()
    for images, _, outlines in finetune.ImageLoader(part, 16, 4, seed=0):
        assert torch.equal(images > 0, outlines == 1)
        seen |= {image.cpu().numpy().tobytes() for image in outlines}
    assert len(seen) == 8


def test_training_touches_no_global_randomness():
    torch.manual_seed(5)
    expected = torch.rand(3)
    network = tiny()
    torch.manual_seed(5)
    run(network)
    assert (torch.rand(3) == expected).all()


def test_validation_and_test_patches_are_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(transforms, "augment", lambda images, *_: seen.append(images.clone()) or images)
    run(tiny(), steps=6)
    seen = torch.cat(seen)[:, 0].numpy()
    assert len(seen) == 6 * 32
    train = {image.astype(np.float32).tobytes() for image in IMAGES[SIDES == "train"]}
    assert {image.tobytes() for image in seen} == train


def test_a_validation_within_an_epoch_does_not_begin_it_anew(monkeypatch):
    seen = []
    monkeypatch.setattr(transforms, "augment", lambda images, *_: seen.extend(images[:, 0].clone()) or images)
    finetune.train(tiny(), PARTS, Recipe(lr=1e-2, batch=16), epochs=2.5, name="t", checks=5)
    epochs = [{image.numpy().tobytes() for image in seen[start : start + 64]} for start in (0, 64)]
    assert len(seen) == 160 and [len(epoch) for epoch in epochs] == [64, 64], "each nodule once an epoch"


def test_a_training_that_diverges_is_stopped_and_says_where():
    trained = run(tiny(), Recipe(lr=1e4))
    assert trained.stopped.startswith("diverged at step") and len(trained.history) < 3


def test_nan_is_divergence_and_is_never_predicted():
    network = tiny()
    with torch.no_grad():
        network[-1].weight.fill_(math.nan)
    trained = run(network)
    assert trained.stopped == "diverged at step 1: training loss nan is not below 2.77"
    with pytest.raises(InputError, match="diverged"):
        predict(trained.model, IMAGES)


# Recipes


def test_the_rate_warms_up_and_falls_and_groups_are_spread():
    rate = Recipe(lr=1.0, spread=100.0, warmup=0.2).rate(3)
    assert np.allclose(rate(0.0), 0) and np.allclose(rate(0.1), [0.005, 0.05, 0.5])
    assert np.allclose(rate(0.2), [0.01, 0.1, 1]) and np.allclose(rate(0.6), [0.005, 0.05, 0.5])
    assert np.allclose(rate(1.0), 0) and np.allclose(Recipe(lr=1.0).rate(1)(0.0), 1)


def test_the_optimizer_uses_those_rates_in_those_groups():
    body = bodies.build(Spec("resnet34", "random"))
    network = Network(body, "all", heads.head(bank.width(body, "all")))
    before = [parameters[0].detach().clone() for parameters in network.groups()]
    run(network, Recipe(lr=1e-3, spread=1000.0), steps=3)
    moved = [(now[0].cpu() - then).abs().max().item() for now, then in zip(network.groups(), before, strict=True)]
    assert moved[0] < moved[1] < moved[-2] and moved[0] < 1e-5


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_and_others_move(frozen):
    network = tiny()
    before = network[2].running_mean.clone()
    run(network, Recipe(lr=1e-3, frozen_statistics=frozen), steps=3)
    assert torch.equal(network[2].running_mean.cpu(), before) is frozen


def test_smoothing_changes_the_training_loss_only():
    """With a rate near 0 the network stays as it is, so both losses can be computed."""
    losses = [run(tiny(), Recipe(lr=1e-12, smoothing=s), steps=3).history for s in (0.0, 0.5)]
    assert np.allclose(losses[0]["valid_loss"], losses[1]["valid_loss"], atol=1e-3)
    assert not np.allclose(losses[0]["train_loss"], losses[1]["train_loss"], atol=1e-3)


def test_the_loss_can_be_another():
    torch.manual_seed(0)
    trained = run(small.CapsuleNet("HU"), Recipe(lr=1e-2, warmup=0.25, loss=small.margin_loss), steps=3)
    assert trained.history["valid_loss"].between(0, 1).all()


def test_the_loss_sees_logits_and_the_shares_of_both_classes():
    seen = []

    def loss(logits, target):
        seen.append((logits.shape[1], sorted(set(target.cpu().flatten().tolist()))))
        return nn.functional.cross_entropy(logits, target)

    run(tiny(), Recipe(lr=1e-3, smoothing=0.25, loss=loss), steps=3)
    assert seen[0] == (2, [0.125, 0.875]) and (2, [0.0, 1.0]) in seen, "smoothed in training only"


@pytest.mark.parametrize("asked", [True, False])
def test_bfloat16_is_used_where_the_recipe_asks_for_it(asked, monkeypatch):
    monkeypatch.setattr("nodules.networks.network.has_bfloat16", lambda: True)
    network, types = tiny(), set()
    network[1].register_forward_hook(lambda _, __, out: types.add(out.dtype))
    run(network, Recipe(lr=1e-3, bfloat16=asked), steps=3)
    assert types == {torch.bfloat16 if asked else torch.float32}


# Sampling


def test_an_epoch_shows_each_nodule_once_by_any_of_its_slices():
    nodules = np.array(["a"] * 9 + ["b"] + ["c"] * 3)
    draws = np.random.default_rng(0)
    epochs = [finetune.one_of_each(nodules, draws) for _ in range(300)]
    assert all(sorted(nodules[rows]) == ["a", "b", "c"] for rows in epochs)
    shown = np.bincount(np.concatenate(epochs), minlength=13)
    assert shown[9] == 300 and shown[:9].min() > 300 / 9 / 2 and shown[10:].min() > 50
    assert {nodules[rows[0]] for rows in epochs} == {"a", "b", "c"}, "in any order"


def test_large_nodules_do_not_dominate(monkeypatch):
    seen = []
    monkeypatch.setattr(transforms, "augment", lambda images, *_: seen.append(len(images)) or images)
    alone = PARTS.train.table.assign(nodule=["large"] * 48 + [f"n{i}" for i in range(16)])
    parts = PARTS._replace(train=split.Part(IMAGES, PARTS.train.y, PARTS.train.rows, alone, PARTS.train.units))
    trained = finetune.train(tiny(), parts, Recipe(lr=1e-2, batch=4), epochs=6, name="t", checks=2)
    assert sum(seen) == pytest.approx(6 * 17, abs=8) and len(trained.history) == 2
    assert trained.history["epoch"].iloc[-1] == pytest.approx(6, abs=0.5)


# The head first, and folds


def test_a_network_can_start_from_a_head_trained_on_the_bank():
    spec = Spec("resnet10t", "random", pool="last")
    features = bank.compute(bodies.build(spec), IMAGES, spec.pool)
    network, history = finetune.head_first(spec, "HU", features, PARTS, seed=3)
    alone = heads.train(features, PARTS, finetune.PROBE, 3)
    pd.testing.assert_frame_equal(history, alone.history)
    assert len(history) == finetune.PROBE.epochs and network.pool == "last"
    p = predict(network.to(device()), PARTS.test.images, symmetries=1)
    assert np.allclose(p, heads.predict(alone.model, features, PARTS.test.rows), atol=0.02)


def test_the_outline_is_learned_where_the_recipe_asks_for_it():
    masks = np.broadcast_to(DISC, IMAGES.shape)
    parts = split.divide(replace(PATCHES, masks=masks), SIDES)
    found = []
    for outline in (0.0, 4.0):
        network = small.seeded(partial(small.NoduleNet, "HU"), 0)
        recipe = Recipe(lr=3e-3, outline=outline, bfloat16=False)
        finetune.train(network, parts, recipe, epochs=40, name="t")
        attention, _ = small.attention(network, IMAGES[:4, None])
        found.append(np.corrcoef(maps.overlay(attention, 64).ravel(), masks[:4].ravel())[0, 1])
    assert found[1] > 0.8 > found[0]


def test_the_loss_of_an_outline_does_not_count_as_divergence():
    recipe = Recipe(lr=1e-3, outline=4.0)
    assert math.isclose(Recipe(lr=1).limit, 4 * math.log(2)) and math.isclose(recipe.limit, 20 * math.log(2))
    trained = run(small.seeded(partial(small.NoduleNet, "HU"), 0), recipe, steps=3)
    assert trained.stopped == "" and len(trained.history) == 3


def test_each_patch_is_predicted_by_a_network_that_has_not_seen_its_fold():
    made, fold = [], split.folds(Y, PATCHES.units, 3, seed=1)

    def make(parts):
        made.append((tiny(), parts))
        return made[-1][0]

    options = {"epochs": 3, "name": "t", "seed": 1}
    p, networks = finetune.cross_validate(make, PATCHES, fold, Recipe(lr=1e-2), **options)
    assert p.shape == (N, 8) and networks == [network for network, _ in made] and len(made) == 3
    for k, (network, parts) in enumerate(made):
        left_out = np.flatnonzero(fold == k)
        assert np.array_equal(np.sort(parts.valid.rows), left_out) and len(parts.test) == 0
        assert np.array_equal(np.sort(np.concatenate([parts.train.rows, parts.valid.rows])), np.arange(N))
        assert np.array_equal(p[left_out], predict(Mixed(network), IMAGES[left_out])), "by the network of its fold"
    assert np.array_equal(p, finetune.cross_validate(make, PATCHES, fold, Recipe(lr=1e-2), **options)[0])


def test_first_weights_in_folds_follow_from_the_seed_alone():
    fold, found = np.arange(N) // 4 % 2, []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        options = {"epochs": 1, "name": "t", "seed": seed}
        make = lambda _: small.Plain("HU")  # noqa: E731
        found.append(finetune.cross_validate(make, PATCHES, fold, Recipe(lr=1e-3, bfloat16=False), **options)[0])
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_patches_of_another_source_are_learned_from_unless_their_unit_is_left_out():
    fold, taught = np.arange(N) // 4 % 3 - 1, []  # a third is of another source

    def make(parts):
        taught.append(parts)
        return small.seeded(partial(small.Plain, "HU"), 0)

    units = np.array([f"u{i % 8}" for i in range(N)])
    part = replace(PATCHES, units=units)
    p, _ = finetune.cross_validate(make, part, fold, Recipe(lr=1e-3), epochs=1, name="t")
    assert p.shape == ((fold >= 0).sum(), 8) and len(taught) == 2
    for k, parts in enumerate(taught):
        assert np.array_equal(np.sort(parts.valid.rows), np.flatnonzero(fold == k))
        apart = np.isin(units, units[fold == k])
        assert np.array_equal(np.sort(parts.train.rows), np.flatnonzero((fold == 1 - k) | ((fold == -1) & ~apart)))
