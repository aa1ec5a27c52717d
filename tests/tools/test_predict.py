import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from nodules import __main__, model, paths, plots
from nodules.data import patches, phantom_scan, scans
from nodules.errors import InputError
from nodules.tools import predict
from scanfiles import write_volume

COLUMNS = ["id", "patient", "nodule", "p", "p_low", "p_high", "set", "called", "remark"]


@pytest.fixture(scope="module")
def practice(tmp_path_factory):
    """A practice scan as DICOM, as MetaImage and as NIfTI, and its nodules."""
    folder = tmp_path_factory.mktemp("practice")
    made, spots = phantom_scan.scan(patches.read("phantom", 300))
    phantom_scan.write(made, folder / "dicom")
    for name in ("chest.mhd", "chest.nii.gz"):
        write_volume(folder / name, made.hu, made.spacing, made.origin)
    millimetres = made.mm(spots[["x", "y", "z"]].to_numpy(float))
    spots = spots.assign(**dict(zip(("mm x", "mm y", "mm z"), millimetres.T, strict=True)))
    return folder, spots


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "nodules", *map(str, arguments)], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def asked(source, *options, folder):
    """What ``predict`` writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nodules", "predict", *map(str, (source, *options, "-o", folder / "out.csv"))])
        assert __main__.main() == 0
    return pd.read_csv(folder / "out.csv", keep_default_na=False)


def test_the_same_place_in_any_format_and_unit_gets_the_same_answer(practice, tmp_path):
    folder, spots = practice
    spot = spots.iloc[0]
    voxel, mm = (",".join(f"{spot[name]}" for name in names) for names in (("x", "y", "z"), ("mm x", "mm y", "mm z")))
    found = [
        asked(folder / "dicom", f"--at={voxel}", "--voxel", folder=tmp_path),
        asked(folder / "dicom", f"--at={mm}", "--mm", folder=tmp_path),
        asked(folder / "chest.mhd", f"--at={mm}", "--mm", folder=tmp_path),
        asked(folder / "chest.nii.gz", f"--at={mm}", "--mm", folder=tmp_path),
    ]
    assert all(list(rows) == COLUMNS and len(rows) == 1 for rows in found)
    assert len({rows["p"][0] for rows in found}) == 1
    assert found[0]["p_low"][0] <= found[0]["p"][0] <= found[0]["p_high"][0]
    assert found[0]["set"][0] in ("benign", "malignant", "either")


def test_a_table_of_places_gets_a_row_and_a_sheet_each(practice, tmp_path):
    folder, spots = practice
    spots[["nodule", "x", "y", "z", "unit"]].to_csv(tmp_path / "places.csv", index=False)
    rows = asked(
        folder / "dicom", "--csv", tmp_path / "places.csv", "--report", tmp_path / "page.html", folder=tmp_path
    )
    assert rows["nodule"].tolist() == rows["id"].tolist() == spots["nodule"].tolist()
    places = [",".join(f"{value:g}" for value in spot) for spot in spots[["x", "y", "z"]].itertuples(index=False)]
    told = asked(folder / "dicom", f"--at={'; '.join(places)}", "--voxel", folder=tmp_path)
    assert told["nodule"].tolist() == [f"at {place}" for place in places]
    assert np.allclose(told["p"], rows["p"], atol=1e-6)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<h1>") == page.count("data:image/png") == len(spots)
    assert "Not a medical device" in page and not re.search(r'(src|href)="(?!data:)', page), "nothing from elsewhere"


def test_what_was_cut_gets_the_answers_of_the_scan_it_is_from(practice, tmp_path):
    folder, spots = practice
    series = scans.find(folder / "dicom")[0].series
    spots[["nodule", "x", "y", "z", "unit"]].assign(series=series).to_csv(folder / "dicom" / "places.csv", index=False)
    done = command("cut", folder / "dicom", "-o", tmp_path / "cut.npz")
    (folder / "dicom" / "places.csv").unlink()
    assert done.returncode == 0, done.stderr
    of_patches = asked(tmp_path / "cut.npz", folder=tmp_path)
    spots[["nodule", "x", "y", "z", "unit"]].to_csv(tmp_path / "places.csv", index=False)
    of_scan = asked(folder / "dicom", "--csv", tmp_path / "places.csv", folder=tmp_path)
    assert len(of_patches) == 5 * len(spots)
    assert np.allclose(of_patches.drop_duplicates("nodule")["p"], of_scan["p"])


REFUSED = {
    "not said where": (),
    "not three numbers": ("--at", "1,2", "--mm"),
    "is not in the scan": ("--at", "9000,2,3", "--voxel"),
    "is not in the scan; give": ("--at", "-9000,2,3", "--voxel"),
    "add --voxel or --mm": ("--at", "1,2,3"),
    "is no name of a file that ends in .html": ("--at", "1,2,3", "--voxel", "--report", "page.csv"),
    "no series ends in": ("--at", "1,2,3", "--voxel", "--series", "7.7"),
    "not the description of a model": ("--at", "200,200,30", "--voxel", "--model", "none.safetensors"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_question_that_can_not_be_answered_is_refused_in_one_line(practice, tmp_path, monkeypatch, capsys, message):
    out = tmp_path / "out.csv"
    arguments = ["predict", practice[0] / "dicom", *REFUSED[message], "-o", out]
    monkeypatch.setattr(sys, "argv", ["nodules", *map(str, arguments)])
    assert __main__.main() == 2
    written = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (line,) = [line for line in written if line.strip() and "|" not in line]  # beside the progress
    assert line.startswith("error: ") and message in line and not out.exists()


def test_a_model_for_hounsfield_units_refuses_grey_levels(tmp_path):
    taught = model.load(model.DEFAULT)
    grey = np.random.default_rng(0).integers(0, 256, (20, 64, 64), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", images=grey, unit="8-bit")
    assert len(predict.judge(taught, tmp_path / "grey.npz").answers) == 20
    taught.about["input"]["unit"] = "HU"
    with pytest.raises(InputError, match=r"grey\.npz: has grey levels, but lidc-small reads Hounsfield units; use a m"):
        predict.judge(taught, tmp_path / "grey.npz")
    np.savez(tmp_path / "hu.npz", images=6 * grey.astype(np.int16) - 1000, unit="HU")
    assert len(predict.judge(taught, tmp_path / "hu.npz").answers) == 20


def test_nothing_that_is_read_is_overwritten(practice, tmp_path, monkeypatch, capsys):
    table = tmp_path / "places.csv"
    practice[1][["nodule", "x", "y", "z", "unit"]].to_csv(table, index=False)
    before = table.read_bytes()
    volume = practice[0] / "chest.nii.gz"
    for options in (["--csv", table, "-o", table], ["--at", "1,2,3", "--voxel", "-o", volume]):
        monkeypatch.setattr(sys, "argv", ["nodules", "predict", *map(str, [volume, *options])])
        assert __main__.main() == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert table.read_bytes() == before and len(scans.find(volume)) == 1


def test_a_mistaken_table_is_named_and_not_the_scan(practice, tmp_path):
    table = tmp_path / "places.csv"
    table.write_text("x,y,z,unit\n1,2,3,voxel\n1,abc,3,voxel\n")
    with pytest.raises(InputError, match=re.escape(f"{table}: 'y' is abc in row 2")):
        predict.table(None, table)


def test_a_unit_is_said_once(tmp_path):
    table = tmp_path / "places.csv"
    table.write_text("x,y,z,unit\n1,2,3,voxel\n")
    with pytest.raises(InputError, match="has a column 'unit', and --mm is given too"):
        predict.table(None, table, "mm")


def test_decimal_commas_are_read(tmp_path):
    table = tmp_path / "places.csv"
    table.write_text("x;y;z;unit\n50,5;2;3;mm\n")
    assert predict.table(None, table)[["x", "y", "z"]].to_numpy().tolist() == [[50.5, 2, 3]]


def test_a_nodule_may_have_any_name(practice, tmp_path):
    folder, spots = practice
    spots = spots[["x", "y", "z", "unit"]].iloc[:1].assign(nodule=r"costs $5 and \frac$ <b>", malignant="?")
    spots.to_csv(tmp_path / "places.csv", index=False)
    rows = asked(
        folder / "chest.mhd", "--csv", tmp_path / "places.csv", "--report", tmp_path / "p.html", folder=tmp_path
    )
    assert rows["nodule"].tolist() == [r"costs $5 and \frac$ <b>"]
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "chest.mhd" in page and "of 1 nodule<" in page


def test_places_are_not_asked_for_in_patches(own, tmp_path):
    np.savez(tmp_path / "own.npz", images=own["images"])
    with pytest.raises(InputError, match="holds patches, not scans; leave out --at"):
        predict.judge(model.load(model.DEFAULT), tmp_path / "own.npz", predict.table("1,2,3", None, "voxel"))


def test_patches_need_no_labels(own, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", images=rng.integers(-1000, 400, (3, 64, 64), dtype=np.int16), unit="HU")
    taught = model.load(model.DEFAULT)
    judged = predict.judge(taught, tmp_path / "own.npz")
    assert len(predict.listed(judged)) == 3 and judged.unit == "HU"
    assert "patient nan" not in predict.page(taught, judged)
    with pytest.raises(InputError, match="no 'malignant' in it"):
        patches.read(str(tmp_path / "own.npz"))


def drawn(monkeypatch, judged):
    """The figures of a page's sheets, each as the names of its first three pictures and the letters in them."""
    figures, png = [], plots.png
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or png(figure))
    predict.page(model.load(model.DEFAULT), judged)
    return [
        {axis.get_title(): "".join(text.get_text() for text in axis.texts) for axis in figure.axes[:3]}
        for figure in figures
    ]


def test_planes_say_which_side_is_which_and_a_patch_alone_is_shown_once(practice, tmp_path, monkeypatch):
    folder, spots = practice
    place = ",".join(f"{spots.iloc[0][name]}" for name in ("x", "y", "z"))
    of_scan = predict.judge(model.load(model.DEFAULT), folder / "chest.mhd", predict.table(place, None, "voxel"))
    # columns run to the patient's left, rows to the back, slices to the head, which is shown at the top
    assert drawn(monkeypatch, of_scan) == [{"axial": "RA", "coronal": "RH", "sagittal": "AH"}]
    images = np.random.default_rng(0).integers(-1000, 400, (3, 64, 64), dtype=np.int16)
    np.savez(tmp_path / "a.npz", images=images, unit="HU")
    assert (
        drawn(monkeypatch, predict.judge(model.load(model.DEFAULT), tmp_path / "a.npz")) == [{"": "", "slice": ""}] * 3
    )
    np.savez(tmp_path / "b.npz", images=images, unit="HU", nodule=["a"] * 3, slice_index=[1, 2, 3])
    neighbours = predict.judge(model.load(model.DEFAULT), tmp_path / "b.npz")
    assert drawn(monkeypatch, neighbours) == [{"slice below": "", "slice": "", "slice above": ""}]


def test_names_from_outside_can_not_write_into_the_page(tmp_path):
    rng = np.random.default_rng(0)
    names = np.array(["<script>alert(1)</script>"] * 2)
    images = rng.integers(-1000, 400, (2, 64, 64), dtype=np.int16)
    np.savez(tmp_path / "own.npz", images=images, unit="HU", nodule=names)
    taught = model.load(model.DEFAULT)
    page = predict.page(taught, predict.judge(taught, tmp_path / "own.npz"))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_starting_needs_none_of_the_libraries_that_train():
    code = "import json, sys; from nodules import model; model.load(model.DEFAULT)"
    code += "; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in loaded
    assert not loaded & {"fastai", "torchvision", "timm", "captum", "matplotlib", "sklearn", "scipy.stats", "h5py"}


def test_an_answer_takes_few_forward_passes():
    """One for each network, of all views of the slices that count: on two cores less than a tenth of a second."""
    taught, passed = model.load(model.DEFAULT), []
    for member in taught.members:
        member.network.head.register_forward_hook(lambda *given: passed.append(len(given[1][0])))
    images = np.random.default_rng(0).normal(size=(5, 64, 64))
    table = pd.DataFrame({"id": list("abcde"), "nodule": "n", "slice_index": range(5)})
    taught.answers(model.part_of(images, table))
    assert passed == [8 * 3] * len(taught.members)
