"""Real data from their hosts: Kaggle's patches, and CT scans of LIDC-IDRI from the Imaging Data Commons.

Nothing else needs this module or its packages, which ``make data-kaggle`` and ``make data-lidc`` install beside the
environment. A download that was interrupted continues when it is run again.
"""

import logging
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nodules import paths
from nodules.data import patches
from nodules.data.lidc import scans as annotated
from nodules.data.sources import KAGGLE_COUNTS, SOURCES
from nodules.errors import InputError, in_brief, within
from nodules.tools import optional

KAGGLE = "kmader/lungnodemalignancy"
KAGGLE_FILES = ("all_patches.hdf5", "malignancy.csv", "ct_tiles.tif")
ROOM = 5  # times the size of Kaggle's archive: it, what it contains, and a copy of that
LIDC = "LIDC-IDRI"
LIDC_LICENCE = "CC BY 3.0, https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX"
BUCKET = "https://s3.amazonaws.com/idc-open-data?list-type=2&max-keys=1"  # where idc-index downloads from
LAYOUT = "%PatientID/%StudyInstanceUID/%SeriesInstanceUID"  # of the folders, as pylidc expects them
TIMEOUT_S = 10  # without a response


_needed = partial(optional.package, group="data")


def kaggle(folder: Path) -> Path:
    """Download Kaggle's set into a folder, unless it is there.

    kagglehub keeps what it has downloaded in ``.kagglehub`` in that folder, and resumes from there; a file gets its
    final place once the whole set has been read.

    Returns:
        The folder.

    Raises:
        InputError: too little space, no or a wrong token, no connection, or a set other than the one that is known.
    """
    folder, expected = folder.resolve(), KAGGLE_COUNTS["patches"]
    with suppress(InputError):
        if patches.has_kaggle(folder) and patches.read(str(folder)).card.name == "kaggle":
            print(f"{folder}: Kaggle's set is here already")
            return folder
    kagglehub, cache = _needed("kagglehub"), folder / ".kagglehub"
    os.environ["KAGGLEHUB_CACHE"] = str(cache)
    with _fetching(KAGGLE):
        offered = _offered()
        licences = f"{SOURCES['kaggle']['licence']}; Kaggle says {offered.license_name or 'none'}"
        print(f"Kaggle {KAGGLE}: {offered.total_bytes / 1e6:.0f} MB, licence {licences}", flush=True)
        _check_space(folder, ROOM * offered.total_bytes)
        arrived = Path(kagglehub.dataset_download(KAGGLE))
    try:
        read = patches.read(str(arrived))
        if read.card.name != "kaggle":
            raise InputError(f"{KAGGLE}: {len(read)} patches arrived, not {expected}; run it again")
        for path in (arrived / name for name in KAGGLE_FILES if (arrived / name).exists()):
            with paths.replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return folder


def lidc(folder: Path, patients: str) -> Path:
    """Download the CT scans of LIDC-IDRI that have annotations into ``folder/patient/study/series/*.dcm``.

    A scan is complete if it has as many files as the Imaging Data Commons lists (the database lacks a slice or more of
    five scans). Complete ones are left alone. s5cmd, which idc-index runs, gives a file its name when it has all of
    it, and of a scan that is incomplete fetches the files that are missing.

    Args:
        folder: where to.
        patients: how many, in the order of their ids, or ``all``.

    Returns:
        The folder.

    Raises:
        InputError: too little space, no connection, or scans that are incomplete in the end.
    """
    scans = _scans(patients)
    with _fetching(LIDC):
        client = _needed("idc_index").IDCClient()
    logging.getLogger("idc_index").setLevel(logging.ERROR)
    # idc-index searches its whole index in each call: a million series, most of other collections
    client.index = client.index[client.index["SeriesInstanceUID"].isin(scans["series"])]
    scans = scans.join(client.index.set_index("SeriesInstanceUID")[["instanceCount", "series_size_MB"]], on="series")
    missing = _incomplete(folder, scans)
    megabytes = missing["series_size_MB"].sum()
    print(f"{LIDC}: {len(missing)} of {len(scans)} scans, {megabytes / 1e3:.1f} GB, licence {LIDC_LICENCE}", flush=True)
    _check_space(folder, megabytes * 1e6)
    if len(missing):
        _check_bucket()
    for patient, theirs in missing.dropna().groupby("patient"):
        print(f"{patient}: {theirs['series_size_MB'].sum():.0f} MB", flush=True)
        _download(client, folder, theirs)
    left = _incomplete(folder, scans)
    for scan in left.itertuples():
        print(f"{scan.patient}, series {scan.series}: {scan.here} of {scan.instanceCount} files")
    if len(left):
        raise InputError(f"{folder}: {len(left)} scans lack files, as listed; run it again, which fetches only those")
    return folder


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    """Turn whatever a host or the package that talks to it raises into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = in_brief(error)
        if what == KAGGLE and getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            token = "your token" if _needed("kagglehub.config").get_kaggle_credentials() else "access without a token"
            raise InputError(
                f"{KAGGLE}: Kaggle refuses {token}; set KAGGLE_API_TOKEN to one from https://www.kaggle.com/settings"
            ) from error
        raise InputError(f"{what}: download failed ({reason}); check the connection and run it again") from error


def _check_space(folder: Path, needed: float) -> None:
    with paths.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; free up space, or choose another folder"
        )


def _offered() -> Any:
    """Kaggle's description of the set, of which ``total_bytes`` and ``license_name`` are used."""
    request = _needed("kagglesdk.datasets.types.dataset_api_service").ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = KAGGLE.split("/")
    with _needed("kagglehub.clients").build_kaggle_client() as client:
        return client.datasets.dataset_api_client.get_dataset(request)


def _scans(patients: str) -> pd.DataFrame:
    """The scans with annotations of the first patients: ``patient``, ``study``, ``series``."""
    scans = annotated()[["patient", "study", "series"]].sort_values(["patient", "series"], ignore_index=True)
    ids = scans["patient"].unique()
    if patients == "all":
        return scans
    if not patients.isdecimal():
        raise InputError(f"patients={patients!r}: not a number; use 1 to {len(ids)}, or all")
    within(1, len(ids), patients=int(patients))
    return scans[scans["patient"].isin(ids[: int(patients)])]


def _place(folder: Path, scan: Any) -> Path:
    return folder / scan.patient / scan.study / scan.series


def _incomplete(folder: Path, scans: pd.DataFrame) -> pd.DataFrame:
    """Those scans of which not all files are here, and how many are: ``here``."""
    here = [len(list(_place(folder, scan).glob("*.dcm"))) for scan in scans.itertuples()]
    return scans.assign(here=here)[scans["instanceCount"].astype(float) != here]


def _check_bucket() -> None:
    with _fetching(LIDC), urllib.request.urlopen(BUCKET, timeout=TIMEOUT_S):
        pass  # s5cmd itself would try again for minutes


def _download(client: Any, folder: Path, scans: pd.DataFrame) -> None:
    """Download the scans of a patient. idc-index reports no failure, so the files are counted by the caller."""
    with _fetching(LIDC):
        client.download_from_selection(
            str(folder),
            seriesInstanceUID=list(scans["series"]),
            show_progress_bar=False,
            use_s5cmd_sync=True,
            dirTemplate=LAYOUT,
        )
    if len(_incomplete(folder, scans)):
        _check_bucket()  # if the connection is lost, the other patients need not be tried
    for scan in scans.itertuples():
        for cut_off in _place(folder, scan).glob("*.dcm?*"):  # left by an s5cmd that was killed
            cut_off.unlink()
