"""Data files as people have them: read if possible, refused with the actual reason if not."""

import multiprocessing
import os

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from nodules.data import files, patches
from nodules.errors import InputError

N = 30
LABELS = (np.arange(N) % 3 == 0).astype(np.int64)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(-1000, 400, (N, 64, 64), dtype=np.int16)


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "malignancy.csv"
    pd.DataFrame({"malignancy": LABELS}).to_csv(path)
    return path


def message(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def appended(path, images):
    with tifffile.TiffWriter(path) as file:
        for image in images:
            file.write(image)


def by_pillow(compression):
    def write(path, images):
        pages = [Image.fromarray(image) for image in (images // 8 + 128).clip(0, 255).astype(np.uint8)]
        pages[0].save(path, save_all=True, append_images=pages[1:], compression=compression)

    return write


TIFFS = {
    "in one": tifffile.imwrite,
    "page by page": appended,
    "deflate": lambda path, images: tifffile.imwrite(path, images, compression="zlib"),
    "LZW": by_pillow("tiff_lzw"),
    "PackBits": by_pillow("packbits"),
    "floats": lambda path, images: tifffile.imwrite(path, images.astype(np.float32)),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_files_as_programs_write_them_are_read(tmp_path, images, csv, name):
    TIFFS[name](tmp_path / "ct_tiles.tif", images)
    stored = files.tiles(tmp_path / "ct_tiles.tif", csv)["images"]
    read = stored.read()
    expected = (images // 8 + 128).clip(0, 255) if name in ("LZW", "PackBits") else images
    assert stored.shape == read.shape == images.shape and np.array_equal(read, expected)


def test_pages_of_unlike_layout_keep_their_order(tmp_path, images, csv):
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        for i, image in enumerate(images):
            file.write(image, compression=None if i % 5 else "zlib", metadata=None, contiguous=False)
    assert np.array_equal(files.tiles(tmp_path / "t.tif", csv)["images"].read(), images)


def test_pages_that_say_white_is_zero_are_turned_one_by_one(tmp_path, csv):
    grey = np.random.default_rng(0).integers(0, 60000, (N, 64, 64), dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        for i, image in enumerate(grey):
            name, values = ("miniswhite", 65535 - image) if i % 2 else ("minisblack", image)
            file.write(values, photometric=name, metadata=None, contiguous=False)
    assert np.array_equal(files.tiles(tmp_path / "t.tif", csv)["images"].read(), grey)


def test_a_palette_is_refused(tmp_path, csv):
    colours = np.zeros((3, 256), np.uint16)
    pages = np.zeros((N, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", pages, photometric="palette", colormap=colours)
    assert "palette" in message(files.tiles, tmp_path / "t.tif", csv)


def test_a_tiff_that_says_white_is_zero_is_turned(tmp_path, csv):
    grey = np.random.default_rng(0).integers(0, 256, (N, 64, 64), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "t.tif", 255 - grey, photometric="miniswhite")
    assert np.array_equal(files.tiles(tmp_path / "t.tif", csv)["images"].read(), grey)


def test_series_that_differ_are_listed(tmp_path, images, csv):
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        file.write(images)
        file.write(np.zeros((128, 128), np.uint8))
    said = message(files.tiles, tmp_path / "t.tif", csv)
    assert "2 series ((30, 64, 64) int16, (128, 128) uint8)" in said


def test_a_codec_that_loses_is_named(tmp_path, csv):
    by_pillow("jpeg")(tmp_path / "t.tif", np.zeros((N, 64, 64), np.int16))
    assert "compressed with JPEG" in message(files.tiles, tmp_path / "t.tif", csv)


ROWS = [f"{i},{label}\n" for i, label in enumerate(LABELS)]
CSVS = {
    "plain": "index,malignancy\n" + "".join(ROWS),
    "byte order mark": "\ufeffindex,malignancy\n" + "".join(ROWS),
    "of Windows": "index,malignancy\r\n" + "".join(ROWS).replace("\n", "\r\n"),
    "semicolons": "index;malignancy\n" + "".join(ROWS).replace(",", ";"),
    "decimal commas": "index;malignancy\n" + "".join(f"{i};{label},0\n" for i, label in enumerate(LABELS)),
    "tabs": "index\tmalignancy\n" + "".join(ROWS).replace(",", "\t"),
    "saved twice": ",index,malignancy\n" + "".join(f"{i},{row}" for i, row in enumerate(ROWS)),
    "no index": "malignancy\n" + "".join(f"{label}\n" for label in LABELS),
    "words": "index,malignancy\n" + "".join(f"{i},{bool(label)}\n" for i, label in enumerate(LABELS)),
    "blanks and capitals": "Index, Malignancy \n" + "".join(ROWS),
    "sep line": "sep=;\nindex;malignancy\n" + "".join(ROWS).replace(",", ";"),
    "empty columns": "index,malignancy,,\n" + "".join(row.replace("\n", ",,\n") for row in ROWS),
    "empty rows": "index,malignancy\n" + "".join(ROWS) + ",\n,\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", CSVS)
def test_csv_files_as_spreadsheets_write_them_are_read(tmp_path, images, name, encoding):
    tifffile.imwrite(tmp_path / "t.tif", images)
    (tmp_path / "l.csv").write_bytes(CSVS[name].encode(encoding))
    assert np.array_equal(files.tiles(tmp_path / "t.tif", tmp_path / "l.csv")["malignant"].read(), LABELS)


def test_names_are_read_as_they_are_written(tmp_path):
    (tmp_path / "places.csv").write_text("nodule,note\n007,\nNA,null\n,x\n")
    table = files.spreadsheet(tmp_path / "places.csv", text=True)
    assert table["nodule"].tolist()[:2] == ["007", "NA"] and table["note"].tolist()[1:] == ["null", "x"]
    assert table.isna().sum().tolist() == [1, 1], "only what is empty is missing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index,label\n0,1\n", "no column 'malignancy' (found: 'index', 'label')"),
        ("index,malignancy\n1,0\n2,1\n", "rows are not numbered 0, 1, 2, ... (column 'index')"),
        ("malignancy,index\n0,1\n1,0\n", "rows are not numbered"),
        ("malignancy,page\n0,1\n1,2\n1,0\n", "rows are not numbered 0, 1, 2, ... (column 'page')"),
        ("index|malignancy\n0|1\n", "no column 'malignancy' (found: 'index|malignancy')"),
        ("index,malignancy,malignancy\n0,1,0\n", "several columns are called 'malignancy'"),
        ("index,fold,malignancy\n0,0,1,1\n1,1,0,0\n", "not a readable CSV"),
        ("index,malignancy\n0,benign\n", "l.csv: 'malignancy' contains 'benign'; labels must be 0 or 1"),
        ("index,malignancy\n0,1\n", "1 rows, but t.tif has 30 pages"),
        ("<!DOCTYPE html><p>log in", "contains a web page, not CSV data"),
    ],
)
def test_a_csv_that_cannot_be_taken_says_what_was_found(tmp_path, images, text, words):
    tifffile.imwrite(tmp_path / "t.tif", images)
    (tmp_path / "l.csv").write_text(text)
    assert words in message(files.tiles, tmp_path / "t.tif", tmp_path / "l.csv")


def test_text_in_another_encoding_is_named(tmp_path, images):
    tifffile.imwrite(tmp_path / "t.tif", images)
    (tmp_path / "l.csv").write_bytes("index,malignité\n".encode("latin-1"))
    assert "save it as UTF-8" in message(files.tiles, tmp_path / "t.tif", tmp_path / "l.csv")


def hold(path, opened, done):
    with h5py.File(path, "r+"):
        opened.set()
        done.wait()


def test_a_file_that_another_process_has_open_is_in_use(tmp_path, own):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"], file["malignant"] = own["images"], own["malignant"]
    spawn = multiprocessing.get_context("spawn")
    opened, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path / "own.h5", opened, done))
    other.start()
    try:
        assert opened.wait(60)
        said = message(patches.read, str(tmp_path / "own.h5"))
        assert "in use by another process" in said and "download or write" not in said
    finally:
        done.set()
        other.join()
    assert len(patches.read(str(tmp_path / "own.h5"))) == 40


def test_a_file_that_its_writer_never_closed_says_so(tmp_path):
    if (child := os.fork()) == 0:
        file = h5py.File(tmp_path / "own.h5", "w", libver="latest")
        file["images"] = np.zeros((3, 64, 64))
        file.swmr_mode = True
        os._exit(0)
    os.waitpid(child, 0)
    assert "h5clear -s" in message(patches.read, str(tmp_path / "own.h5"))


def test_a_filter_that_is_not_installed_is_named(tmp_path, own):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk(own["images"].shape)
        made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple(own["images"].shape)
        data = h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_INT16, space, made)
        data.write_direct_chunk((0, 0, 0), own["images"].tobytes(), filter_mask=0)
        file["malignant"] = own["malignant"]
    said = message(patches.read, str(tmp_path / "own.h5"))
    assert "filter 32015 (zstd)" in said and "pip install hdf5plugin" in said


def test_data_in_groups_and_in_other_files_is_listed(tmp_path, own):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["data/images"], file["data/set/malignant"] = own["images"], own["malignant"]
        file["masks"] = h5py.ExternalLink("other.h5", "masks")
    said = message(patches.read, str(tmp_path / "own.h5"))
    assert "found: data/images, data/set/malignant, masks (a link, never followed)" in said


@pytest.mark.parametrize("where", ["file", "images", "key"])
def test_hdf5_states_the_unit_by_a_key_or_an_attribute(tmp_path, own, where):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"], file["malignant"] = own["images"].clip(-200, 200), own["malignant"]
        if where == "key":
            file["unit"] = "HU"
        else:
            (file if where == "file" else file["images"]).attrs["units"] = "HU"
    assert patches.read(str(tmp_path / "own.h5")).card.unit == "HU"


def test_columns_of_text_as_matlab_writes_them_are_read(tmp_path, own):
    count = 300
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"] = np.resize(own["images"], (count, 64, 64))
        file["malignant"] = (np.arange(count) % 2)[None]
        file["patient"] = np.array([f"p{i // 3}" for i in range(count)], dtype=object)[None]
        file["kind"] = np.dtype("i4")  # a type of its own, no data
        file["images"].attrs["Units"] = np.array([b"HU"])
    card = patches.read(str(tmp_path / "own.h5")).card
    assert (card.patches, card.patients, card.unit) == (300, 100, "HU")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>log in</html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "rename it to end in .hdf5"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "numpy.savez"),
        (b"\x1f\x8b" + bytes(100), "unpack it"),
    ],
)
def test_another_file_under_the_name_says_what_it_is(tmp_path, content, words):
    (tmp_path / "own.npz").write_bytes(content)
    assert words in message(patches.read, str(tmp_path / "own.npz"))
