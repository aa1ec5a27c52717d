"""Keep what a notebook found: numbers and figures, each with where it comes from, written whole or not at all.

A figure is kept as its data and the name of the function in :mod:`nodules.plots` that draws it, so that it can
be drawn again without a model, and a change in drawing code runs no notebook.
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

from nodules import paths, plots
from nodules.device import described
from nodules.errors import SEEDS, InputError, within
from nodules.patches import Card, Patches

KEPT = (".csv", ".json", ".npz", ".choice", ".safetensors")  # what a run writes into its folder
PACKAGES = ("python", "torch", "torchvision", "fastai", "timm", "scikit-learn", "pandas", "papermill")


def git_revision() -> str:
    """Short revision of the checkout, ``+changes`` where the code differs from it; ``unknown`` without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(paths.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "notebooks", "params", "requirements.txt")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, numbers of numpy as numbers, NaN refused."""
    with paths.replacing(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=lambda x: x.item())
        temporary.write_text(text + "\n", encoding="utf-8")


@dataclass
class Run:
    """One notebook's run: its folder ``<run_dir>/<notebook>``, its parameters, what it found.

    A run starts with a clean slate: figures that an earlier run of this notebook left are removed.

    Raises:
        InputError: a seed out of range, or a folder that can't be written to.
    """

    notebook: str
    run_dir: str
    parameters: dict[str, Any]
    card: Card
    split_kind: str
    weights: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    tables: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        within(0, SEEDS, seed=self.parameters["seed"])
        self.folder = paths.resolve(self.run_dir) / self.notebook
        with paths.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.iterdir():
                if old.suffix in KEPT:  # and nothing that somebody else put there
                    old.unlink(missing_ok=True)

    @property
    def provenance(self) -> dict[str, Any]:
        """What every number and figure of this run carries."""
        return {
            "notebook": self.notebook,
            "profile": paths.resolve(self.run_dir).name,
            "parameters": self.parameters,
            "data": self.card.title,
            "data_sha256": self.card.sha256,
            "simulation": self.card.simulation,
            "split": self.split_kind,
            "weights": self.weights or "none",
            "git_revision": git_revision(),
        }

    @property
    def source(self) -> str:
        """The line below each figure."""
        parts = [self.card.title, f"{self.split_kind} split", f"seed {self.parameters['seed']}"]
        return " · ".join(parts + ([f"weights: {self.weights}"] if self.weights else []))

    def environment(self) -> pd.DataFrame:
        """Seed, device, versions, revision and data hash, as a table to print."""
        from platform import python_version

        versions = {name: python_version() if name == "python" else version(name) for name in PACKAGES}
        facts = {"seed": self.parameters["seed"], "device": described(), **versions}
        facts |= {"git revision": git_revision(), "data SHA-256": self.card.sha256}
        return pd.Series(facts, name="value", dtype=object).rename_axis("environment").to_frame()

    def file(self, name: str) -> Path:
        """Where this run keeps a file, for :func:`nodules.paths.replacing`.

        Raises:
            InputError: the name leads out of the run's folder.
        """
        if not name.strip(".") or Path(name).name != name:
            raise InputError(f"{name}: no plain file name; leave out the folder")
        return self.folder / name

    def table(self, name: str, table: pd.DataFrame, caption: str = "") -> Path:
        """Keep a table as CSV for the notebooks that follow; one with a caption is shown in the report."""
        path = self.file(f"{name}.csv")
        with paths.replacing(path) as temporary:
            table.to_csv(temporary, index=False)
        if caption:
            self.tables.append({"name": name, "caption": caption})
        return path

    def choice(self, name: str, /, **values: Any) -> Path:
        """Keep a decision for the notebooks that follow."""
        path = self.file(f"{name}.choice")
        write_json(path, values)
        return path

    def figure(self, name: str, draw: Callable[..., Figure], caption: str, **data: Any) -> Figure:
        """Draw a figure and keep what it takes to draw it again.

        Args:
            name: ``fig01`` for the 2019 report's figure 1, any other name for one beyond the report.
            draw: a function of :mod:`nodules.plots`.
            caption: a sentence or two; ``{name}`` and ``{name:.3f}`` are filled from the facts noted so far. It is
                also the figure's alternative text.
            data: its arguments: arrays, tables, strings, numbers and lists of them.
        """
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
        about = {"draw": draw.__name__, "caption": caption, "order": len(self.figures), "source": self.source}
        write_json(self.file(f"{name}.json"), about | {"arguments": plain} | self.provenance)
        self.figures.append(name)
        figure = plots.stamp(draw(**data), self.source)
        figure.set_label(f"{plots.title(figure)}. {caption.format(**self.facts)}")
        return figure

    def fact(self, name: str, found: dict[str, float] | pd.Series) -> None:
        """Note a number with its interval, ``value, low, high``, as ``name, <name>_low, <name>_high``."""
        ends = {"": "value", "_low": "low", "_high": "high"}
        self.facts |= {f"{name}{end}": float(found[column]) for end, column in ends.items()}

    def leave_out(self, what: str, why: str) -> None:
        """Say what this run can't show, and why; the report says it too."""
        self.left_out.append({"what": what, "why": why})
        print(f"Left out: {what}, because {why}.")

    def row(self, name: str, scores: dict[str, float], **about: Any) -> None:
        """Add a row to the results: what was scored (weights, architecture, epochs, ...) and its scores.

        Left out where there are too few patches for a score or its interval.
        """
        if np.isnan(list(scores.values())).any():
            return self.leave_out(f"the score of {name}", "there are too few patches of both classes")
        common = {"name": name, "notebook": self.notebook, "data": self.card.title, "split": self.split_kind}
        self.rows.append(common | {"seed": self.parameters["seed"]} | about | scores)

    def save(self) -> Path:
        """Write ``results.json``: provenance, card, facts, rows, and a hash of every file that was kept."""
        path = self.folder / "results.json"
        content = {"provenance": self.provenance, "card": asdict(self.card), "facts": self.facts, "rows": self.rows}
        kept = sorted(one for one in self.folder.iterdir() if one.suffix in KEPT and one != path)
        files = {one.name: paths.sha256(one) for one in kept}
        write_json(path, content | {"tables": self.tables, "left_out": self.left_out, "files": files})
        return path


def brief(valid: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    """AUC and accuracy on valid and test with their intervals, named for a table."""
    ends = {"": "", "_low": " low", "_high": " high"}
    return {
        f"{part} {title}{text}": score[f"{metric}{end}"]
        for part, score in (("valid", valid), ("test", test))
        for metric, title in (("auc", "AUC"), ("accuracy", "accuracy"))
        for end, text in ends.items()
    }


def forest(scores: dict[str, dict[str, dict[str, float]]], metric: str) -> pd.DataFrame:
    """One metric of ``scores[name][part]`` as ``name, part, value, low, high``, for :func:`nodules.plots.intervals`."""
    rows = [
        (name, part, score[metric], score[f"{metric}_low"], score[f"{metric}_high"])
        for name, parts in scores.items()
        for part, score in parts.items()
    ]
    return pd.DataFrame(rows, columns=["name", "part", "value", "low", "high"])


def one_standard_error(table: pd.DataFrame) -> dict[str, Any]:
    """The row with the fewest ``parameters`` of those whose ``valid AUC`` is within one standard error of the best.

    The one-standard-error rule of Breiman et al. 1984; the error is a quarter of the 95% interval of the best.
    """
    best = table.loc[table["valid AUC"].idxmax()]
    error = (best["valid AUC high"] - best["valid AUC low"]) / 4
    fit = table[table["valid AUC"] >= best["valid AUC"] - error]
    chosen = fit.sort_values(["parameters", "valid AUC"], ascending=[True, False]).iloc[0]
    return chosen.drop([name for name in chosen.index if name.startswith("test")]).to_dict()


def load(folder: Path) -> dict[str, Any]:
    """What a notebook saved in its ``folder``.

    Raises:
        InputError: it has not been run to its end.
    """
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["files"].items(), content["left_out"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; run {folder.name} first, to its end") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged; run {folder.name} again") from error
    return content


def verify(folder: Path, file: str, files: dict[str, str]) -> Path:
    """The path of a kept file, if it is as the notebook wrote it.

    Args:
        folder: of the notebook.
        file: its name.
        files: hashes by name, as of :func:`load`.

    Raises:
        InputError: it is not there, or has been changed or damaged since.
    """
    path = folder / file
    if file not in files or not path.exists():
        raise InputError(f"{path}: not there; run {folder.name} first")
    if paths.sha256(path) != files[file]:
        raise InputError(f"{path}: not as {folder.name} wrote it; run {folder.name} again")
    return path


def kept(run_dir: str, notebook: str, file: str) -> Path:
    """A file that an earlier notebook kept, checked by :func:`verify`."""
    folder = paths.resolve(run_dir) / notebook
    return verify(folder, file, load(folder)["files"])


def _read(path: Path) -> pd.DataFrame:
    """A table of patches; only what is empty is missing, so that a patient may be called NA or 007."""
    return pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False, na_values=[""])


def load_split(run_dir: str, patches: Patches) -> pd.DataFrame:
    """The split that ``01_data`` wrote, one row a patch in the patches' order.

    Raises:
        InputError: it is not there, or of other patches.
    """
    path = kept(run_dir, "01_data", "split.csv")
    split = _read(path)
    if list(split["id"]) != list(patches.table["id"]):
        raise InputError(f"{path}: a split of other patches than these; run 01_data again")
    return split


def load_predictions(run_dir: str, notebook: str) -> pd.DataFrame:
    """Predictions that a notebook kept: ``id, patient, split`` (valid or test), ``y, p`` (plain), ``p_tta``.

    Raises:
        InputError: it has not been run.
    """
    return _read(kept(run_dir, notebook, "predictions.csv"))


def load_scored(run_dir: str, notebooks: list[str]) -> pd.DataFrame:
    """What every model that these notebooks scored says of the test patches: a column of probabilities each, by ``id``.

    Raises:
        InputError: one of them has not been run.
    """
    tables = [_read(kept(run_dir, name, "scored.csv")).set_index("id") for name in notebooks]
    return pd.concat(tables, axis=1, join="inner")


def load_choice(run_dir: str, notebook: str, name: str) -> dict[str, Any]:
    """What an earlier notebook decided by :meth:`Run.choice`.

    Raises:
        InputError: it has not been run.
    """
    return json.loads(kept(run_dir, notebook, f"{name}.choice").read_text(encoding="utf-8"))


def redraw(about: Path) -> tuple[Figure, dict[str, Any]]:
    """Draw a kept figure again from ``<name>.json`` and the ``<name>.npz`` beside it."""
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
        raise InputError(f"{about}: no longer drawn by plots.{name} ({error}); run its notebook") from error
    return plots.stamp(figure, content["source"]), content
