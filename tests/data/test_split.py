from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodules.data import patches, split
from nodules.errors import SEEDS, InputError


@st.composite
def tables(draw):
    """At least 30 patients, each malignant or benign, with 1 to 6 patches."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=30, max_size=80))
    patient = np.repeat([f"p{i:03d}" for i in range(len(sizes))], sizes)
    label = np.repeat(np.arange(len(sizes)) % draw(st.integers(2, 3)) == 0, sizes).astype(int)
    return pd.DataFrame({"id": [f"{i:04d}" for i in range(len(patient))], "patient": patient, "malignant": label})


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(0, SEEDS))
def test_no_patient_stands_on_two_sides(table, seed):
    assigned = split.assign(table, "patient", seed)
    assert (assigned.groupby("patient")["split"].nunique() == 1).all()
    assert list(assigned["id"]) == list(table["id"]) and set(assigned["split"]) == set(split.SPLITS)
    pd.testing.assert_frame_equal(assigned, split.assign(table, "auto", seed))


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(0, SEEDS))
def test_a_random_split_is_80_10_10_and_stratified(table, seed):
    assigned = split.assign(table, "random", seed)
    shares = assigned["split"].value_counts(normalize=True)
    assert np.allclose(shares[list(split.SPLITS)], [0.8, 0.1, 0.1], atol=2 / len(table) + 1e-9)
    expected = table["malignant"].mean() * assigned["split"].value_counts()
    assert (assigned.groupby("split")["malignant"].sum() - expected).abs().max() <= 2


def test_another_seed_is_another_split_and_the_same_the_same():
    table = pd.DataFrame({"id": np.arange(200).astype(str), "malignant": np.arange(200) % 2})
    first, again, other = (split.assign(table, "auto", seed)["split"] for seed in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)


def test_without_patients_auto_is_random_and_patient_is_refused():
    table = pd.DataFrame({"id": np.arange(200).astype(str), "malignant": np.arange(200) % 2})
    assigned = split.assign(table)
    assert set(assigned["split_kind"]) == {"random"} and assigned["patient"].isna().all()
    assert split.counts(assigned)["patients"].isna().all()
    with pytest.raises(InputError, match="no patients"):
        split.assign(table, "patient")


def test_an_unknown_kind_and_too_few_patients_are_refused():
    table = pd.DataFrame({"id": np.arange(24).astype(str), "patient": [*"wxyz"] * 6, "malignant": [0, 1, 0, 1] * 6})
    with pytest.raises(InputError, match="'folds': no such split"):
        split.assign(table, "folds")
    with pytest.raises(InputError, match="only 2 patients"):
        split.assign(table)
    with pytest.raises(InputError, match="19 patches are too few; provide at least 20"):
        split.assign(table[:19])


def test_counts_add_up():
    table = pd.DataFrame({"id": np.arange(300).astype(str), "malignant": np.arange(300) % 3 == 0})
    table["patient"] = [f"p{i // 3}" for i in range(300)]
    counts = split.counts(split.assign(table))
    assert counts["patches"].sum() == 300 and counts["malignant"].sum() == 100 and counts["patients"].sum() == 100
    assert list(counts.index) == list(split.SPLITS)


def test_small_and_unequal_sets_are_split_in_fewer_folds():
    few = pd.DataFrame({"id": np.arange(60).astype(str), "malignant": (np.arange(60) < 4).astype(int)})
    counts = split.counts(split.assign(few))
    assert (counts["malignant"] >= 1).all() and counts["patches"].sum() == 60
    twenty = pd.DataFrame({"id": np.arange(20).astype(str), "malignant": np.arange(20) % 2})
    assert split.counts(split.assign(twenty))["patches"].tolist() == [16, 2, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, SEEDS), st.integers(60, 300))
def test_a_patient_with_most_patches_is_trained_on(seed, most):
    who = np.concatenate([np.repeat("big", most), np.repeat([f"p{i:02d}" for i in range(30)], 4)])
    table = pd.DataFrame(
        {"id": np.arange(len(who)).astype(str), "patient": who, "malignant": np.arange(len(who)) // 2 % 2}
    )
    assigned = split.assign(table, "patient", seed)
    assert set(assigned.loc[assigned["patient"] == "big", "split"]) == {"train"}
    assert (split.counts(assigned)["malignant"] > 0).all()


def test_no_split_is_said_in_one_line():
    table = pd.DataFrame({"id": np.arange(60).astype(str), "patient": np.repeat([*"abc"], 20)})
    table["malignant"] = (table["patient"] == "a").astype(int)
    with pytest.raises(InputError, match="a class has only 1 patients"):
        split.assign(table)


@pytest.fixture
def part(tmp_path, own):
    """All 40 patches, of 20 patients, of a valid file as one part."""
    np.savez(tmp_path / "own.npz", **own)
    return split.whole(patches.read(str(tmp_path / "own.npz")))


def test_the_whole_is_every_patch_with_its_label_row_and_unit(part, own):
    assert len(part) == 40 and np.array_equal(part.images, own["images"]) and np.array_equal(part.y, own["malignant"])
    assert part.rows.tolist() == part.table.index.tolist() == list(range(40))
    assert part.units.tolist() == own["patient"].tolist()


def test_units_are_the_patches_themselves_where_patients_are_unknown(tmp_path, own):
    del own["patient"]
    np.savez(tmp_path / "own.npz", **own)
    part = split.whole(patches.read(str(tmp_path / "own.npz")))
    assert part.units.tolist() == part.table["id"].tolist() and len(set(part.units)) == 40


def consistent(part, whole):
    """Whether every field of a part is about the same patches of the whole, in the same order."""
    return (
        np.array_equal(part.images, whole.images[part.rows])
        and np.array_equal(part.y, whole.y[part.rows])
        and np.array_equal(part.units, whole.units[part.rows])
        and part.table.equals(whole.table.loc[part.rows])
        and part.table.index.tolist() == part.rows.tolist()
    )


def test_taking_keeps_the_order_that_is_asked_for_and_the_places_among_all_patches(part):
    some = part.take(np.array([7, 3, 30]))
    assert some.rows.tolist() == [7, 3, 30] and consistent(some, part)
    fewer = some.take(np.array([2, 0]))
    assert fewer.rows.tolist() == [30, 7] and consistent(fewer, part), "positions count within the part, rows do not"
    assert len(part.take(np.array([], int))) == 0


def test_dividing_puts_each_patch_on_its_side(part):
    sides = split.assign(part.table)["split"].to_numpy()
    parts = split.divide(part, sides)
    assert parts._fields == split.SPLITS and isinstance(parts, split.Parts)
    for name, side in zip(split.SPLITS, parts, strict=True):
        assert consistent(side, part) and set(sides[side.rows]) == {name}
    assert sorted(np.concatenate([side.rows for side in parts])) == list(range(40))
    assert sum(len(set(side.units)) for side in parts) == len(set(part.units)) == 20


def test_a_part_of_a_part_is_divided_too(part):
    some = part.take(np.arange(39, 9, -1))
    parts = split.divide(some, np.array(["valid", "train"] * 15))
    assert parts.valid.rows.tolist() == list(range(39, 9, -2)) and len(parts.test) == 0
    assert all(consistent(side, part) for side in parts)


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(2, 10), st.integers(0, SEEDS))
def test_folds_hold_every_row_once_and_each_patient_in_one_fold(table, count, seed):
    y, patient = table["malignant"].to_numpy(), table["patient"].to_numpy()
    fold = split.folds(y, patient, count, seed)
    assert fold.shape == y.shape and set(fold) <= set(range(count))
    assert all(len(set(fold[patient == name])) == 1 for name in set(patient))
    assert np.array_equal(fold, split.folds(y, patient, count, seed))


def test_folds_of_single_patches_are_stratified_and_follow_the_seed():
    y, ids = np.arange(103) % 3 == 0, np.arange(103).astype(str)
    fold = split.folds(y, ids, 5, seed=1)
    assert set(np.bincount(fold)) <= {20, 21} and set(np.bincount(fold[y])) == {7}
    assert not np.array_equal(fold, split.folds(y, ids, 5, seed=2))


def test_a_thinned_split_holds_fewer_patches_to_train_on_and_all_others():
    images = np.arange(50)[:, None, None] * np.ones((1, 2, 2))
    table = pd.DataFrame({"id": np.arange(50).astype(str)})
    everything = split.Part(images, np.arange(50) % 2, np.arange(50), table, np.arange(50))
    parts = split.divide(everything, np.repeat(["test", "train", "valid"], [10, 30, 10]))
    few = split.thinned(parts, 12, seed=0)
    assert [len(part) for part in few] == [12, 10, 10] and len(few.train.source) == 32
    assert few.train.source is few.test.source and np.concatenate([part.rows for part in few]).tolist() == [*range(32)]
    for part, before in zip(few, parts, strict=True):
        assert (part.images[:, 0, 0] == part.table["id"].astype(int)).all() and set(part.table["id"]) <= set(
            before.table["id"]
        )
        assert (part.y == part.images[:, 0, 0] % 2).all() and (part.units == part.images[:, 0, 0]).all()
    again, other = split.thinned(parts, 12, seed=0), split.thinned(parts, 12, seed=1)
    assert (again.train.units == few.train.units).all() and set(other.train.units) != set(few.train.units)
    assert len(split.thinned(parts, 1000, seed=0).train) == 30


def test_a_stack_holds_the_slices_below_and_above_of_the_same_nodule():
    table = pd.DataFrame({"id": list("abcdef"), "nodule": list("xyxyxz"), "slice_index": [2, 1, 0, 0, 1, 0]})
    images = np.arange(6)[:, None, None] * np.ones((1, 4, 4))
    part = split.Part(images, np.zeros(6), np.arange(6), table, np.arange(6))
    stacks = split.stacked(part)
    assert stacks.images.shape == (6, 3, 4, 4)
    assert stacks.images[:, :, 0, 0].tolist() == [[4, 0, 0], [3, 1, 1], [2, 2, 4], [3, 3, 1], [2, 4, 0], [5, 5, 5]]
    assert stacks.take(np.array([4, 1])).images[:, :, 0, 0].tolist() == [[2, 4, 0], [3, 1, 1]]
    alone = split.stacked(replace(part, table=table[["id"]]))
    assert (alone.images == images[:, None]).all(), "unknown slices: the patch itself"


def test_unknown_outlines_are_nan():
    part = split.Part(np.zeros((3, 4, 4)), np.zeros(3), np.arange(3), pd.DataFrame({"id": range(3)}), np.arange(3))
    assert np.isnan(part.outlines).all() and part.outlines.shape == (3, 4, 4)
    known = replace(part, masks=np.arange(48).reshape(3, 4, 4) % 2 == 0).take(np.array([2, 0]))
    assert known.outlines.shape == (2, 4, 4) and set(np.unique(known.outlines)) == {0, 1}


def test_two_sources_join_with_their_slices_and_their_own_nodules():
    first = split.Part(
        np.arange(3)[:, None, None] * np.ones((1, 4, 4)),
        np.array([0, 1, 1]),
        np.arange(3),
        pd.DataFrame({"id": list("abc"), "nodule": ["n", "n", "m"], "slice_index": [0, 1, 0]}),
        np.array(["p", "p", "q"]),
        np.zeros((3, 4, 4), bool),
    )
    second = replace(first, source=10 + first.source, y=1 - first.y, masks=np.ones((3, 4, 4), bool))
    both = split.joined(split.stacked(first).take(np.array([0, 2])), split.stacked(second).take(np.array([1])))
    assert both.images[:, :, 0, 0].tolist() == [[0, 0, 1], [2, 2, 2], [10, 11, 11]]
    assert both.y.tolist() == [0, 1, 0] and both.units.tolist() == ["p", "q", "p"]
    assert both.outlines[:, 0, 0].tolist() == [0, 0, 1] and len(set(both.nodules)) == 3
    assert both.take(np.array([2])).images[0, 1, 0, 0] == 11
    plain = split.joined(first, replace(second, masks=None))
    assert plain.images.shape == (6, 4, 4) and np.isnan(plain.outlines).all(), "known to one source is not enough"
