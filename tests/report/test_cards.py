import re

import pandas as pd
import pytest

from nodules import course
from nodules.data import sources
from nodules.report import cards, text

ENDS = ("", "_low", "_high")
MISSING = "Not measured in this run."
DIFFERENCES = {"inflation_auc": "Leakage", "worst_shift_auc": "Another scanner", "radiologist_gap": "Radiologists"}


def answers(content):
    """Of each item its section, question and answer."""
    lines = [line.strip("|").split(" | ") for line in cards.claim(content).splitlines() if re.match(r"\| \d", line)]
    return {int(number): rest for number, *rest in lines}


def said(content, what):
    """What the model card says of something."""
    (line,) = (line for line in cards.model_card(content).splitlines() if line.startswith(f"- **{what}**: "))
    return line.partition("**: ")[2]


def model(content):
    return cards.values(content)["model"]


def test_a_whole_run_fills_every_place(content):
    groups = "- **Groups of people**: Not measured in this run.\n"
    assert MISSING not in cards.model_card(content).replace(groups, "")
    assert cards.claim(content).count(MISSING) == 1 and MISSING not in cards.data_cards(content)


def test_claim_has_44_items_each_asked_and_answered(any_content):
    answered = answers(any_content)
    assert list(answered) == list(range(1, 45))
    for section, asked, answer in answered.values():
        assert section and asked.endswith("?") and answer.rstrip(" |").endswith((".", ").")), asked
    assert len({asked for _, asked, _ in answered.values()}) == 44


@pytest.mark.parametrize("source", ["phantom", "kaggle", "own"])
def test_claim_is_answered_for_every_source(content, source):
    content["card"] |= sources.SOURCES.get(source, {"title": "x.npz", **sources.OWN})
    content["runs"] = [run | {"simulation": source == "phantom"} for run in content["runs"]]
    answered = answers(content)
    assert cards.source(content) == source and len(answered) == 44
    assert ("synthetic" in answered[7][2]) == (source == "phantom")
    assert ("median" in answered[14][2]) == (source == "phantom")
    assert ("owner" in answered[14][2]) == (source == "own")
    for number, (_, _, answer) in answered.items():
        assert source == "phantom" or "simulat" not in answer, number


@pytest.mark.parametrize("key", ["auc", "auc_low", "auc_high", "accuracy", "log_loss", "n"])
def test_a_number_changed_in_the_row_changes_both_cards(content, key):
    before = cards.model_card(content), cards.claim(content)
    model(content)[key] = 0.123456 if key != "n" else 98765
    after = cards.model_card(content), cards.claim(content)
    shown = "98765" if key == "n" else "0.123"
    assert all(shown in new and shown not in old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_claimed_only_where_its_interval_excludes_zero(content, name):
    facts = next(facts for facts in content["facts"].values() if name in facts)
    claims = r"\b(raises|lowers|higher|lower)\b"
    for value, claim in ((0.2, r"\b(raises|higher)\b"), (-0.2, r"\b(lowers|lower)\b")):
        facts |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
        assert re.search(claim, said(content, DIFFERENCES[name]))
    facts |= {f"{name}_low": -0.3, f"{name}_high": 0.001}
    shown = said(content, DIFFERENCES[name])
    assert not re.search(claims, shown) and re.search("no demonstrated effect|No difference", shown)
    assert "-0.200" in shown and "-0.300 to +0.001" in shown


@pytest.mark.parametrize(
    "ends, verdict", [((0.88, 0.95), "consistent"), ((0.8, 0.89), "fewer than"), ((0.91, 0.99), "more than")]
)
def test_coverage_is_judged_by_its_interval(content, ends, verdict):
    keys = [f"conformal_coverage{end}" for end in ENDS]
    content["facts"][course.DECISIONS.name] |= dict(zip(keys, (sum(ends) / 2, *ends), strict=True))
    assert verdict in said(content, "Conformal sets")


def test_what_tta_gains_is_judged_by_its_interval(content):
    assert "raises the accuracy by 0.034 (95% interval 0.011 to 0.070)" in said(content, "Test-time augmentation (TTA)")
    content["facts"][course.TRAINING.name]["gain_low"] = 0.0
    assert "no demonstrated effect on the accuracy" in said(content, "Test-time augmentation (TTA)")


def test_without_the_evaluation_the_rest_stands(content):
    for lesson in (course.OWN_SCAN, course.DECISIONS, course.EVALUATION):
        content["runs"].pop()
        del content["facts"][lesson.name]
    for what in ("Calibration", "Sensitivity on test", "Conformal sets", "Leakage", "Another scanner", "Radiologists"):
        assert said(content, what) == MISSING
    assert f"{model(content)['auc']:.3f}" in cards.model_card(content)


def test_the_learning_rate_is_that_of_its_own_notebook(content):
    assert said(content, "Learning rate").startswith("6.9e-04, the median") and "10 seeds" in said(
        content, "Learning rate"
    )


def test_every_number_of_the_result_table_is_in_the_content(content):
    lines = [line for line in cards.model_card(content).splitlines() if line.startswith("| ")][2:]
    rows = {row["name"]: row for row in content["rows"]}
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(rows)[:4]
    for line in lines:
        name, auc, matched, accuracy, *_, seed, n = line.strip("| ").split(" | ")
        assert (matched == "–") == (name == "prevalence")
        for metric, cell in (("auc", auc), ("matched_auc", matched), ("accuracy", accuracy)):
            if cell != "–":
                assert re.findall(r"\d\.\d+", cell) == [f"{rows[name][metric + end]:.3f}" for end in ENDS]
        assert (int(seed), n) == (rows[name]["seed"], f"{rows[name]['n']} patches")


def test_the_data_card_of_the_source_comes_first_and_the_others_say_that_they_were_not_read(content):
    own, kaggle, *of_scans, file = cards.data_cards(content).split("## Data card: ")[1:]
    assert len(of_scans) == len(sources.CUT) and all("docs/scans.md" in card for card in of_scans)
    assert own.startswith("LIDC phantom") and "Not read" not in own and "| sha256 | 9d37 |" in own
    assert "| ruler on the slice, mm | 0." in own and "| ruler on the slice" not in cards.data_card(content)
    assert kaggle.startswith(sources.SOURCES["kaggle"]["title"]) and "Not read in this run" in kaggle
    assert f"| benign | {sources.KAGGLE_COUNTS['benign']} |" in kaggle and "sha256" not in kaggle
    assert "Not read in this run" in file and "``images``" in file and "``patient``" in file
    for limit in sources.SOURCES["kaggle"]["limits"]:
        assert limit in kaggle and limit not in own


def test_a_file_without_patients_and_a_run_without_a_model(content):
    content["card"] |= sources.OWN | {"name": "own", "title": "own.npz", "patients": None}
    content["runs"] = [content["runs"][0] | {"split": "random"}]
    content["facts"] = {course.DATA.name: content["facts"][course.DATA.name]}
    content["rows"] = content["rows"][:2]
    own, phantom, kaggle, *_ = cards.data_cards(content).split("## Data card: ")[1:]
    assert own.startswith("own.npz") and "| patients | unknown |" in own
    assert phantom.startswith("LIDC phantom") and kaggle.startswith("Kaggle")
    assert "has no test result for the model" in cards.model_card(content)
    answered = answers(content)
    assert "too optimistic" in answered[20][2] and "Patients: unknown" in answered[20][2]
    assert "the test patches (" in answered[29][2] and MISSING in answered[37][2]


def test_every_answer_is_a_template_of_its_own():
    items = pd.read_csv(text.TEMPLATES / "claim.csv", keep_default_na=False)
    assert (
        len(items) == 44 and items["answer"].all() and (items["kaggle"].astype(bool) == items["own"].astype(bool)).all()
    )
