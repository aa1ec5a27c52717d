import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nodules import paths
from nodules.data import transforms
from nodules.errors import InputError
from nodules.networks import bank, bodies, weights
from nodules.networks.bodies import Spec
from nodules.networks.device import device

SMALL = Spec("resnet10t", "random")
N = 7


@pytest.fixture(scope="module")
def body():
    return bodies.build(SMALL)


@pytest.fixture(scope="module")
def images():
    """Coarse random blocks, so that a turned patch looks different to the network."""
    blocks = np.random.default_rng(0).integers(-1000, 400, (N, 4, 4), dtype=np.int16)
    return blocks.repeat(16, 1).repeat(16, 2)


@pytest.fixture
def no_fill(monkeypatch):
    def fail(*_):
        raise AssertionError("features are computed")

    monkeypatch.setattr(bank, "_fill", fail)


@pytest.fixture
def zeros(monkeypatch):
    """Instead of features, where only their key matters."""

    def fill(path, shape, *_):
        with path.open("wb") as file:
            np.save(file, np.zeros(shape, np.float16))

    monkeypatch.setattr(bank, "_fill", fill)


def by_hand(body, images, pool="all"):
    with torch.inference_mode():
        maps = body.eval()(body.prepare(torch.from_numpy(images.copy()).to(body.mean.device)))
    maps = maps if pool == "all" else maps[-1:]
    parts = [reduce(m, 1).flatten(1) for m in maps for reduce in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d)]
    return torch.cat(parts, 1).cpu().numpy()


def distance(a, b):
    """Mean difference of features over the mean difference of two patches: 0 the same, 1 another patch."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.abs(a - b).mean() / np.abs(b - np.roll(b, 1, axis=0)).mean()


def generators():
    return str((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002


# Features


@pytest.mark.parametrize("pool", bank.POOLS)
def test_view_0_holds_maximum_and_mean_of_the_feature_maps(body, images, pool):
    computed = bank.compute(body, images, pool, "rotate", k=2)
    assert computed.features.shape == (N, 3, bank.width(body, pool)) and computed.features.dtype == np.float16
    assert computed.width == bank.width(body, pool)
    assert distance(computed.features[:, 0], by_hand(body, images, pool)) < 0.05
    assert computed.patches_per_second > 0


@pytest.mark.parametrize("kind", transforms.AUGMENTATIONS)
def test_an_augmented_view_is_that_of_its_kind_and_strength(body, images, kind):
    low, high = body.weights.window
    features = bank.compute(body, images, kind=kind, k=1, seed=3).features
    draws = np.random.default_rng([3, 1])
    seen = transforms.vary(torch.from_numpy(images.astype(np.float32))[:, None], kind, draws, high - low)
    assert distance(features[:, 1], by_hand(body, seen.numpy())) < 0.3 * distance(features[:, 1], features[:, 0])


def test_the_last_stage_is_the_tail_of_all_stages(body, images):
    last, every = (bank.compute(body, images, pool).features for pool in bank.POOLS)
    assert np.array_equal(every[:, :, -last.shape[2] :], last) and every.shape[2] > last.shape[2]


def test_the_network_and_the_global_generators_stay_as_they_are(images):
    body = bodies.build(SMALL).train()
    before = generators()
    bank.compute(body, images, kind="rotate", k=1)
    assert weights.fingerprint(body.cpu().net.state_dict()) == body.weights.sha256, "batch norm statistics"
    assert not body.training and generators() == before


def test_a_body_can_be_trained_after_its_features_were_computed(images):
    body = bodies.build(SMALL)
    bank.compute(body, images)
    body.train()(body.prepare(torch.from_numpy(images)))[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


def test_each_patch_turns_by_its_own_angles_and_a_seed_repeats_them(body, images, monkeypatch):
    same = np.repeat(images[:1], N, axis=0)
    first, other = (bank.compute(body, same, kind="rotate", k=2, seed=seed).features for seed in (0, 1))
    plain, turned = first[:, 0].astype(float), first[:, 1:].reshape(2 * N, -1).astype(float)
    noise = np.abs(plain - plain[0]).max()
    apart = np.abs(turned[:, None] - turned[None]).max(2)[~np.eye(2 * N, dtype=bool)]
    assert apart.min() > 10 * noise, "two turned views are the same"
    assert not np.array_equal(first[:, 1:], other[:, 1:])
    monkeypatch.setenv("NODULES_CACHE", "empty")
    assert np.array_equal(bank.compute(body, same, kind="rotate", k=2, seed=0).features, first)


def test_dihedral_views_are_the_eight_symmetries_of_the_square(body, images):
    features = bank.compute(body, images, kind="dihedral").features
    assert features.shape[1] == 8
    for i in range(8):
        turned = np.rot90(images, i % 4, (1, 2))
        seen = by_hand(body, turned[:, :, ::-1] if i >= 4 else turned)
        apart = [distance(features[:, view], seen) for view in range(8)]
        assert np.argmin(apart) == i and apart[i] < 0.05 < np.sort(apart)[1]


def test_features_do_not_depend_on_the_batch_size(body, images, monkeypatch):
    banks = []
    for batch in (2, 128):
        monkeypatch.setenv("NODULES_CACHE", str(batch))
        monkeypatch.setattr(bank, "FORWARD_BATCH", batch)
        banks.append(bank.compute(body, images, kind="rotate", k=2).features)
    for view in range(3):
        assert distance(banks[0][:, view], banks[1][:, view]) < 0.05


def test_the_strongest_maps_of_every_stage_are_those_with_the_highest_means(body, images):
    seen = bank.strongest(body, images[0], 3)
    assert seen.shape == (len(body.channels), 3, 32, 32)
    with torch.inference_mode():
        maps = body.eval()(body.prepare(torch.from_numpy(images[:1]).to(body.mean.device)))
    assert maps[0].shape[-1] == 32
    for shown, of_stage in zip(seen, maps, strict=True):
        highest = np.sort(of_stage[0].mean((1, 2)).cpu().numpy())[::-1][:3]
        assert np.allclose(shown.mean((1, 2)), highest, rtol=1e-3), "repeating pixels keeps the mean"


def test_the_first_filter_makes_its_map_of_the_patch(body, images):
    kernel, shown = bank.first_filter(body, images[0])
    grey = body.eval().prepare(torch.from_numpy(images[:1]).to(body.mean.device))
    layer = next(layer for layer in body.modules() if isinstance(layer, torch.nn.Conv2d))
    with torch.inference_mode():
        maps = layer(grey)[0].cpu().numpy()
    assert shown.std() == pytest.approx(maps.std((1, 2)).max(), rel=1e-5)
    (which,) = [k for k, of_filter in enumerate(maps) if np.array_equal(of_filter, shown)]
    assert np.allclose(kernel, layer.weight[which].sum(0).detach().cpu().numpy())


# What is kept


def test_a_kept_bank_is_read_and_not_computed_again(body, images, kept, request):
    first = bank.compute(body, images, kind="rotate", k=1)
    request.getfixturevalue("no_fill")
    again = bank.compute(body, images, kind="rotate", k=1)
    assert again.key == first.key and again.patches_per_second == first.patches_per_second
    assert np.array_equal(again.features, first.features) and isinstance(again.features, np.memmap)
    assert kept() == [f"{first.key}.json", f"{first.key}.npy"]


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_damaged_bank_is_made_anew(body, images, suffix):
    first = bank.compute(body, images, kind="rotate", k=1)
    expected = first.features.copy()
    path = paths.cache() / f"{first.key}.{suffix}"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        assert np.array_equal(bank.compute(body, images, kind="rotate", k=1).features, expected)


def test_a_copy_on_a_gpu_gives_the_same_batches(body, images):
    rng = np.random.default_rng(0)
    features = bank.compute(body, images, kind="rotate", k=2)
    rows, views = rng.integers(len(images), size=9), rng.integers(3, size=9)
    batch = features.gathered(rows, views)
    assert batch.dtype == torch.float16 and np.array_equal(batch.cpu(), features.features[rows, views])
    features.__dict__["resident"] = torch.from_numpy(np.array(features.features)).to(device())
    assert torch.equal(features.gathered(rows, views), batch)


def key(spec=SMALL, unit="HU", weights_seed=0, pixel=0, **options):
    """Of a bank like the others but for what is named."""
    images = np.zeros((N, 64, 64), np.int16)
    images[3, 20, 20] += pixel
    return bank.compute(bodies.build(spec, unit, weights_seed), images, **{"kind": "rotate", "k": 2} | options).key


CHANGES = {
    "weights": {"weights_seed": 1},
    "architecture": {"spec": Spec("resnet14t", "random")},
    "size": {"spec": Spec("resnet10t", "random", size=96)},
    "window": {"unit": "8-bit, not HU"},
    "pool": {"pool": "last"},
    "views": {"kind": "dihedral"},
    "k": {"k": 3},
    "seed": {"seed": 1},
    "pixel": {"pixel": 1},
}


@pytest.mark.parametrize("change", [{}, *CHANGES.values()], ids=["nothing", *CHANGES])
def test_the_key_changes_with_all_that_features_depend_on(zeros, change):
    assert (key() == key(**change)) == (change == {})


def test_the_key_changes_with_the_code_and_the_precision(zeros, body, images, monkeypatch):
    keys = {bank.compute(body, images).key}
    with monkeypatch.context() as patch:
        patch.setattr(bank.inspect, "getsource", lambda _: "other code")
        keys.add(bank.compute(body, images).key)
    precision = bank.has_bfloat16()
    monkeypatch.setattr(bank, "has_bfloat16", lambda: not precision)
    keys.add(bank.compute(body, images).key)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool": "first"}, "last, all"),
        ({"kind": "mirror"}, "none, dihedral, all, rotate"),
        ({"kind": "rotate", "k": 0}, "k=0"),
        ({"kind": "rotate", "k": -1}, "k=-1"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line_before_any_work(options, named):
    with pytest.raises(InputError) as caught:
        bank.compute(None, None, **options)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_an_interrupted_bank_leaves_nothing(body, images, kept, monkeypatch):
    whole, batches = bank.pooled, iter(range(2))

    def interrupted(*args):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bank, "FORWARD_BATCH", 2)
        patch.setattr(bank, "pooled", interrupted)
        bank.compute(body, images)
    assert next(batches, None) is None, "it was interrupted in the middle"
    assert kept() == []
    assert distance(bank.compute(body, images).features[:, 0], by_hand(body, images)) < 0.05


def test_a_bank_is_never_kept_without_its_speed(body, images, kept, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        bank.compute(body, images)
    assert kept() == []
