import re

import numpy as np
import pandas as pd
import pytest

from nodules.errors import InputError
from nodules.report import cards, page, text


def rendered(content, folder):
    """All that is written from the content of a run."""
    return [card(content) for card in page.CARDS.values()] + [page.page(content, {}, [], folder)]


def test_every_kind_of_run_gives_a_report_and_cards_without_gaps(any_content, tmp_path):
    for written in rendered(any_content, tmp_path):
        shown = re.sub(r"<style>.*</style>", "", written, flags=re.DOTALL)
        assert not re.search(r"\b(None|nan|Undefined)\b|[{}]|\$\w|\bTrue\b", shown)
        assert not re.search(r"  \||[^.]\.\.(?!\.)|\w \.\s", shown), "neither an empty cell nor a stray full stop"


def test_a_number_that_the_run_did_not_keep_is_an_error(content):
    known = cards.values(content)
    for wrong in ("{{ evaluation.zom }}", "{{ evaluation.zom | number }}", "{{ interval(evaluation, 'zom') }}"):
        with pytest.raises(InputError, match=r"^a\.md: needs .*zom.*; run make notebooks again"):
            text.render_text(wrong, known, "a.md")
    with pytest.raises(InputError, match="zom"):
        text.render_text("{% if excludes(evaluation, 'zom') %}x{% endif %}", known, "a.md")
    with pytest.raises(InputError, match="a value is nan"):
        text.render_text("{{ lost }}", {"lost": float("nan")} | known, "a.md")
    with pytest.raises(InputError, match="a value is None"):
        text.render_text("{{ lost }}", {"lost": None} | known, "a.md")


@pytest.mark.parametrize("name", ["zoom", "brier", "at_most", "radiologist_auc", "inflation_auc_low"])
def test_a_run_that_lacks_one_number_of_a_part_is_refused(content, name, tmp_path):
    del next(facts for facts in content["facts"].values() if name in facts)[name]
    with pytest.raises(InputError, match=name):
        rendered(content, tmp_path)


def test_an_interval_that_touches_the_reference_claims_nothing():
    known = {"a": 0.1, "a_low": 0.0, "a_high": 0.2, "b": -0.1, "b_low": -0.2, "b_high": -0.01}
    assert not text.excludes(known, "a") and text.excludes(known, "b") and text.excludes(known, "a", 0.3)
    assert text.interval(known, "b", "+.2f") == "-0.10 (-0.20 to -0.01)"


def test_an_empty_cell_is_a_dash():
    table = pd.DataFrame({"n": [1, 2], "value": [0.5, np.nan], "name": ["x", None]})
    assert text.markdown(table).splitlines()[2:] == ["| 1 | 0.5 | x |", "| 2 | – | – |"]


def test_numbers_are_read_and_not_typed():
    for name in (
        "answer.md",
        "sentences.md",
        "trust.md",
        "model_card.md",
        "data_card.md",
        "claim.csv",
        "claim.md",
        "results.md",
    ):
        typed = (text.TEMPLATES / name).read_text()
        typed = re.sub(r"https?://\S+|\"\"Is 0.95 good\?\"\"|{[{%#].*?[}%#]}", "", typed)
        assert set(re.findall(r"\d+\.\d+", typed)) <= {"0.5"}, name
