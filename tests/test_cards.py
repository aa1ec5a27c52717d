import copy
import json
import re
from string import Template

import numpy as np
import pandas as pd
import pytest

from nodules import cards, patches, paths, report

ENDS = ("", "_low", "_high")
TRUSTED = sorted(set(re.findall(r"{evaluation\[(\w+)\]", "".join(cards.SAID.values()))))
WORDS = {"kept": "patients", "worst_shift": "thick slices"}


@pytest.fixture
def content():
    """A whole run: the committed one, and 07_evaluation with numbers of which no two are the same."""
    found = json.loads((paths.ROOT / "figures" / "results.json").read_text())
    run = next(run for run in found["runs"] if run["notebook"] == "04_training")
    found["runs"] = [one for one in found["runs"] if one["notebook"] != "07_evaluation"]
    found["runs"].append(run | {"notebook": "07_evaluation"})
    found["facts"]["07_evaluation"] = {key: 0.1 + i / 1000 for i, key in enumerate(TRUSTED)} | WORDS
    return found


@pytest.fixture
def mine(tmp_path, own, content):
    """A run of one notebook on a file of one's own that knows no patients."""
    np.savez(tmp_path / "own.npz", **{key: value for key, value in own.items() if key != "patient"})
    card = patches.read(str(tmp_path / "own.npz")).card
    run = content["runs"][0] | {"data": card.title, "simulation": False, "split": "random"}
    rows = [row | {"split": "random"} for row in content["rows"] if row["notebook"] == "01_data"]
    facts = {"01_data": content["facts"]["01_data"]}
    return content | {"runs": [run], "card": vars(card), "rows": rows, "facts": facts}


def answers(content):
    """Of each item its section, question and answer."""
    lines = [line.strip("|").split(" | ") for line in cards.claim(content).splitlines() if re.match(r"\| \d", line)]
    return {int(number): rest for number, *rest in lines}


def model(content):
    return next(row for row in content["rows"] if (row["notebook"], row["name"]) == cards.MODEL)


def test_a_whole_run_fills_every_place(content):
    for card in (cards.data_cards, cards.model_card, cards.claim):
        text = card(content)
        assert cards.MISSING not in text and not re.search(r"[${}]|\bNone\b|\bnan\b", text), card


def test_claim_has_44_items_each_asked_and_answered(content):
    found = answers(content)
    assert list(found) == list(range(1, 45))
    for section, asked, answer in found.values():
        assert section and asked.endswith("?") and answer.rstrip(" |").endswith((".", ").")), asked
    assert len({tuple(item[1:]) for item in found.values()}) == 44


@pytest.mark.parametrize("source", ["phantom", "kaggle", "own"])
def test_claim_is_answered_for_every_source(content, source):
    known = patches.SOURCES.get(source, {"title": "x.npz", **patches.OWN})
    content["card"] |= known
    found = answers(content)
    assert cards.source(content) == source and len(found) == 44
    assert ("synthetic" in found[7][2]) == (source == "phantom")
    assert ("median" in found[14][2]) == (source == "phantom")
    assert ("owner" in found[14][2]) == (source == "own")
    for number, (_, _, answer) in found.items():
        assert source == "phantom" or "simulat" not in answer, number


@pytest.mark.parametrize("key", ["auc", "auc_low", "auc_high", "accuracy", "log_loss", "n"])
def test_a_number_changed_in_the_row_changes_both_cards(content, key):
    before = cards.model_card(content), cards.claim(content)
    model(content)[key] = 0.123456 if key != "n" else 98765
    after = cards.model_card(content), cards.claim(content)
    said = "98765" if key == "n" else "0.123"
    assert all(said in new and said not in old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("key", TRUSTED)
def test_a_number_of_the_evaluation_is_said_and_may_be_missing(content, key):
    whole = cards.model_card(content)
    changed = copy.deepcopy(content)
    changed["facts"]["07_evaluation"][key] = "another word" if key in WORDS else 0.987654
    assert cards.model_card(changed) != whole
    del content["facts"]["07_evaluation"][key]
    lost = cards.model_card(content)
    assert lost.count(cards.MISSING) == 1, "only what needs it is lost"
    assert len(lost.splitlines()) == len(whole.splitlines())


def test_without_the_evaluation_the_rest_stands(content):
    content["runs"].pop()
    del content["facts"]["07_evaluation"]
    text = cards.model_card(content)
    for what in ("Calibration", "Sensitivity on test", "Leakage", "Another scanner", "Against radiologists"):
        assert f"**{what}**: {cards.MISSING}." in text
    assert f"{model(content)['auc']:.3f}" in text and len(answers(content)) == 44


def test_every_number_of_the_result_table_is_in_the_content(content):
    text = cards.model_card(content)
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    rows = {row["name"]: row for row in content["rows"]}
    assert "| second result, with TTA |" in text and len(lines) == 8
    for line in lines:
        name, auc, accuracy, *_, seed, n = line.strip("| ").split(" | ")
        for metric, said in (("auc", auc), ("accuracy", accuracy)):
            values = [f"{rows[name][metric + end]:.3f}" for end in ENDS]
            assert re.findall(r"\d\.\d+", said) == values
        assert (int(seed), int(n)) == (rows[name]["seed"], rows[name]["n"])


def test_numbers_are_read_and_not_typed():
    items = pd.read_csv(cards.CLAIM, keep_default_na=False)
    typed = cards.MODEL_CARD.template + " ".join(items[["answer", "kaggle", "own"]].to_numpy().ravel())
    typed = re.sub(r"https://\S+|\d\d_\w+|CC BY 3.0|\"Is 0.95 good\?\"", "", typed)
    assert set(re.findall(r"\d+\.\d+", typed)) == {"0.5"}, "the line of accuracy"
    assert set(cards.SAID) <= set(Template(typed).get_identifiers()), "nothing is kept that no card says"


def test_the_evaluation_notes_what_the_cards_name():
    notebook = json.loads((paths.NOTEBOOKS / "07_evaluation.ipynb").read_text())
    code = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "code" for line in cell["source"])
    assert len(TRUSTED) > 20
    for key in TRUSTED:
        noted = re.sub(r"^(sensitivity|specificity)|_(low|high)$", "", key)  # put together by the notebook
        assert f'{noted}"' in code, key


def test_the_data_card_of_the_source_comes_first_and_the_others_say_that_they_were_not_read(content):
    own, kaggle, file = cards.data_cards(content).split("## Data card: ")[1:]
    assert own.startswith("LIDC phantom") and "Not read" not in own and content["card"]["sha256"] in own
    assert kaggle.startswith(patches.SOURCES["kaggle"]["title"]) and "Not read by this run" in kaggle
    assert f"| benign | {patches.KAGGLE_COUNTS['benign']} |" in kaggle and "sha256" not in kaggle
    assert "Not read by this run" in file and "``images``" in file and "``patient``" in file
    for limit in patches.SOURCES["kaggle"]["limits"]:
        assert limit in kaggle and limit not in own


def test_a_file_without_patients_and_a_run_without_a_model(mine):
    own, phantom, kaggle = cards.data_cards(mine).split("## Data card: ")[1:]
    assert own.startswith("own.npz") and "| patients | unknown |" in own
    assert phantom.startswith("LIDC phantom") and kaggle.startswith("Kaggle")
    assert "has not trained the model" in cards.model_card(mine)
    found = answers(mine)
    assert cards.APART["random"] in found[20][2] and "Patients: unknown" in found[20][2]
    assert "test patches (" in found[29][2] and cards.MISSING in found[37][2]


def test_the_report_writes_and_links_every_card(content, tmp_path):
    assert set(report.CARDS) == {"data_card.md", "model_card.md", "claim.md"}
    shown = report.page(content | {"rows": content["rows"][:4], "tables": []}, {}, {}, tmp_path)
    assert all(f'href="{name}"' in shown for name in report.CARDS)
    assert "LIDC phantom" in shown and "Not read by this run" not in shown
