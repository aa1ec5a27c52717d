"""A widget that shows how the network sees a patch, and a still picture for when no kernel is running."""

from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from nodules import plots
from nodules.data import transforms
from nodules.data.sources import CLASSES
from nodules.interactive import DPI, both_forms
from nodules.networks import maps
from nodules.networks.network import predict

SHOWN = {"both classes": [0, 1], "benign": [0], "malignant": [1]}


def titles(table: pd.DataFrame) -> list[str]:
    """Two lines per patch: its class and the probability ``p_tta`` of malignancy; its ``id``, with ratings if known."""
    lines = []
    for row in table.to_dict("records"):
        readers = f" · readers {row['ratings'].replace(';', ' ')}" if "ratings" in row else ""
        lines.append(f"{CLASSES[row['y']]} · model: {row['p_tta']:.0%} malignant\n{row['id']}{readers}")
    return lines


class Explorer:
    """Choose a class and a range of probabilities, then a patch; see its views, its map and its probability.

    Args:
        table: one row per patch: ``id, y, p_tta``, and ``ratings`` where known.
        images: the same patches, (N, 64, 64).
        network: with ``taps``, like :class:`nodules.networks.network.Network`.
        stage: whose maps Grad-CAM weights.
        window: pixel values shown as black and white.

    Where widgets don't work, as in an executed notebook on a web page, the patches with the highest, a middle and the
    lowest probability are shown instead.
    """

    def __init__(
        self, table: pd.DataFrame, images: np.ndarray, network: nn.Module, stage: int, window: list[float]
    ) -> None:
        order = table["p_tta"].argsort(kind="stable")[::-1]
        self.table, self.images = table.iloc[order].reset_index(drop=True), images[order]
        self.titles = titles(self.table)
        self.network, self.stage, self.window = network, stage, window
        self.kind = widgets.Dropdown(options=list(SHOWN), description="class")
        self.range = widgets.FloatRangeSlider(value=(0, 1), min=0, max=1, step=0.05, description="probability")
        self.patch = widgets.Dropdown(description="patch")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.box = widgets.VBox([widgets.HBox([self.kind, self.range, self.patch]), self.picture])
        self.kind.observe(self._list, "value")
        self.range.observe(self._list, "value")
        self.patch.observe(self._show, "value")
        self._list()

    def rows(self) -> np.ndarray:
        """Patches in the chosen class and range, the highest probability first."""
        fit = self.table["y"].isin(SHOWN[self.kind.value]) & self.table["p_tta"].between(*self.range.value)
        return np.flatnonzero(fit)

    def draw(self, row: int) -> Figure:
        """The figure of one patch."""
        image = self.images[row : row + 1]
        p = predict(self.network, image)[0]
        evidence = maps.overlay(maps.grad_cam(self.network, image, self.stage), image.shape[1])[0]
        seen = np.stack([transforms.dihedral(torch.from_numpy(image[0]), which).numpy() for which in range(len(p))])
        return plots.inspection(image[0], evidence, seen, p, self.window, self.titles[row])

    def still(self) -> Figure:
        """The highest, a middle and the lowest probability, side by side."""
        rows = np.unique(np.linspace(0, len(self.table) - 1, 3).astype(int))
        evidence = maps.overlay(maps.grad_cam(self.network, self.images[rows], self.stage), self.images.shape[1])
        titles = [self.titles[row] for row in rows]
        no_outlines = np.zeros(evidence.shape, dtype=bool)
        return plots.cases(self.images[rows], no_outlines, evidence, titles, self.window, "Pick a patch", columns=3)

    def _list(self, _: Any = None) -> None:
        self.patch.options = [(self.table["id"][row], int(row)) for row in self.rows()]
        self.patch.index = 0 if self.patch.options else None  # a new value calls _show

    def _show(self, _: Any = None) -> None:
        self.picture.value = b"" if self.patch.value is None else plots.png(self.draw(self.patch.value), DPI)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return both_forms(self.box, self.still(), options)
