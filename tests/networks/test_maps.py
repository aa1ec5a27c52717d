from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nodules.data import split
from nodules.networks import bank, bodies, heads, maps, small
from nodules.networks.bodies import Spec
from nodules.networks.device import device, tensor
from nodules.networks.network import Network
from nodules.networks.weights import ARCHITECTURES

rng = np.random.default_rng(0)
IMAGES = rng.integers(-1000, 400, (6, 64, 64), dtype=np.int16)
Y = np.arange(6) % 2
PATCHES = split.Part(IMAGES, Y, np.arange(6), pd.DataFrame({"malignant": Y}), np.arange(6))


@pytest.fixture(params=ARCHITECTURES, scope="module")
def body(request):
    return bodies.build(Spec(request.param, "random"))


@pytest.fixture
def network(body):
    torch.manual_seed(0)
    return Network(body, "all", heads.head(bank.width(body, "all"))).to(device())


@pytest.fixture
def linear(body):
    return maps.averaged(body, bank.compute(body, IMAGES), PATCHES)


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in network.modules())


def logits(linear):
    with torch.inference_mode():
        return linear(tensor(IMAGES)).cpu().numpy()


def test_the_mean_of_a_classic_map_is_the_logit(linear):
    classic = maps.cam(linear, IMAGES)
    assert classic.shape[0] == 6 and classic.shape[1] == classic.shape[2]
    assert np.allclose(classic.mean((1, 2)) + linear.bias, logits(linear), atol=1e-3)


def test_the_linear_head_is_the_logistic_regression_that_was_fitted(linear):
    """Scaling folded into the weights: six patches are told apart."""
    assert ((logits(linear) > 0) == (Y == 1)).all()


@pytest.mark.parametrize("stage", range(4))
def test_grad_cam_works_on_every_stage_repeats_and_releases_its_hooks(network, stage):
    evidence = maps.grad_cam(network, IMAGES, stage)
    side = {"efficientnet_lite0": 32}.get(network.body.architecture, 16) >> stage
    assert evidence.shape == (6, side, side) and (evidence >= 0).all()
    assert (maps.grad_cam(network, IMAGES, stage) == evidence).all()
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
    with pytest.raises(Exception, match=r"pass \(N, 1, 64, 64\)"):
        maps.grad_cam(network, np.zeros((2, 3, 64, 64), np.float32), 1)
    assert hooks(network) == 0


def test_grad_cam_of_all_stages_in_one_pass_is_captums_of_each():
    body = bodies.build(Spec("resnet34", "random"))
    torch.manual_seed(0)
    network = Network(body, "all", heads.head(bank.width(body, "all"))).to(device()).eval()
    evidence = maps.grad_cams(network, IMAGES, range(4))
    for tap, ours in zip(network.taps, evidence, strict=True):
        captum = LayerGradCam(lambda images: network(images).diff(dim=1)[:, 0], tap)
        theirs = captum.attribute(tensor(IMAGES), relu_attributions=True)[:, 0].detach().cpu().numpy()
        assert theirs.max() > 0 and np.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.max())


def test_two_networks_share_a_frozen_body_and_a_head_can_be_forgotten():
    parts = split.divide(PATCHES, np.repeat(["train", "valid"], [4, 2]))
    body = bodies.build(Spec("resnet10t", "random"))
    linear, network = maps.networks(body, parts, heads.Recipe(epochs=1, lr=1e-3), seed=0)
    assert linear.body is network.body is body
    assert ((logits(linear) > 0) == (Y == 1))[:4].all(), "fitted to the patches to train on"
    state = torch.get_rng_state()
    first, again, other = (maps.forgotten(network, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.body.state_dict().values(), body.state_dict().values()))
    assert first.pool == "all" and not first.training
    weights = [whole.head[-1].weight for whole in (network, first, other)]
    assert torch.equal(first.head[-1].weight, again.head[-1].weight)
    assert not any(torch.equal(weights[i], weights[k]) for i, k in ((0, 1), (0, 2), (1, 2)))


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (2, 4, 4), elements=st.floats(-10, 10, width=32)))
def test_an_overlay_lies_between_0_and_1(evidence):
    grown = maps.overlay(evidence, 64)
    assert grown.shape == (2, 64, 64) and grown.min() >= 0 and grown.max() <= 1


# The network for nodules


def test_attention_is_framed_by_the_margin_that_the_network_does_not_see():
    network = small.seeded(lambda: small.NoduleNet("HU"), 0)
    images = rng.normal(-600, 300, (5, 64, 64))
    attention, evidence = small.attention(network, images)
    assert attention.shape == evidence.shape == (5, 16, 16)
    assert (attention[:, :2] == 0).all() and (attention[:, :, 14:] == 0).all() and (attention[:, 2:14, 2:14] > 0).all()
    again = small.attention(network, images[:2])[1]
    assert np.allclose(evidence[:2], again, atol=1e-5) and (evidence[:, 2:14, 2:14] != 0).all()


def test_a_forgotten_head_changes_the_evidence_but_not_the_attention():
    network = small.seeded(partial(small.NoduleNet, "HU"), 0)
    before = network.head.weight.detach().clone()
    images = rng.normal(-600, 300, (2, 1, 64, 64))
    other = maps.forgotten(network, 1)
    assert torch.equal(network.head.weight, before) and not torch.equal(other.head.weight, before)
    assert np.array_equal(small.attention(network, images)[0], small.attention(other, images)[0])
    assert not np.allclose(small.attention(network, images)[1], small.attention(other, images)[1])
    assert torch.equal(other.head.weight, maps.forgotten(network, 1).head.weight)
