"""Damaged and hostile files: whatever is in them, success with what they contain, or one line and exit code 2.

The command line reads every case in a process of its own, with limits on time and memory, so that a crash, a hang or a
bomb shows as what it is.
"""

import csv
import io
import json
import os
import resource
import signal
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from nodules import __main__, paths
from nodules.data import export, patches, scans
from nodules.errors import InputError
from nodules.networks import bodies, network
from nodules.tools import run
from scanfiles import values, write_series, write_volume

SECONDS = 120  # that a case may take before it counts as hanging
MEMORY = 1_500_000_000  # bytes that it may take beyond what the process has
WRONG = 77  # exit code of a child that read something else than the file contains
TINY = "test_resnet"  # the smallest network of timm
EXTREME = [bytes(8), b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x01" * 4, b"0" * 8]


def limit():
    """End this process when it takes too long or, on Linux, too much memory."""
    signal.alarm(SECONDS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def told(job, log):
    """Exit code of ``job`` in a forked process, negative for a signal, and what it wrote to standard error."""
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            limit()
            torch.set_num_threads(1)  # the threads of the parent do not exist here
            with log.open("w") as file:
                sys.stderr = file
                code = job()
        except BaseException as error:  # no traceback may escape the command line
            log.write_text(f"escaped: {type(error).__name__}: {error}")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def command(*arguments):
    def job():
        sys.argv = ["nodules", *map(str, arguments)]
        return __main__.main()

    return job


def check(job, log):
    """The contract: code 0, or code 2 with one line that begins with error."""
    code, text = told(job, log)
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip() and "patch" not in line[:8]]
    assert code in (0, 2), f"code {code}: {text[-500:]}"
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 600, text[-1000:]
    return code


def damaged(content, rng):
    """One of many kinds of damage done to bytes."""
    content, at = bytearray(content), int(rng.integers(len(content)))
    near = int(rng.integers(min(len(content), 600)))  # headers stand at the beginning
    kind = int(rng.integers(9))
    if kind < 3:
        for place in rng.integers(len(content) if kind else min(len(content), 600), size=rng.integers(1, 9)):
            content[place] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del content[at:]
    elif kind == 4:
        del content[at : at + int(rng.integers(1, 200))]
    elif kind == 5:
        content[at:at] = rng.bytes(int(rng.integers(1, 200)))
    elif kind in (6, 7):
        value = EXTREME[int(rng.integers(len(EXTREME)))]
        place = near if kind == 6 else len(content) - 1 - near  # zip files are read from their end
        content[place : place + len(value)] = value
    else:
        other = int(rng.integers(len(content)))
        content[at : at + 64] = content[other : other + 64]
    return bytes(content)


def columns(n=40):
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(-1000, 400, (n, 64, 64), dtype=np.int16),
        "malignant": (np.arange(n) % 5 < 2).astype(np.int64),
        "patient": np.array([f"p{i // 2:02d}" for i in range(n)]),
        "diameter_mm": rng.uniform(3, 30, n),
    }


def write_hdf5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            text = value.dtype.kind == "U"
            file.create_dataset(key, data=value.astype(object) if text else value, **({} if text else options))


def write_kaggle(folder, arrays, **options):
    tifffile.imwrite(folder / "ct_tiles.tif", arrays["images"], photometric="minisblack", **options)
    pd.DataFrame({"malignancy": arrays["malignant"].astype(float)}).to_csv(folder / "malignancy.csv")


SOURCES = {  # name: (cases, how the folder is filled, which file is damaged, what is read)
    "npz": (160, lambda f, a: np.savez(f / "own.npz", **a), "own.npz", "own.npz"),
    "npz, compressed": (160, lambda f, a: np.savez_compressed(f / "own.npz", **a), "own.npz", "own.npz"),
    "HDF5": (220, lambda f, a: write_hdf5(f / "own.h5", a), "own.h5", "own.h5"),
    "HDF5, compressed": (160, lambda f, a: write_hdf5(f / "own.h5", a, compression="gzip"), "own.h5", "own.h5"),
    "TIFF": (180, write_kaggle, "ct_tiles.tif", ""),
    "TIFF, compressed": (120, lambda f, a: write_kaggle(f, a, compression="zlib"), "ct_tiles.tif", ""),
    "CSV": (160, write_kaggle, "malignancy.csv", ""),
}


def content_of(path):
    """What the file contains according to another reader; an npz is checksummed as a whole, nothing else is."""
    if path.suffix == ".npz":
        return columns()
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {key: file[key].asstr()[()] if key == "patient" else file[key][()] for key in file}
    tiff = path / "ct_tiles.tif"
    with tifffile.TiffFile(tiff) as file:
        pages = [
            page.asarray()
            if page.compression > 1 or len(page.dataoffsets) > 1
            else np.fromfile(tiff, page.dtype.newbyteorder(file.byteorder), 64 * 64, offset=page.dataoffsets[0])
            for page in file.pages
        ]
    pages = np.stack([page.reshape(64, 64) for page in pages])
    with (path / "malignancy.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {"images": pages, "malignant": [float(row["malignancy"]) for row in rows]}


def compare(ct, split, folder):
    """Take the place of the export: is what was read what the file contains?"""
    expected = content_of(paths.resolve(damaged_source))
    for key in expected.keys() & {"images", "malignant", "patient", "diameter_mm"}:
        values = ct.images if key == "images" else ct.table[key].to_numpy() if key in ct.table else None
        if values is not None and not np.array_equal(values, np.asarray(expected[key]).reshape(values.shape)):
            os._exit(WRONG)
    return folder


damaged_source = ""


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_data_file_is_read_as_it_is_or_refused_in_one_line(tmp_path, monkeypatch, name):
    global damaged_source
    cases, write, file, source = SOURCES[name]
    arrays = columns()
    write(tmp_path, arrays)
    malignant = int(arrays["malignant"].sum())
    monkeypatch.setattr(patches, "KAGGLE_COUNTS", {"patches": 40, "malignant": malignant, "benign": 40 - malignant})
    monkeypatch.setattr(export, "to_folders", compare)
    damaged_source = str(tmp_path / source)
    options = ("export", tmp_path / "out", "--data", tmp_path / source)
    intact = (tmp_path / file).read_bytes()
    assert check(command(*options), tmp_path / "log") == 0
    codes = []
    for seed in range(cases):
        (tmp_path / file).write_bytes(damaged(intact, np.random.default_rng([seed, cases])))
        try:
            codes.append(check(command(*options), tmp_path / "log"))
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error
    assert codes.count(2) > cases / 5, "most damage is seen"


def test_a_damaged_profile_is_used_as_it_is_or_refused_in_one_line(tmp_path, monkeypatch):
    def compare_parameters(notebook, output, chosen, seconds):
        written = yaml.safe_load(path.read_text())
        if any(chosen[key] != value for key, value in written.items() if key in chosen and type(value) is not str):
            os._exit(WRONG)

    monkeypatch.setattr(run, "execute", compare_parameters)
    path, intact = tmp_path / "p.yaml", (paths.ROOT / "params" / "smoke.yaml").read_bytes()
    options = ("run", paths.NOTEBOOKS / "02_architectures.ipynb", tmp_path / "o.ipynb", "--profile", path)
    codes = []
    for seed in range(200):
        path.write_bytes(damaged(intact, np.random.default_rng([seed, 9])))
        codes.append(check(command(*options), tmp_path / "log"))
    assert 0 in codes and codes.count(2) > 40


@pytest.mark.parametrize("name", ["weights", "head"])
def test_damaged_weights_are_taken_as_they_are_or_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    intact = bodies.build(bodies.Spec(TINY, "random"), seed=3)
    head = {"3.weight": torch.ones(2, 3)}
    path = tmp_path / "weights" / f"{TINY}.safetensors"
    path.parent.mkdir()
    save_file(intact.net.state_dict() if name == "weights" else head, path)

    def job():
        try:
            if name == "weights":
                return int(not bodies.build(bodies.Spec(TINY, "imagenet")).weights.sha256)
            network.restore(bodies.Spec(TINY, "random"), "HU", path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    content = path.read_bytes()
    codes = []
    for seed in range(80):
        path.write_bytes(damaged(content, np.random.default_rng([seed, 7])))
        codes.append(check(job, tmp_path / "log"))
    assert codes.count(2) > 15


@pytest.mark.parametrize("name", ["DICOM", "MetaImage"])
def test_a_damaged_scan_is_read_or_refused_in_one_line(tmp_path, name):
    folder, hu = tmp_path / "scan", values()
    files = write_series(folder, hu) if name == "DICOM" else [write_volume(folder / "a.mhd", hu), folder / "a.raw"]

    def job():
        try:
            for found in scans.find(folder):
                scans.read(found)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    assert check(job, tmp_path / "log") == 0
    codes = []
    for seed in range(150):
        rng = np.random.default_rng([seed, 5])
        file = files[rng.integers(len(files))]
        intact = file.read_bytes()
        file.write_bytes(damaged(intact, rng))
        codes.append(check(job, tmp_path / "log"))
        file.write_bytes(intact)
    assert 0 in codes and codes.count(2) > 30


def npy(header, version=1, data=b""):
    """An npy file with a header of one's own."""
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def header(descr, shape):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


def claims_much(folder):
    arrays = {"malignant": np.arange(200_000) % 2}
    content = {key: io.BytesIO() for key in arrays}
    for key, value in arrays.items():
        np.save(content[key], value)
    zeros = npy(header("<f8", (200_000, 64, 64)), data=bytes(10_000_000))
    return zipped(folder / "a.npz", images=zeros, malignant=content["malignant"].getvalue())


def unfolds(folder):
    return zipped(folder / "a.npz", images=npy(header("<f8", (200_000, 64, 64)), data=bytes(100_000_000)))


def long_header(folder):
    return zipped(folder / "a.npz", images=npy(b" " * 300_000_000, version=2))


def nested_header(folder):
    return zipped(folder / "a.npz", images=npy(b"(" * 9000 + b"\n"))


def wide_names(folder):
    images = io.BytesIO()
    np.save(images, columns()["images"])
    labels = io.BytesIO()
    np.save(labels, columns()["malignant"])
    name = npy(header("<U200000000", (40,)), data=bytes(1000))
    return zipped(folder / "a.npz", images=images.getvalue(), malignant=labels.getvalue(), patient=name)


def fills(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("images", (200_000, 64, 64), np.float64, chunks=(1, 64, 64), fillvalue=7.0)
        file["malignant"] = np.arange(200_000) % 2
    return folder / "a.h5"


def one_long_name(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file["images"], file["malignant"] = columns()["images"], columns()["malignant"]
        file["patient"] = np.array(["x" * 50_000_000] * 2 + ["y"] * 38, dtype=object)
    return folder / "a.h5"


def elsewhere(folder, kind):
    """Images that lie in another file: by a link, by raw bytes, by a virtual data set."""
    write_hdf5(folder / "secret.h5", columns())
    with h5py.File(folder / "a.h5", "w") as file:
        file["malignant"] = columns()["malignant"]
        if kind == "link":
            file["images"] = h5py.ExternalLink(str(folder / "secret.h5"), "images")
        elif kind == "soft link":
            file["images"] = h5py.SoftLink("/nowhere")
        elif kind == "raw":
            raw = [(str(folder / "secret.h5"), 0, 40 * 4096 * 2)]
            file.create_dataset("images", (40, 64, 64), np.int16, external=raw)
        else:
            layout = h5py.VirtualLayout((40, 64, 64), np.int16)
            layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "images", (40, 64, 64))
            file.create_virtual_dataset("images", layout)
    return folder / "a.h5"


def huge_tiff(folder):
    write_kaggle(folder, columns())
    content = (folder / "ct_tiles.tif").read_bytes()
    with tifffile.TiffFile(folder / "ct_tiles.tif") as file:
        tag = file.pages[0].tags["ImageWidth"]
        at, size = tag.valueoffset, 2 if tag.dtype == 3 else 4
    (folder / "ct_tiles.tif").write_bytes(content[:at] + b"\xff" * size + content[at + size :])
    return folder


def huge_csv(folder):
    write_kaggle(folder, columns())
    (folder / "malignancy.csv").write_text(",malignancy\n" + "1,0\n" * 4_000_000)
    return folder


def leads_out(folder):
    return zipped(folder / "a.npz", **{"../../images": npy(header("<i2", (0, 64, 64))), "malignant": npy(b"")})


HOSTILE = [claims_much, unfolds, long_header, nested_header, wide_names, fills, one_long_name, huge_tiff, huge_csv]
HOSTILE += [leads_out]
HOSTILE += [lambda folder, kind=kind: elsewhere(folder, kind) for kind in ("link", "soft link", "raw", "virtual")]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: (make.__defaults__ or [make.__name__])[0])
def test_bombs_and_files_that_lead_elsewhere_are_refused(tmp_path, make):
    inside = tmp_path / "in"
    inside.mkdir()
    path = make(inside)
    before = sorted(tmp_path.rglob("*"))
    assert check(command("export", tmp_path / "out", "--data", path), tmp_path / "log") == 2
    assert sorted(set(tmp_path.rglob("*")) - {tmp_path / "log"}) == before, "nothing was written anywhere"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "epochs: " + "[" * 20_000,
        "epochs: " + "9" * 6000,
        "epochs: " + "9" * 600,
        "seed: .inf",
        "compare_lr: .nan",
        "compare_lr: 1e999",
        "? {a: b}\n: c",
        "seed: 2001-01-01",
        "seed: !!binary aGVsbG8=",
        "seed: !!python/object/apply:os.system ['touch sprung']",
        "data: !!python/name:os.system",
        'data: "a\\nimport os"',
        "x" * 200_000,
        "\x00",
        "seed: 0\nseed",
    ],
    ids=range(16),
)
def test_a_hostile_profile_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    options = ("run", paths.NOTEBOOKS / "02_architectures.ipynb", tmp_path / "o.ipynb")
    assert check(command(*options, "--profile", tmp_path / "p.yaml"), tmp_path / "log") == 2
    assert not (tmp_path / "o.ipynb").exists() and not Path("sprung").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.dictionaries(
        st.sampled_from(["images", "malignant", "patient", "id", "masks", "diameter_mm", "ratings", "remark"]),
        st.one_of(
            hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, max_side=5)),
            hnp.arrays(st.sampled_from(["i2", "f4", "u1", "?", "U3", "S3"]), st.sampled_from([4, (4, 1)])),
        ),
    ),
    valid=st.sets(st.sampled_from(["images", "malignant", "patient"])),
)
def test_whatever_arrays_a_file_holds_it_is_read_or_refused(tmp_path, arrays, valid):
    good = columns(4) | {"malignant": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "own.npz", **(arrays | {key: good[key] for key in valid}))
    try:
        ct = patches.read(str(tmp_path / "own.npz"))
    except InputError as error:
        assert "\n" not in str(error) and "own.npz" in str(error)
    else:
        assert len(ct) == len(ct.table) and set(ct.table["malignant"]) == {0, 1}
        assert ct.table["id"].is_unique and json.dumps(ct.card.sha256)
