"""What a notebook opens, on small data of one's own."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from nodules import course, paths, study
from nodules.data import patches, split
from nodules.errors import InputError
from nodules.networks import bank, bodies, heads, weights
from nodules.networks.network import predict
from nodules.study import Study
from nodules.tools import run

SMALL = bodies.Spec("test_resnet", "random", 32, "last")  # the smallest network of timm


def defaults(lesson):
    return course.parameters(paths.NOTEBOOKS / f"{lesson.name}.ipynb")


@pytest.fixture
def opened(tmp_path, own):
    """Open a notebook on patches of one's own, with some of its parameters set and some arrays of the file changed."""

    def opened(lesson=course.DATA, arrays=None, **chosen):
        if lesson is course.DATA:
            changed = own | (arrays or {})
            np.savez(tmp_path / "own.npz", **{name: array for name, array in changed.items() if array is not None})
            chosen = {"data": str(tmp_path / "own.npz")} | chosen
        return Study.open(lesson.name, defaults(lesson) | {"run_dir": str(tmp_path / "runs" / "x")} | chosen)

    return opened


@pytest.fixture
def first(opened):
    """The first notebook's study, saved as that notebook saves it."""

    def first(**chosen):
        opening = opened(**chosen)
        opening.table("split", opening.split)
        opening.save()
        return opening

    return first


# Parameters


@pytest.mark.parametrize("lesson", course.LESSONS, ids=lambda lesson: lesson.name)
def test_provenance_is_the_parameters_cell_with_the_values_given(opened, first, lesson, tmp_path):
    data = {"data": str(tmp_path / "own.npz")} if lesson is course.DATA else {}
    given = {"seed": 7, "run_dir": str(tmp_path / "runs" / "x")} | data
    first()
    opening = opened(lesson, seed=7, helper=print, unused=3)
    assert opening.provenance["parameters"] == opening.parameters == defaults(lesson) | given
    assert opening.provenance["notebook"] == lesson.name and opening.seed == 7
    assert opening.folder == tmp_path / "runs" / "x" / lesson.name


def test_every_number_and_every_choice_of_a_notebook_has_a_range_and_the_reverse():
    everywhere = {name: value for lesson in course.LESSONS for name, value in defaults(lesson).items()}
    numeric = {
        name
        for name, value in everywhere.items()
        if all(type(number) in (int, float) for number in (value if isinstance(value, list) else [value]))
    }
    assert (
        numeric | {"split_kind", "pool", "rule", "unit", "ingredients"}
        == study.RANGES.keys() | study.CHOICES.keys()
        <= everywhere.keys()
    )


@pytest.mark.parametrize("path", sorted(paths.ROOT.glob("params/*.yaml")), ids=lambda path: path.stem)
def test_what_notebooks_and_profiles_set_is_in_range(path):
    profile = run.read_profile(path)
    for lesson in course.LESSONS:
        study.check(run.merge(paths.NOTEBOOKS / f"{lesson.name}.ipynb", profile, []))
        study.check(defaults(lesson))


@pytest.mark.parametrize("name", study.RANGES)
def test_a_number_is_taken_from_its_range_ends_included(name):
    least, most = study.RANGES[name]
    for value in (least, most, [least, most]):
        study.check({name: value})
    for value in (least - 1e-9, most + 1e-3, -1, float("nan"), float("inf"), [], [least, most + 1]):
        with pytest.raises(InputError) as caught:
            study.check({"run_dir": "x", name: value})
        assert str(caught.value) == f"{name}={value}: out of range; use {least} to {most}"


@pytest.mark.parametrize("name", study.CHOICES)
def test_a_choice_is_one_of_those_named(name):
    for value in study.CHOICES[name]:
        study.check({name: value})
    for value in ("some", 1):
        with pytest.raises(InputError) as caught:
            study.check({name: value})
        known = ", ".join(str(choice) for choice in study.CHOICES[name])
        assert str(caught.value) == f"{name}={value!r}: unknown; use one of {known}"


def test_an_architecture_is_one_that_is_known():
    study.check({"architectures": [*weights.ARCHITECTURES, SMALL.architecture]})
    with pytest.raises(InputError, match="architecture='resnet35': no such network"):
        study.check({"architectures": ["resnet34", "resnet35"]})


WRONG = {"seed": -1, "split_kind": "odd", "pool": "some", "rule": "median", "folds": 1, "architectures": ["resnet35"]}


@pytest.mark.parametrize("lesson", course.LESSONS, ids=lambda lesson: lesson.name)
def test_a_parameter_that_cannot_be_used_is_refused_before_anything_is_read(opened, lesson, monkeypatch, tmp_path):
    monkeypatch.setattr(patches, "read", lambda *_: pytest.fail("data were read"))
    values = defaults(lesson)
    ranged = {name: study.RANGES[name] for name in values if name in study.RANGES}
    wrong = {name: [most + 1] if isinstance(values[name], list) else most + 1 for name, (_, most) in ranged.items()}
    wrong |= {name: value for name, value in WRONG.items() if name in values}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=rf"^{name.removesuffix('s')}s?=") as caught:
            opened(lesson, **{name: value})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


# Patches


def test_the_first_notebook_splits_the_patches_that_it_reads(opened, tmp_path):
    opening = opened(split_seed=5)
    ct = patches.read(str(tmp_path / "own.npz"))
    pd.testing.assert_frame_equal(opening.split, split.assign(ct.table, "auto", 5))
    assert np.array_equal(opening.patches.images, ct.images) and opening.card == ct.card
    assert opening.split_kind == "patient" and opened(split_kind="random").split_kind == "random"


@pytest.mark.parametrize("kind", ["patient", "random"])
def test_those_that_follow_find_the_same_split_on_the_same_patches(opened, first, kind):
    opening = first(split_kind=kind)
    following = opened(course.TRAINING, data="absent.npz")
    assert following.split_kind == kind and following.card == opening.card
    pd.testing.assert_frame_equal(following.split, opening.split, check_dtype=False)
    for side, again in zip(opening.parts, following.parts, strict=True):
        assert np.array_equal(side.rows, again.rows) and np.array_equal(side.images, again.images)


def test_rows_of_the_split_are_those_of_the_patches(opened, first):
    first()
    following = opened(course.TRAINING)
    table, images = following.patches.table, following.patches.images
    assert list(following.split["id"]) == list(table["id"])
    assert np.array_equal(following.split["malignant"], following.everything.y)
    assert following.parts == (following.train, following.valid, following.test)
    for side, part in zip(split.SPLITS, following.parts, strict=True):
        assert np.array_equal(part.rows, np.flatnonzero(following.split["split"] == side)) and len(part) > 0
        assert np.array_equal(part.y, table["malignant"].to_numpy()[part.rows])
        assert np.array_equal(part.images, images[part.rows])
        assert np.array_equal(part.units, following.everything.units[part.rows])
        assert part.table.equals(table.iloc[part.rows])
    assert sorted(np.concatenate([part.rows for part in following.parts])) == list(range(len(table)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", lambda images: images + (np.arange(40) == 39)[:, None, None]),
        ("malignant", lambda malignant: 1 - malignant),
        ("patient", lambda patient: np.char.replace(patient, "p19", "p20")),
        ("patient", lambda patient: None),
        ("id", lambda _: np.arange(40)[::-1].astype(str)),
    ],
)
def test_other_patches_than_those_of_the_first_notebook_are_refused(opened, first, own, name, change, tmp_path):
    first()
    others = own | {name: change(own.get(name))}
    np.savez(tmp_path / "own.npz", **{key: array for key, array in others.items() if array is not None})
    with pytest.raises(InputError, match="01_data: made from different patches; run 01_data again"):
        opened(course.TRAINING)


def test_without_the_first_notebook_the_others_say_so(opened, first, own, tmp_path):
    with pytest.raises(InputError, match="run 01_data to its end first"):
        opened(course.EVALUATION)
    opening = first()
    path = opening.folder / "split.csv"
    path.write_text(path.read_text().replace("valid", "train"))
    with pytest.raises(InputError, match=r"split\.csv: changed since 01_data wrote it; run 01_data again"):
        opened(course.EVALUATION)


def test_units_are_patients_where_they_are_known_and_else_patches(opened, own):
    known = opened()
    assert known.counted == "patients" and np.array_equal(known.everything.units, own["patient"])
    assert np.array_equal(known.kept_together, own["patient"])
    shuffled = opened(split_kind="random")
    assert shuffled.counted == "patients" and np.array_equal(shuffled.everything.units, own["patient"])
    assert shuffled.kept_together.is_unique, "its sides share patients"
    unknown = opened(arrays={"patient": None})
    assert unknown.counted == "patches" and np.array_equal(unknown.everything.units, unknown.patches.table["id"])
    assert np.array_equal(unknown.kept_together, unknown.patches.table["id"])


def test_unit_and_window_are_those_of_the_pixels(opened, own):
    assert opened().unit == "HU" and opened().window == [-1000, 400]
    grey = opened(arrays={"images": (own["images"] + 1000) / 1400 * 255, "unit": "8-bit"})
    assert grey.unit == grey.card.unit != "HU" and grey.window == [0, 255]


# What earlier notebooks kept


@pytest.fixture
def trained(first, opened, monkeypatch, tmp_path):
    """A run whose network was chosen and whose head was kept, with predictions in an order of their own."""
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path / "cache"))
    first()
    chosen = opened(course.ARCHITECTURES)
    chosen.choice("network", **asdict(SMALL), parameters=17)
    chosen.save()
    training = opened(course.TRAINING)
    body = training.body()
    head = heads.head(bank.width(body, SMALL.pool))
    weights.save(head.state_dict(), training.file("head.safetensors"))
    rows = np.concatenate([training.test.rows, training.valid.rows])[::-1]
    said = training.split.iloc[rows][["id", "patient", "split"]].assign(y=training.everything.y[rows])
    training.table("predictions", said.assign(p=rows / 100, p_tta=rows / 200))
    training.save()
    return training, head


def test_what_a_notebook_predicted_lines_up_with_the_patches(trained, opened, own):
    following = opened(course.EVALUATION)
    predicted = following.predicted()
    for table, part in zip(predicted, (following.valid, following.test), strict=True):
        assert table.index.tolist() == part.rows.tolist() and np.array_equal(table["id"], part.table["id"])
        assert np.array_equal(table["y"], part.y) and np.array_equal(table["unit"], part.units)
        assert np.array_equal(table["p"], part.rows / 100) and np.array_equal(table["p_tta"], part.rows / 200)
        assert np.array_equal(table["diameter_mm"], own["diameter_mm"][part.rows])
        assert np.array_equal(table["nodule"], table["id"]), "nodules are unknown, so each patch stands for one"


def test_the_network_is_the_one_that_was_chosen(trained, opened):
    following = opened(course.RATE)
    assert following.network == SMALL and following.weights == ""
    body = following.body()
    assert (body.architecture, body.weights.name, body.size) == ("test_resnet", "random", 32)
    assert following.weights == f"test_resnet, {body.weights.source}" and following.weights in following.source


def test_the_model_is_the_network_with_the_head_that_was_kept(trained, opened):
    training, head = trained
    following = opened(course.INTERPRETATION)
    model = following.model()
    assert following.weights == training.weights and not model.training
    assert all(torch.equal(model.head.state_dict()[name].cpu(), kept) for name, kept in head.state_dict().items())
    assert predict(model, following.test.images, 1).shape == (len(following.test), 1)


def test_a_network_that_was_not_chosen_yet_is_named(first, opened):
    first()
    with pytest.raises(InputError, match="run 02_architectures to its end first"):
        opened(course.TRAINING).body()
