import json
import re
from string import Template

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from nodules import patches, paths, plots, report, results, split
from nodules.errors import InputError

SCORES = {"n": 4} | {f"{m}{end}": 0.5 for m in ("auc", "accuracy", "log_loss") for end in ("", "_low", "_high")}


@pytest.fixture
def card(tmp_path, own):
    np.savez(tmp_path / "own.npz", **own)
    return patches.read(str(tmp_path / "own.npz")).card


@pytest.fixture
def run(tmp_path, card):
    """A finished run with one figure of the report and one beyond it."""
    run = results.Run("01_data", str(tmp_path / "runs" / "x"), {"seed": 3}, card, "patient")
    run.facts |= {"n": np.int64(40), "auc": 0.8125}
    images = np.linspace(-1000, 400, 2 * 64 * 64).reshape(2, 64, 64)
    grid = {"titles": ["a", "b"], "window": [-1000, 400], "unit": "HU", "heading": "Two", "columns": 2}
    run.figure("fig01", plots.patch_grid, "There are {n} patches.", images=images, **grid)
    forest = pd.DataFrame({"name": ["ruler"], "value": [0.8], "low": [0.7], "high": [0.9]})
    run.figure(
        "forest", plots.intervals, "It is {auc:.2f}.", table=forest, label="AUC", reference=0.5, heading="Forest"
    )
    run.row("ruler", SCORES | {"auc": 0.8125})
    run.save()
    return run


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_a_kept_figure_is_drawn_again_pixel_for_pixel(run):
    images = np.random.default_rng(0).normal(size=(1, 64, 64))
    data = {"titles": ["é"], "window": [-1, 1], "unit": "HU", "heading": "One", "columns": 1}
    first = run.figure("again", plots.patch_grid, "", images=images, **data)
    second, about = results.redraw(run.folder / "again.json")
    assert np.array_equal(pixels(first), pixels(second))
    assert about["draw"] == "patch_grid" and about["parameters"] == {"seed": 3} and about["split"] == "patient"
    assert "own.npz" in second.get_supxlabel() and "patient split" in second.get_supxlabel()


def test_tables_of_text_and_numbers_survive(run):
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.1, 0.2], "low": [0, 0.1], "high": [0.3, 0.4]})
    run.figure("t", plots.intervals, "", table=table, label="x", reference=0.5, heading="h")
    figure, _ = results.redraw(run.folder / "t.json")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_a_figure_that_no_longer_fits_says_so(run):
    path = run.folder / "forest.json"
    path.write_text(path.read_text().replace('"reference"', '"luck"'))
    with pytest.raises(InputError, match=r"forest\.json: no longer drawn by plots\.intervals"):
        results.redraw(path)


def test_a_new_run_starts_with_a_clean_slate(run, card):
    assert (run.folder / "results.json").exists()
    results.Run("01_data", run.run_dir, {"seed": 4}, card, "patient")
    assert not list(run.folder.glob("*"))


def test_the_environment_names_what_a_result_depends_on(run):
    shown = run.environment()["value"]
    assert shown["seed"] == 3 and shown["data SHA-256"] == run.card.sha256 and shown["fastai"].startswith("2.8")


def test_nothing_is_seen_half_written(tmp_path):
    path = tmp_path / "x.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), paths.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_the_report_is_one_page_with_everything_in_it(run, tmp_path):
    out = tmp_path / "figures"
    text = report.build(tmp_path / "runs" / "x", out).read_text()
    assert "There are 40 patches." in text and "It is 0.81." in text
    assert text.count("data:image/png;base64") == 2
    assert text.count("Not made by this run") == len(report.FIGURES) - 1
    for outside in ('src="http', "<script", 'href="http', "@import", "<link"):
        assert outside not in text
    assert [text.index(f"Figure {n}. ") for n in range(1, 23)] == sorted(
        text.index(f"Figure {n}. ") for n in range(1, 23)
    )


def test_every_figure_has_a_sidecar_and_old_ones_go(run, tmp_path):
    out = tmp_path / "figures"
    out.mkdir()
    (out / "old.png").write_bytes(b"")
    (out / "old.json").write_text("{}")
    report.build(tmp_path / "runs" / "x", out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["fig01.png", "fig01.json", "forest.png", "forest.json", "results.json", "report.html", *report.CARDS]
    )
    about = json.loads((out / "fig01.json").read_text())
    for key in ("notebook", "profile", "parameters", "git_revision", "data_sha256", "caption"):
        assert about[key], key
    assert about["data_sha256"] == run.card.sha256
    assert Image.open(out / "fig01.png").size[0] > 200
    content = json.loads((out / "results.json").read_text())
    assert content["facts"]["01_data"]["n"] == 40 and content["rows"][0]["auc"] == 0.8125
    assert content["rows"][0] | {"data": "own.npz", "split": "patient", "seed": 3} == content["rows"][0]
    assert run.card.sha256 in (out / "data_card.md").read_text()


def test_the_readme_gets_the_table_between_its_marks(run, tmp_path):
    readme = tmp_path / "README.md"
    first, last = report.README_MARKS
    readme.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    report.build(tmp_path / "runs" / "x", tmp_path / "figures", readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ruler | 0.812 (0.500 to 0.500) |" in text
    readme.write_text("no marks")
    with pytest.raises(InputError, match="lacks the lines"):
        report.build(tmp_path / "runs" / "x", tmp_path / "figures", readme)


def test_the_discussion_puts_our_rows_beside_the_cited_ones(run, tmp_path):
    text = report.build(tmp_path / "runs" / "x", tmp_path / "figures").read_text()
    section = text[text.index("Is 0.95 good?") : text.index("Beyond the report")]
    rows = section.split("<tr>")
    (ours,) = (row for row in rows if "ruler" in row)
    assert "0.812 (0.500 to 0.500)" in ours and "own.npz" in ours and "01_data" in ours
    every = pd.read_csv(report.CITED)
    measured = every[every["auc_low"].notna()]
    assert len(measured) == 9 and measured["what"].str.startswith("This project on real patches").all()
    for row in measured.itertuples():
        assert f"<td>{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})</td>" in section
    cited = every.drop(measured.index)
    for accuracy in (0.95, 0.93, 0.81, 0.68, 0.59, 0.863):
        (row,) = cited[cited["accuracy"] == accuracy].itertuples()
        (shown,) = (text for text in rows if f"<td>{row.what}</td>" in text)
        assert f"<td>{accuracy}</td>" in shown and row.split in shown and row.source in shown
    assert "an interval of 0.932 to 0.965" in section and "62.2%" in section and "$" not in section


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no notebook has been run"):
        report.build(tmp_path, tmp_path / "figures")


def test_a_table_with_a_caption_stands_in_the_report(run, tmp_path):
    run.table("shown", pd.DataFrame({"name": ["pear"], "value": [0.12345]}), "A table of pears")
    run.table("kept", pd.DataFrame({"name": ["apple"]}))
    run.save()
    text = report.build(tmp_path / "runs" / "x", tmp_path / "figures").read_text()
    assert "A table of pears" in text and "pear" in text and "0.123" in text and "apple" not in text


def test_weights_stand_below_every_figure_that_needs_them(card, tmp_path):
    run = results.Run("n", str(tmp_path), {"seed": 0}, card, "random", "chest CT")
    assert run.source.endswith("seed 0 · weights: chest CT") and run.provenance["weights"] == "chest CT"


def test_the_split_is_found_again_and_only_for_its_patches(tmp_path, own):
    np.savez(tmp_path / "own.npz", **own)
    ct = patches.read(str(tmp_path / "own.npz"))
    with pytest.raises(InputError, match="run 01_data first"):
        results.load_split(str(tmp_path), ct)
    run = results.Run("01_data", str(tmp_path), {"seed": 0}, ct.card, "random")
    assigned = split.assign(ct.table, "random")
    run.table("split", assigned)
    run.save()
    loaded = results.load_split(str(tmp_path), ct)
    assert list(loaded["id"]) == list(ct.table["id"]) and list(loaded["split"]) == list(assigned["split"])
    run.table("split", assigned.iloc[1:])
    run.save()
    with pytest.raises(InputError, match="other patches"):
        results.load_split(str(tmp_path), ct)


def test_a_choice_is_read_back_or_named_as_missing(run):
    run.choice("network", architecture="resnet50", size=64)
    run.save()
    assert results.load_choice(run.run_dir, "01_data", "network") == {"architecture": "resnet50", "size": 64}
    with pytest.raises(InputError, match="run 02_architectures first"):
        results.load_choice(run.run_dir, "02_architectures", "network")


def test_what_was_changed_or_damaged_since_is_not_read(run, tmp_path):
    run.choice("network", size=64)
    run.save()
    path = run.folder / "network.choice"
    path.write_text(path.read_text().replace("64", "65"))
    with pytest.raises(InputError, match=r"network\.choice: not as 01_data wrote it; run 01_data again"):
        results.load_choice(run.run_dir, "01_data", "network")
    with pytest.raises(InputError, match=r"network\.choice: not as 01_data wrote it"):
        report.build(tmp_path / "runs" / "x", tmp_path / "figures")
    for content in ("", "[]", "{}", '{"files": 3}', "\xff", '{"files": {'):
        (run.folder / "results.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=r"results\.json: damaged; run 01_data again"):
            results.load_choice(run.run_dir, "01_data", "network")


def test_a_run_removes_what_it_made_and_writes_nowhere_else(run, card):
    (run.folder / "thesis.docx").write_text("mine")
    again = results.Run("01_data", run.run_dir, {"seed": 4}, card, "patient")
    assert [path.name for path in run.folder.iterdir()] == ["thesis.docx"]
    for name in ("../x", "/x", "a/b", "..", ""):
        with pytest.raises(InputError, match="no plain file name"):
            again.file(name)
        with pytest.raises(InputError, match="no plain file name"):
            again.table(f"{name}/..", pd.DataFrame({"a": [1]}))
    assert [path.name for path in run.folder.parent.iterdir()] == ["01_data"]


def test_the_smallest_network_within_one_standard_error_is_chosen():
    table = pd.DataFrame({"name": [*"abcd"], "parameters": [10, 20, 30, 5], "valid AUC": [0.88, 0.885, 0.9, 0.86]})
    table = table.assign(**{"valid AUC low": table["valid AUC"] - 0.06, "valid AUC high": table["valid AUC"] + 0.04})
    assert results.one_standard_error(table)["name"] == "a"  # 0.9 - 0.1 / 4 = 0.875


def trusted(run):
    """Let a run have what two sections of the chapter on trust need."""
    frame = pd.DataFrame({"panel": "", "name": "m", "x": [1, 2], "value": 0.7, "low": 0.6, "high": 0.8})
    shown = {"columns": 1, "xlabel": "x", "ylabels": ["y"], "heading": "Learning"}
    run.figure("learning_curve", plots.bands, "A curve.", table=frame, **shown)
    run.facts |= {"most_patients": 77, "unit": "patients", "at_most": 0.8, "foretold": 0.87654}
    run.facts |= {"zoom": 0.01, "zoom_low": 0.0, "zoom_high": 0.02}


def test_the_chapter_on_trust_tells_what_was_measured_and_leaves_out_what_was_not(run, card, tmp_path):
    run = results.Run("07_evaluation", str(tmp_path / "runs" / "x"), {"seed": 3}, card, "patient")
    trusted(run)
    run.row("ruler", SCORES)
    run.save()
    page = report.build(tmp_path / "runs" / "x", tmp_path / "figures").read_text()
    assert "How far can it be trusted?" in page and "With all 77 training patients" in page and "0.877" in page
    assert page.count("data:image/png;base64") == 3, "the curve stands in its section and nowhere else"
    assert "Which augmentation" not in page, "its numbers are there, but not its figure"
    assert "One reader is taken away" not in page


def test_without_an_evaluation_there_is_no_chapter_on_trust(run, tmp_path):
    assert "How far can it be trusted?" not in report.build(tmp_path / "runs" / "x", tmp_path / "figures").read_text()


def test_the_chapter_on_trust_names_only_what_the_notebook_notes():
    cells = nbformat.read(paths.NOTEBOOKS / "07_evaluation.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    noted = set(re.findall(r"{(\w+)[:}]", report.TRUST.read_text()))
    shown = Template(report.TRUST.read_text()).get_identifiers()
    assert len(noted) > 30 and len(shown) > 15
    for name in noted:
        ways = (f'"{name}":', f'facts["{name}"]', f'run.fact("{re.sub("_(low|high)$", "", name)}"')
        assert any(way in code for way in ways) or "_at_90" in name, name
    for name in shown:
        assert f'run.figure("{name}"' in code, name


def test_what_models_said_of_the_test_patches_is_put_side_by_side(run, card):
    other = results.Run("02_other", run.run_dir, {"seed": 3}, card, "patient")
    run.table("scored", pd.DataFrame({"id": ["007", "012"], "a": [0.1, 0.2]}))
    other.table("scored", pd.DataFrame({"id": ["012", "007"], "b": [0.3, 0.4]}))
    run.save()
    other.save()
    both = results.load_scored(run.run_dir, ["01_data", "02_other"])
    assert both.loc["007"].to_dict() == {"a": 0.1, "b": 0.4}
    with pytest.raises(InputError, match="run 03_absent first"):
        results.load_scored(run.run_dir, ["03_absent"])


def test_a_fact_carries_its_interval(run):
    run.fact("zoom", pd.Series({"value": 0.1, "low": 0.0, "high": 0.2, "name": "zoom"}))
    assert {k: v for k, v in run.facts.items() if "zoom" in k} == {"zoom": 0.1, "zoom_low": 0.0, "zoom_high": 0.2}


def test_what_is_left_out_is_said_kept_and_shown(run, tmp_path, capsys):
    run.leave_out("the ruler", "nobody measured")
    run.row("coin", SCORES | {"auc_low": float("nan")})
    run.save()
    assert "Left out: the ruler, because nobody measured." in capsys.readouterr().out
    page = report.build(tmp_path / "runs" / "x", tmp_path / "out").read_text()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["what"] for one in content["left_out"]] == ["the ruler", "the score of coin"]
    assert "What this run leaves out" in page and "the ruler, because nobody measured (01_data)" in page
    assert "coin" not in {row["name"] for row in content["rows"]}


def test_figures_of_a_notebook_that_did_not_end_are_not_drawn(run, tmp_path, card):
    other = results.Run("02_architectures", str(tmp_path / "runs" / "x"), {"seed": 3}, card, "patient")
    forest = pd.DataFrame({"name": ["a"], "value": [0.8], "low": [0.7], "high": [0.9]})
    other.figure("half", plots.intervals, "", table=forest, label="x", reference=0.5, heading="h")
    report.build(tmp_path / "runs" / "x", tmp_path / "out")
    assert (tmp_path / "out" / "fig01.png").exists() and not (tmp_path / "out" / "half.png").exists()


@pytest.mark.parametrize("name", ["NA", "007", "null", "1e5", "true"])
def test_patients_keep_their_names_from_notebook_to_notebook(tmp_path, run, own, name):
    table = pd.DataFrame({"id": [name, "x"], "patient": [name, None], "split": "test"})
    run.table("predictions", table)
    run.save()
    read = results.load_predictions(run.run_dir, "01_data")
    assert read["id"].tolist() == [name, "x"] and read["patient"][0] == name and pd.isna(read["patient"][1])
