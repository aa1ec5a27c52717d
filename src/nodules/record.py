"""What a notebook keeps: numbers and figures with their provenance, written atomically.

A figure is kept as its data and the name of its function in :mod:`nodules.plots`, so it can be redrawn without a model
and without running a notebook.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nodules import course, paths, plots
from nodules.data.sources import Card
from nodules.errors import InputError

KEPT = (".csv", ".json", ".npz", ".choice", ".safetensors")  # what a run writes into its folder
PACKAGES = ("python", "torch", "torchvision", "fastai", "timm", "scikit-learn", "pandas", "papermill")


def git_revision() -> str:
    """Short revision of the checkout, with ``+changes`` if the code differs; ``unknown`` without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "notebooks", "params", "requirements.txt")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; numpy scalars become numbers, NaN is an error."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=lambda x: x.item())
    paths.write(path, text + "\n")


@dataclass
class Record:
    """What one notebook keeps in its folder, ``<run_dir>/<notebook>``, which starts empty.

    Raises:
        InputError: the folder can't be written to.
    """

    notebook: str
    run_dir: str
    parameters: dict[str, Any]
    card: Card
    split_kind: str
    split_seed: int
    weights: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    tables: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = paths.resolve(self.run_dir) / self.notebook
        with paths.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.iterdir():
                if old.suffix in KEPT:  # leave other people's files
                    old.unlink(missing_ok=True)

    @property
    def provenance(self) -> dict[str, Any]:
        """What is recorded with every number and figure of this run."""
        return {
            "notebook": self.notebook,
            "profile": paths.resolve(self.run_dir).name,
            "parameters": self.parameters,
            "data": self.card.title,
            "data_sha256": self.card.sha256,
            "simulation": self.card.simulation,
            "split": self.split_kind,
            "split_seed": self.split_seed,
            "weights": self.weights or "none",
            "git_revision": git_revision(),
        }

    @property
    def source(self) -> str:
        """The line below each figure."""
        of_split = "" if self.split_seed == self.parameters["seed"] else f" {self.split_seed}"
        parts = [self.card.title, f"{self.split_kind} split{of_split}", f"seed {self.parameters['seed']}"]
        return " · ".join(parts + ([f"weights: {self.weights}"] if self.weights else []))

    def environment(self) -> pd.DataFrame:
        """Seed, device, versions, revision and data hash, as a table to print."""
        from platform import python_version

        from nodules.networks.device import described

        versions = {name: python_version() if name == "python" else version(name) for name in PACKAGES}
        facts = {"seed": self.parameters["seed"], "device": described(), **versions}
        facts |= {"git revision": git_revision(), "data SHA-256": self.card.sha256}
        return pd.Series(facts, name="value", dtype=object).rename_axis("environment").to_frame()

    def file(self, name: str) -> Path:
        """The path of a file of this run, for :func:`nodules.paths.replacing`.

        Raises:
            InputError: the name leads out of the run's folder.
        """
        if not name.strip(".") or Path(name).name != name:
            raise InputError(f"{name}: not a file name; leave out the folder")
        return self.folder / name

    def table(self, name: str, table: pd.DataFrame, caption: str = "") -> Path:
        """Keep a table as CSV for later notebooks; one with a caption is shown in the report."""
        path = self.file(f"{name}.csv")
        with paths.replacing(path) as temporary:
            table.to_csv(temporary, index=False)
        if caption:
            self.tables.append({"name": name, "caption": caption})
        return path

    def choice(self, name: str, /, **values: Any) -> Path:
        """Keep a decision for later notebooks."""
        path = self.file(f"{name}.choice")
        write_json(path, values)
        return path

    def figure(
        self, name: str, draw: Callable[..., Figure], caption: str, heading: str = "", source: str = "", **data: Any
    ) -> Figure:
        """Draw a figure and keep what is needed to redraw it.

        Args:
            name: ``fig01`` for the 2019 report's figure 1, any other name for a figure beyond the report.
            draw: a function of :mod:`nodules.plots`.
            caption: a sentence or two, also the figure's alternative text.
            heading: its title; figures of the report have theirs in :mod:`nodules.course`.
            source: the line below it, if its data are not the study's.
            data: the function's other arguments: arrays, tables, strings, numbers and lists of them.
        """
        data["heading"], source = course.HEADINGS.get(name, heading), source or self.source
        arrays, plain = {}, {}
        for key, value in data.items():
            if isinstance(value, pd.DataFrame):
                columns = {column: value[column].to_numpy() for column in value}
                arrays |= {f"{key}/{c}": v.astype(str) if v.dtype == object else v for c, v in columns.items()}
            elif isinstance(value, np.ndarray):
                arrays[key] = value
            else:
                plain[key] = value
        with paths.replacing(self.file(f"{name}.npz")) as temporary:
            np.savez_compressed(temporary, **arrays)
        about = {"draw": draw.__name__, "caption": caption, "order": len(self.figures), "source": source}
        write_json(self.file(f"{name}.json"), about | {"arguments": plain} | self.provenance)
        self.figures.append(name)
        figure = plots.stamp(draw(**data), source)
        title = plots.title(figure)
        figure.set_label(f"{title}{'' if title.endswith('?') else '.'} {caption}")
        return figure

    def fact(self, **values: Any) -> None:
        """Keep named facts for the report; intervals (``value, low, high``) add ``<name>_low`` and ``<name>_high``."""
        for name, value in values.items():
            if isinstance(value, (dict, pd.Series)):
                ends = {"": "value", "_low": "low", "_high": "high"}
                self.facts |= {f"{name}{end}": float(value[column]) for end, column in ends.items()}
            else:
                self.facts[name] = value

    def leave_out(self, what: str, why: str) -> None:
        """Note what this run can't show, and why, here and in the report."""
        self.left_out.append({"what": what, "why": why})
        print(f"Left out: {what}, because {why}.")

    def row(self, name: str, scores: dict[str, float], **about: Any) -> None:
        """Add a row to the results: what was scored (weights, architecture, epochs, ...) and its scores.

        Left out if there are too few patches for a score or its interval.
        """
        if np.isnan(list(scores.values())).any():
            return self.leave_out(f"the score of {name}", "there are too few patches of both classes")
        common = {"name": name, "notebook": self.notebook, "data": self.card.title, "split": self.split_kind}
        seeds = {"split_seed": self.split_seed, "seed": self.parameters["seed"]}
        self.rows.append(common | seeds | about | scores)

    def save(self) -> Path:
        """Write ``results.json``: provenance, card, facts, rows, and a hash of every file kept."""
        path = self.folder / "results.json"
        content = {"provenance": self.provenance, "card": asdict(self.card), "facts": self.facts, "rows": self.rows}
        kept = sorted(file for file in self.folder.iterdir() if file.suffix in KEPT and file != path)
        files = {file.name: paths.sha256(file) for file in kept}
        write_json(path, content | {"tables": self.tables, "left_out": self.left_out, "files": files})
        return path


def load(folder: Path) -> dict[str, Any]:
    """What a notebook saved in its ``folder``.

    Raises:
        InputError: it has not run to its end.
    """
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["files"].items(), content["left_out"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; run {folder.name} to its end first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged; run {folder.name} again") from error
    return content


def verify(folder: Path, file: str, files: dict[str, str]) -> Path:
    """The path of a kept file, verified by its hash.

    Args:
        folder: of the notebook.
        file: its name.
        files: hashes by name, as from :func:`load`.

    Raises:
        InputError: it is missing, changed or damaged.
    """
    path = folder / file
    if file not in files or not path.exists():
        raise InputError(f"{path}: missing; run {folder.name} first")
    if paths.sha256(path) != files[file]:
        raise InputError(f"{path}: changed since {folder.name} wrote it; run {folder.name} again")
    return path


class Earlier:
    """What an earlier notebook of a run kept; each file is verified by its hash before it is read.

    Raises:
        InputError: that notebook has not run to its end, or a file is missing or was changed.
    """

    def __init__(self, run_dir: str, notebook: str) -> None:
        self.folder = paths.resolve(run_dir) / notebook
        self.content = load(self.folder)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of its run."""
        return self.content["provenance"]["parameters"]

    def file(self, name: str) -> Path:
        """A file that it kept."""
        return verify(self.folder, name, self.content["files"])

    def choice(self, name: str) -> dict[str, Any]:
        """A decision kept by :meth:`Record.choice`."""
        return json.loads(self.file(f"{name}.choice").read_text(encoding="utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        """A table that it kept; only empty cells are missing values, so a patient may be called NA or 007."""
        text = {"id": str, "patient": str}
        return pd.read_csv(self.file(f"{name}.csv"), dtype=text, keep_default_na=False, na_values=[""])


def redraw(about: Path) -> tuple[Figure, dict[str, Any]]:
    """Redraw a kept figure from ``<name>.json`` and the ``<name>.npz`` beside it."""
    content = json.loads(about.read_text(encoding="utf-8"))
    data, columns = dict(content["arguments"]), {}
    with np.load(about.with_suffix(".npz"), allow_pickle=False) as arrays:
        for key in arrays:
            name, _, column = key.partition("/")
            if column:
                columns.setdefault(name, {})[column] = arrays[key]
            else:
                data[name] = arrays[key]
    data |= {name: pd.DataFrame(table) for name, table in columns.items()}
    try:
        figure = getattr(plots, content["draw"])(**data)
    except (AttributeError, TypeError) as error:
        name = content["draw"]
        raise InputError(f"{about}: plots.{name} can't draw it ({error}); run its notebook again") from error
    return plots.stamp(figure, content["source"]), content
