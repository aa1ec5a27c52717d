import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

from nodules.networks import bank, bodies, finetune, heads, maps

ARCHITECTURES = bodies.ARCHITECTURES
rng = np.random.default_rng(0)
IMAGES = rng.integers(-1000, 400, (6, 64, 64), dtype=np.int16)
Y = np.arange(6) % 2


@pytest.fixture(params=ARCHITECTURES, scope="module")
def body(request):
    return bodies.body(request.param, "random")


@pytest.fixture
def network(body):
    torch.manual_seed(0)
    return finetune.Network(body, "all", heads.head(bank.width(body, "all")))


@pytest.fixture
def linear(body, monkeypatch, tmp_path):
    monkeypatch.setattr("nodules.paths.CACHE", tmp_path)
    return maps.averaged(body, bank.bank(body, IMAGES), Y, np.arange(6))


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in network.modules())


def test_the_mean_of_a_classic_map_is_the_logit(linear):
    maps = maps.cam(linear, IMAGES)
    with torch.inference_mode():
        logits = linear(torch.from_numpy(IMAGES.astype(np.float32))[:, None]).numpy()
    assert maps.shape[0] == 6 and maps.shape[1] == maps.shape[2]
    assert np.allclose(maps.mean((1, 2)) + linear.bias, logits, atol=1e-3)


def test_the_linear_head_is_the_logistic_regression_that_was_fitted(linear):
    """Scaling folded into the weights: six patches are told apart."""
    with torch.inference_mode():
        logits = linear(torch.from_numpy(IMAGES.astype(np.float32))[:, None]).numpy()
    assert ((logits > 0) == (Y == 1)).all()


@pytest.mark.parametrize("stage", range(4))
def test_grad_cam_works_on_every_stage_repeats_and_releases_its_hooks(network, stage):
    maps = maps.grad_cam(network, IMAGES, stage)
    side = {"efficientnet_lite0": 32}.get(network.body.architecture, 16) >> stage
    assert maps.shape == (6, side, side) and (maps >= 0).all()
    assert (maps.grad_cam(network, IMAGES, stage) == maps).all()
    assert hooks(network) == 0


def test_maps_change_with_the_head(network, linear):
    before = maps.grad_cam(network, IMAGES, 1), maps.cam(linear, IMAGES)
    for layer in network.head.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    linear.weight = linear.weight[torch.randperm(len(linear.weight))]
    after = maps.grad_cam(network, IMAGES, 1), maps.cam(linear, IMAGES)
    assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(before, after, strict=True))


def test_hooks_are_released_when_the_forward_pass_fails(network):
    with pytest.raises(Exception, match="bring"):
        maps.grad_cam(network, np.zeros((2, 3, 64, 64), np.float32), 1)
    assert hooks(network) == 0


def test_grad_cam_is_the_gradient_weighted_sum_of_the_maps():
    body = bodies.body("resnet34", "random")
    torch.manual_seed(0)
    network = finetune.Network(body, "all", heads.head(bank.width(body, "all"))).eval()
    images = torch.from_numpy(IMAGES.astype(np.float32))[:, None]
    # In the same memory layout, since the last bit can decide where a maximum lies
    maps = body(body.prepare(images).contiguous(memory_format=torch.channels_last))
    maps[1].retain_grad()
    logits = network.head(bank.pooled(maps, "all"))
    (logits[:, 1] - logits[:, 0]).sum().backward()
    expected = (maps[1].grad.mean((2, 3), keepdim=True) * maps[1]).sum(1).relu().detach().numpy()
    assert np.allclose(maps.grad_cam(network, IMAGES, 1), expected, atol=0.01 * expected.max())


def test_pointing_by_hand():
    masks = np.zeros((3, 64, 64), bool)
    masks[:, :32, :32] = True
    maps = np.zeros((3, 2, 2))
    maps[0, 0, 0] = 1  # inside
    maps[1, 1, 1] = 1  # outside
    found = maps.pointing(maps, masks)  # the third is empty
    assert found["hit"].tolist() == [1, 0, 0]
    assert found["mass"][0] > 0.7 and found["mass"][1] < 0.1 and found["mass"][2] == 0


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (2, 4, 4), elements=st.floats(-10, 10, width=32)))
def test_an_overlay_lies_between_0_and_1(maps):
    grown = maps.overlay(maps, 64)
    assert grown.shape == (2, 64, 64) and grown.min() >= 0 and grown.max() <= 1


def test_controls_score_as_what_they_are():
    """In the middle of the patch the blob finds a nodule and noise does not; noise has the share of the area."""
    yy, xx = np.mgrid[:64, :64]
    mask = (yy - 31.5) ** 2 + (xx - 31.5) ** 2 < 8**2
    masks = np.repeat(mask[None], 400, 0)
    table = maps.localisation(maps.controls(400, 16, 0), masks, None, 0).set_index(["name", "part"])
    assert table.loc[("centred blob", "hit"), "value"] == 1
    assert abs(table.loc[("random map", "mass"), "value"] - mask.mean()) < 0.01
    assert abs(table.loc[("random map", "hit"), "value"] - mask.mean()) < 0.04


def test_likeness_is_the_rank_correlation_of_each_map():
    maps, others = rng.random((5, 4, 4)), rng.random((5, 4, 4))
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(maps, others, strict=True)]
    assert np.allclose(maps.likeness(maps, others), expected)
    assert np.allclose(maps.likeness(maps, maps**3), 1), "order counts, not size"
    assert not maps.likeness(maps, np.zeros_like(maps)).any()


def test_titles_say_what_the_source_knows():
    table = pd.DataFrame({"id": ["a"], "p_tta": [0.256], "patient": ["P1"], "ratings": ["5;4"]})
    assert maps.titles(table) == ["a\np 0.26, ratings 5;4, P1"]
    assert maps.titles(table.assign(patient=np.nan).drop(columns="ratings")) == ["a\np 0.26"]
