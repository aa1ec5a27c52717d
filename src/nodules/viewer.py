"""A scan to look through: three planes, a slider, windows, and a place chosen by a click."""

from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib.figure import Figure

from nodules import plots
from nodules.data import cut
from nodules.data.scans import Scan
from nodules.interactive import DPI, both_forms

WINDOWS = {"lung": [-1350, 150], "soft tissue": [-160, 240], "bone": [-300, 1200]}  # HU


class Clickable(anywidget.AnyWidget):
    """A PNG that tells where it was clicked: ``x`` and ``y`` as shares of its width and height, from the top left."""

    _esm = """
    export default { render({ model, el }) {
      const image = document.createElement("img");
      image.style.cssText = "max-width: 100%; cursor: crosshair";
      image.alt = "axial slice; click to choose a place";
      const draw = () => {
        URL.revokeObjectURL(image.src);
        image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
      };
      image.addEventListener("click", (event) => {
        const box = image.getBoundingClientRect();
        model.set("at", [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
        model.save_changes();
      });
      model.on("change:png", draw);
      draw();
      el.append(image);
    } };
    """
    png = traitlets.Bytes().tag(sync=True)
    at = traitlets.List(traitlets.Float()).tag(sync=True)


class Viewer:
    """Look through a scan, and choose a place in it.

    Attributes:
        voxel: the place chosen, x, y, z.

    Args:
        scan: what to look at.
        voxel: the place to begin with, x, y, z.
    """

    def __init__(self, scan: Scan, voxel: np.ndarray) -> None:
        self.scan, self.voxel = scan, np.rint(voxel).astype(int)
        self.slice = widgets.IntSlider(
            self.voxel[2], min=0, max=len(scan.hu) - 1, description="slice", continuous_update=False
        )
        self.window = widgets.Dropdown(options=list(WINDOWS), description="window")
        self.axial, self.planes, self.where = Clickable(), widgets.Image(format="png"), widgets.Label()
        self.box = widgets.VBox(
            [widgets.HBox([self.slice, self.window]), self.where, widgets.HBox([self.axial, self.planes])]
        )
        self.axial.observe(self._clicked, "at")
        self.slice.observe(self._moved, "value")
        self.window.observe(self._draw, "value")
        self._draw()

    def figure(self) -> Figure:
        """The three planes through the place chosen, in the window chosen."""
        pictures, sides = cut.planes(self.scan, self.voxel)
        return plots.planes(*pictures, sides, WINDOWS[self.window.value], f"Through voxel {self.place()}")

    def place(self) -> str:
        """The place chosen, in voxels and in mm."""
        voxel, mm = (", ".join(f"{value:g}" for value in each) for each in (self.voxel, self.mm().round(1)))
        return f"{voxel}; {mm} mm"

    def mm(self) -> np.ndarray:
        """The place chosen, in mm."""
        return self.scan.mm(self.voxel)

    def _clicked(self, change: dict[str, Any]) -> None:
        rows, columns = self.scan.hu.shape[1:]
        x, y = change["new"]
        self.voxel[:2] = np.clip([x * columns, y * rows], 0, [columns - 1, rows - 1]).astype(int)
        self._draw()

    def _moved(self, change: dict[str, Any]) -> None:
        self.voxel[2] = change["new"]
        self._draw()

    def _draw(self, _: Any = None) -> None:
        low, high = WINDOWS[self.window.value]
        self.axial.png = plots.png(plots.whole_slice(self.scan.hu[self.voxel[2]], self.voxel[:2], [low, high]), DPI)
        self.planes.value = plots.png(self.figure(), DPI)
        self.where.value = f"voxel {self.place()}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return both_forms(self.box, self.figure(), options)
