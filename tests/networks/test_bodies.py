import warnings

import numpy as np
import pytest
import torch
from torchvision.models import get_model

from nodules.errors import InputError
from nodules.networks import bodies, weights
from nodules.networks.bodies import Spec

SMALL = "mobilenetv3_small_050"  # any further name of timm


def refused(*choices, **options):
    """The one line by which a network is refused."""
    with pytest.raises(InputError) as caught:
        bodies.build(Spec(*choices, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names


@pytest.mark.parametrize("name", ["resnet35", "hf-hub:someone/something", ""])
def test_unknown_architecture(name):
    message = refused(name)
    assert "timm" in message
    assert all(known in message for known in weights.ARCHITECTURES)
    with pytest.raises(InputError, match="no such network"):
        bodies.specs([name], ["random"], 64, "all")
    with pytest.raises(InputError, match="no such network"):
        bodies.check(name)


def test_what_cannot_be_is_refused_in_one_line():
    assert "auto" in refused("resnet34", "image-net")
    assert "resnet50, resnet101, resnet152" in refused("resnet34", "chest-ct")
    assert all("32" in refused("resnet34", "random", size=size) for size in (16, "64"))
    assert "Input height" in refused("vit_tiny_patch16_224", "random")


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"architecture": "resnet35"}, "architecture='resnet35'"),
        ({"weights": "image-net"}, "use auto or one of chest-ct, imagenet, random"),
        ({"architecture": "resnet34", "weights": "chest-ct"}, "use one of resnet50, resnet101, resnet152"),
        ({"size": 31}, "size=31"),
        ({"size": 1025}, "size=1025"),
        ({"size": 64.0}, "size=64.0"),
        ({"size": "64"}, "size='64'"),
    ],
)
def test_a_choice_is_checked_before_anything_is_built(choice, named, monkeypatch):
    monkeypatch.setattr(bodies, "_build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(InputError) as caught:
        Spec(**{"architecture": "resnet50", "weights": "random"} | choice).check()
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert refused(**{"architecture": "resnet50", "weights": "random"} | choice) == str(caught.value)


@pytest.mark.parametrize(
    "spec", [Spec("resnet34"), Spec("resnet152", "chest-ct", 32), Spec(SMALL, "imagenet", 1024, "last")]
)
def test_what_can_be_passes_the_check(spec):
    spec.check()


def test_specs_are_what_can_be_compared_here(monkeypatch):
    here = {"resnet34": ["random"], "resnet50": ["imagenet", "random"]}
    monkeypatch.setattr(weights, "available", here.get)
    assert bodies.specs(list(here), ["random", "imagenet"], 96, "last") == [
        Spec("resnet34", "random", 96, "last"),
        Spec("resnet50", "imagenet", 96, "last"),
        Spec("resnet50", "random", 96, "last"),
    ]
    with pytest.raises(InputError, match="none has weights"):
        bodies.specs(["resnet34"], ["imagenet"], 64, "all")
    with pytest.raises(InputError, match="'imagnet': no such weights"):
        bodies.specs(["resnet34"], ["imagnet"], 64, "all")


def test_the_preferred_network_is_the_reports_unless_a_profile_names_one():
    specs = [Spec("resnet34", "random"), Spec("resnet50", "chest-ct"), Spec("resnet50", "random")]
    assert bodies.preferred(specs) == specs[1] and bodies.preferred(specs, "resnet34") == specs[0]
    assert bodies.preferred(specs[:1]) == specs[0], "the first where the report's is not compared"
    with pytest.raises(InputError, match="architecture='resnet101': not compared"):
        bodies.preferred(specs, "resnet101")


# Shapes


@pytest.mark.parametrize(
    ("architecture", "channels", "sides", "millions"),
    [
        ("resnet34", [64, 128, 256, 512], [16, 8, 4, 2], 21.3),
        ("resnet50", [256, 512, 1024, 2048], [16, 8, 4, 2], 23.5),
        ("resnet101", [256, 512, 1024, 2048], [16, 8, 4, 2], 42.5),
        ("resnet152", [256, 512, 1024, 2048], [16, 8, 4, 2], 58.1),
        ("efficientnet_lite0", [16, 24, 40, 112, 320], [32, 16, 8, 4, 2], 3.0),
        (SMALL, [16, 8, 16, 24, 288], [32, 16, 8, 4, 2], 0.3),
    ],
)
def test_maps_of_every_stage(architecture, channels, sides, millions):
    body = bodies.build(Spec(architecture, "random"))
    maps = body.eval()(body.prepare(torch.zeros(2, 64, 64)))
    assert body.channels == channels
    assert [tuple(features.shape) for features in maps] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)
    ]
    assert bodies.parameters(body) == pytest.approx(millions * 1e6, abs=5e4)
    stages = bodies.stages(body, 64)
    assert [stage["channels"] for stage in stages] == channels and [stage["side"] for stage in stages] == sides
    assert sum(stage["parameters"] for stage in stages) == bodies.parameters(body)


def test_resnet_maps_are_torchvisions():
    body = bodies.build(Spec("resnet34", "random"), seed=3).eval()
    theirs = get_model("resnet34").eval()
    theirs.load_state_dict(body.net.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(theirs.fc(body(images)[-1].mean((2, 3))), theirs(images), atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet34", "efficientnet_lite0", "resnet18", "convnext_atto"])
def test_groups_follow_the_stages(architecture):
    body = bodies.build(Spec(architecture, "random")).eval()
    groups = body.groups()
    assert [id(p) for group in groups for p in group] == [id(p) for p in body.parameters()]
    assert len(groups) == len(body.channels)
    maps = body(torch.randn(1, 3, 64, 64))
    for stage, group in enumerate(groups):
        uses = torch.autograd.grad(maps[stage].sum(), group, retain_graph=True, allow_unused=True)
        assert any(gradient is not None for gradient in uses)
        if stage:
            early = torch.autograd.grad(maps[stage - 1].sum(), group, retain_graph=True, allow_unused=True)
            assert all(gradient is None for gradient in early)


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("name", ["resnet34", "resnet50", SMALL])
def test_frozen_it_computes_the_same_and_can_still_be_trained_whole(name, bfloat16, monkeypatch):
    monkeypatch.setattr(bodies, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(bodies, "device", lambda: torch.device("cpu"))
    body = bodies.build(Spec(name, "random"))
    images = body.prepare(torch.randn(4, 64, 64))
    before = weights.fingerprint(body.state_dict())
    frozen = body.frozen()
    folded = not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in frozen.modules())
    assert folded == name.startswith("resnet")
    with torch.inference_mode():
        for expected, computed in zip(body(images), frozen(images), strict=True):
            assert computed.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
            error = (computed.float() - expected).abs().mean() / expected.abs().mean()
            assert error < (0.15 if bfloat16 else 1e-4)
    assert weights.fingerprint(body.state_dict()) == before
    body.train()(images)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


# Images


def test_prepare_windows_and_normalises():
    body = bodies.build(Spec("resnet34", "random"))
    images = torch.full((2, 64, 64), -300, dtype=torch.int16)  # the middle of -1000..400
    images[1] = 3000
    out = body.prepare(images)
    assert out.shape == (2, 3, 64, 64)
    assert out[0, :, 5, 5].tolist() == pytest.approx(
        [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    )
    assert out[1, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229)
    assert torch.equal(out, body.prepare(images[:, None]))


def test_prepare_of_bytes_and_of_another_size():
    body = bodies.build(Spec("efficientnet_lite0", "random", size=128), unit="byte")
    images = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    out = body.prepare(images)
    assert body.weights.window == (0.0, 255.0)
    assert out.shape == (1, 3, 128, 128)
    # Bilinear between pixel centres: columns 2 and 3 lie at 0.75 and 1.25 of the patch
    assert (out[0, 0, 9, 2:4] * 0.5 + 0.5).mul(255).tolist() == pytest.approx([0.75, 1.25], abs=1e-4)


def test_prepare_refuses_other_shapes():
    body = bodies.build(Spec(SMALL, "random"))
    for shape in [(64, 64), (2, 3, 64, 64)]:
        with pytest.raises(InputError, match="shape"):
            body.prepare(torch.zeros(shape))


# Random weights


def test_random_weights_repeat_for_a_seed():
    first, again, other = (bodies.build(Spec(SMALL, "random"), seed=seed) for seed in (1, 1, 2))
    assert first.weights == again.weights
    assert first.weights.sha256 == weights.fingerprint(first.net.state_dict()) != other.weights.sha256
    assert (first.weights.name, other.weights.source) == ("random", "random, seed 2")


@pytest.mark.parametrize("architecture", ["resnet34", "efficientnet_lite0"])
def test_global_random_state_is_untouched(architecture):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bodies.build(Spec(architecture))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_deep_random_networks_stay_finite():
    body = bodies.build(Spec("resnet152", "random")).eval()
    with torch.inference_mode():
        maps = body(body.prepare(torch.full((1, 64, 64), -800.0)))
    assert max(float(m.abs().max()) for m in maps) < 1e4, "float16 ends at 65504"
