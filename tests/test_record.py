"""What a notebook keeps, and what of it an earlier notebook's reader accepts."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nodules import course, paths, plots, record
from nodules.data import patches
from nodules.errors import InputError
from nodules.record import Earlier, Record

SCORES = {"n": 4} | {f"{m}{end}": 0.5 for m in ("auc", "accuracy", "log_loss") for end in ("", "_low", "_high")}
INTERVAL = {"value": 0.1, "low": 0.0, "high": 0.2}


@pytest.fixture
def card(tmp_path, own):
    np.savez(tmp_path / "own.npz", **own)
    return patches.read(str(tmp_path / "own.npz")).card


@pytest.fixture
def finished(tmp_path, card):
    """A finished run with one figure of the report and one beyond it."""
    finished = Record("01_data", str(tmp_path / "runs" / "x"), {"seed": 3}, card, "patient", 3)
    finished.fact(n=np.int64(40), auc=0.8125)
    images = np.linspace(-1000, 400, 2 * 64 * 64).reshape(2, 64, 64)
    grid = {"titles": ["a", "b"], "window": [-1000, 400], "unit": "HU", "columns": 2}
    finished.figure("fig01", plots.patch_grid, "There are 40 patches.", images=images, **grid)
    forest = pd.DataFrame({"name": ["ruler"], "value": [0.8], "low": [0.7], "high": [0.9]})
    shown = {"table": forest, "label": "AUC", "reference": 0.5}
    finished.figure("forest", plots.intervals, "It is 0.81.", "Forest", **shown)
    finished.row("ruler", SCORES | {"auc": 0.8125})
    finished.save()
    return finished


@pytest.fixture
def kept(finished):
    """What the next notebook reads of a run, as it was saved last."""

    def kept(notebook="01_data"):
        finished.save()
        return Earlier(finished.run_dir, notebook)

    return kept


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


# Figures


def test_a_kept_figure_is_drawn_again_pixel_for_pixel(finished):
    images = np.random.default_rng(0).normal(size=(1, 64, 64))
    data = {"images": images, "titles": ["é"], "window": [-1, 1], "unit": "HU", "columns": 1}
    first = finished.figure("again", plots.patch_grid, "", "One", **data)
    second, about = record.redraw(finished.folder / "again.json")
    assert np.array_equal(pixels(first), pixels(second))
    assert about["draw"] == "patch_grid" and about["parameters"] == {"seed": 3} and about["split"] == "patient"
    assert "own.npz" in second.get_supxlabel() and "patient split" in second.get_supxlabel()


def test_tables_of_text_and_numbers_survive(finished):
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.1, 0.2], "low": [0, 0.1], "high": [0.3, 0.4]})
    finished.figure("t", plots.intervals, "", "h", table=table, label="x", reference=0.5)
    figure, _ = record.redraw(finished.folder / "t.json")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_a_figure_of_the_2019_report_has_its_title_and_another_its_own(finished):
    titles = {name: plots.title(record.redraw(finished.folder / f"{name}.json")[0]) for name in finished.figures}
    assert titles == {"fig01": course.HEADINGS["fig01"], "forest": "Forest"}


def test_title_and_caption_are_the_alternative_text_and_kept_as_they_are(finished):
    table = pd.DataFrame({"name": ["a"], "value": [0.8], "low": [0.7], "high": [0.9]})
    shown = {"table": table, "label": "x", "reference": 0.5}
    figure = finished.figure("braces", plots.intervals, "The set {0, 1} of 40.", "Labels", **shown)
    assert figure.get_label() == "Labels. The set {0, 1} of 40."
    asked = finished.figure("asked", plots.intervals, "A set.", "Why?", **shown)
    assert asked.get_label() == "Why? A set."
    assert json.loads((finished.folder / "braces.json").read_text())["caption"] == "The set {0, 1} of 40."


def test_figures_are_kept_in_the_order_in_which_they_were_drawn(finished):
    orders = {path.stem: json.loads(path.read_text()).get("order") for path in finished.folder.glob("f*.json")}
    assert orders == {"fig01": 0, "forest": 1}


def test_a_figure_that_no_longer_fits_says_so(finished):
    path = finished.folder / "forest.json"
    path.write_text(path.read_text().replace('"reference"', '"luck"'))
    with pytest.raises(InputError, match=r"forest\.json: plots\.intervals can't draw it"):
        record.redraw(path)


def test_weights_stand_below_every_figure_that_needs_them(card, tmp_path):
    with_weights = Record("n", str(tmp_path), {"seed": 0}, card, "random", 0, "chest CT")
    assert with_weights.source.endswith("seed 0 · weights: chest CT")
    assert with_weights.provenance["weights"] == "chest CT"


# Facts, rows, what is left out


def test_every_result_says_where_it_comes_from(finished, card):
    content = json.loads((finished.folder / "results.json").read_text())
    assert content["facts"] == {"n": 40, "auc": 0.8125} and content["card"]["sha256"] == card.sha256
    (row,) = content["rows"]
    about = {
        "name": "ruler",
        "notebook": "01_data",
        "data": "own.npz",
        "split": "patient",
        "split_seed": 3,
        "seed": 3,
        "auc": 0.8125,
    }
    assert row == row | about
    provenance = {"notebook": "01_data", "profile": "x", "parameters": {"seed": 3}, "data": "own.npz"}
    provenance |= {
        "data_sha256": card.sha256,
        "simulation": False,
        "split": "patient",
        "split_seed": 3,
        "weights": "none",
    }
    assert content["provenance"] == provenance | {"git_revision": record.git_revision()}
    assert content["files"] == {
        path.name: paths.sha256(path) for path in finished.folder.iterdir() if path.name != "results.json"
    }


def test_the_environment_names_what_a_result_depends_on(finished):
    shown = finished.environment()["value"]
    assert shown["seed"] == 3 and shown["data SHA-256"] == finished.card.sha256 and shown["fastai"].startswith("2.8")


@pytest.mark.parametrize("interval", [INTERVAL | {"p_value": 0.4}, pd.Series(INTERVAL | {"name": "zoom"})])
def test_a_fact_carries_its_interval(finished, interval):
    finished.fact(zoom=interval, shift="low dose", seeds=3)
    added = {name: value for name, value in finished.facts.items() if name not in ("n", "auc")}
    assert added == {"zoom": 0.1, "zoom_low": 0.0, "zoom_high": 0.2, "shift": "low dose", "seeds": 3}


def test_what_is_left_out_is_said_and_kept(finished, kept, capsys):
    finished.leave_out("the ruler", "nobody measured")
    finished.row("coin", SCORES | {"auc_low": float("nan")})
    content = kept().content
    assert "Left out: the ruler, because nobody measured." in capsys.readouterr().out
    assert [part["what"] for part in content["left_out"]] == ["the ruler", "the score of coin"]
    assert content["left_out"][0]["why"] == "nobody measured"
    assert "coin" not in {row["name"] for row in content["rows"]}


def test_only_a_table_with_a_caption_is_for_the_report(finished, kept):
    finished.table("shown", pd.DataFrame({"name": ["pear"], "value": [0.12345]}), "A table of pears")
    finished.table("kept", pd.DataFrame({"name": ["apple"]}))
    assert kept().content["tables"] == [{"name": "shown", "caption": "A table of pears"}]
    assert kept().table("kept")["name"].tolist() == ["apple"] and kept().table("shown")["value"].tolist() == [0.12345]


# Files


def test_a_new_run_starts_with_a_clean_slate(finished, card):
    assert (finished.folder / "results.json").exists()
    Record("01_data", finished.run_dir, {"seed": 4}, card, "patient", 3)
    assert not list(finished.folder.glob("*"))


def test_a_run_removes_what_it_made_and_writes_nowhere_else(finished, card):
    (finished.folder / "thesis.docx").write_text("mine")
    again = Record("01_data", finished.run_dir, {"seed": 4}, card, "patient", 3)
    assert [path.name for path in finished.folder.iterdir()] == ["thesis.docx"]
    for name in ("../x", "/x", "a/b", "..", ""):
        with pytest.raises(InputError, match="not a file name"):
            again.file(name)
        with pytest.raises(InputError, match="not a file name"):
            again.table(f"{name}/..", pd.DataFrame({"a": [1]}))
    assert [path.name for path in finished.folder.parent.iterdir()] == ["01_data"]


def test_nothing_is_seen_half_written(tmp_path):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        record.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), paths.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# What the notebooks that follow read


def test_a_choice_is_read_back_or_named_as_missing(finished, kept):
    finished.choice("network", architecture="resnet50", size=64)
    assert kept().choice("network") == {"architecture": "resnet50", "size": 64}
    assert kept().parameters == {"seed": 3}
    with pytest.raises(InputError, match=r"rate\.choice: missing; run 01_data first"):
        kept().choice("rate")
    with pytest.raises(InputError, match="run 02_architectures to its end first"):
        kept("02_architectures")


def test_what_was_written_after_the_end_is_not_read(finished, kept):
    earlier = kept()
    finished.choice("network", size=64)
    with pytest.raises(InputError, match=r"network\.choice: missing; run 01_data first"):
        earlier.choice("network")


def test_a_notebook_that_did_not_end_has_kept_nothing(finished, card):
    other = Record("02_architectures", finished.run_dir, {"seed": 3}, card, "patient", 3)
    other.choice("network", size=64)
    with pytest.raises(InputError, match="run 02_architectures to its end first"):
        Earlier(finished.run_dir, "02_architectures")


def test_what_was_changed_or_damaged_since_is_not_read(finished, kept):
    finished.choice("network", size=64)
    finished.table("split", pd.DataFrame({"id": ["64"]}))
    earlier = kept()
    for name, read in (("network.choice", earlier.choice), ("split.csv", earlier.table)):
        path = finished.folder / name
        path.write_text(path.read_text().replace("64", "65"))
        with pytest.raises(InputError, match=rf"{name}: changed since 01_data wrote it; run 01_data again"):
            read(path.stem)
        with pytest.raises(InputError, match=rf"{name}: changed since 01_data wrote it"):
            earlier.file(name)
    for content in ("", "[]", "{}", '{"files": 3}', "\xff", '{"files": {'):
        (finished.folder / "results.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=r"results\.json: damaged; run 01_data again"):
            Earlier(finished.run_dir, "01_data")


@pytest.mark.parametrize("name", ["NA", "007", "null", "1e5", "true"])
def test_patients_keep_their_names_from_notebook_to_notebook(finished, kept, name):
    finished.table("predictions", pd.DataFrame({"id": [name, "x"], "patient": [name, None], "split": "test"}))
    read = kept().table("predictions")
    assert read["id"].tolist() == [name, "x"] and read["patient"][0] == name and pd.isna(read["patient"][1])


def test_numbers_are_read_to_the_last_digit(finished, kept):
    p = np.random.default_rng(0).random(50)
    finished.table("scored", pd.DataFrame({"id": np.arange(50), "p": p}))
    assert np.array_equal(kept().table("scored")["p"], p)
