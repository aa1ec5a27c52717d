import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from nodules.data.pixels import GREY, HU
from nodules.networks import small

NETWORKS = {
    "plain": small.Plain,
    "squeezenet": small.squeezenet,
    "capsules": small.CapsuleNet,
    "nodules": small.NoduleNet,
}


@pytest.fixture(params=NETWORKS)
def make(request):
    return NETWORKS[request.param]


@pytest.mark.parametrize("unit", [HU, GREY])
def test_a_network_gives_two_logits_and_every_parameter_learns(make, unit):
    network = small.seeded(partial(make, unit), 0)
    out = network(torch.randn(4, 1, 64, 64) * 300 - 600)
    logits, *further = [out] if isinstance(out, torch.Tensor) else out
    assert logits.shape == (4, 2)
    ((logits * torch.tensor([1.0, -1.0])).sum() + sum(estimate.sum() for estimate in further)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_how_grey_levels_are_stretched_does_not_matter(make):
    images, network = torch.randn(2, 1, 64, 64) * 200, small.seeded(partial(make, GREY), 0).eval()
    assert torch.allclose(network(images), network(images * 0.2 + 100), atol=1e-3)


def test_densities_matter_in_hounsfield_units(make):
    """Patches that differ in density alone; where each is standardised, they are the same."""
    images = torch.randn(2, 1, 64, 64) * 100 - 600
    denser = images + 300
    for unit, told in {HU: True, GREY: False}.items():
        network = small.seeded(partial(make, unit), 0).eval()
        assert torch.allclose(network(images), network(denser), atol=1e-3) != told


def test_hounsfield_units_are_seen_in_a_window_for_the_lung_and_one_for_soft_tissue():
    values = torch.tensor([-3024.0, -1000.0, -300.0, -200.0, 200.0, 400.0, 600.0, 5000.0])
    lung, soft = small.Scale(HU)(values.expand(2, 1, 1, 8)).unbind(1)
    shares = [0, 0, 1 / 2, 4 / 7, 6 / 7, 1, 1, 1], [0, 0, 0, 0, 1 / 2, 3 / 4, 1, 1]
    for seen, expected in zip((lung, soft), shares, strict=True):
        scaled = 3 * torch.tensor(expected) - 0.9
        assert torch.allclose(seen, scaled.expand(2, 1, 8), atol=1e-5), "neither padding nor metal weighs more"


def test_the_slices_of_a_window_stay_together():
    slices = torch.tensor([-500.0, 0.0, 300.0])[None, :, None, None].expand(2, 3, 4, 4)
    seen = small.Scale(HU)(slices)
    assert seen.shape == (2, 6, 4, 4) and small.Scale(HU).views == 2
    for i in range(3):
        assert torch.equal(seen[:, [i, 3 + i]], small.Scale(HU)(slices[:, [i]]))


def test_other_units_are_refused():
    with pytest.raises(ValueError, match="pixels in 'hu'"):
        small.Scale("hu")


def test_squashing_keeps_the_direction_and_gives_lengths_of_equation_1():
    vectors = torch.randn(5, 8, dtype=torch.double) * torch.logspace(-1, 1, 5)[:, None]
    short, length = small.squash(vectors), vectors.norm(dim=1)
    assert torch.allclose(short.norm(dim=1), length**2 / (1 + length**2))
    assert torch.allclose(F.cosine_similarity(short, vectors), torch.ones(5, dtype=torch.double))


def test_routing_follows_the_votes_that_agree():
    """Ten capsules vote alike for class 0 and at odds for class 1, so class 0 comes out longer."""
    torch.manual_seed(0)
    same = torch.randn(16).expand(10, 16)
    odd = F.normalize(torch.randn(10, 16), dim=1) * same.norm(dim=1, keepdim=True)
    first, second = small.route(torch.stack([same, odd])[None])[0].norm(dim=1)
    assert first > 0.9 and second < 0.6


def test_routing_is_procedure_1_of_the_paper():
    """The same in plain loops."""
    votes = torch.randn(2, 2, 5, 3, dtype=torch.double)
    for of_patch, routed in zip(votes, small.route(votes), strict=True):
        b = torch.zeros(2, 5, dtype=torch.double)
        for _ in range(small.ROUTINGS):
            v = small.squash((b.softmax(0)[..., None] * of_patch).sum(1))
            b = b + (of_patch * v[:, None]).sum(-1)
        assert torch.allclose(routed, v)


def test_margin_loss_is_equation_4():
    lengths = torch.tensor([[0.95, 0.05], [0.2, 0.6]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    expected = (0 + (0.7**2 + 0.5 * 0.5**2)) / 2
    assert torch.isclose(small.margin_loss(lengths.log(), target), torch.tensor(expected))


def test_first_weights_follow_from_the_seed():
    first, again, other = (small.seeded(partial(small.Plain, HU), seed).head[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# The network for nodules


@pytest.fixture
def nodules():
    return small.seeded(partial(small.NoduleNet, HU, 3), 0).eval()


def test_the_network_for_nodules_gives_an_outline_in_training_only(nodules):
    images = torch.randn(5, 3, 64, 64) * 300 - 600
    assert nodules(images).shape == (5, 2)
    assert [tuple(out.shape) for out in nodules.train()(images)] == [(5, 2), (5, 1, 12, 12)]


def test_it_sees_the_middle_of_the_patch_alone(nodules):
    images = torch.randn(2, 3, 64, 64) * 300 - 600
    framed = torch.nn.functional.pad(small.middle(images), [8] * 4, value=7.0)
    assert torch.equal(nodules(images), nodules(framed)) and small.middle(images).shape[2:] == (48, 48)


def test_the_evidence_is_what_features_under_attention_add_to_the_logit(nodules):
    images = torch.randn(3, 3, 64, 64) * 300 - 600
    attention, evidence = nodules.attended(images)
    assert attention.shape == evidence.shape == (3, 12, 12) and ((attention > 0) & (attention < 1)).all()
    logit = nodules(images).diff(dim=1)[:, 0]
    with torch.no_grad():
        nodules.head.weight[:, 256:384] = 0  # of the features averaged inside
    assert torch.allclose(evidence.sum((1, 2)), logit - nodules(images).diff(dim=1)[:, 0], atol=1e-5)


def test_without_attention_it_does_not_matter_what_lies_inside():
    network = small.seeded(partial(small.Unattended, HU), 0).eval()
    images = torch.randn(2, 1, 64, 64) * 300 - 600
    before = network(images)
    with torch.no_grad():
        network.outline.bias += 3
    assert torch.equal(network(images), before)


def test_the_loss_of_the_outline_counts_what_is_known():
    outline, inside = torch.zeros(2, 1, 12, 12), torch.zeros(2, 1, 64, 64)
    assert math.isclose(small.outline_loss(outline, inside), math.log(2), rel_tol=1e-6)
    inside[1], outline[1] = torch.nan, 5.0
    assert math.isclose(small.outline_loss(outline, inside), math.log(2), rel_tol=1e-6)
    assert small.outline_loss(outline, inside * torch.nan) == 0


def test_the_outline_is_compared_with_the_middle_of_the_true_one():
    inside = torch.zeros(1, 1, 64, 64)
    inside[..., 8:12, 8:12] = 1  # the first cell
    right = torch.full((1, 1, 12, 12), -9.0)
    right[..., 0, 0] = 9.0
    assert small.outline_loss(right, inside) < 0.001 and small.outline_loss(-right, inside) > 8
