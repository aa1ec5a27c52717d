"""Figures from plain tables and arrays, without models or files.

Colours are seaborn's colour-blind-safe palette: benign is blue, malignant orange, everywhere.
"""

import io
import itertools
import re
import sys
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from nodules.errors import InputError

sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"image.cmap": "gray"})
BLUE, ORANGE, GREEN = sns.color_palette("colorblind")[:3]
EDGES = {"axial": "RA", "coronal": "RH", "sagittal": "AH"}  # right, anterior, head: at the left and at the top
LAID_OVER = 0.8  # opacity of an activation map at its maximum; at 0 it is transparent
CLASS_COLOURS = {"benign": BLUE, "malignant": ORANGE}
WEIGHT_COLOURS = {"chest-ct": BLUE, "imagenet": ORANGE, "random": GREEN}
COMMON_LOSS = 1.5  # the most that is shown of losses, twice that of guessing
HIGHEST_LOSS = 10.0  # shown; beyond it a mark at the edge
MARKERS = "os^Dv"  # of groups
KIN = ("unknown", "different patients", "same patient", "same nodule")
LEGENDS = ("label", "part")  # what seaborn calls groups in a legend
DPI = 100


def stamp(figure: Figure, text: str) -> Figure:
    """Write the data's source below a figure."""
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color="0.4")
    return figure


def title(figure: Figure) -> str:
    """The title above a figure."""
    return figure.get_suptitle() or figure.axes[0].get_title()


def described(figure: Figure) -> str:
    """What a figure shows, for those who can't see it: its panels, their axes and what is drawn in them."""
    pictures = sum(bool(axis.images) and not axis.get_xlabel() for axis in figure.axes)
    parts = [f"{pictures} pictures"] if pictures > 1 else ["A picture"] * pictures
    for axis in figure.axes:
        ticks = [tick.get_text() for tick in axis.get_yticklabels()]
        names = [tick for tick in ticks if re.search("[a-z]", tick) and not tick.startswith("$")]
        lines = [name for name in axis.get_legend_handles_labels()[1] if name and name not in LEGENDS]
        if axis.get_xlabel() and (axis.get_ylabel() or names):
            name = f"{axis.get_title()}: " if len(figure.axes) > 1 and axis.get_title() else ""
            against = f"{axis.get_ylabel() or 'rows'} against {axis.get_xlabel()}"
            parts.append(name + against + (f", of {', '.join(names or lines)}" if names or lines else ""))
    panels = [axis.get_title().replace("\n", " ") for axis in figure.axes if not axis.images and axis.get_title()]
    parts += [f"panels: {', '.join(panels)}"] * (len(panels) > 1)
    return "; ".join(dict.fromkeys(parts)) or title(figure)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as PNG."""
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=dpi)
    return pixels.getvalue()


def show_in_notebooks() -> None:
    """Make a kernel show figures as images with their label as alternative text.

    matplotlib-inline does so only for pyplot figures, and without alternative text.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def picture(figure: Figure) -> tuple[bytes, dict[str, str]]:
        return png(figure), {"alt": figure.get_label()}

    def text(figure: Figure, printer: Any, _: bool) -> None:
        printer.text(figure.get_label())

    formatters = shell.display_formatter.formatters
    formatters["image/png"].for_type(Figure, picture)
    formatters["text/plain"].for_type(Figure, text)


show_in_notebooks()


def patch_grid(
    images: np.ndarray, titles: list[str], window: list[float], unit: str, heading: str, columns: int
) -> Figure:
    """Patches (N, 64, 64) in rows of ``columns``, shown in ``window`` (low, high), with a colour bar."""
    if len(images) != len(titles):
        raise InputError(f"{heading}: {len(images)} images but {len(titles)} titles; give one per image")
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns + 0.9, 1.42 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        shown = axis.imshow(image, vmin=window[0], vmax=window[1], interpolation="nearest")
        axis.set_title(title, fontsize=8, pad=3)
    figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30, pad=0.015).set_label(unit, fontsize=9)
    figure.suptitle(heading)
    return figure


def intensity_histogram(table: pd.DataFrame, unit: str, heading: str) -> Figure:
    """Density of pixel values by class; ``table`` has ``value, class, density``."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    sns.lineplot(
        table,
        x="value",
        y="density",
        hue="class",
        style="class",
        palette=CLASS_COLOURS,
        hue_order=list(CLASS_COLOURS),
        drawstyle="steps-mid",
        ax=axis,
    )
    axis.set(title=heading, xlabel=f"pixel value [{unit}]", ylabel="density", yscale="log")
    axis.get_legend().set_title("")
    sns.despine(figure)
    return figure


def diameter_by_class(table: pd.DataFrame, heading: str) -> Figure:
    """Histogram and cumulative share of nodule diameters; ``table`` has ``diameter_mm, class``, one row each."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shared = dict(x="diameter_mm", hue="class", palette=CLASS_COLOURS, hue_order=list(CLASS_COLOURS))
    sns.histplot(table, binwidth=2, ax=left, **shared)
    sns.ecdfplot(table, ax=right, legend=False, **shared)
    for line, style in zip(right.lines, ("-", "--"), strict=False):
        line.set_linestyle(style)
    left.get_legend().set_title("")
    left.set(xlabel="nodule diameter [mm]", ylabel="nodules", title="Nodules")
    right.set(xlabel="nodule diameter [mm]", ylabel="share of the class", title="Cumulative share")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def intervals(table: pd.DataFrame, label: str, heading: str, reference: float | None = None) -> Figure:
    """Values with intervals; ``table`` has ``name, value, low, high`` and perhaps ``part`` (a colour).

    The dotted line is at ``reference``.
    """
    names, parts = table["name"].unique(), table["part"].unique() if "part" in table else [""]
    figure = Figure(figsize=(9, 1.4 + (0.3 + 0.25 * len(parts)) * len(names)), layout="constrained")
    axis = figure.subplots()
    if reference is not None:
        axis.axvline(reference, color="0.6", linestyle=":", linewidth=1.5)
    for i, (part, colour, marker) in enumerate(zip(parts, (BLUE, ORANGE, GREEN), "os^", strict=False)):
        chosen = table[table["part"] == part] if part else table
        rows = len(names) - 1 - pd.Index(names).get_indexer(chosen["name"]) - 0.28 * (i - (len(parts) - 1) / 2)
        axis.errorbar(chosen["value"], rows, xerr=_lengths(chosen), fmt=marker, color=colour, capsize=3, label=part)
        for row, value, high in zip(rows, chosen["value"], chosen["high"], strict=True):
            beside = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
            paper = dict(facecolor="white", edgecolor="none", pad=0.5)  # else the dotted line strikes it through
            axis.annotate(f"{value:.3f}", (high, row), **beside, bbox=paper)
    if len(parts) > 1:
        figure.legend(loc="outside right upper", frameon=False)
    axis.margins(x=0.1)
    axis.set(title=heading, xlabel=label, ylim=(-0.6, len(names) - 0.4))
    axis.set_yticks(np.arange(len(names))[::-1], names)
    sns.despine(figure)
    return figure


def _lengths(table: pd.DataFrame) -> np.ndarray:
    """From a value to the ends of its interval, (2, N)."""
    return np.abs(table[["low", "high"]].to_numpy() - table[["value"]].to_numpy()).T


def spread(every: pd.DataFrame, table: pd.DataFrame, label: str, heading: str) -> Figure:
    """Results of many runs: a mark each, by split; intervals of one run (grey) and of the mean (black).

    ``every`` has ``name, value, split``, a row for each run; ``table`` has ``name, mean, one, low, high``.
    """
    splits, names = sorted(every["split"].unique()), list(table["name"])
    figure = Figure(figsize=(10, 1.6 + 0.75 * len(names)), layout="constrained")
    axis = figure.subplots()
    looks = zip(sns.color_palette("colorblind", len(splits)), itertools.cycle(MARKERS))
    rows = dict(zip(names, np.arange(len(names))[::-1], strict=True))
    for i, (split, (colour, marker)) in enumerate(zip(splits, looks, strict=False)):
        chosen = every[every["split"] == split]
        height = chosen["name"].map(rows) - 0.12 + 0.36 * (i + 0.5) / len(splits)
        axis.scatter(chosen["value"], height, s=22, color=colour, marker=marker, label=f"split {split}", linewidth=0)
    for name, mean, one, low, high in table[["name", "mean", "one", "low", "high"]].itertuples(index=False):
        axis.errorbar(mean, rows[name] - 0.22, xerr=one, color="0.6", linewidth=4, fmt="none")
        axis.errorbar(mean, rows[name] - 0.22, xerr=[[mean - low], [high - mean]], color="black", capsize=3, fmt="|")
    axis.margins(x=0.05)
    axis.set(title=f"{heading}: {label} of {every['run'].nunique()} runs", xlabel=label, ylim=(-0.6, len(names) - 0.4))
    axis.set_yticks(list(rows.values()), list(rows))
    if len(splits) <= 10:
        figure.legend(loc="outside right upper", frameon=False)
    sns.despine(figure)
    return figure


def findings(table: pd.DataFrame, heading: str) -> Figure:
    """Differences with their intervals in every run, a panel each; ``table`` has ``name, value, low, high``."""
    names = list(table["name"].unique())
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.5 * columns, 0.6 + 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        chosen = table[table["name"] == name].sort_values("value")
        colours = np.where(chosen["low"] > 0, 0, np.where(chosen["high"] < 0, 1, 2))
        for i, colour in enumerate((BLUE, ORANGE, "0.5")):
            shown, rows = chosen[colours == i], np.flatnonzero(colours == i)
            axis.errorbar(shown["value"], rows, xerr=_lengths(shown), fmt="o", markersize=4, color=colour, linewidth=1)
        axis.axvline(0, color="0.3", linestyle=":", linewidth=1.5)
        axis.set_title(name, fontsize=11)
        axis.set(xlabel="difference", ylabel="runs", yticks=[])
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def bars(table: pd.DataFrame, label: str, heading: str) -> Figure:
    """Shares as bars with intervals; ``table`` has ``name, part`` (a block of one colour), ``value, low, high``."""
    parts = list(table["part"].unique())
    rows = np.arange(len(table)) + 1.2 * table["part"].map(parts.index).to_numpy()
    figure = Figure(figsize=(9, 1.2 + 0.34 * (rows[-1] + 1)), layout="constrained")
    axis = figure.subplots()
    for part, colour in zip(parts, (ORANGE, BLUE, GREEN), strict=False):
        chosen = (table["part"] == part).to_numpy()
        shown = table[chosen]
        axis.barh(rows[chosen], shown["value"], xerr=_lengths(shown), color=colour, ecolor="0.2", capsize=3)
        axis.text(0.005, rows[chosen][0] - 0.95, part, weight="bold", va="center", fontsize=11)
    for row, value, high in zip(rows, table["value"], table["high"], strict=True):
        axis.annotate(f"{value:.0%}", (high, row), (6, 0), textcoords="offset points", va="center", fontsize=10)
    axis.set(title=heading, xlabel=label, xlim=(0, 1.08), ylim=(rows[-1] + 0.7, -1.5))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_yticks(rows, table["name"])
    axis.tick_params(axis="y", length=0)
    sns.despine(figure, left=True)
    return figure


def training_curves(table: pd.DataFrame, losses: list[float], accuracies: list[float], heading: str) -> Figure:
    """Loss and accuracy by epoch, mean and range over seeds, on given scales (low, high).

    A loss above ``COMMON_LOSS`` is cut off.

    ``table`` has ``label`` (the weights), ``seed, epoch, train_loss, valid_loss, accuracy``.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    both = table.melt(["label", "seed", "epoch"], ["train_loss", "valid_loss"], "part", "loss")
    both["part"] = both["part"].map({"train_loss": "train", "valid_loss": "valid"})
    shared = dict(x="epoch", hue="label", palette=WEIGHT_COLOURS, errorbar=("pi", 100))
    sns.lineplot(both, y="loss", style="part", ax=left, **shared)
    sns.lineplot(table, y="accuracy", ax=right, legend=False, linestyle="--", **shared)
    handles, labels = left.get_legend_handles_labels()
    left.get_legend().remove()
    kept = [(h, name) for h, name in zip(handles, labels, strict=True) if name not in LEGENDS]
    figure.legend(*zip(*kept, strict=True), loc="outside right upper", frameon=False)
    cut = f", cut off at {COMMON_LOSS}" if losses[1] > COMMON_LOSS else ""
    left.set(title=f"Loss{cut}", ylabel="cross-entropy", ylim=(losses[0], min(losses[1], COMMON_LOSS)))
    right.set(title="Accuracy on valid", ylabel="accuracy", ylim=accuracies)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def losses(table: pd.DataFrame, top: float, heading: str) -> Figure:
    """Training and validation loss by epoch up to ``top``; ``table`` has ``epoch, train_loss, valid_loss``."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(table["epoch"], table["train_loss"], color=BLUE, label="train")
    axis.plot(table["epoch"], table["valid_loss"], color=ORANGE, linestyle="--", label="valid")
    lowest = table["valid_loss"].idxmin()
    axis.plot(table["epoch"][lowest], table["valid_loss"][lowest], "o", color=ORANGE, label="lowest on valid")
    axis.set(title=heading, xlabel="epoch", ylabel="cross-entropy", ylim=(0, top))
    axis.locator_params(axis="x", integer=True)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def result(
    history: pd.DataFrame, steps: pd.DataFrame, lines: dict[str, float], top: float, lowest: float, heading: str
) -> Figure:
    """Accuracy on valid by epoch beside some ``lines``, losses up to ``top``, and the learning rate used.

    ``lowest`` is where the scale of the accuracy begins; it ends at 1.
    """
    figure = Figure(figsize=(12.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(history["epoch"], history["accuracy"], color=ORANGE, label="valid, by epoch")
    for (name, value), colour, style in zip(lines.items(), (GREEN, BLUE, "0.4"), ("--", "-.", ":"), strict=False):
        left.axhline(value, color=colour, linestyle=style, label=f"{name}: {value:.3f}")
    left.set(title="Accuracy", xlabel="epoch", ylabel="accuracy", ylim=(lowest, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    for part, colour, style in (("train", BLUE, "-"), ("valid", ORANGE, "--")):
        middle.plot(history["epoch"], history[f"{part}_loss"], style, color=colour, label=part)
    middle.set(title="Loss", xlabel="epoch", ylabel="cross-entropy", ylim=(0, top))
    middle.legend(frameon=False, fontsize=10)
    right.plot(steps["epoch"], steps["lr"], color=BLUE, linewidth=1)
    right.set(title="Learning rate", xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    for axis in (left, middle, right):
        axis.locator_params(axis="x", integer=True)
    left.legend(fontsize=9, loc="lower right")
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def lr_finder(curves: pd.DataFrame, suggestions: pd.DataFrame, chosen: float, heading: str) -> Figure:
    """Loss against learning rate for every seed, and the spread of fastai's suggestions.

    ``curves`` has ``seed, lr, loss``; ``suggestions`` has ``seed, name, lr``.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for seed, curve in curves.groupby("seed"):
        left.plot(curve["lr"], curve["loss"], color=BLUE, alpha=0.9 if seed == 0 else 0.25, linewidth=1)
    medians = suggestions.groupby("name", sort=False)["lr"].median()
    for (name, lr), style in zip(medians.items(), ("-", "--", "-.", ":"), strict=False):
        left.axvline(lr, color=ORANGE, linestyle=style, linewidth=1.5, label=f"{name}: {lr:.1e}")
    left.legend(title="median suggestion", frameon=False, fontsize=9, title_fontsize=9)
    start, lowest = curves.loc[curves["lr"] < 1e-5, "loss"].median(), curves["loss"].min()
    left.set(title="Loss by learning rate", xscale="log", xlabel="learning rate", ylabel="smoothed loss")
    left.set_ylim(lowest - 0.1 * (start - lowest), start + 0.6 * (start - lowest))
    # jitter would differ from run to run
    sns.stripplot(suggestions, x="lr", y="name", color=BLUE, alpha=0.6, jitter=False, ax=right)
    right.axvline(chosen, color=GREEN, linewidth=2)
    right.set(title=f"Suggestions by seed, chosen {chosen:.1e}", xscale="log", xlabel="learning rate", ylabel="")
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def schedules(table: pd.DataFrame, heading: str) -> Figure:
    """Learning rates as the optimizer used them, one panel per schedule; ``table`` has ``schedule, epoch, lr``."""
    names = table["schedule"].unique()
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        chosen = table[table["schedule"] == name]
        axis.plot(chosen["epoch"], chosen["lr"], color=BLUE)
        axis.set_title(name, fontsize=11)
        axis.set(xlabel="epoch", ylabel="learning rate")
        axis.label_outer()
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def network(
    stages: pd.DataFrame,
    image: np.ndarray,
    kernel: np.ndarray,
    convolved: np.ndarray,
    maps: np.ndarray,
    window: list[float],
    heading: str,
) -> Figure:
    """A network at work: one convolution on a patch, then each stage's shape and strongest feature maps.

    Args:
        stages: one row each: ``name, channels, side, parameters``; the last row, without a side, is the head.
        image: the patch, (64, 64).
        kernel: weights of one filter of the first layer, (K, K).
        convolved: what it makes of the patch, (height, width).
        maps: R feature maps per stage, (stages, R, height, width).
        window: pixel values shown as black and white.
        heading: the title.
    """
    rows = maps.shape[1]
    figure = Figure(figsize=(1.75 * (len(maps) + 4), 1.75 * rows + 1.4), layout="constrained")
    grid = figure.add_gridspec(rows, len(maps) + 4)
    low, high = window
    most = float(np.abs(kernel).max())
    worked = [
        (image, "patch\n1 × 64 × 64", {"vmin": low, "vmax": high}),
        (kernel, "∗ one filter\nof the first layer", {"cmap": "PuOr_r", "vmin": -most, "vmax": most}),
        (convolved, f"= its map\n{convolved.shape[0]} × {convolved.shape[1]}", {"cmap": "viridis"}),
    ]
    for column, (shown, name, style) in enumerate(worked):
        axis = figure.add_subplot(grid[:, column])
        axis.imshow(shown, interpolation="nearest", **style)
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    for column, (stage, of_stage) in enumerate(zip(stages.itertuples(), maps, strict=False), len(worked)):
        for row, feature_map in enumerate(of_stage):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(feature_map, cmap="viridis", interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                shape = f"{stage.channels:g} × {stage.side:g} × {stage.side:g}"
                axis.set_title(f"{stage.name}\n{shape}\n{stage.parameters:,} parameters", fontsize=9)
    head = stages.iloc[-1]
    axis = figure.add_subplot(grid[:, -1])
    text = f"{head['name']}\n{head['channels']:g} features\n{head['parameters']:,} parameters"
    axis.text(0.5, 0.5, f"{text}\n\n→ benign\n→ malignant", ha="center", va="center", fontsize=9)
    axis.set_axis_off()
    figure.suptitle(heading)
    return figure


def phases(table: pd.DataFrame, heading: str) -> Figure:
    """Losses of the head alone, then of all layers, a panel per arm.

    ``table`` has ``arm, stopped, phase, part, done, loss``. ``done`` is training progress: the head alone up to 0, then
    all layers up to 1; a cross marks where a training was ``stopped``. ``part`` is ``train`` (by step) or ``valid``
    (points). What is above ``HIGHEST_LOSS`` is a mark at the edge.
    """
    names = table["arm"].unique()
    columns = len(names) if len(names) <= 4 else -(-len(names) // 2)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.9 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, name in zip(axes, names, strict=False):
        of_arm = table[table["arm"] == name]
        axis.axvline(0, color="0.6", linestyle=":")
        for (_, part), line in of_arm.groupby(["phase", "part"]):
            colour, style = (BLUE, "-") if part == "train" else (ORANGE, "o--")
            axis.plot(line["done"], line["loss"], style, color=colour, markersize=4, linewidth=1.1, label=part)
            beyond = line.loc[line["loss"] > HIGHEST_LOSS, "done"]
            if len(beyond):  # an empty line that isn't clipped would upset the layout
                axis.plot(beyond, np.full(len(beyond), HIGHEST_LOSS), "^", color=colour, markersize=6, clip_on=False)
        if of_arm["stopped"].any():
            done, loss = of_arm.loc[of_arm["done"].idxmax(), ["done", "loss"]]
            axis.plot(done, np.fmin(loss, HIGHEST_LOSS), "X", color="black", markersize=8, clip_on=False)
        if of_arm["done"].min() >= 0:
            axis.text(-0.5, 0.5, "no head\nbefore", transform=axis.get_xaxis_transform(), ha="center", color="0.4")
        worst = of_arm["loss"].max()
        off = f"\n(highest loss {worst:.0e})" if worst > HIGHEST_LOSS else ""
        axis.set_title(name + (" (stopped)" if of_arm["stopped"].any() else "") + off, fontsize=10)
        axis.set(ylabel="cross-entropy", yscale="log", xlim=(-1.05, 1.05))
        axis.set_ylim(top=HIGHEST_LOSS if table["loss"].max() > HIGHEST_LOSS else None)
        axis.set_xticks([-0.5, 0.5], ["head alone", "all layers"])
        axis.tick_params(which="both", labelsize=9)
        axis.label_outer()
    for axis in figure.axes[len(names) :]:
        axis.set_axis_off()
    for axis in figure.axes[len(names) - columns : len(names)]:  # also where nothing is below
        axis.tick_params(labelbottom=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.axes[0].legend(once.values(), once, frameon=False, fontsize=9)
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def confusion(table: pd.DataFrame, heading: str) -> Figure:
    """Confusion matrix; ``table`` has ``truth, called, patches``, ``value, low, high`` (shares of the true class)."""
    names = list(CLASS_COLOURS)
    figure = Figure(figsize=(7.4, 5.4), layout="constrained")
    axis = figure.subplots()
    shares = table.pivot(index="truth", columns="called", values="value").reindex(index=names, columns=names)
    shown = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for row in table.itertuples():
        text = f"{row.patches}\n{row.value:.1%}\n({row.low:.1%} to {row.high:.1%})"
        colour = "white" if row.value > 0.6 else "0.15"
        axis.text(names.index(row.called), names.index(row.truth), text, ha="center", va="center", color=colour)
    axis.set(title=heading, xlabel="called", ylabel="truth")
    axis.set_xticks(range(2), names)
    axis.set_yticks(range(2), names, rotation=90, va="center")
    figure.colorbar(shown, ax=axis, format=PercentFormatter(1), label="share of the true class")
    return figure


def windowed(image: np.ndarray, low: float, high: float, unit: str) -> Figure:
    """A patch in a window, and where the window lies among its pixel values."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image, vmin=low, vmax=high)
    left.set_axis_off()
    right.hist(image.ravel(), bins=60, color="0.6")
    right.axvspan(low, high, color=BLUE, alpha=0.2, label="window")
    hidden = ((image <= low) | (image >= high)).mean()
    right.set(xlabel=unit, ylabel="pixels", title=f"{hidden:.0%} of the pixels are plain black or white")
    right.legend(frameon=False)
    figure.suptitle(f"Window from {low:.0f} to {high:.0f} {unit}: level {(low + high) / 2:.0f}, width {high - low:.0f}")
    sns.despine(figure)
    return figure


def descent(losses: np.ndarray, lr: float) -> Figure:
    """The loss after each step of a training at one learning rate, (steps,), in nats; a fair coin's loss is dotted."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.minimum(losses, COMMON_LOSS), color=BLUE)
    axis.axhline(np.log(2), linestyle=":", color="0.5", label="a fair coin")
    axis.set(
        xlabel="step", ylabel="loss", ylim=(0, COMMON_LOSS), title=f"Learning rate {lr:g}: ends at {losses[-1]:.3g}"
    )
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def thresholded(y: np.ndarray, p: np.ndarray, threshold: float) -> Figure:
    """What a threshold does: its point on the ROC curve, the two classes on either side, and the four counts."""
    called = p >= threshold
    counts = np.array([[(called[y == true] == said).sum() for said in (0, 1)] for true in (0, 1)])
    sensitivity, false_alarms = counts[1, 1] / counts[1].sum(), counts[0, 1] / counts[0].sum()
    figure = Figure(figsize=(11.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    lines = np.sort(p)[::-1]
    left.plot(*[[(p[y == label] >= line).mean() for line in lines] for label in (0, 1)], color=BLUE)
    left.plot(false_alarms, sensitivity, "o", color=ORANGE, markersize=10)
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"sensitivity {sensitivity:.0%}")
    for label, (name, colour) in enumerate(CLASS_COLOURS.items()):
        middle.hist(p[y == label], bins=np.linspace(0, 1, 21), color=colour, alpha=0.55, label=name)
    middle.axvline(threshold, color="0.2")
    middle.set(xlabel="probability", ylabel="patches", title=f"specificity {1 - false_alarms:.0%}")
    middle.legend(frameon=False)
    sns.heatmap(counts, annot=True, fmt="d", cmap="Blues", cbar=False, ax=right, square=True)
    right.set(xlabel="called", ylabel="truth", title=f"{(called == (y == 1)).mean():.0%} called right")
    right.set_xticklabels(CLASS_COLOURS)
    right.set_yticklabels(CLASS_COLOURS)
    figure.suptitle(f"Called malignant from a probability of {threshold:.2f}")
    sns.despine(figure)
    return figure


def curves(table: pd.DataFrame, prevalence: float, heading: str) -> Figure:
    """ROC and precision-recall curves with bands; ``table`` has ``name, curve, x, value, low, high``."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, curve in ((left, "ROC"), (right, "PR")):
        chosen = table[table["curve"] == curve]
        for name, colour, style in zip(chosen["name"].unique(), (BLUE, ORANGE, GREEN), ("-", "--", "-."), strict=False):
            line = chosen[chosen["name"] == name]
            axis.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0)
            axis.plot(line["x"], line["value"], style, color=colour, label=name)
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        for along in (axis.xaxis, axis.yaxis):
            along.set_major_formatter(PercentFormatter(1))
    left.plot([0, 1], [0, 1], ":", color="0.5", label="chance")
    right.axhline(prevalence, linestyle=":", color="0.5", label="chance")
    left.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity")
    right.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision")
    left.legend(frameon=False, loc="lower right")
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def cases(
    images: np.ndarray,
    masks: np.ndarray,
    maps: np.ndarray,
    titles: list[str],
    window: list[float],
    heading: str,
    columns: int,
) -> Figure:
    """Patches beside their activation maps in 0..1 with outlines, (N, 64, 64) each; ``columns`` pairs a row."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.8, 1.95 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, mask, evidence, title) in enumerate(zip(images, masks, maps, titles, strict=True)):
        left, right = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        for axis in (left, right):
            axis.imshow(image, vmin=window[0], vmax=window[1], interpolation="nearest")
        shown = right.imshow(evidence, vmin=0, vmax=1, cmap="viridis", alpha=LAID_OVER * evidence)
        if mask.any():
            right.contour(mask, levels=[0.5], colors=[ORANGE], linewidths=1)
        left.set_title(title, fontsize=8, loc="left")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30, pad=0.015)
    bar.set_label("relative evidence for malignant", fontsize=9)
    # As it looks laid over grey: the less evidence, the more transparent
    bar.ax.set_facecolor("0.5")
    bar.solids.set_alpha(LAID_OVER * np.linspace(0, 1, 256)[:, None])
    figure.suptitle(heading)
    return figure


def gallery(
    image: np.ndarray,
    mask: np.ndarray,
    maps: np.ndarray,
    rows: list[str],
    columns: list[str],
    window: list[float],
    heading: str,
) -> Figure:
    """Activation maps, one row per network or patch: each method as computed, then overlaid on the patch.

    Args:
        image: the patch of all rows, (64, 64), or of each, (rows, 64, 64).
        mask: true inside the nodule, likewise; an empty one has no outline.
        maps: (rows, 2 * methods, 64, 64) in 0..1; every second one is overlaid.
        rows: names of the networks or patches.
        columns: titles of the maps, two per method.
        window: pixel values shown as black and white.
        heading: the title.
    """
    figure = Figure(figsize=(1.7 * (1 + len(columns)) + 1.2, 1.65 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    images, masks = (np.broadcast_to(of_row, (len(rows), *of_row.shape[-2:])) for of_row in (image, mask))
    for name, line, shown, image, mask in zip(rows, axes, maps, images, masks, strict=True):
        line[0].imshow(image, vmin=window[0], vmax=window[1], interpolation="nearest")
        line[0].set_ylabel(name, fontsize=9)
        for i, (axis, evidence) in enumerate(zip(line[1:], shown, strict=True)):
            if i % 2:
                axis.imshow(image, vmin=window[0], vmax=window[1], interpolation="nearest")
            alpha = LAID_OVER * evidence if i % 2 else 1
            axis.imshow(evidence, vmin=0, vmax=1, cmap="viridis", alpha=alpha, interpolation="nearest")
        for axis in line:
            axis.set(xticks=[], yticks=[])
            if mask.any():
                axis.contour(mask, levels=[0.5], colors=[ORANGE], linewidths=1)
    for axis, name in zip(axes[0], ["patch", *columns], strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle(heading)
    return figure


def inspection(
    image: np.ndarray, evidence: np.ndarray, seen: np.ndarray, p: np.ndarray, window: list[float], heading: str
) -> Figure:
    """One patch, its activation map, and its views with the probability of each.

    Args:
        image: the patch, (64, 64).
        evidence: its activation map, (64, 64) in 0..1.
        seen: its views, (V, 64, 64), V even.
        p: probability of malignancy of each view, (V,).
        window: pixel values shown as black and white.
        heading: the title.
    """
    half = len(seen) // 2
    figure = Figure(figsize=(5.6 + 1.4 * half, 3.5), layout="constrained")
    grid = figure.add_gridspec(2, half + 4)
    places = [grid[:, :2], grid[:, 2:4], *(grid[i // half, 4 + i % half] for i in range(len(seen)))]
    names = ["patch", "evidence for malignant", *(f"p {value:.2f}" for value in p)]
    for place, shown, name in zip(places, [image, image, *seen], names, strict=True):
        axis = figure.add_subplot(place)
        axis.imshow(shown, vmin=window[0], vmax=window[1], interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    figure.axes[1].imshow(evidence, vmin=0, vmax=1, cmap="viridis", alpha=LAID_OVER * evidence)
    figure.suptitle(heading, fontsize=12, parse_math=False)  # a nodule's name may have dollar signs
    return figure


def bands(
    table: pd.DataFrame, columns: int, xlabel: str, ylabels: list[str], heading: str, log: bool = False
) -> Figure:
    """Lines with bands, one panel per ``panel``, one colour per ``name``.

    Args:
        table: ``panel, name, x, value, low, high``.
        columns: panels per row; a row shares its vertical scale.
        xlabel: of each column.
        ylabels: one per row.
        heading: the title.
        log: whether x is logarithmic.
    """
    panels, names = table["panel"].unique(), table["name"].unique()
    rows = -(-len(panels) // columns)
    wide = {1: 8.0, 2: 5.0, 3: 3.9}.get(columns, 2.5)
    figure = Figure(figsize=(max(9.0, wide * columns + 1), 3.2 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    styles = dict(zip(names, zip((BLUE, ORANGE, GREEN, "0.4"), ("-", "--", "-.", ":"), strict=True), strict=False))
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, line in table[table["panel"] == panel].groupby("name", sort=False):
            colour, style = styles[name]
            axis.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0)
            dots = "o" if len(line) <= 8 else ""
            axis.plot(line["x"], line["value"], dots + style, color=colour, markersize=4, label=name)
        axis.set(title=panel, xlabel=xlabel, xscale="log" if log else "linear")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        places = table["x"].unique()
        if log or len(places) <= 6:
            axis.set_xticks(places[:: 1 + (len(places) > 6)])
            axis.minorticks_off()
        axis.label_outer()
    for axis, label in zip(axes[:, 0], ylabels, strict=True):
        axis.set_ylabel(label)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def reliability(table: pd.DataFrame, heading: str) -> Figure:
    """Share of malignant patches against predicted probability; ``table`` has ``name, x, value, low, high``."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], ":", color="0.5", label="perfect")
    for name, colour, marker in zip(table["name"].unique(), (ORANGE, BLUE), "so", strict=False):
        line = table[table["name"] == name]
        axis.errorbar(
            line["x"], line["value"], yerr=_lengths(line), fmt=f"{marker}-", color=colour, capsize=3, label=name
        )
    axis.set(title=heading, xlabel="predicted probability", ylabel="malignant", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for along in (axis.xaxis, axis.yaxis):
        along.set_major_formatter(PercentFormatter(1))
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def differences(table: pd.DataFrame, label: str, names: list[str], heading: str) -> Figure:
    """A matrix of differences, bold where they are sure.

    Args:
        table: ``row, column, value, sure`` (0 or 1).
        label: of the colour bar.
        names: of the horizontal and the vertical axis.
        heading: the title.
    """
    rows, columns = table["row"].unique(), table["column"].unique()
    figure = Figure(figsize=(4.2 + 0.75 * len(columns), 2.2 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    grid = table.pivot(index="row", columns="column", values="value").reindex(index=rows, columns=columns)
    most = max(0.01, float(table["value"].abs().max()))
    shown = axis.imshow(grid, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    for cell in table.itertuples():
        colour = "white" if abs(cell.value) > 0.6 * most else "0.1"
        place = (list(columns).index(cell.column), list(rows).index(cell.row))
        weight = "bold" if cell.sure else "normal"
        axis.text(*place, f"{cell.value:+.3f}", ha="center", va="center", fontsize=9, color=colour, weight=weight)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=10)
    axis.set_yticks(range(len(rows)), rows, fontsize=10)
    axis.set(title=heading, xlabel=names[0], ylabel=names[1])
    figure.colorbar(shown, ax=axis, label=label)
    return figure


def kinship(table: pd.DataFrame, line: float, heading: str) -> Figure:
    """Pixel correlation of pairs, by what they share; ``table`` has ``correlation, kin``, one row per pair."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    edges = np.histogram_bin_edges(table["correlation"], 60)
    for name, colour, style in zip(KIN, (BLUE, BLUE, ORANGE, GREEN), ("-", "-", "--", "-."), strict=True):
        if (chosen := table["kin"] == name).any():
            look = dict(histtype="step", color=colour, linestyle=style, linewidth=1.6)
            axis.hist(table.loc[chosen, "correlation"], edges, label=name, **look)
    axis.axvline(line, color="0.4", linestyle=":")
    axis.set(title=heading, xlabel="cross-correlation of the pixels at the best shift", ylabel="pairs", yscale="log")
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def whole_slice(plane: np.ndarray, place: np.ndarray, window: list[float]) -> Figure:
    """A slice that fills the figure, with a cross at a place (x, y)."""
    figure = Figure(figsize=(5, 5 * plane.shape[0] / plane.shape[1]))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(plane, vmin=window[0], vmax=window[1], aspect="auto")
    axis.plot(*place, "+", color=ORANGE, markersize=18)
    _lettered(axis, "axial")
    axis.set_axis_off()
    return figure


def planes(
    first: np.ndarray,
    second: np.ndarray,
    third: np.ndarray,
    sides_mm: list[list[float]],
    window: list[float],
    heading: str,
) -> Figure:
    """The axial, coronal and sagittal plane through a place; ``sides_mm`` has the width and height of each."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.91))  # between the title and the source
    _crossed(figure.subplots(1, 3), (first, second, third), ["axial", "coronal", "sagittal"], sides_mm, window)
    figure.suptitle(heading, fontsize=12)
    return figure


def _lettered(axis: Any, plane: str) -> None:
    """Mark where the left and the upper edge of a plane of a scan lie in the patient; leave other pictures alone."""
    for letter, at in zip(EDGES.get(plane, ""), ((0.03, 0.43), (0.43, 0.93)), strict=False):
        text = axis.text(*at, letter, transform=axis.transAxes, color=ORANGE, fontsize=9, weight="bold")
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _crossed(
    axes: np.ndarray,
    pictures: tuple[np.ndarray, ...],
    names: list[str],
    sides_mm: list[list[float]],
    window: list[float],
) -> None:
    """Draw pictures that have a name, with a cross that leaves their middle free; in mm where their sides are known."""
    for axis, picture, name, sides in zip(axes, pictures, names, sides_mm, strict=True):
        if not name:
            axis.set_axis_off()
            continue
        across, down = (side / 2 for side in sides or picture.shape[::-1])
        up = down if EDGES.get(name, "").endswith("H") else -down  # numbers grow towards the left, back and head
        axis.imshow(picture, vmin=window[0], vmax=window[1], extent=(-across, across, -up, up))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("mm" if sides else "pixels", fontsize=8)
        axis.tick_params(labelsize=8)
        for line in (axis.axvline, axis.axhline):
            for low, high in ((0, 0.3), (0.7, 1)):
                line(0, low, high, color=ORANGE, linewidth=0.8)
        _lettered(axis, name)


def opinion(
    first: np.ndarray,
    second: np.ndarray,
    third: np.ndarray,
    names: list[str],
    sides_mm: list[list[float]],
    patch: np.ndarray,
    attention: np.ndarray,
    evidence: np.ndarray,
    parts: pd.DataFrame,
    window: list[float],
    heading: str,
) -> Figure:
    """A nodule as people see it, as the networks see it, and what they make of it.

    Args:
        first: a picture of the nodule, such as a plane through it, (height, width).
        second: another.
        third: another.
        names: titles of the three.
        sides_mm: width and height of each in mm; empty lists where unknown.
        patch: what the networks see, as they scale it, (side, side).
        attention: how much of each pixel they take to be nodule, 0 to 1, (side, side).
        evidence: what each pixel adds to the logit of malignant, (side, side).
        parts: ``name, value``: what groups of features add to it.
        window: pixel values shown as black and white.
        heading: the title.
    """
    figure = Figure(figsize=(10, 6.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.96))  # below the title
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    _crossed(top.subplots(1, 3), (first, second, third), names, sides_mm, window)
    left, middle, right = bottom.subplots(1, 3, width_ratios=[1, 1.3, 1.1])
    for axis in (left, middle):
        axis.imshow(patch, vmin=-1.5, vmax=3)
        axis.set_axis_off()
    if attention.max() > 0.5 > attention.min():
        left.contour(attention, levels=[0.5], colors=[ORANGE], linewidths=1.2)
    left.set_title("what the networks see;\noutlined: taken to be nodule", fontsize=10)
    most = max(float(np.abs(evidence).max()), 1e-9)
    colours = LinearSegmentedColormap.from_list("evidence", [BLUE, "0.9", ORANGE])
    shown = middle.imshow(evidence, vmin=-most, vmax=most, cmap=colours, alpha=LAID_OVER * np.abs(evidence) / most)
    middle.set_title("evidence\ninside the nodule", fontsize=10)
    bar = bottom.colorbar(shown, ax=middle, shrink=0.8)
    bar.set_ticks([-most, 0, most], labels=["benign", "0", "malignant"])
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=8)
    bars = right.barh(parts["name"], parts["value"], color=[ORANGE if value > 0 else BLUE for value in parts["value"]])
    right.bar_label(bars, fmt="{:+.2f}", fontsize=8, padding=2)
    right.margins(x=0.2)
    right.axvline(0, color="0.3", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(labelsize=8)
    right.set_xlabel("added to the logit of malignant", fontsize=8)
    right.set_title("for and against, compared\nwith the average patch", fontsize=10)
    sns.despine(ax=right)
    figure.suptitle(heading, fontsize=12, parse_math=False)
    return figure
