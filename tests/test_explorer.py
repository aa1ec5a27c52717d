import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from nodules import explorer
from nodules.networks import bank, bodies, heads
from nodules.networks.device import device
from nodules.networks.network import Network, predict

IMAGES = np.random.default_rng(0).integers(-1000, 400, (6, 64, 64), dtype=np.int16)
TABLE = pd.DataFrame({"id": list("abcdef"), "y": [0, 1, 0, 1, 0, 1], "p_tta": [0.1, 0.9, 0.6, 0.3, 0.2, 0.8]})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    body = bodies.build(bodies.Spec("resnet34", "random"))
    return Network(body, "all", heads.head(bank.width(body, "all"))).to(device())


@pytest.fixture
def widget(network):
    return explorer.Explorer(TABLE.assign(patient="x"), IMAGES, network, 1, [-1000, 400])


def listed(widget):
    return [name for name, _ in widget.patch.options]


def test_the_surest_malignant_comes_first_with_its_own_picture(widget):
    assert listed(widget) == list("bfcdea")
    assert np.array_equal(widget.images[widget.patch.value], IMAGES[1])


def test_class_and_range_narrow_the_list_and_the_picture_follows(widget):
    first = widget.picture.value
    assert Image.open(io.BytesIO(first)).format == "PNG"
    widget.kind.value = "benign"
    assert listed(widget) == list("cea") and widget.picture.value != first
    widget.range.value = (0, 0.25)
    assert listed(widget) == list("ea")
    before = widget.picture.value
    widget.patch.value = widget.patch.options[1][1]
    assert widget.picture.value != before
    widget.range.value = (0.95, 1)
    assert listed(widget) == [] and widget.picture.value == b""
    widget.range.value = (0, 1)
    assert listed(widget) == list("cea") and widget.picture.value


def test_a_figure_shows_the_patch_its_map_and_eight_views_with_their_probabilities(widget, network):
    figure = widget.draw(widget.patch.value)
    p = predict(network, IMAGES[1:2])[0]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["patch", "evidence for malignant", *(f"p {value:.2f}" for value in p)]
    assert figure.get_suptitle() == "malignant · model: 90% malignant\nb"


def test_without_widgets_a_still_picture_stands_in_its_place(widget):
    bundle = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 500


def test_titles_say_what_the_source_knows():
    table = pd.DataFrame({"id": ["a"], "y": [0], "p_tta": [0.256], "ratings": ["5;4"]})
    assert explorer.titles(table) == ["benign · model: 26% malignant\na · readers 5 4"]
    assert explorer.titles(table.drop(columns="ratings")) == ["benign · model: 26% malignant\na"]
