"""The viewer of scans, with and without a kernel."""

import io

import numpy as np
import pytest
from PIL import Image

from nodules.data import scans
from nodules.viewer import WINDOWS, Viewer
from scanfiles import values, write_volume


@pytest.fixture
def viewer(tmp_path):
    path = write_volume(tmp_path / "a.mha", values(20, 60, 50), (1, 1, 2), (-10, -20, -30))
    return Viewer(scans.only(path), np.array([20.4, 30, 5]))


def test_a_click_chooses_a_place_in_voxels_and_millimetres(viewer):
    before = viewer.axial.png, viewer.planes.value
    viewer.axial.at = [0.5, 0.25]
    assert viewer.voxel.tolist() == [25, 15, 5] and viewer.mm().tolist() == [15, -5, -20]
    assert viewer.where.value == "voxel 25, 15, 5; 15, -5, -20 mm"
    assert viewer.axial.png != before[0] and viewer.planes.value != before[1]
    viewer.axial.at = [1.0, -0.1]
    assert viewer.voxel.tolist() == [49, 0, 5], "a click on the edge stays in the scan"


def test_the_slider_and_the_window_draw_again(viewer):
    seen = {viewer.axial.png}
    viewer.slice.value = 12
    seen.add(viewer.axial.png)
    viewer.window.value = "bone"
    seen.add(viewer.axial.png)
    assert len(seen) == 3 and viewer.voxel[2] == 12 and viewer.window.options == tuple(WINDOWS)


def test_the_slice_fills_its_picture_so_that_a_click_is_where_it_seems(viewer):
    shown = np.asarray(Image.open(io.BytesIO(viewer.axial.png)).convert("L"), float)
    height, width = shown.shape
    assert abs(height / width - 60 / 50) < 0.02
    scaled = Image.fromarray(np.clip((viewer.scan.hu[5] + 1350) / 1500 * 255, 0, 255).astype(np.uint8))
    expected = np.asarray(scaled.resize((width, height), Image.Resampling.NEAREST), float)
    assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.7, "no margin, no mirror"


def test_without_a_kernel_the_three_planes_stand_in(viewer):
    shown = viewer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(shown)
