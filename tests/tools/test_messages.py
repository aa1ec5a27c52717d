"""Every error is in the table in the documentation, and reads as the table says."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from nodules.data import patches, split
from nodules.errors import InputError
from nodules.networks import bank, heads
from nodules.tools import messages


def test_the_page_is_what_the_code_says():
    assert messages.DOCUMENT.read_text() == messages.document(), "run make errors"


def test_every_message_has_a_cause_and_a_remedy_on_one_line():
    table = messages.table()
    places = list(table["raised in"])
    assert {"data/files.py", "networks/heads.py", "tools/run.py", "paths.py", "Makefile"} < set(places)
    assert len(table) > 80 and places == sorted(places, key=lambda name: (name == "Makefile", Path(name)))
    for row in table.itertuples():
        assert re.fullmatch(r"[^\n]+: [^\n]+", row.message) and row.remedy.strip() and "\n" not in row.remedy
        assert "None" not in row.message and "{" not in row.remedy


def test_a_message_without_a_remedy_is_found(tmp_path, monkeypatch):
    (tmp_path / "errors.py").write_text('def f(x):\n    raise InputError(f"{x}: it is broken")\n')
    monkeypatch.setattr(messages, "PACKAGE", tmp_path)
    monkeypatch.setattr(messages, "importlib", SimpleNamespace(import_module=lambda name: None))
    with pytest.raises(ValueError, match=r"errors\.py: '\*x\*: it is broken' lacks the form"):
        messages.table()


@pytest.mark.parametrize(
    "cause",
    [
        lambda: bank.check("some", "none", 0),
        lambda: heads.Recipe(epochs=0, lr=0.1),
        lambda: patches.read("absent.npz"),
        lambda: patches.read("phantom", n_patches=0),
        lambda: split.assign(None, "whole"),
        lambda: split.assign(None, seed=-1),
    ],
)
def test_what_is_raised_is_in_the_table(cause):
    with pytest.raises(InputError) as caught:
        cause()
    table = messages.table()
    forms = [re.sub(r"\\\*\w+\\\*", ".+", re.escape(f"{row.message}; {row.remedy}")) for row in table.itertuples()]
    assert sum(bool(re.fullmatch(form, str(caught.value))) for form in forms) >= 1, str(caught.value)
