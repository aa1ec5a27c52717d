import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from nodules import cache, paths
from nodules.data import patches, phantom, sources
from nodules.errors import InputError


def write(folder, arrays, suffix):
    path = folder / f"own{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value.astype(object) if value.dtype.kind == "U" else value
    return path


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        patches.read(str(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_own_file_comes_back_as_written(tmp_path, own, suffix):
    ct = patches.read(str(write(tmp_path, own, suffix)))
    assert np.array_equal(ct.images, own["images"]) and ct.images.dtype == np.int16
    assert list(ct.table["patient"]) == list(own["patient"])
    assert np.allclose(ct.table["diameter_mm"], own["diameter_mm"])
    assert (ct.card.patches, ct.card.malignant, ct.card.patients, ct.card.nodules) == (40, 20, 20, None)
    assert ct.card.unit == "HU" and not ct.card.simulation and ct.masks is None


def test_both_kinds_of_file_have_the_same_hash_and_a_changed_pixel_another(tmp_path, own):
    first, second = (patches.read(str(write(tmp_path, own, s))).card.sha256 for s in (".npz", ".h5"))
    assert first == second
    for changed in (own | {"diameter_mm": np.full(40, 9.0)}, own | {"masks": np.ones((40, 64, 64), bool)}):
        assert patches.read(str(write(tmp_path, changed, ".npz"))).card.sha256 != first
    own["images"][7, 3, 3] += 1
    assert patches.read(str(write(tmp_path, own, ".npz"))).card.sha256 != first


def test_bytes_are_marked_not_hu(tmp_path, own):
    own["images"] = np.random.default_rng(1).integers(0, 256, (40, 64, 64), dtype=np.uint8)
    ct = patches.read(str(write(tmp_path, own, ".npz")))
    assert "not HU" in ct.card.unit and np.array_equal(ct.images, own["images"])


def test_a_file_named_phantom_is_not_the_phantom(tmp_path, own):
    np.savez(tmp_path / "phantom.npz", **own)
    assert not patches.read(str(tmp_path / "phantom.npz")).card.simulation


def change(**changes):
    return lambda own: own | {key: value(own) if callable(value) else value for key, value in changes.items()}


def with_nan(own):
    images = own["images"].astype(np.float32)
    images[3, 5, 5] = np.nan
    return images


CORRUPTIONS = {
    "no images": (lambda own: {k: v for k, v in own.items() if k != "images"}, ["no 'images'"]),
    "no labels": (lambda own: {k: v for k, v in own.items() if k != "malignant"}, ["no 'malignant'"]),
    "wrong side": (change(images=lambda own: own["images"][:, :32, :32]), ["(40, 32, 32)", "(N, 64, 64)"]),
    "wrong rank": (change(images=lambda own: own["images"][0]), ["(64, 64)"]),
    "text images": (change(images=np.full((40, 64, 64), "a")), ["not numeric"]),
    "complex images": (change(images=np.zeros((40, 64, 64), complex)), ["not numeric"]),
    "NaN": (change(images=with_nan), ["NaN"]),
    "infinite": (change(images=np.full((40, 64, 64), np.inf)), ["infinite"]),
    "empty": (change(images=np.zeros((0, 64, 64), np.int16)), ["0 patches"]),
    "too few labels": (change(malignant=np.array([0, 1])), ["40 images", "(2,)"]),
    "label 2": (change(malignant=lambda own: own["malignant"] + 1), ["2", "labels must be 0 or 1"]),
    "label NaN": (change(malignant=np.full(40, np.nan)), ["nan", "labels must be 0 or 1"]),
    "one class": (change(malignant=np.ones(40)), ["both classes"]),
    "same ids": (change(id=np.array(["a"] * 40)), ["'a'", "40 times"]),
    "too few patients": (change(patient=np.array(["a"])), ["'patient'"]),
    "nameless patient": (change(patient=np.array([""] * 40)), ["'patient'", "empty", "row 0"]),
    "not HU": (change(images=lambda own: own["images"].astype(np.int32) * 100), ["far outside Hounsfield"]),
    "stored values": (change(images=lambda own: (own["images"] + 1024).astype(np.uint16)), ["subtract 1024"]),
    "unit of length": (change(unit=np.array("mm")), ["'mm'", "'HU'"]),
    "unit for each": (change(unit=np.full(40, "HU")), ["'unit'", "(40,)"]),
    "half a patient": (change(patient=np.arange(40) / 2), ["'patient' is 0.5 in row 1", "not an exact whole number"]),
    "inexact patient": (change(patient=np.full(40, 1e17)), ["'patient'", "store it as text"]),
    "rounded patient": (change(patient=(123456789 + np.arange(40)).astype("f4")), ["'patient'", "store it as text"]),
    "patient lost": (change(patient=np.array([np.nan, *range(39)])), ["'patient' is nan in row 0"]),
    "patient written as lost": (change(patient=np.array(["a", "nan"] * 20)), ["empty ('nan') in row 1"]),
    "blank patient": (change(patient=np.array(["a", "  "] * 20)), ["empty ('') in row 1"]),
    "ids that blanks told apart": (
        change(id=np.array(["a", "a ", *list("bcdefghijklmnopqrstu"), *list("BCDEFGHIJKLMNOPQRS")])),
        ["'a'", "2 times"],
    ),
    "endless": (change(diameter_mm=np.full(40, 1e6)), ["'diameter_mm' is 1e+06 in row 0", "1000 mm"]),
    "wrong masks": (change(masks=np.zeros((40, 64, 64), np.uint8)), ["'masks'"]),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bad_arrays_are_refused_in_one_line(tmp_path, own, name, suffix):
    if suffix == ".hdf5" and name == "text images":
        pytest.skip("HDF5 has no fixed-width unicode")
    corrupt, words = CORRUPTIONS[name]
    refused(write(tmp_path, corrupt(own), suffix), *words)


def test_pickled_arrays_are_refused_unread(tmp_path, own):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    for key in ("images", "malignant", "patient", "remark"):
        refused(write(tmp_path, own | {key: np.array([Trap()] * 40)}, ".npz"), f"'{key}'")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_damaged_files_are_refused(tmp_path, own, suffix):
    path = write(tmp_path, own, suffix)
    whole = path.read_bytes()
    for content in (b"", b"no array file", whole[: len(whole) // 2], whole[:-200]):
        path.write_bytes(content)
        refused(path, "not a readable")


def test_absurd_shapes_are_refused_before_allocation(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file.create_dataset("images", (10**9, 64, 64), np.int16, chunks=(1, 64, 64))
        file["malignant"] = np.array([0, 1])
    refused(tmp_path / "own.h5", "1000000000 patches")


def test_missing_and_unknown_files_are_refused(tmp_path):
    refused(tmp_path / "absent.npz", "no such file")
    (tmp_path / "own.pkl").write_bytes(b"")
    refused(tmp_path / "own.pkl", "unknown file type", ".npz")


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 30),
    dtype=st.sampled_from(["i2", "i4", "i8", "f4", "f8", "u1"]),
    columns=st.sets(st.sampled_from(["patient", "nodule", "diameter_mm"])),
    column_vector=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_valid_is_read_back(n, dtype, columns, column_vector, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 64, 64)).astype(dtype)
    labels = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)]).astype(rng.choice(["i1", "f8", "i8"]))
    values = {"patient": rng.integers(1, 9, n).astype(str), "nodule": np.arange(n), "diameter_mm": rng.random(n)}
    file = {"images": images, "malignant": labels[:, None] if column_vector else labels}
    with tempfile.TemporaryDirectory() as folder:
        ct = patches.read(str(write(Path(folder), file | {c: values[c] for c in columns}, ".npz")))
    assert np.array_equal(ct.images, images)
    assert np.array_equal(ct.table["malignant"], labels)
    assert set(ct.table) == {"id", "malignant"} | columns and ct.table["id"].is_unique
    assert ct.card.malignant + ct.card.benign == n == len(ct)


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """A folder with files in exactly the form of Kaggle's: HDF5, multipage TIFF, CSV; random pixels."""
    folder = tmp_path_factory.mktemp("kaggle")
    malignant = np.arange(6691) < 2526  # Kaggle's rows are sorted by class
    images = np.random.default_rng(0).integers(-1024, 1600, (6691, 64, 64), dtype=np.int16)
    with h5py.File(folder / "all_patches.hdf5", "w") as file:
        file["ct_slices"] = images
        file["slice_class"] = malignant[:, None].astype(np.int64)
    tifffile.imwrite(folder / "ct_tiles.tif", images, photometric="minisblack")
    pd.DataFrame({"malignancy": malignant.astype(float)}).to_csv(folder / "malignancy.csv")
    return folder, images


def linked(kaggle, tmp_path, *names):
    for name in names:
        (tmp_path / name).symlink_to(kaggle[0] / name)
    return str(tmp_path)


def test_kaggle_is_read_from_either_form(kaggle, tmp_path):
    for names in (["all_patches.hdf5"], ["ct_tiles.tif", "malignancy.csv"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        ct = patches.read(linked(kaggle, folder, *names))
        assert np.array_equal(ct.images, kaggle[1])
        assert (ct.card.malignant, ct.card.benign, ct.card.patients) == (2526, 4165, None)
        assert ct.table["malignant"].iloc[:2526].all() and not ct.table["malignant"].iloc[2526:].any()


def test_kaggle_csv_written_here_is_in_the_form_of_the_real_one(kaggle, tmp_path, real):
    csv = real("kaggle_malignancy.csv")
    written, original = (pd.read_csv(path) for path in (kaggle[0] / "malignancy.csv", csv))
    pd.testing.assert_frame_equal(written, original)
    linked(kaggle, tmp_path, "ct_tiles.tif")
    (tmp_path / "malignancy.csv").write_bytes(csv.read_bytes())
    assert patches.read(str(tmp_path)).card.malignant == 2526


def test_kaggle_is_found_in_the_data_folder(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(InputError, match=r"download https://www\.kaggle\.com\S+ .*put all_patches\.hdf5"):
        patches.read("kaggle")
    linked(kaggle, tmp_path, "all_patches.hdf5")
    assert patches.read("kaggle").card.title == "Kaggle kmader/lungnodemalignancy"


def test_other_counts_are_not_taken_for_kaggles_set(tmp_path, own, kaggle, monkeypatch):
    with h5py.File(tmp_path / "all_patches.hdf5", "w") as file:
        file["ct_slices"], file["slice_class"] = own["images"], own["malignant"][:, None]
    part = patches.read(str(tmp_path))  # a folder in the same form, such as a part of the set
    assert len(part) == 40 and "Kaggle" not in part.card.title and part.card.limits == sources.OWN["limits"]
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(InputError, match=r"'patches': 40.*'patches': 6691"):
        patches.read("kaggle")
    linked(kaggle, tmp_path, "ct_tiles.tif")
    (tmp_path / "all_patches.hdf5").unlink()
    labels = pd.read_csv(kaggle[0] / "malignancy.csv", index_col=0)
    (1 - labels).to_csv(tmp_path / "malignancy.csv")  # the counts exchanged, as the 2019 report has them
    with pytest.raises(InputError, match=r"'malignant': 4165"):
        patches.read(str(tmp_path))


def test_columns_are_made_alike_before_they_are_compared(tmp_path, own):
    del own["images"]
    own["patient"] = np.array([f"p{i // 4:02d}{' ' * (i % 2)}" for i in range(40)])
    columns = {
        "images": np.random.default_rng(0).integers(-1000, 400, (40, 64, 64)).astype(">i2"),
        "malignant": own["malignant"].astype(">i4"),
        "diameter_mm": own["diameter_mm"].astype(">f8"),
        "slice_index": np.arange(40).astype(">i8"),
        "nodule": np.arange(40) // 2 * 1.0,
        "ratings": np.full(40, 4.0),
    }
    for suffix in (".npz", ".h5"):
        ct = patches.read(str(write(tmp_path, own | columns, suffix)))
        assert ct.card.patients == 10 and ct.card.nodules == 20 and not ct.card.notes
        assert set(ct.table["nodule"]) == set(map(str, range(20))) and set(ct.table["ratings"]) == {"4"}
        assert all(ct.table[name].to_numpy().dtype.isnative for name in ("diameter_mm", "slice_index"))
        assert ct.images.dtype == np.int16 and ct.table.groupby("patient")["slice_index"].nunique().max() == 4


@pytest.mark.parametrize("shape", [(40, 1), (1, 40)])
def test_columns_and_images_may_have_a_dimension_to_spare(tmp_path, own, shape):
    wide = {key: value.reshape(shape) for key, value in own.items() if key != "images"}
    for images in (own["images"][:, None], own["images"][..., None]):
        ct = patches.read(str(write(tmp_path, wide | {"images": images}, ".npz")))
        assert np.array_equal(ct.images, own["images"]) and ct.card.patients == 20


@pytest.mark.parametrize("name", ["patient_id", "PatientID", "Patients", "patient "])
def test_patients_under_a_near_name_are_not_lost(tmp_path, own, name):
    own[name] = own.pop("patient")
    for suffix in (".npz", ".h5"):
        card = patches.read(str(write(tmp_path, own, suffix))).card
        assert card.patients == 20 and card.notes == [f"Column {name} is read as patient."]


def test_columns_that_nothing_uses_are_named_and_may_be_anything_but_pickles(tmp_path, own):
    own |= {"age": np.array([np.nan, *range(39)]), "day": np.full(40, np.datetime64("2020-01-01"))}
    assert patches.read(str(write(tmp_path, own, ".npz"))).card.notes == ["Not used: age, day."]


@pytest.mark.parametrize("missing", ["N/A", "#N/A", "NULL", "NAN", "none"])
def test_words_for_a_missing_patient_are_refused(tmp_path, own, missing):
    own["patient"] = np.where(np.arange(40) % 2, missing, own["patient"])
    refused(write(tmp_path, own, ".npz"), f"'patient' is empty ({missing!r}) in row 1")


def test_a_name_that_may_stand_for_several_is_pointed_out(tmp_path, own):
    own["patient"] = np.where(np.arange(40) % 2, "unknown", own["patient"])
    notes = patches.read(str(write(tmp_path, own, ".npz"))).card.notes
    assert notes == ["Column patient: 'unknown' occurs 20 times; is it a single patient?"]


def test_a_nodule_is_of_one_patient(tmp_path, own):
    own["nodule"] = np.tile(["1", "2"], 20)  # numbered within each patient
    refused(write(tmp_path, own, ".npz"), "the nodule '1' is of 20 patients; give each nodule a name of its own")
    own["nodule"] = np.char.add(own["patient"], own["nodule"])
    assert patches.read(str(write(tmp_path, own, ".npz"))).card.nodules == 40


def test_invisible_characters_do_not_tell_patients_apart(tmp_path, own):
    marks = np.array(["", "\ufeff", "\u200b", "\xa0"])[np.arange(40) % 4]
    own["patient"] = np.char.add(marks, own["patient"])
    assert patches.read(str(write(tmp_path, own, ".npz"))).card.patients == 20


def test_impossible_paths_are_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source in (str(tmp_path / "loop"), "x" * 300 + ".npz", "\0.npz"):
        with pytest.raises(InputError, match=r"not a valid path \(.*; give a file|no such file"):
            patches.read(source)


def test_an_archive_that_was_packed_anew_is_read(tmp_path, own):
    path = write(tmp_path, own, ".npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "what this is")
        archive.writestr("__MACOSX/._images.npy", "x")
    assert len(patches.read(str(path))) == 40


def test_ratings_and_lengths_of_another_shape_are_refused(tmp_path, own):
    for key in ("ratings", "diameter_mm", "slice_index"):
        refused(write(tmp_path, own | {key: np.ones((40, 4))}, ".npz"), f"'{key}' has shape (40, 4)")


def test_a_folder_with_another_file_names_it(tmp_path, own):
    write(tmp_path, own, ".npz")
    refused(tmp_path, "Kaggle's files are missing (found: own.npz")


def test_names_that_are_nearly_equal_are_pointed_out(tmp_path, own):
    own["patient"] = np.array(["P7", "p7", "P07", "P10", "P100", "Q1"] + [f"R{i}" for i in range(34)])
    (note,) = patches.read(str(write(tmp_path, own, ".npz"))).card.notes
    assert note == "Column patient: 'P7' and 'p7' and 'P07' differ only in case, blanks or zeros; are they the same?"
    assert note in patches.read(str(write(tmp_path, own, ".npz"))).card.table().loc["notes", "value"]


def test_a_unit_that_is_stated_wins(tmp_path, own):
    own["images"] = own["images"].clip(-200, 200)
    refused(write(tmp_path, own, ".npz"), "lung is missing", "unit='HU'")
    for stated in (np.array("HU"), np.array([b"HU"])):
        assert patches.read(str(write(tmp_path, own | {"unit": stated}, ".npz"))).card.unit == "HU"


def test_a_csv_out_of_order_is_refused(kaggle, tmp_path):
    linked(kaggle, tmp_path, "ct_tiles.tif")
    labels = pd.read_csv(kaggle[0] / "malignancy.csv", index_col=0)
    labels.sample(frac=1, random_state=0).to_csv(tmp_path / "malignancy.csv")
    with pytest.raises(InputError, match="rows are not numbered"):
        patches.read(str(tmp_path))
    labels.rename(columns={"malignancy": "label"}).to_csv(tmp_path / "malignancy.csv")
    with pytest.raises(InputError, match="no column 'malignancy'"):
        patches.read(str(tmp_path))


def test_real_patches_pass_through_the_npz_reader(real):
    ct = patches.read(str(real("lidc_patches_dev.npz")))
    assert (ct.card.patches, ct.card.patients, ct.card.nodules, ct.card.malignant) == (4807, 579, 1243, 1743)
    assert "not HU" in ct.card.unit
    hu = patches.read(str(real("lidc_hu_dev.npz")))
    assert (hu.card.patches, hu.card.patients, hu.card.malignant, hu.card.unit) == (472, 311, 235, "HU")


def test_the_phantom_is_cached_and_says_that_it_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path))
    ct = patches.read("phantom", n_patches=80)
    assert ct.card.simulation and "simulation" in ct.card.title and ct.card.malignant == round(80 * 2526 / 6691)
    assert ct.masks.shape == ct.images.shape and ct.masks.any(axis=(1, 2)).all()
    monkeypatch.setattr("nodules.data.phantom.render", None)  # a second reading renders nothing
    assert patches.read("phantom", n_patches=80).card.sha256 == ct.card.sha256
    key = {"n_patches": 80, "seed": 0, "version": phantom.version()}
    assert cache.place("phantom", "npz", key) in tmp_path.iterdir()
    with pytest.raises(InputError, match="n_patches=0"):
        patches.read("phantom", n_patches=0)


def test_the_histogram_of_each_class_sums_to_one(tmp_path, own):
    table = patches.intensity_histogram(patches.read(str(write(tmp_path, own, ".npz"))))
    for _, part in table.groupby("class"):
        assert np.isclose(part["density"].sum() * part["value"].diff().median(), 1, atol=0.02)


INVALID_TEXT = {
    "bytes": np.full(40, b"\x80"),
    "surrogate": np.full(40, "\ud800"),
    "beyond Unicode": np.full(40, 0x110000, dtype="<u4").view("<U1"),
}


@pytest.mark.parametrize("key", ["patient", "id", "ratings", "remark"])
@pytest.mark.parametrize("wrong", INVALID_TEXT)
def test_invalid_text_is_refused(tmp_path, own, key, wrong):
    refused(
        write(tmp_path, own | {key: INVALID_TEXT[wrong]}, ".npz"), f"'{key}' contains invalid text; store it as UTF-8"
    )


@pytest.mark.parametrize("length", [1, None], ids=["fixed", "variable"])
def test_bytes_in_hdf5_that_are_not_text_are_refused(tmp_path, own, length):
    del own["patient"]
    path = write(tmp_path, own, ".h5")
    with h5py.File(path, "a") as file:
        file.create_dataset("patient", 40, h5py.string_dtype("ascii", length))[:] = np.full(40, b"\x80")
    refused(path, "can't decode byte 0x80")


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_bytes_are_read_as_utf_8(tmp_path, own, suffix):
    names = np.array([f"p{i}é" for i in range(40)])
    own["patient"] = np.char.encode(names, "utf-8")
    assert patches.read(str(write(tmp_path, own, suffix))).table["patient"].tolist() == names.tolist()
