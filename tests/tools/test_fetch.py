"""Downloads, from stand-ins on this machine.

kagglehub and idc-index are no part of the environment. Where they are missing, the tests with the real packages are
skipped; those with stand-ins run everywhere.
"""

import inspect
import io
import json
import os
import re
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import pandas as pd
import pytest

from nodules.data import patches
from nodules.errors import InputError
from nodules.tools import fetch

COUNTS = {"patches": 40, "malignant": 20, "benign": 20}
CHUNK = 1 << 20  # bytes that kagglehub writes at a time
TOKENS = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")


class Kaggle(BaseHTTPRequestHandler):
    """Answers as Kaggle does to kagglehub; ``server`` has the archive, the token, and how many bytes to send first."""

    def do_POST(self):
        service = self.path.rsplit("/", 1)[-1]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(service)
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, b"{}", "application/json")
        elif service == "GetDataset":
            self.answer(200, json.dumps(self.server.described).encode(), "application/json")
        else:
            self.do_GET()

    def do_GET(self):
        begin = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        self.server.begins.append(begin)
        self.answer(206 if begin else 200, self.server.archive[begin:], "application/zip")

    def answer(self, code, body, kind):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: self.server.cut or None] if kind == "application/zip" else body)

    def log_message(self, *_):
        pass


def archive(own, n=COUNTS["patches"]):
    buffer, held = io.BytesIO(), io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["ct_slices"], file["slice_class"] = own["images"][:n], own["malignant"][:n, None]
    with zipfile.ZipFile(held, "w") as file:
        file.writestr("all_patches.hdf5", buffer.getvalue())
        file.writestr("malignancy.csv", ",malignancy\n")
        file.writestr("other.png", bytes(3 * CHUNK))  # not wanted
    return held.getvalue()


@pytest.fixture
def host(own, monkeypatch):
    """A server in Kaggle's place, with a set of 40 patches, and no token in the environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    held = archive(own)
    described = {"currentVersionNumber": 4, "totalBytes": len(held), "licenseName": "CC BY 3.0"}
    for name, value in {"archive": held, "described": described, "token": "", "cut": 0}.items():
        setattr(server, name, value)
    server.asked, server.begins = [], []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(patches, "KAGGLE_COUNTS", COUNTS)
    monkeypatch.setattr(fetch, "KAGGLE_COUNTS", COUNTS)
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLEHUB_CACHE", "")  # which the code sets: put back afterwards
    yield server
    server.shutdown()
    server.server_close()


class Refused(OSError):
    response = SimpleNamespace(status_code=401)


def stand_in(host, monkeypatch, tmp_path):
    """What is used of kagglehub, without HTTP."""

    def asking(service):
        host.asked.append(service)
        if host.token:
            raise Refused

    class Client:
        def __enter__(self):
            service = SimpleNamespace(get_dataset=self.get_dataset)
            return SimpleNamespace(datasets=SimpleNamespace(dataset_api_client=service))

        def __exit__(self, *_):
            pass

        def get_dataset(self, request):
            asking("GetDataset")
            assert (request.owner_slug, request.dataset_slug) == ("kmader", "lungnodemalignancy")
            return SimpleNamespace(total_bytes=host.described["totalBytes"], license_name=host.described["licenseName"])

    def dataset_download(handle):
        asking("DownloadDataset")
        folder = Path(os.environ["KAGGLEHUB_CACHE"], handle)
        zipfile.ZipFile(io.BytesIO(host.archive)).extractall(folder)
        return str(folder)

    modules = {
        "kagglehub": {"dataset_download": dataset_download},
        "kagglehub.clients": {"build_kaggle_client": Client},
        "kagglehub.config": {"get_kaggle_credentials": lambda: None},
        "kagglesdk.datasets.types.dataset_api_service": {"ApiGetDatasetRequest": SimpleNamespace},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def real(host, monkeypatch, tmp_path):
    """kagglehub itself, talking to the server of the test."""
    environment = pytest.importorskip("kagglesdk.kaggle_env")
    pytest.importorskip("kagglehub")
    address = f"http://127.0.0.1:{host.server_port}"
    monkeypatch.setitem(environment._env_to_endpoint, environment.KaggleEnv.PROD, address)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token might be
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))


@pytest.fixture(params=[stand_in, real], ids=["stand-in", "kagglehub"])
def hub(request, host, monkeypatch, tmp_path):
    """The host, with kagglehub or its stand-in talking to it."""
    request.param(host, monkeypatch, tmp_path)
    return host


def test_kaggles_set_arrives_once_after_its_size_and_licence_were_told(hub, tmp_path, capsys):
    folder = tmp_path / "data"
    assert fetch.kaggle(folder) == folder
    told = capsys.readouterr().out
    assert re.search(r"Kaggle kmader/lungnodemalignancy: \d+ MB, licence .*LUNA16.*; Kaggle says CC BY 3.0", told)
    assert sorted(path.name for path in folder.iterdir()) == ["all_patches.hdf5", "malignancy.csv"]
    assert patches.read(str(folder)).card.name == "kaggle"
    asked = len(hub.asked)
    fetch.kaggle(folder)
    assert len(hub.asked) == asked and "here already" in capsys.readouterr().out


def test_a_set_of_another_size_is_refused_and_not_kept(hub, own, tmp_path):
    hub.archive = archive(own, 30)
    with pytest.raises(InputError, match="30 patches arrived, not 40; run it again"):
        fetch.kaggle(tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_token_is_asked_for_when_kaggle_refuses(hub, tmp_path):
    hub.token = "secret"
    with pytest.raises(InputError, match="refuses access without a token; set KAGGLE_API_TOKEN"):
        fetch.kaggle(tmp_path / "data")


def test_too_little_space_is_told_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(hub.archive)))
    with pytest.raises(InputError, match=r"0.0 GB free, 0.0 GB needed; free up space"):
        fetch.kaggle(tmp_path / "data")
    assert "DownloadDataset" not in hub.asked


def test_the_users_token_is_used_and_a_wrong_one_named(host, tmp_path, monkeypatch):
    real(host, monkeypatch, tmp_path)
    host.token = "secret"
    monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong")
    with pytest.raises(InputError, match="refuses your token"):
        fetch.kaggle(tmp_path / "data")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    fetch.kaggle(tmp_path / "data")


def test_a_download_that_broke_off_is_resumed(host, tmp_path, monkeypatch):
    real(host, monkeypatch, tmp_path)
    host.cut = CHUNK * 3 // 2
    with pytest.raises(InputError, match=r"download failed .*run it again"):
        fetch.kaggle(tmp_path / "data")
    host.cut = 0
    fetch.kaggle(tmp_path / "data")
    assert host.begins[-1] == CHUNK


def test_a_host_that_cannot_be_reached_is_one_line(host, tmp_path, monkeypatch):
    real(host, monkeypatch, tmp_path)
    host.shutdown()
    host.server_close()
    with pytest.raises(InputError, match=r"download failed .*; check the connection") as caught:
        fetch.kaggle(tmp_path / "data")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "do"), [("kagglehub", fetch.kaggle), ("idc_index", lambda folder: fetch.lidc(folder, "1"))]
)
def test_a_missing_package_is_one_line(name, do, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"not installed; add the packages of requirements-data.txt"):
        do(tmp_path)


class Client:
    """What is used of idc_index.IDCClient; ``Client.lost`` files of each scan never arrive."""

    lost = 0

    def __init__(self):
        scans = fetch._scans("4")
        self.index = pd.DataFrame(
            {"SeriesInstanceUID": scans["series"], "instanceCount": range(3, 3 + len(scans)), "series_size_MB": 100.0}
        )
        self.index["instanceCount"] = self.index["instanceCount"].astype("Int64")
        self.scans, self.fetched = scans.set_index("series"), []
        Client.last = self

    def download_from_selection(
        self, downloadDir, seriesInstanceUID=None, show_progress_bar=True, use_s5cmd_sync=False, dirTemplate=""
    ):
        assert use_s5cmd_sync and not show_progress_bar
        counts = self.index.set_index("SeriesInstanceUID")["instanceCount"]
        for series in seriesInstanceUID:
            self.fetched.append(series)
            place = dirTemplate.replace("%PatientID", self.scans["patient"][series])
            place = place.replace("%StudyInstanceUID", self.scans["study"][series])
            place = Path(downloadDir, place.replace("%SeriesInstanceUID", series))
            place.mkdir(parents=True, exist_ok=True)
            for number in range(counts[series] - self.lost):
                (place / f"{number}.dcm").touch()
            (place / "0.dcm123").touch()  # as a killed s5cmd leaves it


@pytest.fixture
def commons(monkeypatch, tmp_path):
    """The Imaging Data Commons, with the scans of four patients; a file stands for its bucket."""
    module = ModuleType("idc_index")
    module.IDCClient = Client
    monkeypatch.setitem(sys.modules, "idc_index", module)
    monkeypatch.setattr(Client, "lost", 0)
    monkeypatch.setattr(fetch, "BUCKET", (tmp_path / "bucket").as_uri())
    (tmp_path / "bucket").touch()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_scans_of_the_first_patients_arrive_and_only_missing_files_are_fetched_again(commons, tmp_path, capsys):
    folder = tmp_path / "scans"
    assert fetch.lidc(folder, "4") == folder
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("LIDC-IDRI: 4 of 4 scans, 0.4 GB, licence CC BY 3.0") and len(told) == 5
    first = Client.last.scans.iloc[0]
    series = Client.last.scans.index[0]
    assert first["patient"] == "LIDC-IDRI-0001" and len(files(folder)) == 3 + 4 + 5 + 6
    place = folder / first["patient"] / first["study"] / series
    assert {path.name for path in files(place)} == {"0.dcm", "1.dcm", "2.dcm"}
    (place / "1.dcm").unlink()
    fetch.lidc(folder, "4")
    assert Client.last.fetched == [series] and len(files(place)) == 3
    fetch.lidc(folder, "4")
    assert not Client.last.fetched


def test_scans_that_lack_files_are_listed(commons, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Client, "lost", 2)
    with pytest.raises(InputError, match="2 scans lack files, as listed; run it again"):
        fetch.lidc(tmp_path / "scans", "2")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("LIDC-IDRI-0001, series 1.3.6.1.4.1.14519")
    assert [line.split(": ")[1] for line in lines] == ["1 of 3 files", "2 of 4 files"]


def test_scans_that_the_commons_do_not_have_are_listed(commons, tmp_path, capsys):
    with pytest.raises(InputError, match="1 scans lack files"):
        fetch.lidc(tmp_path / "scans", "5")
    assert "0 of <NA> files" in capsys.readouterr().out and len(Client.last.fetched) == 4


def test_an_unreachable_bucket_and_a_full_disk_are_told_before_anything_is_fetched(commons, tmp_path, monkeypatch):
    (tmp_path / "bucket").unlink()
    with pytest.raises(InputError, match=r"LIDC-IDRI: download failed .*; check the connection"):
        fetch.lidc(tmp_path / "scans", "1")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=99e6))
    with pytest.raises(InputError, match=r"0\.1 GB free, 0\.1 GB needed"):
        fetch.lidc(tmp_path / "scans", "1")
    assert not Client.last.fetched


@pytest.mark.parametrize("patients", ["0", "-1", "some", "1.5", "", "876"])
def test_the_number_of_patients_is_checked(patients, tmp_path):
    with pytest.raises(InputError, match=r"patients=.*; use 1 to 875"):
        fetch.lidc(tmp_path, patients)


def test_all_scans_with_annotations_are_those_of_the_database():
    scans = fetch._scans("all")
    assert len(scans) == scans["series"].nunique() == 883 and scans["patient"].nunique() == 875
    assert scans["patient"].is_monotonic_increasing


def test_the_stand_in_has_the_signature_of_the_real_client():
    client = pytest.importorskip("idc_index").IDCClient
    theirs = inspect.signature(client.download_from_selection).parameters
    ours = inspect.signature(Client.download_from_selection).parameters
    assert set(ours) <= set(theirs)
    assert theirs["downloadDir"].default is inspect.Parameter.empty and list(theirs)[1] == "downloadDir"


def test_the_commons_have_every_scan_that_has_annotations():
    listed = pytest.importorskip("idc_index").IDCClient().index.set_index("SeriesInstanceUID")
    scans = fetch._scans("all").join(listed, on="series")
    assert scans["patient"].equals(scans["PatientID"]) and scans["study"].equals(scans["StudyInstanceUID"])
    assert set(scans["Modality"]) == {"CT"} and set(scans["license_short_name"]) == {"CC BY 3.0"}
    assert 100_000 < scans["series_size_MB"].sum() < 125_000 and (scans["instanceCount"] > 50).all()
    assert set(scans["aws_bucket"]) == {fetch.BUCKET.split("/")[3].split("?")[0]}
