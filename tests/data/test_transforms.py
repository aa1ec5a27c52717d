import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nodules.data import transforms


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_window_maps_its_ends_to_0_and_1_and_clips():
    values = [-3000.0, -1000.0, -300.0, 400.0, 2000.0]
    for images in (np.array(values), torch.tensor(values)):
        assert np.allclose(transforms.window(images, *transforms.LUNG_WINDOW), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("quarters", range(4))
def test_quarter_turns_are_counterclockwise_and_exact(quarters):
    images = torch.rand(3, 1, 64, 64)
    turned = transforms.rotate(images, torch.full((3,), 90.0 * quarters))
    assert torch.allclose(turned, images.rot90(quarters, (2, 3)), atol=1e-4)


def test_each_image_turns_by_its_own_angle_and_a_centred_disc_stays():
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    disc = torch.sigmoid(10 - (x**2 + y**2).sqrt())[None, None]
    turned = transforms.rotate(disc.repeat(5, 1, 1, 1), torch.tensor([0.0, 13, 77, 181, 333]))
    assert (turned - disc).abs().max() < 0.05
    ramp = x[None, None].repeat(2, 1, 1, 1)
    still, half = transforms.rotate(ramp, torch.tensor([0.0, 180.0]))
    assert torch.allclose(still, -half, atol=1e-3)


def test_dihedral_gives_the_eight_symmetries_exactly():
    image = np.arange(16.0).reshape(4, 4)
    seen = [transforms.dihedral(torch.from_numpy(image), i).numpy() for i in range(8)]
    assert np.array_equal(seen[0], image)
    for i in range(4):
        assert np.array_equal(seen[i], np.rot90(image, i))
        assert np.array_equal(seen[4 + i], np.fliplr(np.rot90(image, i)))
    assert len({turned.tobytes() for turned in seen}) == 8


@pytest.mark.parametrize("which", range(8))
def test_dihedral_turns_the_last_two_axes_only(which):
    images = torch.rand(2, 3, 5, 5)
    turned = transforms.dihedral(images, which)
    assert turned.shape == images.shape
    assert torch.equal(turned[1, 2], transforms.dihedral(images[1, 2], which))


def test_augmented_images_are_symmetries_and_follow_the_generator():
    images = torch.randn(64, 1, 8, 8)
    seen, again = (transforms.augment(images, np.random.default_rng(0)) for _ in range(2))
    assert torch.equal(seen, again)
    which = [
        [torch.equal(turned, transforms.dihedral(image, k)) for k in range(8)]
        for turned, image in zip(seen, images, strict=True)
    ]
    assert all(map(any, which)) and {row.index(True) for row in which} == set(range(8))


def disc(radius):
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    return torch.sigmoid(radius - (x**2 + y**2).sqrt())[None, None]


def test_zoom_makes_a_nodule_as_many_times_wider():
    seen = transforms.zoom(disc(10).repeat(3, 1, 1, 1), torch.tensor([1.0, 1.4, 0.5]))
    inside = seen[:, :, 12:52, 12:52]  # the border is mirrored, and with it the disc
    widths = (inside.sum((1, 2, 3)) / np.pi).sqrt()
    assert torch.allclose(widths / widths[0], torch.tensor([1.0, 1.4, 0.5]), atol=0.02)
    assert torch.allclose(seen[:1], disc(10), atol=1e-4)


def test_blur_is_that_of_scipy_with_a_width_for_each_image():
    images = torch.randn(3, 1, 64, 64)
    seen = transforms.blur(images, torch.tensor([0.0, 0.7, 1.5]))
    for image, blurred, sigma in zip(images[:, 0].numpy(), seen[:, 0].numpy(), (0.0, 0.7, 1.5), strict=True):
        expected = gaussian_filter(image, sigma, truncate=4 / max(sigma, 1))
        inside = (slice(6, -6), slice(6, -6))
        assert np.allclose(expected[inside], blurred[inside], atol=0.02)


@pytest.mark.parametrize("kind", [*transforms.AUGMENTATIONS, "all"])
def test_each_augmentation_changes_every_image_by_an_amount_of_its_own_and_repeats(kind):
    images = (disc(8) + 0.2 * torch.rand(1, 1, 64, 64)).repeat(4, 1, 1, 1) * 1000 - 800
    before = images.clone()
    # Seeds whose amounts lie well apart: a blur of a tenth of a pixel changes nothing
    seen, again = (transforms.vary(images, kind, np.random.default_rng(33), 1200.0) for _ in range(2))
    other = transforms.vary(images, kind, np.random.default_rng(34), 1200.0)
    assert torch.equal(seen, again) and torch.equal(images, before) and seen.shape == images.shape
    assert not any(torch.allclose(seen[i], unlike, atol=1) for i in range(4) for unlike in (images[0], other[i]))
    assert not any(torch.allclose(seen[i], seen[k], atol=1) for i in range(4) for k in range(i))


def test_jitter_and_noise_are_as_strong_as_they_say():
    images, rng = torch.zeros(400, 1, 16, 16), np.random.default_rng(0)
    brightness = transforms.vary(images, "jitter", rng, 1200.0).mean((1, 2, 3))
    assert brightness.abs().max() <= transforms.OFFSET * 1200 < 1.05 * brightness.abs().max()
    spread = transforms.vary(images, "noise", rng, 1200.0).std((1, 2, 3))
    assert spread.max() < 1.2 * transforms.NOISE * 1200
    assert spread.mean() == pytest.approx(transforms.NOISE * 600, rel=0.1)
