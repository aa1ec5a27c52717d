import urllib.error
import urllib.request

import pytest
import torch

from nodules import paths


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A project folder, cache and torch home without any weights, no network, and torch seeded."""
    torch.manual_seed(0)

    def no_network(*_, **__):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path


@pytest.fixture
def kept(elsewhere):
    """Names of the files in the cache, sorted."""

    def names():
        folder = paths.cache()
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    return names
