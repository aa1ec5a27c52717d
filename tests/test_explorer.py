import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from nodules import explorer
from nodules.networks import bank, bodies, finetune, heads

IMAGES = np.random.default_rng(0).integers(-1000, 400, (6, 64, 64), dtype=np.int16)
TABLE = pd.DataFrame({"id": list("abcdef"), "y": [0, 1, 0, 1, 0, 1], "p_tta": [0.1, 0.9, 0.6, 0.3, 0.2, 0.8]})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    body = bodies.body("resnet34", "random")
    return finetune.Network(body, "all", heads.head(bank.width(body, "all"))).to(bank.device())


@pytest.fixture
def explorer(network):
    return explorer.Explorer(TABLE.assign(patient="x"), IMAGES, network, 1, [-1000, 400])


def listed(explorer):
    return [name for name, _ in explorer.patch.options]


def test_the_surest_malignant_comes_first_with_its_own_picture(explorer):
    assert listed(explorer) == list("bfcdea")
    assert np.array_equal(explorer.images[explorer.patch.value], IMAGES[1])


def test_class_and_range_narrow_the_list_and_the_picture_follows(explorer):
    first = explorer.picture.value
    assert Image.open(io.BytesIO(first)).format == "PNG"
    explorer.kind.value = "benign"
    assert listed(explorer) == list("cea") and explorer.picture.value != first
    explorer.range.value = (0, 0.25)
    assert listed(explorer) == list("ea")
    before = explorer.picture.value
    explorer.patch.value = explorer.patch.options[1][1]
    assert explorer.picture.value != before
    explorer.range.value = (0.95, 1)
    assert listed(explorer) == [] and explorer.picture.value == b""
    explorer.range.value = (0, 1)
    assert listed(explorer) == list("cea") and explorer.picture.value


def test_a_figure_shows_the_patch_its_map_and_eight_views_with_their_probabilities(explorer, network):
    figure = explorer.draw(explorer.patch.value)
    p = finetune.predict(network, IMAGES[1:2])[0]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["patch", "evidence for malignant", *(f"p {value:.2f}" for value in p)]
    assert figure.get_suptitle() == "b\np 0.90, x, rated malignant"


def test_without_widgets_a_still_picture_stands_in_its_place(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 500
