import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from nodules import course, paths, record
from nodules.errors import InputError
from nodules.report import answer, cards, page, text

FOREST = {"arguments": {"label": "AUC", "reference": 0.5}, "draw": "intervals"}
FIGURE_1, FIGURE_21 = course.figure_name(1), course.figure_name(21)


@pytest.fixture
def keep(tmp_path, content):
    """Write what a notebook keeps, as the module ``record`` does, with a figure for each name in ``figures``."""

    def keep(lesson, figures, **more):
        folder = tmp_path / "runs" / "x" / lesson.name
        folder.mkdir(parents=True, exist_ok=True)
        (provenance,) = (run for run in content["runs"] if run["notebook"] == lesson.name)
        for order, (name, heading) in enumerate(figures.items()):
            about = {
                "draw": "intervals",
                "caption": f"All about {name}.",
                "order": order,
                "source": "LIDC phantom, seed 0",
            }
            arguments = {"label": "AUC", "reference": 0.5, "heading": heading}
            record.write_json(folder / f"{name}.json", about | {"arguments": arguments} | provenance)
            forest = {"table/name": ["ruler"], "table/value": [0.8], "table/low": [0.7], "table/high": [0.9]}
            np.savez(folder / f"{name}.npz", **forest)
        kept = {"provenance": provenance, "card": content["card"], "facts": content["facts"][lesson.name]}
        kept |= {"rows": cards.rows_of(content, lesson), "tables": [], "left_out": []} | more
        files = {path.name: paths.sha256(path) for path in folder.iterdir() if path.name != "results.json"}
        record.write_json(folder / "results.json", kept | {"files": files})
        return folder

    return keep


@pytest.fixture
def run(keep, tmp_path):
    """The folder of a run of which one notebook has kept a figure of the report and one beyond it."""
    keep(course.DATA, {FIGURE_1: course.HEADINGS[FIGURE_1], "forest": "Forest"})
    return tmp_path / "runs" / "x"


def figures(*names):
    about = {"notebook": course.DATA.name, "alt": "A dot", "source": "s"}
    return {name: about | {"title": f"Title of {name}", "caption": f"About {name}."} for name in names}


def section(report, heading):
    """From a heading to the next of its rank or above."""
    rank, rest = re.search(rf"<h(\d)[^>]*>{re.escape(heading)}(.*)", report, re.DOTALL).groups()
    return re.split(rf"<h[1-{rank}]", rest)[0]


def shown(content, folder, *names):
    """The report with some figures, each a picture of its own."""
    for name in names:
        Image.new("L", (4, 4)).save(folder / f"{name}.png")
    return page.page(content, figures(*names), [], folder)


def test_the_report_is_one_page_with_everything_in_it(run, tmp_path):
    report = page.build(run, tmp_path / "figures").read_text()
    assert f"All about {FIGURE_1}." in report and "All about forest." in report and "<h3" in report
    assert report.count("data:image/png;base64") == 3
    assert report.count("Not made in this run") == len(course.FIGURES) - 1
    for outside in ('src="http', "<script", "@import", "<link"):
        assert outside not in report
    places = [report.index(f">{short}</h3>") for short in course.SHORT.values()]
    assert places == sorted(places)
    assert "All about forest" in section(report, "Further figures")


def test_every_figure_has_a_sidecar_and_old_ones_go(run, tmp_path):
    out = tmp_path / "figures"
    out.mkdir()
    (out / "old.png").write_bytes(b"")
    (out / "old.json").write_text("{}")
    page.build(run, out)
    pictures = [f"{name}.{kind}" for name in (FIGURE_1, "forest", "answer") for kind in ("png", "json")]
    assert {path.name for path in out.iterdir()} == {*pictures, "results.json", "report.html", *page.CARDS}
    about = json.loads((out / f"{FIGURE_1}.json").read_text())
    for key in ("notebook", "profile", "parameters", "git_revision", "data_sha256", "caption"):
        assert about[key], key
    assert "title" not in about and "arguments" not in about
    assert Image.open(out / f"{FIGURE_1}.png").size[0] > 200
    assert "| sha256 | 9d37 |" in (out / "data_card.md").read_text()


def test_what_the_notebooks_kept_stands_in_the_results(run, tmp_path, content):
    page.build(run, tmp_path / "figures")
    written = json.loads((tmp_path / "figures" / "results.json").read_text())
    assert list(written) == ["runs", "card", "facts", "rows", "tables", "left_out"]
    assert written["facts"] == {course.DATA.name: content["facts"][course.DATA.name]}
    assert written["rows"] == cards.rows_of(content, course.DATA) and written["runs"] == content["runs"][:1]


def test_the_readme_gets_its_tables_between_their_marks(run, tmp_path):
    readme = tmp_path / "README.md"
    marked = "before\n{}\nold\n{}\nbetween\n{}\nold\n{}\nafter\n"
    readme.write_text(marked.format(*page.RESULTS_MARKS, *page.NOTEBOOKS_MARKS))
    page.build(run, tmp_path / "figures", readme)
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "\nold\n" not in written
    assert "TTA | 0.950 (0.932 to 0.965) | – | the 2019 report" in written.split("between")[0]
    assert "| real nodules, patients apart |" in written.split("between")[0]
    assert "(notebooks/01_data.ipynb)" in written.split("between")[1]
    page.build(run, tmp_path / "figures", readme)
    assert readme.read_text() == written
    for marks in (page.RESULTS_MARKS, page.NOTEBOOKS_MARKS):
        readme.write_text(f"{marks[0]}\n{marks[1]}\n")
        with pytest.raises(InputError, match="lacks the lines"):
            page.build(run, tmp_path / "figures", readme)


def test_the_readme_lists_the_notebooks_of_the_course():
    readme = paths.ROOT / "README.md"
    assert page.with_notebooks(readme) == readme.read_text()
    for lesson in course.LESSONS:
        assert f"| [{lesson.name}](notebooks/{lesson.name}.ipynb) | {lesson.question} |" in readme.read_text()


def test_the_report_lists_the_notebooks_of_the_course(content, tmp_path):
    listed = section(shown(content, tmp_path), "The notebooks")
    for lesson in course.LESSONS:
        assert f"<code>{lesson.name}</code>" in listed and f"<td>{lesson.question}</td>" in listed


def test_the_discussion_puts_our_rows_beside_the_cited_ones(content, tmp_path):
    discussion = section(shown(content, tmp_path), "Is 0.95 good?")
    rows = discussion.split("<tr>")
    kept = list(answer.rows(answer.real()).values())
    kept += [row for row in answer.real()["rows"] if row["name"].endswith("three readers or more")]
    for row in kept:
        assert f"<td>{text.interval(row, 'auc')}</td>" in discussion
    assert discussion.count("this project, a kept run") == len(kept)
    cited = pd.read_csv(text.TEMPLATES / "cited.csv")
    assert cited[["model", "data", "split", "source"]].notna().all(axis=None)
    for accuracy in (0.95, 0.93, 0.81, 0.68, 0.59, 0.863):
        (row,) = cited[cited["accuracy"] == accuracy].itertuples()
        (line,) = (line for line in rows if f"<td>{row.model}</td>" in line)
        assert f"<td>{accuracy}</td>" in line and row.split in line and row.source in line
    assert "is 0.932 to 0.965" in discussion and "62.2%" in discussion and "not stated" in discussion


def test_the_discussion_says_whether_a_network_beats_a_ruler(content, tmp_path):
    told = section(shown(content, tmp_path), "Is 0.95 good?")
    assert (
        "On the LIDC phantom (simulation), by cross-validation: in place of a ruler" in told
        and "raises the AUC by 0.021" in told
        and "lowers the AUC by 0.014" in told
    )
    assert "added to the diameter, it raises the AUC by 0.017" in told
    kept = answer.facts(answer.real())
    assert "On real nodules, by cross-validation: in place of a ruler laid on the same slice" in told
    assert f"raises the AUC by {kept['gain_patches']:.3f}" in told, "the kept run's, not this one's"
    content["facts"][course.RULER.name]["gain_nodules_high"] = 0.01
    unsure = section(shown(content, tmp_path), "Is 0.95 good?")
    assert unsure.count("no demonstrated effect on the AUC") == told.count("no demonstrated effect on the AUC") + 1
    content["facts"][course.RULER.name] = {}
    assert "<p>Not measured in this run." in section(shown(content, tmp_path), "Is 0.95 good?")


def test_the_discussion_says_what_more_slices_are_worth(content, tmp_path):
    def told():
        return shown(content, tmp_path).partition("<strong>Would 3D be better?</strong>")[2].partition("</p>")[0]

    assert "On the LIDC phantom (simulation), per nodule, the mean of the nodule network" in told()
    assert told().endswith("on the middle one alone, raises the AUC by 0.019 (95% interval 0.006 to 0.031).")
    del content["facts"][course.RULER.name]["gain_slices"]
    assert told().endswith("Not measured in this run.")


def test_a_title_claims_of_network_and_ruler_what_their_intervals_support(content):
    def title():
        return text.render_text("{{ say.titled(course.RULER) }}", cards.values(content), "title").strip()

    facts, start = content["facts"][course.RULER.name], f"{course.RULER.title}: "
    assert title() == start + "the network +0.021 AUC per patch against the ruler"
    facts["gain_patches_low"] = -0.01
    assert title() == start + "network and ruler +0.030 AUC per patch against the ruler"
    facts["added_patches_low"] = -0.01
    assert title() == start + "network and ruler are not surely better than the ruler"
    facts.update(gain_patches=-0.02, gain_patches_high=-0.01)
    assert title() == start + "network and ruler are not surely better than the ruler", "surely worse is no gain"


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no notebook has been run"):
        page.build(tmp_path, tmp_path / "figures")


def test_what_was_changed_since_is_not_read(run, tmp_path):
    path = run / course.DATA.name / "forest.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(InputError, match=r"forest\.json: changed since 01_data wrote it"):
        page.build(run, tmp_path / "figures")


def test_figures_of_a_notebook_that_did_not_end_are_not_drawn(run, keep, tmp_path):
    folder = keep(course.ARCHITECTURES, {"half": "Half"})
    (folder / "results.json").unlink()
    page.build(run, tmp_path / "out")
    assert (tmp_path / "out" / f"{FIGURE_1}.png").exists() and not (tmp_path / "out" / "half.png").exists()


def test_a_figure_of_an_earlier_report_goes_and_the_users_own_stays(run, tmp_path):
    (tmp_path / "mine.png").touch()
    for name in ("old.png", "old.json"):
        (tmp_path / name).touch()
    page.build(run, tmp_path)
    assert (tmp_path / "mine.png").exists() and not list(tmp_path.glob("old.*"))


def test_a_table_with_a_caption_stands_in_the_report(keep, tmp_path):
    folder = keep(course.DATA, {}, tables=[{"name": "fruit", "caption": "A table of pears"}])
    (folder / "fruit.csv").write_text("name,value\npear,0.12345\napple,\n")
    tables = section(page.build(folder.parent, tmp_path / "figures").read_text(), "Tables")
    assert "A table of pears" in tables and "<td>0.123</td>" in tables and "<td>–</td>" in tables


def test_what_is_left_out_is_shown(keep, tmp_path):
    folder = keep(course.DATA, {}, left_out=[{"what": "the ruler", "why": "nobody measured"}])
    report = page.build(folder.parent, tmp_path / "out").read_text()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["left_out"] == [{"what": "the ruler", "why": "nobody measured", "notebook": course.DATA.name}]
    assert "the ruler, because nobody measured (01_data)" in section(report, "What this run leaves out")


def test_each_figure_is_shown_once_and_in_its_section(content, tmp_path):
    names = ("learning_curve", "radiologists", FIGURE_21, "extra")
    report = shown(content, tmp_path, *names)
    assert report.count("data:image/png;base64") == len(names)
    assert "About learning_curve" in section(report, "Would more data help?")
    assert "About radiologists" in section(report, "How does the model compare with a radiologist?")
    assert f"About {FIGURE_21}" in section(report, f"{course.SHORT[FIGURE_21]}<")
    assert "About extra" in section(report, "Further figures")


def test_each_figure_and_section_can_be_reached_and_is_described(content, tmp_path):
    soup = BeautifulSoup(shown(content, tmp_path, FIGURE_21, "extra"), "html.parser")
    links = {link["href"] for link in soup.nav.find_all("a")}
    assert {f"#fig-{FIGURE_21}", "#fig-extra"} <= links
    targets = {f"#{tag['id']}" for tag in soup.main.find_all(id=True)}
    assert links <= targets and len(links) > 20
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids)) and not any("%" in name for name in ids)
    for figure in soup.find_all("figure"):
        assert figure.img["alt"] == "A dot" and figure.figcaption.get_text().startswith("About ")
    for table in soup.find_all("table"):
        assert table.parent["class"] == ["scroll"] and table.parent["aria-label"]


def test_no_table_shows_a_raw_float(keep, tmp_path):
    folder = keep(course.DATA, {}, tables=[{"name": "loss", "caption": "Losses"}])
    numbers = "high,1026852159.505\nlow,0.12345\nnone,\nendless,inf\ncount,3.0\nrate,0.0003\n"
    (folder / "loss.csv").write_text(f"name,value\n{numbers}")
    tables = section(page.build(folder.parent, tmp_path / "figures").read_text(), "Tables")
    shown = re.findall(r"<td>([^<a-z][^<]*|infinite)</td>", tables)
    assert shown == ["1.03e+09", "0.123", "–", "infinite", "3", "0.0003"]


def test_the_first_screen_answers_the_question(content, tmp_path):
    report = shown(content, tmp_path, "answer")
    first = report[report.index("<main>") : report.index("<h2")]
    kept = answer.values(content)["real"]
    assert "measured on shuffled patches" in first and "62% of them" in first and "About answer" in first
    for row in ("frozen", "patch", "nodule", "ruler"):
        assert text.interval(kept[row], "accuracy", ".0%") in first
    assert f"of {kept['card']['nodules']} nodules" in first and "What stays open" in first


def test_the_first_screen_says_in_how_many_runs_of_a_sweep_it_holds(content, tmp_path, monkeypatch):
    places = {"divisions": tmp_path / "divisions.json", "runs on a phantom": tmp_path / "phantom.json"}
    monkeypatch.setattr(answer, "SWEPT", places)
    monkeypatch.setattr(answer, "DIVISIONS", "divisions")
    assert "How much is chance" not in shown(content, tmp_path), "nothing is said of sweeps that nobody ran"
    ends = {"above": 3, "below": 7, "mean": 0.012, "least": -0.003, "most": 0.021}
    found = [{"fact": "added_nodules", "above": 21, "below": 0}, {"fact": "gain_nodules"} | ends]
    record.write_json(places["runs on a phantom"], {"runs": 24, "findings": found, "results": []})
    assert "in 24 runs on a phantom. Per nodule" in shown(content, tmp_path)
    ends = {"above": 2, "below": 0, "mean": 0.014, "least": 0.012, "most": 0.015}
    found = [{"fact": "added_nodules", "above": 5, "below": 0}, {"fact": "gain_nodules"} | ends]
    ruler = {"name": "ruler on the slice, mm", "metric": "accuracy", "least": 0.686, "most": 0.819}
    record.write_json(places["divisions"], {"runs": 5, "findings": found, "results": [ruler]})
    report = shown(content, tmp_path)
    first = report[report.index("<main>") : report.index("<h2")]
    assert "in 5 divisions and in 24 runs on a phantom" in first
    assert "In 5 divisions of the patients, the ruler is right for 69% to 82%" in first
    assert "surely adds to the ruler in 5 of 5 and 21 of 24 of them" in first
    assert "beats the ruler in 2 of 5 and 3 of 24, and surely loses to it in 0 of 5 and 7 of 24." in first
    assert "to the most, +0.014 (+0.012 to +0.015) and +0.012 (-0.003 to +0.021)." in first


def test_findings_are_compared_with_those_of_other_machines(content, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "ELSEWHERE", tmp_path / "elsewhere")
    chosen = {"chosen": "resnet50 with chest-ct weights"}
    surely = {"gain_patches": 0.02, "gain_patches_low": 0.01, "gain_patches_high": 0.05}  # above 0, as here
    there = {"gain": 0.02, "gain_low": 0.01, "gain_high": 0.03, "inflation_auc": 0.03}  # b lacks the last interval
    leaked = {"inflation_auc_low": 0.01, "inflation_auc_high": 0.05}
    for name, facts in {"a": surely | leaked, "b": surely | {"gain_patches_low": -0.01}}.items():
        kept = {"where": f"machine {name}", "profile": "demo-phantom", "facts": {"x": there | facts | chosen}}
        record.write_json(answer.ELSEWHERE / f"{name}.json", kept)
    told = section(shown(content, tmp_path), "Does it hold on another machine?")
    assert "3 of 4 findings agree" in told and "<td>network chosen</td>" in told
    assert re.findall("<th>(.*?)</th>", told) == ["finding", "this run", "machine a", "machine b", "agree"]
    for name, *cells in (
        ("gain_patches", "+0.021 (+0.010 to +0.032)", "+0.020 (+0.010 to +0.050)", "+0.020 (-0.010 to +0.050)", "no"),
        ("gain", "+0.034 (+0.011 to +0.070)", *["+0.020 (+0.010 to +0.030)"] * 2, "yes"),
        ("inflation_auc", "+0.020 (+0.011 to +0.051)", "+0.030 (+0.010 to +0.050)", "–", "yes"),
    ):
        (line,) = (line for line in told.split("<tr>") if f"<td>{answer.FINDINGS[name]}</td>" in line)
        assert re.findall("<td>(.*?)</td>", line)[1:] == cells
    for run in content["runs"]:
        run["profile"] = "demo-kaggle"
    assert "Does it hold on another machine?" not in shown(content, tmp_path), "only the same run is compared"


def test_each_ingredient_stands_in_a_line_with_real_nodules_and_phantom_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "REAL", tmp_path)
    (tmp_path / "ingredients.csv").write_text(
        "data,without,counted,value,low,high\nreal nodules,a,patches,0.1,0.05,0.15\nphantom,a,patches,-0.1,-0.2,0\n"
        "real nodules,b,patches,0.2,0.1,0.3\n"
    )
    table = answer.ingredients()
    assert list(table) == ["compared with", "real nodules, per patch", "phantom, per patch"]
    assert table.fillna("not measured").to_numpy().tolist() == [
        ["a", "+0.100 (+0.050 to +0.150)", "-0.100 (-0.200 to +0.000)"],
        ["b", "+0.200 (+0.100 to +0.300)", "not measured"],
    ]


def test_the_chapter_on_trust_says_what_was_measured(content, tmp_path):
    report = shown(content, tmp_path)
    assert "With all 579 training patients" in report and "extrapolates this to 0.896" in report
    assert "in 94% (90% to 97%, consistent with the nominal 95%)" in report
    assert "in 69% (62% to 75%, below the nominal 95%)" in report
    assert "That gain can't be expected for new patients." in section(report, "How much of a score is leakage?")
    assert "+0.040 (+0.010 to +0.061), so slices of the same nodule are not all of it (on" in report
    unsure = "zoom changes the AUC by -0.021 (-0.036 to -0.003), which is not sure (p = 0.294"
    assert unsure in section(report, "Which augmentation helps?")
    assert "97.3% (94.0% to 99.0%) of the benign and 74.6% (67.2% to 84.5%) of the malignant" in report
    content["facts"][course.DECISIONS.name]["zoom_p"] = 0.01
    told = section(shown(content, tmp_path), "Which augmentation helps?")
    assert "zoom lowers the AUC by 0.021 (95% interval 0.003 to 0.036) (p = 0.010" in told


def test_the_chapter_on_trust_claims_no_difference_that_was_not_shown(content, tmp_path):
    for name in ("inflation_auc", "zoom", "worst_shift_auc", "radiologist_gap", "log_loss_change"):
        facts = next(facts for facts in content["facts"].values() if name in facts)
        facts |= {f"{name}_low": -0.5, f"{name}_high": 0.5}
    report = shown(content, tmp_path)
    trust = report[report.index(course.EVALUATION.question + "</h2>") :]
    assert (
        trust.count("has no demonstrated effect on the AUC") == 2
        and "which is not sure" in trust
        and "No difference in AUC is shown" in trust
    )
    for claim in ("can't be expected", "raises", "lowers", "higher:", "lower:"):
        assert claim not in trust


def test_what_the_evaluation_left_out_is_said_to_be_missing(any_content, tmp_path):
    report = shown(any_content, tmp_path)
    lessons = [course.EVALUATION, course.DECISIONS]
    not_run = [lesson for lesson in lessons if lesson.name not in any_content["facts"]]
    for lesson in not_run:
        assert "Not measured in this run" in section(report, lesson.question)
    if not_run:
        return
    facts = any_content["facts"][course.EVALUATION.name] | any_content["facts"][course.DECISIONS.name]
    optional = {"How much of a score is leakage?": "kept", "What happens on another scanner?": "worst_shift"}
    optional |= {"How does the model compare with a radiologist?": "opinions"}
    for heading, fact in optional.items():
        missing = re.search("Not measured in this run|Not compared: simulated", section(report, heading))
        assert bool(missing) == (fact not in facts)


def test_the_report_links_every_card(content, tmp_path):
    report = shown(content, tmp_path)
    assert set(page.CARDS) == {"data_card.md", "model_card.md", "claim.md"}
    assert all(f'href="{name}"' in report for name in page.CARDS)
    assert "LIDC phantom" in report and "Not read in this run" not in report


def test_the_minutes_of_each_notebook_are_those_of_its_executed_copy(tmp_path):
    begun = pd.Timestamp("2026-01-01T12:00:00+00:00")
    assert page.minutes(tmp_path).endswith(" 0.0 in all")
    # The last two run side by side, for half a minute of their time
    for lesson, start, seconds in ((course.DATA, 0, 30.0), (course.TRAINING, 600, 90.0), (course.RATE, 660, 60.0)):
        notebook, ends = nbformat.v4.new_notebook(), [start, start + seconds]
        start_time, end_time = ((begun + pd.Timedelta(end, "s")).isoformat() for end in ends)
        notebook.metadata["papermill"] = {"start_time": start_time, "end_time": end_time, "duration": seconds}
        nbformat.write(notebook, tmp_path / f"{lesson.name}.ipynb")
    unfinished = nbformat.v4.new_notebook(metadata={"papermill": {"duration": None}})
    nbformat.write(unfinished, tmp_path / f"{course.WHOLE.name}.ipynb")
    each = "01_data 0.5, 03_learning_rate 1.0, 04_training 1.5"
    assert page.minutes(tmp_path) == f"minutes by notebook: {each}; 2.5 in all"
