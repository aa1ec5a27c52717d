import pytest
import torch
from torch.nn import functional as F

from nodules.networks import small

NETWORKS = {"plain": small.Plain, "squeezenet": small.squeezenet, "capsules": small.CapsuleNet}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


def test_a_network_gives_two_logits_and_every_parameter_learns(network):
    logits = network(torch.randn(4, 1, 64, 64) * 300 - 600)
    assert logits.shape == (4, 2)
    (logits * torch.tensor([1.0, -1.0])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_unit_of_the_pixels_does_not_matter(network):
    images = torch.randn(2, 1, 64, 64) * 200
    network.eval()
    assert torch.allclose(network(images), network(images * 0.2 + 100), atol=1e-3)


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
    first, again, other = (small.seeded(small.Plain, seed).head[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
