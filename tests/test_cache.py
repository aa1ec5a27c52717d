"""What is kept under a key: made once, checked when it is read, made anew when it is damaged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nodules import cache, paths
from nodules.errors import InputError

KEY = {"seed": 0, "rate": 0.1, "sizes": [1, 2]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Writes a text, and counts how often."""

    def __init__(self, text="content", note=None):
        self.text, self.note, self.calls = text, note, 0

    def __call__(self, path):
        self.calls += 1
        path.write_text(self.text)
        return self.note


def test_a_file_is_made_once_and_found_again_with_its_note(folder):
    make = Maker(note={"speed": 1 / 3, "name": "é"})
    first, second = (cache.kept("bank-a.b", "npy", KEY, make) for _ in range(2))
    assert first == second and make.calls == 1
    path, note = first
    assert path == cache.place("bank-a.b", "npy", KEY) and path.read_text() == "content"
    assert note == {"speed": 1 / 3, "name": "é", "sha256": paths.sha256(path)}, "to the last digit"
    assert sorted(kept.name for kept in folder.iterdir()) == [f"{path.stem}.json", path.name]


def test_the_note_is_the_same_whether_the_file_was_made_or_found():
    first, second = (cache.kept("x", "npy", KEY, Maker(note={"size": (1, np.float64(0.1))}))[1] for _ in range(2))
    assert first == second == {"size": [1, 0.1], "sha256": first["sha256"]}


def test_a_maker_need_not_note_anything():
    path, note = cache.kept("x", "txt", KEY, Maker())
    assert note == {"sha256": paths.sha256(path)}


def test_the_place_depends_on_every_value_of_the_key_and_not_on_their_order(folder):
    keys = [KEY, KEY | {"seed": 1}, KEY | {"rate": math.nextafter(0.1, 1)}, KEY | {"sizes": [2, 1]}, {}]
    assert len({cache.place("x", "npy", key) for key in keys}) == len(keys)
    assert cache.place("x", "npy", dict(reversed(KEY.items()))) == cache.place("x", "npy", KEY)
    assert cache.place("x", "npy", KEY | {"seed": np.int64(0)}) == cache.place("x", "npy", KEY)
    path = cache.place("x", "npy", KEY)
    assert path.parent == folder and path.suffix == ".npy" and not folder.exists()
    assert path.stem.startswith("x-") and len(path.stem) == 18


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, note: path.write_text("contenT"),
        lambda path, note: path.unlink(),
        lambda path, note: note.unlink(),
        lambda path, note: note.write_bytes(b"\xff"),
        lambda path, note: note.write_text("[]"),
        lambda path, note: note.write_text("{}"),
        lambda path, note: note.write_text(json.dumps({"sha256": None})),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_made_anew(damage):
    path, note = cache.kept("x", "npy", KEY, Maker(note={"speed": 1}))
    damage(path, path.with_suffix(".json"))
    make = Maker(note={"speed": 2})
    assert cache.kept("x", "npy", KEY, make) == (path, note | {"speed": 2})
    assert make.calls == 1 and path.read_text() == "content"


def test_a_maker_that_fails_leaves_nothing(folder):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.kept("x", "npy", KEY, fail)
    assert list(folder.iterdir()) == []


def test_there_is_never_a_file_without_its_note(folder, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        cache.kept("x", "npy", KEY, lambda path: path.write_bytes(b"content") and None)
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said_in_one_line(folder, monkeypatch):
    folder.write_text("a file where a folder should be")
    monkeypatch.setenv("NODULES_CACHE", str(folder / "inside"))
    with pytest.raises(InputError, match="can't be written"):
        cache.kept("x", "npy", KEY, Maker())


def test_the_folder_is_that_of_the_environment_or_the_projects_own(tmp_path, monkeypatch):
    assert paths.cache() == tmp_path / "cache"
    monkeypatch.setenv("NODULES_CACHE", "relative")
    assert paths.cache() == paths.ROOT / "relative"
    for unset in ("", None):
        monkeypatch.delenv("NODULES_CACHE") if unset is None else monkeypatch.setenv("NODULES_CACHE", unset)
        assert paths.cache() == paths.ROOT / ".cache"
