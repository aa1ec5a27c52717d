"""Patches shown in another way are the same patches, in the same order."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nodules.data import shown, split

TABLE = pd.DataFrame(
    {
        "id": list("abcdef"),
        "nodule": ["one"] * 4 + ["two"] * 2,
        "ratings": ["5;3;1"] * 4 + ["2"] * 2,
        "pixel_spacing_mm": [1.4, 0.7, 0.7, 0.7, 0.7, np.nan],
    }
)


@pytest.fixture
def part():
    """A bright square of 16 pixels in the middle of each of six patches, which is the nodule."""
    masks = np.zeros((6, 64, 64), bool)
    masks[:, 24:40, 24:40] = True
    y = np.array([1, 1, 1, 1, 0, 0])
    return split.Part((200 * masks).astype(np.uint8), y, np.arange(6), TABLE, np.arange(6), masks)


def test_a_frame_is_what_the_network_cuts_off(part):
    seen = shown.framed(part, 8)
    assert seen.images.shape == (6, 80, 80) and (seen.images[:, 8:-8, 8:-8] == part.images).all()
    assert seen.outlines.sum() == part.outlines.sum()


def test_pixels_of_one_width_keep_sizes_in_mm(part):
    seen = shown.of_one_width(part)
    sides = np.sqrt(seen.outlines.sum((1, 2)))
    assert sides[0] == pytest.approx(32, abs=2), "pixels twice as wide make twice as many"
    assert (sides[1:] == 16).all() and np.allclose(seen.images[1:], part.images[1:], atol=1e-3)
    inside = [image[outline > 0].mean() for image, outline in zip(seen.images, seen.outlines, strict=True)]
    assert min(inside) > 190, "outline and image are changed alike"


def test_finer_pixels_show_the_same_middle(part):
    seen = shown.finer(part, 8)
    assert seen.images.shape == (6, 88, 88), "of which a margin of 8 leaves one and a half times 48"
    assert seen.outlines[0].sum() == 24**2 and seen.outlines[0, 32:56, 32:56].all()


def test_slices_count_as_nodules_or_as_often_as_read(part):
    assert len(np.unique(shown.slice_by_slice(part).nodules)) == 6
    counts = pd.Series(shown.by_readers(part).nodules).value_counts()
    assert sorted(counts) == [1, 1, 2, 2], "three readers of one nodule, one of the other"


def test_slices_are_labelled_by_one_reader_in_turn(part):
    assert shown.of_single_readers(part).y.tolist() == [1, 1, 0, 1, 0, 0], "5, 3 (as all together), 1, 5; 2, 2"


def test_unknown_outlines_stay_unknown(part):
    part = replace(part, masks=None)
    for seen in (shown.framed(part, 8), shown.of_one_width(part), shown.finer(part, 8)):
        assert np.isnan(seen.outlines).all()
