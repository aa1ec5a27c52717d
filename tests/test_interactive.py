"""Guesses and figures with controls, with and without a kernel."""

import io

import numpy as np
import pytest
from PIL import Image

from nodules import plots
from nodules.interactive import Controlled, Guess, chosen, slider


@pytest.fixture
def drawn():
    """A figure of one number with a slider, and the numbers that it was drawn with."""
    seen = []

    def draw(lr):
        seen.append(lr)
        return plots.descent(np.full(3, lr), lr)

    return Controlled(draw, lr=slider("rate", 0.5, 0, 1, 0.1)), seen


def test_a_moved_control_draws_again(drawn):
    figure, seen = drawn
    before = figure.picture.value
    figure.controls["lr"].value = 0.9
    assert seen[-1] == 0.9 and figure.picture.value != before
    assert Image.open(io.BytesIO(figure.picture.value)).format == "PNG"


def test_without_a_kernel_a_still_picture_stands_in(drawn):
    shown = drawn[0]._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(shown)


def test_a_choice_of_few_values():
    control = chosen("slices", [1, 3, 12], 12)
    assert control.value == 12 and list(control.options) == [1, 3, 12]


@pytest.mark.parametrize(
    ("moved", "ends", "told"),
    [
        (None, (), "You made no guess; it came out as 0.812."),
        (0.7, (), "You guessed 0.70; it came out as 0.812."),
        (0.8, (0.75, 0.9), "You guessed 0.80, which its interval holds; it came out as 0.812 (0.750 to 0.900)."),
        (0.2, (0.75, 0.9), "You guessed 0.20; it came out as 0.812 (0.750 to 0.900)."),
    ],
)
def test_a_guess_stands_beside_what_came_out(moved, ends, told, capsys):
    guess = Guess("How often?", 0, 1)
    if moved is not None:
        guess.slider.value = moved
    guess.compare(0.8123, *ends)
    assert capsys.readouterr().out == told + "\n"


def test_without_a_kernel_a_guess_asks_for_pen_and_paper():
    shown = Guess("How often?", 0, 1)._repr_mimebundle_()
    assert "How often?" in shown["text/html"] and "application/vnd.jupyter.widget-view+json" in shown


def test_a_threshold_counts_both_classes():
    figure = plots.thresholded(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9]), 0.5)
    assert [axis.get_title() for axis in figure.axes] == ["sensitivity 50%", "specificity 50%", "50% called right"]


def test_a_window_says_how_much_it_hides():
    figure = plots.windowed(np.array([[-1000, -500], [0, 300]]), -600, 200, "HU")
    assert "50% of the pixels" in figure.axes[1].get_title() and "level -200, width 800" in plots.title(figure)
