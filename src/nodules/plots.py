"""Tables and arrays to figures: no model, no file. Every function returns a Figure and takes plain data.

Colours are seaborn's colour-blind-safe palette: blue is benign, orange malignant, everywhere.
"""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nodules.errors import InputError

sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc={"image.cmap": "gray"})
BLUE, ORANGE, GREEN = sns.color_palette("colorblind")[:3]
CLASS_COLOURS = {"benign": BLUE, "malignant": ORANGE}


def stamp(figure: Figure, text: str) -> Figure:
    """Write below a figure where its data come from."""
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color="0.4")
    return figure


def patch_grid(
    images: np.ndarray, titles: list[str], window: list[float], unit: str, heading: str, columns: int
) -> Figure:
    """Patches (N, 64, 64) in rows of ``columns``, shown in ``window`` (low, high), with the scale beside them."""
    if len(images) != len(titles):
        raise InputError(f"{heading}: {len(images)} images but {len(titles)} titles; give one each")
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


def class_counts(table: pd.DataFrame, heading: str) -> Figure:
    """Bars of patches by split and class; ``table`` has ``split, class, patches``."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    sns.barplot(table, x="split", y="patches", hue="class", palette=CLASS_COLOURS, saturation=1, ax=axis)
    for bars in axis.containers:
        axis.bar_label(bars, fontsize=9)
    axis.set(title=heading, xlabel="", ylabel="patches")
    sns.despine(figure)
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
    """Histogram and cumulative share of nodule diameters; ``table`` has ``diameter_mm, class``, a row a nodule."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shared = dict(x="diameter_mm", hue="class", palette=CLASS_COLOURS, hue_order=list(CLASS_COLOURS))
    sns.histplot(table, binwidth=2, ax=left, **shared)
    sns.ecdfplot(table, ax=right, legend=False, **shared)
    left.get_legend().set_title("")
    left.set(xlabel="nodule diameter [mm]", ylabel="nodules", title="How many")
    right.set(xlabel="nodule diameter [mm]", ylabel="share of the class", title="Share at most so wide")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def patients_per_split(table: pd.DataFrame, heading: str) -> Figure:
    """Patients in each split, and how many patches each brings; ``table`` has ``split, patches``, a row each."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sns.countplot(table, x="split", color=GREEN, saturation=1, ax=left)
    left.bar_label(left.containers[0], fontsize=9)
    sns.boxplot(table, x="split", y="patches", color=GREEN, saturation=1, width=0.5, ax=right)
    left.set(xlabel="", ylabel="patients", title="Patients")
    right.set(xlabel="", ylabel="patches of one patient", title="Patches each of them brings", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(heading)
    sns.despine(figure)
    return figure


def intervals(table: pd.DataFrame, label: str, chance: float, heading: str) -> Figure:
    """Values with intervals, one row each; ``table`` has ``name, value, low, high``."""
    figure = Figure(figsize=(8, 1.4 + 0.55 * len(table)), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(table))[::-1]
    errors = np.abs(table[["low", "high"]].to_numpy() - table[["value"]].to_numpy()).T
    axis.axvline(chance, color="0.6", linestyle=":", linewidth=1.5)
    axis.errorbar(table["value"], rows, xerr=errors, fmt="o", color=BLUE, capsize=4)
    for row, value in zip(rows, table["value"], strict=True):
        axis.annotate(f"{value:.3f}", (value, row), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axis.set(title=heading, xlabel=label, ylim=(-0.6, len(table) - 0.3))
    axis.set_yticks(rows, table["name"])
    sns.despine(figure)
    return figure
