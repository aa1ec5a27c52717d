"""Guesses and figures with controls, and what stands in for them where no kernel is running."""

import base64
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from nodules import plots

DPI = 80
WIDE, UNCUT = "22em", {"description_width": "initial"}  # of a slider, and of its label


def both_forms(box: widgets.Widget, still: Figure, options: dict[str, Any]) -> dict[str, Any]:
    """A widget and a still picture, of which a front end picks the best that it can show."""
    picture = base64.b64encode(plots.png(still, DPI)).decode()
    return {**box._repr_mimebundle_(**options), "image/png": picture}


class Controlled:
    """A figure with controls, drawn again whenever one is moved.

    Args:
        draw: of the controls' values, by name.
        controls: widgets with a ``value``, by name.
    """

    def __init__(self, draw: Callable[..., Figure], **controls: widgets.Widget) -> None:
        self.draw, self.controls = draw, controls
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.box = widgets.VBox([widgets.HBox(list(controls.values())), self.picture])
        for control in controls.values():
            control.observe(self._show, "value")
        self._show()

    def figure(self) -> Figure:
        """The figure at the controls' present values."""
        return self.draw(**{name: control.value for name, control in self.controls.items()})

    def _show(self, _: Any = None) -> None:
        self.picture.value = plots.png(self.figure(), DPI)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return both_forms(self.box, self.figure(), options)


class Guess:
    """A question to answer before the result is seen: a slider, or pen and paper where no kernel is running.

    Args:
        question: what will come out?
        low: the least that can be guessed.
        high: the most.
    """

    def __init__(self, question: str, low: float, high: float) -> None:
        self.question, self.made = question, False
        step = (high - low) / 100
        self.slider = widgets.FloatSlider(
            (low + high) / 2, min=low, max=high, step=step, description="your guess", readout_format=".2f"
        )
        self.box = widgets.VBox([widgets.Label(question), self.slider])
        self.slider.observe(self._moved, "value")

    def compare(self, value: float, low: float = np.nan, high: float = np.nan) -> None:
        """Print the guess beside what came out, with its interval where it has one."""
        came = f"it came out as {value:.3f}" + (f" ({low:.3f} to {high:.3f})" if np.isfinite(low) else "")
        if not self.made:
            print(f"You made no guess; {came}.")
        elif low <= self.slider.value <= high:
            print(f"You guessed {self.slider.value:.2f}, which its interval holds; {came}.")
        else:
            print(f"You guessed {self.slider.value:.2f}; {came}.")

    def _moved(self, _: Any = None) -> None:
        self.made = True

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        alone = f"<p><strong>{self.question}</strong> Write your guess down, then read on.</p>"
        return {**self.box._repr_mimebundle_(**options), "text/html": alone}


def slider(label: str, value: float, low: float, high: float, step: float) -> widgets.FloatSlider:
    """A slider that draws when it is let go."""
    return widgets.FloatSlider(value, min=low, max=high, step=step, **_look(label))


def chosen(label: str, values: list[Any], value: Any) -> widgets.SelectionSlider:
    """A slider over a few values."""
    return widgets.SelectionSlider(options=values, value=value, **_look(label))


def _look(label: str) -> dict[str, Any]:
    return {"description": label, "continuous_update": False, "layout": widgets.Layout(width=WIDE), "style": UNCUT}
