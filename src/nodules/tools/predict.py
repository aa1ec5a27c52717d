"""What a model says of nodules: in patches, or at places in a scan; as a table, and as a page with a sheet for each."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from nodules import model, paths
from nodules.data import patches, split, transforms
from nodules.data.files import OPENERS, spreadsheet
from nodules.data.pixels import GREY, HU
from nodules.data.split import Part
from nodules.errors import InputError
from nodules.model import ANSWER, GROUPS, Model

if TYPE_CHECKING:
    from nodules.data.scans import Scan

SHOWN = 40  # rows printed
NAMES = {
    "scan": ["axial", "coronal", "sagittal"],
    "slices": ["slice below", "slice", "slice above"],
    "patch": ["", "slice", ""],  # nothing is known of others
}


class Judged(NamedTuple):
    """Patches of nodules with what a model says of them, and pictures of the nodules."""

    part: Part
    answers: pd.DataFrame  # a row per patch
    shown: dict[str, tuple[list[np.ndarray], list[list[float]], int]]  # by nodule in a scan: planes, sides, slice
    unit: str
    source: Path


def table(at: str | None, csv: Path | None, unit: str = "") -> pd.DataFrame | None:
    """The places given as text, as for :func:`nodules.data.cut.listed`, or as a CSV; None if neither is.

    Args:
        at: places.
        csv: a table of places.
        unit: of the places, ``mm`` or ``voxel``, unless the table says it.

    Raises:
        InputError: what is given does not say where the nodules are.
    """
    if at is None and csv is None:
        return None
    from nodules.data import cut  # its libraries take long to import, and patches need none of them

    if csv:
        listed = spreadsheet(csv, text=True).drop(columns="malignant", errors="ignore")
        if unit and "unit" in listed:
            raise InputError(f"{csv}: has a column 'unit', and --{unit} is given too; leave one of them out")
        return cut.places(csv, listed, unit)
    if not unit:
        raise InputError(f"--at {at}: not said what x, y, z are; add --voxel or --mm")
    return cut.listed(at).assign(unit=unit)


def judge(taught: Model, source: Path, table: pd.DataFrame | None = None, series: str = "") -> Judged:
    """Ask a model about patches, or places in scans.

    Args:
        taught: the model.
        source: a file of patches, or a scan or folder of scans.
        table: the places in scans, as from :func:`table`.
        series: which scan of several, where the table does not say.

    Raises:
        InputError: unreadable patches, scans or places.
    """
    if not source.exists():
        raise InputError(f"{source}: there is no such file or folder; name a scan, or a file of patches")
    if source.suffix.lower() in OPENERS:
        if table is not None or series:
            raise InputError(f"{source}: holds patches, not scans; leave out --at, --csv and --series")
        held = patches.read(str(source.resolve()), labelled=False)
        if (taught.about["input"]["unit"], held.card.unit) == (HU, GREY):
            raise InputError(
                f"{source}: has grey levels, but {taught.about['name']} reads Hounsfield units; use a model taught on "
                "grey levels, such as lidc-small"
            )
        part = split.whole(held)
        return Judged(part, taught.answers(part), {}, held.card.unit, source)
    if table is None:
        raise InputError(f"{source}: not said where the nodules are; give --at x,y,z or --csv, or a file of patches")
    from nodules.data import cut

    images, tables, shown = [], [], {}
    if series and "series" in table:
        raise InputError(f"--series {series}: the table names the scan of each place itself; leave one of the two out")
    for scan, rows in _scans(source, table, series):
        taken = cut.at_places(scan, rows)
        images.append(taken.images)
        tables.append(taken.table)
        for place in rows.to_dict("records"):
            voxel = cut.voxel_of(scan, place)
            shown[place["nodule"]] = (*cut.planes(scan, voxel), round(voxel[2]))
    part = model.part_of(np.concatenate(images), pd.concat(tables, ignore_index=True))
    return Judged(part, taught.answers(part), shown, "HU", source)


def _scans(source: Path, table: pd.DataFrame, series: str) -> Iterator[tuple["Scan", pd.DataFrame]]:
    """Each scan with its places."""
    from nodules.data import cut, scans

    if "series" not in table:
        yield scans.only(source, series), table
        return
    found = scans.find(source)
    for name, rows in table.groupby("series", sort=False):
        yield scans.read(cut.chosen(source, name, found)), rows.drop(columns="series")


def listed(judged: Judged) -> pd.DataFrame:
    """The answers to write: one row per patch of a file, or per place in a scan."""
    if not judged.shown:
        return judged.answers[ANSWER]
    alone = judged.answers.drop_duplicates("nodule")
    return alone.assign(id=alone["nodule"])[ANSWER]


def predict(taught: Model, judged: Judged, out: Path | None, sheets: Path | None) -> str:
    """Write answers as CSV and a page with a sheet for each nodule; return the answers as text."""
    rows = listed(judged)
    if out:
        with paths.replacing(out) as temporary:
            rows.to_csv(temporary, index=False)
    if sheets:
        paths.write(sheets, page(taught, judged))
    return rows.round(3).to_string(index=False, max_rows=SHOWN)


def page(taught: Model, judged: Judged) -> str:
    """A page with a sheet for each nodule."""
    from nodules.report import text

    nodules, stacks = judged.answers.assign(row=np.arange(len(judged.answers))), split.stacked(judged.part)
    sheets = [_sheet(taught, judged, stacks, rows) for _, rows in nodules.groupby("nodule", sort=False)]
    values = {"sheets": sheets, "source": judged.source, "about": taught.about, "pico": text.style()}
    return text.render("opinion.html", values)


def _sheet(taught: Model, judged: Judged, stacks: Part, rows: pd.DataFrame) -> dict[str, Any]:
    """What the page shows of one nodule: its answer, a figure, what speaks for and against."""
    from nodules import plots

    stacked = "slice_index" in judged.part.table
    height = judged.part.table["slice_index"].iloc[rows["row"]] if stacked else rows["row"]
    planes, sides, middle = judged.shown.get(rows["nodule"].iloc[0], ([], [[], [], []], height.median()))
    answer = rows.iloc[(height - middle).abs().argmin()].to_dict()
    planes = planes or list(stacks.take(np.array([answer["row"]])).images[0])
    names = NAMES["scan" if judged.shown else "slices" if stacked else "patch"]
    window = list(transforms.default_window(judged.unit))
    figure = plots.opinion(**model.pictured(taught, judged.part, answer, planes, sides, names, window))
    figure.set_label(
        f"{plots.title(figure)}: three pictures of the nodule, what the networks see, evidence, contributions"
    )
    picture = base64.b64encode(plots.png(figure)).decode()
    contributions = {name: answer[name] for name in GROUPS}
    about = {"picture": picture, "label": figure.get_label(), "planes": bool(judged.shown), "parts": contributions}
    return answer | about
