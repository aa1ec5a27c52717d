import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nodules.data import transforms
from nodules.errors import InputError
from nodules.networks import bank, bodies, finetune, heads, small

N = 96
rng = np.random.default_rng(0)
Y = np.arange(N) % 2
yy, xx = np.mgrid[:64, :64] - 31.5
DISC = yy**2 + xx**2 < 15**2
IMAGES = (rng.normal(-800, 50, (N, 64, 64)) + 700 * Y[:, None, None] * DISC).astype(np.int16)
SPLIT = np.repeat(["train", "valid", "test"], [64, 16, 16])


@pytest.fixture
def budget():
    return finetune.Budget(1, 50)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(small.Standardise(), nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 15 * 15, 2))  # fmt: skip


def run(network, budget, recipe=None, steps=6, **options):
    recipe = recipe or finetune.Recipe(lr=1e-2, warmup=0.25)
    return finetune.train(network, IMAGES, Y, SPLIT, recipe, steps=steps, budget=budget, name="t", **options)


def test_it_learns_what_can_be_seen_and_the_same_seed_gives_the_same_network(budget):
    first, again, other = (run(small(), budget, steps=15, seed=seed) for seed in (0, 0, 1))
    p = finetune.predict(first.model, IMAGES)
    assert p.shape == (N, 8) and ((p.mean(1) > 0.5) == Y)[SPLIT == "test"].all()
    assert (p == finetune.predict(again.model, IMAGES)).all() and (p != finetune.predict(other.model, IMAGES)).any()
    assert first.stopped == "" and len(first.history) == finetune.CHECKS and len(first.steps) == 15
    assert math.isclose(first.history["epoch"].iloc[-1], 15 * finetune.BATCH / 64)


def test_training_touches_no_global_randomness(budget):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = small()
    torch.manual_seed(5)
    run(network, budget)
    assert (torch.rand(3) == expected).all()


def test_validation_and_test_patches_are_not_trained_on(budget, monkeypatch):
    seen = []
    monkeypatch.setattr(views, "augment", lambda images, *_: seen.append(images.clone()) or images)
    run(small(), budget, steps=6)
    seen = torch.cat(seen)[:, 0].numpy()
    assert len(seen) == 6 * finetune.BATCH
    train = {image.astype(np.float32).tobytes() for image in IMAGES[SPLIT == "train"]}
    assert {image.tobytes() for image in seen} == train


def test_a_training_that_diverges_is_stopped_and_says_where(budget):
    found = run(small(), budget, finetune.Recipe(lr=1e4))
    assert found.stopped.startswith("diverged at step") and len(found.history) < finetune.CHECKS


def test_nan_is_divergence_and_is_never_predicted(budget):
    network = small()
    with torch.no_grad():
        network[-1].weight.fill_(math.nan)
    found = run(network, budget)
    assert found.stopped == f"diverged at step 1: training loss nan is not below {finetune.LIMIT:.2f}"
    with pytest.raises(InputError, match="diverged"):
        finetune.predict(found.model, IMAGES)


def test_the_rate_warms_up_and_falls_and_groups_are_spread():
    rate = finetune.Recipe(lr=1.0, spread=100.0, warmup=0.2).rate(3)
    assert np.allclose(rate(0.0), 0) and np.allclose(rate(0.1), [0.005, 0.05, 0.5])
    assert np.allclose(rate(0.2), [0.01, 0.1, 1]) and np.allclose(rate(0.6), [0.005, 0.05, 0.5])
    assert np.allclose(rate(1.0), 0) and np.allclose(finetune.Recipe(lr=1.0).rate(1)(0.0), 1)


def test_the_optimizer_uses_those_rates_in_those_groups(budget):
    body = bodies.body("resnet34", "random")
    network = finetune.Network(body, "all", heads.head(bank.width(body, "all")))
    before = [parameters[0].detach().clone() for parameters in network.groups()]
    run(network, budget, finetune.Recipe(lr=1e-3, spread=1000.0), steps=3)
    moved = [(now[0] - then).abs().max().item() for now, then in zip(network.groups(), before, strict=True)]
    assert moved[0] < moved[1] < moved[-2] and moved[0] < 1e-5


def test_frozen_statistics_stay_and_others_move(budget):
    for frozen in (True, False):
        network = small()
        before = network[2].running_mean.clone()
        run(network, budget, finetune.Recipe(lr=1e-3, frozen_statistics=frozen), steps=3)
        assert torch.equal(network[2].running_mean.cpu(), before) is frozen


def test_smoothing_changes_the_training_loss_only(budget):
    """With a rate near 0 the network stays as it is, so both losses can be computed."""
    losses = [run(small(), budget, finetune.Recipe(lr=1e-12, smoothing=s), steps=3).history for s in (0.0, 0.5)]
    assert np.allclose(losses[0]["valid_loss"], losses[1]["valid_loss"], atol=1e-3)
    assert not np.allclose(losses[0]["train_loss"], losses[1]["train_loss"], atol=1e-3)


def test_the_loss_can_be_another(budget):
    torch.manual_seed(0)
    found = run(small.CapsuleNet(), budget, steps=3, loss=small.margin_loss)
    assert found.history["valid_loss"].between(0, 1).all()


def test_steps_follow_from_the_budget_and_not_from_the_clock(budget):
    network = small()
    flops = 2 * 5 * 5 * 4 * 15 * 15 + 2 * 4 * 15 * 15 * 2  # forward, of one patch
    expected = (0.001 * 60 * 50e9 / flops - finetune.CHECKS * 100) / 3 / 32
    assert abs(budget.steps(network.to(bank.device()), 0.001, 100) - expected) <= finetune.CHECKS
    assert budget.steps(network, 1e-9, 100) == finetune.CHECKS
    assert finetune.Budget(2, 50).steps(network, 0.001, 0) == pytest.approx(2 * budget.steps(network, 0.001, 0), abs=8)


@pytest.mark.parametrize("wrong", [(0, 50), (1, 0), (float("nan"), 1)])
def test_a_budget_of_nothing_is_refused(wrong):
    with pytest.raises(InputError, match="above 0"):
        finetune.Budget(*wrong)


def test_predictions_are_of_the_eight_symmetries():
    model = finetune.Mixed(small())
    p = finetune.predict(model, IMAGES[:3])
    turned = np.rot90(IMAGES[:3], 1, (1, 2)).copy()
    assert np.allclose(finetune.predict(model, turned)[:, 0], p[:, 1], atol=1e-6)


def test_augmenting_is_exact_and_repeats():
    images = torch.from_numpy(IMAGES[:40].astype(np.float32))[:, None]
    one, same, other = (transforms.augment(images, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    turned = torch.stack([transforms.dihedral(images, which) for which in range(8)])
    found = [int((seen == turned[:, i]).flatten(1).all(1).nonzero()[0]) for i, seen in enumerate(one)]
    assert set(found) == set(range(8))


def test_rescaling_gives_every_disc_its_size_in_millimetres():
    spacing = np.array([0.5, 0.7, 0.9])
    discs = np.stack([1000 * (yy**2 + xx**2 < (10 / s) ** 2) for s in spacing]).astype(np.int16)
    areas = (transforms.rescale(discs, spacing, 0.7) > 500).sum((1, 2)) * 0.7**2
    assert np.allclose(areas, np.pi * 10**2, rtol=0.04)
    assert (transforms.rescale(discs, spacing, 0.7)[1] == discs[1]).all()


def test_a_kept_head_is_put_back_and_another_one_refused(tmp_path):
    body = bodies.body("resnet34", "random")
    network = finetune.Network(body, "all", heads.head(bank.width(body, "all"))).to(bank.device())
    path = tmp_path / "head.safetensors"
    about = {"architecture": "resnet34", "weights": "random", "size": 64, "pool": "all"}
    with pytest.raises(InputError, match="run 04_training again"):
        finetune.restore(about, "HU", path)
    save_file(network.head.state_dict(), path)
    assert np.array_equal(
        finetune.predict(finetune.restore(about, "HU", path), IMAGES[:3]), finetune.predict(network, IMAGES[:3])
    )
    with pytest.raises(InputError, match="no head of efficientnet_lite0"):
        finetune.restore(about | {"architecture": "efficientnet_lite0"}, "HU", path)


def test_phases_end_the_head_where_all_layers_begin(budget):
    found = run(small(), budget, steps=6)
    head = pd.DataFrame({"epoch": [1, 2], "train_loss": [0.7, 0.6], "valid_loss": [0.8, 0.7], "accuracy": 0.5})
    table = finetune.phases({"a": found}, head)
    before, after = table[table["done"] <= -0.5], table[(table["done"] > 0) & (table["part"] == "valid")]
    assert before["loss"].tolist() == [0.7, 0.8] and table.loc[table["done"] == 0, "loss"].isin([0.6, 0.7]).sum() == 2
    assert table["done"].between(-1, 1).all() and np.allclose(after["loss"], found.history["valid_loss"])
    assert finetune.phases({"a": found})["done"].min() == 0
