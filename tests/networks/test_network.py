import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nodules.data import transforms
from nodules.errors import InputError
from nodules.networks import bank, bodies, heads, small
from nodules.networks.bodies import Spec
from nodules.networks.device import device, tensor
from nodules.networks.network import Mixed, Network, predict, restore

IMAGES = np.random.default_rng(0).integers(-1000, 400, (5, 64, 64), dtype=np.int16)
SMALL = Spec("resnet10t", "random")


def network(spec=SMALL):
    body = bodies.build(spec)
    return Network(body, spec.pool, heads.head(bank.width(body, spec.pool)))


def tiny():
    return nn.Sequential(small.Scale("HU"), nn.Conv2d(2, 4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, 2))


@pytest.mark.parametrize("pool", bank.POOLS)
def test_a_network_is_its_head_on_the_pooled_maps_of_its_body(pool):
    whole = network(Spec("resnet10t", "random", 64, pool)).to(device()).eval()
    images = tensor(IMAGES)
    assert images.shape == (5, 1, 64, 64) and images.dtype == torch.float32
    with torch.inference_mode():
        expected = whole.head(bank.pooled(whole.body(whole.body.prepare(images)), pool))
        assert torch.allclose(whole(images), expected, atol=1e-4)


def test_groups_are_those_of_the_body_and_the_head_last():
    whole = network()
    groups = whole.groups()
    assert [id(p) for group in groups for p in group] == [id(p) for p in whole.parameters()]
    assert len(groups) == len(whole.body.groups()) + 1 and groups[-1][0] is next(whole.head.parameters())


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_bfloat16_is_used_where_it_is_asked_for_and_the_machine_has_it(asked, hardware, monkeypatch):
    monkeypatch.setattr("nodules.networks.network.has_bfloat16", lambda: hardware)
    model, types = tiny(), []
    model[1].register_forward_hook(lambda _, __, out: types.append(out.dtype))
    logits = Mixed(model, asked)(tensor(IMAGES))
    assert types == [torch.bfloat16 if asked and hardware else torch.float32] and logits.dtype == torch.float32


def test_predictions_are_of_the_eight_symmetries():
    torch.manual_seed(0)
    model = Mixed(tiny(), bfloat16=False).train()
    p = predict(model, IMAGES)
    assert p.shape == (5, 8) and not model.training
    for which in range(8):
        turned = transforms.dihedral(torch.from_numpy(IMAGES), which).numpy().copy()
        assert np.allclose(predict(model, turned, symmetries=1)[:, 0], p[:, which], atol=1e-6)
    assert np.array_equal(predict(model, IMAGES, symmetries=3), p[:, :3])
    turned = np.rot90(IMAGES, 1, (1, 2)).copy()
    assert np.allclose(predict(model, turned)[:, 0], p[:, 1], atol=1e-6)


def test_a_network_that_gives_no_numbers_is_refused():
    model = tiny().to(device())
    nn.init.constant_(model[-1].weight, float("nan"))
    with pytest.raises(InputError, match="diverged; use a lower learning rate"):
        predict(model, IMAGES)


def test_a_kept_head_is_put_back_and_another_one_refused(tmp_path):
    spec = Spec("resnet34", "random")
    whole = network(spec).to(device())
    path = tmp_path / "04_training" / "head.safetensors"
    path.parent.mkdir()
    with pytest.raises(InputError, match="run 04_training again"):
        restore(spec, "HU", path)
    save_file(whole.head.state_dict(), path)
    put_back = restore(spec, "HU", path)
    assert not put_back.training and np.array_equal(predict(put_back, IMAGES), predict(whole, IMAGES))
    with pytest.raises(InputError, match="not a head of efficientnet_lite0") as caught:
        restore(Spec("efficientnet_lite0", "random"), "HU", path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a head of resnet34"):
        restore(spec, "HU", path)
