import numpy as np
import pytest
import torch

from nodules import views


def test_the_window_maps_its_ends_to_0_and_1_and_clips():
    values = [-3000.0, -1000.0, -300.0, 400.0, 2000.0]
    for images in (np.array(values), torch.tensor(values)):
        assert np.allclose(views.window(images, *views.LUNG_WINDOW), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_counterclockwise_and_exact(quarters):
    images = torch.rand(3, 1, 64, 64)
    turned = views.rotate(images, torch.full((3,), 90.0 * quarters))
    assert torch.allclose(turned, images.rot90(quarters, (2, 3)), atol=1e-4)


def test_each_image_turns_by_its_own_angle_and_a_centred_disc_stays():
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    disc = torch.sigmoid(10 - (x**2 + y**2).sqrt())[None, None]
    turned = views.rotate(disc.repeat(5, 1, 1, 1), torch.tensor([0.0, 13, 77, 181, 333]))
    assert (turned - disc).abs().max() < 0.05
    ramp = x[None, None].repeat(2, 1, 1, 1)
    still, half = views.rotate(ramp, torch.tensor([0.0, 180.0]))
    assert torch.allclose(still, -half, atol=1e-3)


def test_dihedral_gives_the_eight_symmetries_exactly():
    image = np.arange(16.0).reshape(4, 4)
    seen = [views.dihedral(torch.from_numpy(image), i).numpy() for i in range(8)]
    assert np.array_equal(seen[0], image)
    for i in range(4):
        assert np.array_equal(seen[i], np.rot90(image, i))
        assert np.array_equal(seen[4 + i], np.fliplr(np.rot90(image, i)))
    assert len({one.tobytes() for one in seen}) == 8


@pytest.mark.parametrize("which", range(8))
def test_dihedral_turns_the_last_two_axes_only(which):
    images = torch.rand(2, 3, 5, 5)
    turned = views.dihedral(images, which)
    assert turned.shape == images.shape
    assert torch.equal(turned[1, 2], views.dihedral(images[1, 2], which))


def test_augmented_images_are_symmetries_and_follow_the_generator():
    images = torch.randn(64, 1, 8, 8)
    seen, again = (views.augment(images, np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(seen, again)
    which = [
        [torch.equal(one, views.dihedral(image, k)) for k in range(8)] for one, image in zip(seen, images, strict=True)
    ]
    assert all(map(any, which)) and {row.index(True) for row in which} == set(range(8))


def test_rescaled_pixels_have_one_width():
    y, x = np.mgrid[:64, :64] - 31.5
    discs = np.stack([(np.hypot(y, x) < radius) * 1000 for radius in (20, 10)]).astype(np.int16)
    same = views.rescale(discs, np.array([0.5, 1.0]), 0.5)
    assert same.dtype == discs.dtype and same.shape == discs.shape
    area = (same > 500).sum((1, 2))
    assert area[0] == (discs[0] > 500).sum() and abs(area[1] / area[0] - 1) < 0.03, "20 pixels of 0.5 mm are 10 of 1 mm"
