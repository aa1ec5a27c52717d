"""Every error is in the table of the documentation, and looks as the table says."""

import re

import pytest

from nodules import features, learners, messages, patches, split
from nodules.errors import InputError


def test_the_page_is_what_the_code_says():
    assert messages.DOCUMENT.read_text() == messages.document(), "run make errors"


def test_every_message_has_a_cause_and_a_remedy_on_one_line():
    table = messages.table()
    assert len(table) > 80 and {"arrays.py", "patches.py", "run.py", "paths.py", "Makefile"} < set(table["raised in"])
    for row in table.itertuples():
        assert re.fullmatch(r"[^\n]+: [^\n]+", row.message) and row.remedy.strip() and "\n" not in row.remedy
        assert "None" not in row.message and "{" not in row.remedy


def test_a_message_without_a_remedy_is_found(tmp_path, monkeypatch):
    (tmp_path / "errors.py").write_text('def f(x):\n    raise InputError(f"{x}: it is broken")\n')
    monkeypatch.setattr(messages, "__file__", str(tmp_path / "messages.py"))
    with pytest.raises(ValueError, match=r"errors\.py: '\*x\*: it is broken' is not in the form"):
        messages.table()


@pytest.mark.parametrize(
    "cause",
    [
        lambda: features.check("some", "none", 0),
        lambda: learners.check(0, 0.1, "constant", 1, 1),
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
