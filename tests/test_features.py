import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nodules import features, models, paths
from nodules.errors import InputError

SMALL = "resnet10t"
SIZE = 64
N = 7


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def body():
    return models.body(SMALL, "random")


@pytest.fixture(scope="module")
def images():
    """Coarse random blocks, so that a turned patch looks different to the network."""
    blocks = np.random.default_rng(0).integers(-1000, 400, (N, 4, 4), dtype=np.int16)
    return blocks.repeat(16, 1).repeat(16, 2)


@pytest.fixture
def no_fill(monkeypatch):
    def fail(*_):
        raise AssertionError("features are computed")

    monkeypatch.setattr(features, "_fill", fail)


def zeros(path, shape, *_):
    with path.open("wb") as file:
        np.save(file, np.zeros(shape, np.float16))


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


@pytest.mark.parametrize("pool", features.POOLS)
def test_view_0_holds_maximum_and_mean_of_the_feature_maps(body, images, pool):
    bank = features.bank(body, images, pool, "rotate", k=2)
    assert bank.features.shape == (N, 3, features.width(body, pool)) and bank.features.dtype == np.float16
    assert distance(bank.features[:, 0], by_hand(body, images, pool)) < 0.05
    assert bank.patches_per_second > 0


def test_the_last_stage_is_the_tail_of_all_stages(body, images):
    last, every = (features.bank(body, images, pool).features for pool in features.POOLS)
    assert np.array_equal(every[:, :, -last.shape[2] :], last) and every.shape[2] > last.shape[2]


def test_the_network_and_the_global_generators_stay_as_they_are(images):
    body = models.body(SMALL, "random").train()
    before = generators()
    features.bank(body, images, kind="rotate", k=1)
    assert models.fingerprint(body.cpu().net.state_dict()) == body.weights.sha256, "batch norm statistics"
    assert not body.training and generators() == before


def test_each_patch_turns_by_its_own_angles_and_a_seed_repeats_them(body, images, cache, monkeypatch):
    same = np.repeat(images[:1], N, axis=0)
    first, other = (features.bank(body, same, kind="rotate", k=2, seed=seed).features for seed in (0, 1))
    plain, turned = first[:, 0].astype(float), first[:, 1:].reshape(2 * N, -1).astype(float)
    noise = np.abs(plain - plain[0]).max()
    apart = np.abs(turned[:, None] - turned[None]).max(2)[~np.eye(2 * N, dtype=bool)]
    assert apart.min() > 10 * noise, "two turned views are the same"
    assert not np.array_equal(first[:, 1:], other[:, 1:])
    monkeypatch.setattr(paths, "CACHE", cache / "empty")
    assert np.array_equal(features.bank(body, same, kind="rotate", k=2, seed=0).features, first)


def test_dihedral_views_are_the_eight_symmetries_of_the_square(body, images):
    bank = features.bank(body, images, kind="dihedral")
    assert bank.features.shape[1] == 8
    for i in range(8):
        turned = np.rot90(images, i % 4, (1, 2))
        seen = by_hand(body, turned[:, :, ::-1] if i >= 4 else turned)
        apart = [distance(bank.features[:, view], seen) for view in range(8)]
        assert np.argmin(apart) == i and apart[i] < 0.05 < np.sort(apart)[1]


def test_a_kept_bank_is_read_and_not_computed_again(body, images, cache, monkeypatch, request):
    first = features.bank(body, images, kind="rotate", k=1)
    request.getfixturevalue("no_fill")
    again = features.bank(body, images, kind="rotate", k=1)
    assert again.key == first.key and again.patches_per_second == first.patches_per_second
    assert np.array_equal(again.features, first.features) and isinstance(again.features, np.memmap)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("part", ["npy", "json"])
def test_a_damaged_bank_is_made_anew(body, images, cache, part):
    first = features.bank(body, images, kind="rotate", k=1)
    expected = first.features.copy()
    (path,) = cache.glob(f"*.{part}")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        assert np.array_equal(features.bank(body, images, kind="rotate", k=1).features, expected)


CHANGES = {
    "weights": {"body": {"seed": 1}},
    "architecture": {"body": {"architecture": "resnet14t"}},
    "size": {"body": {"size": 96}},
    "window": {"body": {"unit": "8-bit, not HU"}},
    "pool": {"pool": "last"},
    "views": {"kind": "dihedral"},
    "k": {"k": 3},
    "seed": {"seed": 1},
    "pixel": {"pixel": 1},
}


@pytest.mark.parametrize("change", [{}, *CHANGES.values()], ids=["nothing", *CHANGES])
def test_the_key_changes_with_all_that_features_depend_on(images, monkeypatch, change):
    monkeypatch.setattr(features, "_fill", zeros)

    def key(body=None, pixel=0, **options):
        network = models.body(**{"architecture": SMALL, "weights": "random"} | (body or {}))
        changed = images.copy()
        changed[3, 20, 20] += pixel
        return features.bank(network, changed, **{"kind": "rotate", "k": 2} | options).key

    assert (key() == key(**change)) == (change == {})


def test_the_key_changes_with_the_code_and_the_precision(body, images, monkeypatch):
    monkeypatch.setattr(features, "_fill", zeros)
    keys = {features.bank(body, images).key}
    with monkeypatch.context() as patch:
        patch.setattr(features.inspect, "getsource", lambda _: "other code")
        keys.add(features.bank(body, images).key)
    precision = features.has_bfloat16()
    monkeypatch.setattr(features, "has_bfloat16", lambda: not precision)
    keys.add(features.bank(body, images).key)
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
        features.bank(None, None, **options)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_an_interrupted_bank_leaves_nothing(body, images, cache, monkeypatch):
    whole, batches = features.pooled, iter(range(2))

    def interrupted(*args):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "BATCH", 2)
        patch.setattr(features, "pooled", interrupted)
        features.bank(body, images)
    assert next(batches, None) is None, "it was interrupted in the middle"
    assert not list(cache.iterdir())
    assert distance(features.bank(body, images).features[:, 0], by_hand(body, images)) < 0.05


def test_a_bank_is_never_kept_without_its_speed(body, images, cache, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        features.bank(body, images)
    assert not list(cache.iterdir())


def test_features_do_not_depend_on_the_batch_size(body, images, cache, monkeypatch):
    banks = []
    for batch in (2, 128):
        monkeypatch.setattr(paths, "CACHE", cache / str(batch))
        monkeypatch.setattr(features, "BATCH", batch)
        banks.append(features.bank(body, images, kind="rotate", k=2).features)
    for view in range(3):
        assert distance(banks[0][:, view], banks[1][:, view]) < 0.05
