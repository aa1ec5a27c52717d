import warnings

import pytest
import torch

from nodules.networks import device


@pytest.fixture(autouse=True)
def fresh():
    device.device.cache_clear()
    yield
    device.device.cache_clear()


def test_without_a_gpu_the_cpu_is_taken_without_a_word(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.device().type == "cpu"
    assert device.described().startswith("CPU, ")


def test_a_gpu_that_torch_cannot_use_is_named_and_left(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Quadro M4000")
    monkeypatch.setattr(torch, "ones", refuse)
    message = "Quadro M4000 can't be used, falling back to the CPU: .*no kernel image"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert device.device().type == device.device().type == "cpu"
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert device.described().startswith("CPU, ")
