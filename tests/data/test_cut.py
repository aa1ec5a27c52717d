import json
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nodules.data import cut, lidc, patches, phantom_scan, scans
from nodules.data.scans import AIR
from nodules.errors import InputError
from scanfiles import values, write_series, write_volume

SPACING, ORIGIN = (0.7, 0.7, 2.0), (-100.0, -80.0, 30.0)


@pytest.fixture(scope="module")
def phantom():
    return patches.read("phantom", 300)


@pytest.fixture(scope="module")
def stack(phantom):
    """The slices of the phantom nodule that has most of them."""
    table = phantom.table
    rows = table.index[table["nodule"] == table["nodule"].value_counts().index[0]]
    return phantom.images[rows[np.argsort(table["slice_index"][rows])]]


@pytest.fixture(scope="module")
def chest(stack):
    """A scan (slices, 90, 100) with the phantom's slices in the middle; their corner is at row 20, column 30."""
    hu = np.random.default_rng(0).integers(-900, -800, (len(stack) + 6, 90, 100)).astype(np.int16)
    hu[3 : 3 + len(stack), 20:84, 30:94] = stack
    return hu


def write_table(folder, **columns):
    pd.DataFrame(columns).to_csv(folder / "nodules.csv", index=False)
    return folder


def middle(stack):
    """The voxel in the middle of the phantom's slices."""
    return np.array([30 + 31.5, 20 + 31.5, 3 + len(stack) // 2])


WRITERS = {
    "DICOM": lambda folder, hu: write_series(folder / "a", hu, SPACING, ORIGIN, series="1.2.3"),
    "MetaImage": lambda folder, hu: write_volume(folder / "1.2.3.mhd", hu, SPACING, ORIGIN),
    "NIfTI": lambda folder, hu: write_volume(folder / "1.2.3.nii.gz", hu, SPACING, ORIGIN),
    "flipped MetaImage": lambda folder, hu: write_volume(
        folder / "1.2.3.mha",
        hu[:, ::-1, ::-1],
        SPACING,
        np.array(ORIGIN) + np.array([hu.shape[2] - 1, hu.shape[1] - 1, 0]) * SPACING,
        np.diag([-1, -1, 1]),
    ),
}


@pytest.mark.parametrize("unit", cut.UNITS)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_phantom_written_as_a_scan_comes_back_as_the_same_patches(tmp_path, chest, stack, write, unit):
    write(tmp_path, chest)
    voxel = middle(stack)
    place = voxel if unit == "voxel" else np.array(ORIGIN) + voxel * SPACING
    x, y, z = place
    write_table(tmp_path, series=["1.2.3"], x=[x], y=[y], z=[z], unit=[unit], malignant=[1], patient=["p1"])
    told = cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert told == ["5 patches of 1 nodules, 1 scans."]
    with np.load(tmp_path / "out.npz") as made:
        at = int(voxel[2]) - 3
        expected = stack[max(0, at - 2) : at + 3]
        first = max(0, 2 - at)
        assert np.array_equal(made["images"][first : first + len(expected)], expected)
        assert made["slice_index"].tolist() == list(range(at + 1, at + 6)) and set(made["malignant"]) == {1}
        assert np.allclose(made["pixel_spacing_mm"], 0.7) and np.allclose(made["slice_spacing_mm"], 2)
        assert made["unit"] == "HU" and "masks" not in made and made["patient"][0] == "p1"


def test_beyond_the_scan_there_is_air(chest):
    assert (cut.window(chest[0], np.array([0, 0, 0]))[:31] == AIR).all()
    corner = cut.window(chest[0], np.array([99, 89, 0]))
    assert (corner[-30:] == AIR).all() and (corner[:30, :30] == chest[0, 57:87, 67:97]).all()
    assert (cut.window(chest[0], np.array([500, 500, 0])) == AIR).all()


def test_planes_pass_through_the_place_with_the_head_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cut, "HALF_MM", 8)
    hu = values(12, 40, 50)
    scan = scans.read(scans.find(write_volume(tmp_path / "a.mha", hu, (1, 1, 2), (0, 0, 0)))[0])
    (axial, coronal, sagittal), sides = cut.planes(scan, np.array([20, 15, 6]))
    assert np.array_equal(axial, hu[6, 7:24, 12:29]) and sides[0] == [17, 17]
    assert np.array_equal(coronal, hu[2:11, 15, 12:29][::-1]) and sides[1] == [17, 18]
    assert np.array_equal(sagittal, hu[2:11, 7:24, 20][::-1])
    assert (cut.planes(scan, np.array([0, 0, 0]))[0][0][:8] == AIR).all()


TWICE = {"series": ["1.2.3"] * 2, "unit": ["mm"] * 2} | {name: [1, 1] for name in "xyz"}
REFUSED = {
    "no column 'series'": {"series": None, "series uid": ["1.2.3"]},
    "is not in the scan": {"x": [500]},
    "write a number": {"x": ["left"]},
    "a column 'unit' that holds mm or voxel": {"unit": ["cm"]},
    "write 0 or 1": {"malignant": [2]},
    "0 scans here are of the series '9.9'": {"series": ["9.9"]},
    "'nodule' is empty in row 2": {
        n: [v] * 2 for n, v in {"x": 1, "y": 1, "z": 1, "series": "1.2.3", "unit": "mm"}.items()
    }
    | {"nodule": ["a", None]},
    "'a' occurs twice": {n: [v] * 2 for n, v in {"x": 1, "y": 1, "z": 1, "series": "1.2.3", "unit": "mm"}.items()}
    | {"nodule": ["a", "a"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_table_that_is_wrong_is_refused_in_one_line(tmp_path, chest, message):
    WRITERS["DICOM"](tmp_path, chest)
    right = {"series": ["1.2.3"], "x": [50], "y": [40], "z": [5], "unit": ["voxel"]}
    write_table(tmp_path, **{name: values for name, values in (right | REFUSED[message]).items() if values})
    with pytest.raises(InputError, match=message) as refusal:
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out.npz").exists()


def test_scans_whose_nodules_have_no_label_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cut, "jobs", lambda folder: ([], "lidc", []))
    with pytest.raises(InputError, match="no nodule with a label in its scans"):
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts")


def test_scans_without_a_table_that_are_not_of_lidc_are_refused(tmp_path, chest):
    with pytest.raises(InputError, match="no scan in it"):
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts")
    WRITERS["DICOM"](tmp_path, chest)
    with pytest.raises(InputError, match="none of its 1 scans is of LIDC-IDRI; add a table"):
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts")


def test_a_scan_that_was_refused_is_named_and_alone_read_again(tmp_path, chest, monkeypatch):
    for name in ("1.2.3", "1.2.4", "1.2.5"):
        write_series(tmp_path / name, chest, SPACING, ORIGIN, series=name)
    right = {"x": [50] * 3, "y": [40] * 3, "z": [5] * 3, "unit": ["voxel"] * 3, "malignant": [0, 1, 1]}
    write_table(tmp_path, series=["1.2.3", "1.2.4", "1.2.5"], **right)
    damaged = sorted((tmp_path / "1.2.5").iterdir())[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    told = cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert told[0].startswith("10 patches") and told[1].startswith("1 scans are left out, with 1 places, such as ")
    assert damaged.name in told[1]
    damaged.write_bytes(content)
    read, plain = [], scans.read
    monkeypatch.setattr(scans, "read", lambda found: read.append(found.series) or plain(found))
    cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert read == ["1.2.5"] and not (tmp_path / "parts").exists()
    held = patches.read(str(tmp_path / "out.npz"))
    assert len(held) == 15 and held.card.nodules == 3 and held.card.patients == 1


def test_two_workers_write_what_one_writes(tmp_path, chest):
    for name in ("1.2.3", "1.2.4"):
        write_series(tmp_path / name, chest, SPACING, ORIGIN, series=name)
    write_table(tmp_path, series=["1.2.3", "1.2.4"], x=[50, 51], y=[40, 40], z=[5, 5], unit=["voxel"] * 2)
    made = []
    for workers in (1, 2):
        cut.dataset(tmp_path, tmp_path / f"{workers}.npz", tmp_path / "parts", workers)
        with np.load(tmp_path / f"{workers}.npz") as arrays:
            made.append({name: arrays[name] for name in arrays})
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_pseudonyms_hide_ids_and_depend_on_the_key(tmp_path, chest):
    WRITERS["DICOM"](tmp_path, chest)
    write_table(
        tmp_path,
        series=["1.2.3"],
        x=[50],
        y=[40],
        z=[5],
        unit=["voxel"],
        patient=["Doe"],
        nodule=["Doe_1"],
        name=["Doe"],
    )
    ids = []
    for key in (b"k" * 16, b"k" * 16, b"l" * 16):
        (tmp_path / "key").write_bytes(key)
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", pseudonym=tmp_path / "key")
        with np.load(tmp_path / "out.npz") as made:
            text = " ".join(str(made[name]) for name in made)
        assert "Doe" not in text and "1.2.3" not in text
        ids.append(text)
    assert ids[0] == ids[1] != ids[2]
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(InputError, match="too few for a key"):
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", pseudonym=tmp_path / "key")


def test_what_has_been_cut_so_far_has_pseudonyms_too(tmp_path, chest):
    WRITERS["DICOM"](tmp_path, chest)
    (tmp_path / "broken.mha").write_bytes(b"ObjectType = Image")
    places = {"series": ["1.2.3", "broken"], "x": [50, 50], "y": [40, 40], "z": [5, 5], "unit": ["voxel"] * 2}
    write_table(tmp_path, **places, patient=["Doe", "Roe"], nodule=["Doe_1", "Roe_1"])
    (tmp_path / "key").write_bytes(b"k" * 16)
    told = cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", pseudonym=tmp_path / "key")
    assert "1 scans are left out, with 1 places." in told, "and it is not named"
    (part,) = (tmp_path / "parts").iterdir()
    with np.load(part) as made:
        assert "Doe" not in str(made["table"]) and "1.2.3" not in str(made["table"])


def test_pixels_that_are_not_square_are_refused(tmp_path):
    write_volume(tmp_path / "wide.mha", np.full((9, 80, 80), -850, np.int16), (0.6, 0.9, 1.0), (0.0, 0.0, 0.0))
    write_table(tmp_path, series=["wide"], x=[40], y=[40], z=[4], unit=["voxel"])
    with pytest.raises(InputError, match=re.escape("wide: its pixels are 0.6 x 0.9 mm; resample it to square ones")):
        cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts")


@pytest.fixture(scope="module")
def annotated():
    """A nodule of LIDC-IDRI with its scan: series, study, patient and the positions of its slices."""
    rated = cut._rated()
    return rated[(rated["radiologists"] == 4) & (rated["nodule"].str.endswith("_n0"))].iloc[0]


def lidc_scan(annotated):
    """A scan (slices, 512, 512) that holds the nodule, bright where at least one radiologist drew; spacing, origin."""
    heights = sorted(lidc.drawn(annotated["nodule"]))
    step = float(np.min(np.diff(heights)))
    count = 4 + round((heights[-1] - heights[0]) / step) + 1
    hu = np.full((count, 512, 512), -850, dtype=np.int16)
    hu[:, int(annotated["y"]), int(annotated["x"])] = 700
    mm = float(lidc.annotations().set_index("nodule").loc[annotated["nodule"], "pixel_spacing_mm"].iloc[0])
    return hu, (mm, mm, step), (-170.0, -160.0, heights[0] - 2 * step)


def test_a_nodule_of_lidc_is_cut_where_the_radiologists_drew(tmp_path, annotated):
    hu, spacing, origin = lidc_scan(annotated)

    def of_study(dataset, _):
        dataset.StudyInstanceUID, dataset.PatientID = annotated["study"], annotated["patient"]

    write_series(tmp_path / "x", hu, spacing, origin, series=annotated["series"], change=of_study)
    told = cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert "882 of 883 annotated scans are not here, such as LIDC-IDRI-0" in told[-1]
    held = patches.read(str(tmp_path / "out.npz"), labelled=False)
    of_nodule = held.table["nodule"] == annotated["nodule"]
    images, masks = held.images[of_nodule], held.masks[of_nodule]
    assert held.card.title == "LIDC-IDRI" and len(images) == len(hu) - 4
    rows, columns = np.nonzero(images[len(images) // 2] == 700)
    assert abs(rows[0] - 31.5) <= 1 and abs(columns[0] - 31.5) <= 1, "the middle of the outlines is in the middle"
    mm = float(held.table["pixel_spacing_mm"][0])
    widest = max(np.ptp(np.nonzero(mask)[1]) + 1 for mask in masks if mask.any()) * mm
    assert 0.6 * annotated["diameter_mm"] < widest < 1.2 * annotated["diameter_mm"]

    def other(dataset, _):
        dataset.StudyInstanceUID, dataset.PatientID = "1.2.3", annotated["patient"]

    write_series(tmp_path / "y" / "z", hu, spacing, origin, series=annotated["series"], change=other)
    with pytest.raises(InputError, match="none of its 1 scans is of LIDC-IDRI"):
        cut.dataset(tmp_path / "y", tmp_path / "out.npz", tmp_path / "parts", 1)


@pytest.mark.parametrize("flipped", [False, True])
def test_luna16_is_joined_with_the_ratings_of_lidc(tmp_path, annotated, flipped):
    hu, spacing, origin = lidc_scan(annotated)
    x, y = np.array(origin[:2]) + annotated[["x", "y"]].to_numpy(float) * spacing[:2]
    if flipped:  # a patient on the belly: the array is as LIDC-IDRI has it, its axes point the other way
        x, y = -x, -y
        turned = np.array([-origin[0], -origin[1], origin[2]])
        write_volume(tmp_path / f"{annotated['series']}.mhd", hu, spacing, turned, np.diag([-1, -1, 1]))
    else:
        write_volume(tmp_path / f"{annotated['series']}.mhd", hu, spacing, origin)
    listed = pd.DataFrame(
        {
            "seriesuid": annotated["series"],
            "coordX": [x, x + 90],
            "coordY": y,
            "coordZ": annotated["z"],
            "diameter_mm": [9.0, 5.0],
        }
    )
    listed.to_csv(tmp_path / "annotations.csv", index=False)
    told = cut.dataset(tmp_path, tmp_path / "out.npz", tmp_path / "parts", 1)
    assert told[1] == "1 of 2 places are not a nodule with a label."
    held = patches.read(str(tmp_path / "out.npz"), labelled=False)
    assert held.card.title == "LUNA16" and set(held.table["nodule"]) == {annotated["nodule"]}
    assert (held.images[len(held) // 2][31:33, 31:33] == 700).any(), "in the middle"

    listed.assign(coordX=x + 90).to_csv(tmp_path / "annotations.csv", index=False)
    with pytest.raises(InputError, match="no nodule with a label in its scans"):
        cut.dataset(tmp_path, tmp_path / "none.npz", tmp_path / "parts", 1)
    assert not (tmp_path / "none.npz").exists() and not (tmp_path / "parts").exists()


def test_masks_of_real_nodules_are_those_known_before(real):
    with np.load(real("lidc_stacks_dev.npz")) as known:
        names, masks, index = known["nodule"], known["masks"], known["slice_index"]
    overlaps, scan = [], SimpleNamespace(hu=np.empty((1, 512, 512), np.int8), turned=(False, False))
    for nodule in lidc.nodules()["nodule"][:40]:
        rows = np.flatnonzero(names == nodule)
        levels = lidc.drawn(nodule)
        if len(rows) != len(levels):
            continue
        points = np.concatenate([p for drawings in levels.values() for drawing in drawings for _, p in drawing])
        centre, readers = (points.min(0) + points.max(0)) / 2, max(map(len, levels.values()))
        for row, z in zip(rows[np.argsort(index[rows])], sorted(levels), strict=True):
            mine = cut._outline(scan, levels[z], centre, readers)
            if mine.sum() > 20 and masks[row].sum() > 20:
                overlaps.append(best_overlap(mine, masks[row]))
    assert len(overlaps) > 20 and np.median(overlaps) == 1


def best_overlap(one, other):
    """Intersection over union, at the best shift of a few pixels: patches are not centred alike."""
    shifts = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)]
    moved = (np.roll(one, shift, (0, 1)) for shift in shifts)
    return max((m & other).sum() / (m | other).sum() for m in moved)


def test_a_folder_of_scans_is_a_source_of_patches(tmp_path, chest, monkeypatch):
    monkeypatch.setenv("NODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "scans"
    write_series(folder / "a", chest, SPACING, ORIGIN, series="1.2.3")
    write_series(folder / "b", chest, SPACING, ORIGIN, series="1.2.4")
    spots = {"series": ["1.2.3", "1.2.4"], "x": [50, 51], "y": [40, 40], "z": [5, 5], "unit": ["voxel"] * 2}
    write_table(folder, malignant=[0, 1], **spots)
    held = patches.read(str(folder))
    assert len(held) == 10 and held.card.title == "scans" and held.card.unit == "HU" and not held.card.simulation
    assert held.card.notes[0] == "10 patches of 2 nodules, 2 scans."
    with pytest.raises(InputError, match="no column 'malignant'"):
        write_table(folder, **spots)
        patches.read(str(folder))
    write_table(folder, malignant=[0, 1], **spots)
    assert patches.read(str(folder)).card == held.card


def test_the_practice_scan_shows_the_phantoms_own_patches(tmp_path, phantom):
    scan, spots = phantom_scan.scan(phantom)
    phantom_scan.write(scan, tmp_path)
    again = scans.only(tmp_path)
    assert np.array_equal(again.hu, scan.hu) and again.spacing == scan.spacing
    assert np.allclose(again.origin, scan.origin) and np.array_equal(again.direction, np.eye(3))
    assert min(path.name for path in tmp_path.iterdir()) == "0000.dcm" and again.patient == scan.patient
    core = slice(8, -8)
    for spot in spots.to_dict("records"):
        rows = phantom.table[phantom.table["nodule"] == spot["nodule"]].sort_values("slice_index").index
        shown = phantom.table.loc[rows[(len(rows) - 1) // 2]]
        corner = cut.voxel_of(scan, spot) - [shown["offset_x_px"], shown["offset_y_px"], 0]
        seen = cut.window(scan.hu[int(spot["z"])], corner)
        assert np.array_equal(seen[core, core], phantom.images[shown.name][core, core])
    same, _ = phantom_scan.scan(phantom)
    assert np.array_equal(same.hu, scan.hu)


def test_patches_are_joined_without_holding_them_all(tmp_path):
    parts, n = [], 5
    for k in range(3):
        path = tmp_path / f"{k}.npz"
        table = pd.DataFrame({"id": [f"{k}_{i}" for i in range(n)], "p": np.arange(n) / 3})
        np.savez(
            path, images=np.full((n, 64, 64), k, np.int16), table=np.array(table.to_json(orient="table", index=False))
        )
        parts.append(path)
    table = pd.concat([cut._table(part) for part in parts], ignore_index=True)
    cut._write(tmp_path / "out.npz", parts, table, "luna16")
    with np.load(tmp_path / "out.npz") as made:
        assert np.array_equal(made["images"][:, 0, 0], np.repeat([0, 1, 2], n)) and made["source"] == "luna16"
        assert np.array_equal(made["p"], table["p"]) and json.dumps(made["id"].tolist())
    assert zipfile.ZipFile(tmp_path / "out.npz").testzip() is None
