import numpy as np
import pytest

from nodules.data import pixels
from nodules.errors import InputError


def hu(n=40, seed=0):
    """Nodules in lung, in Hounsfield units, (n, 64, 64) int16."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64] - 31.5
    away = np.hypot(rows, columns) - rng.uniform(5, 12, (n, 1, 1))
    images = -850 + 880 / (1 + np.exp(away / 1.5)) + rng.normal(0, 25, (n, 64, 64))
    return images.round().astype(np.int16)


def grey(images):
    return ((images + 1000.0) / 1400 * 255).clip(0, 255)


def mixed(first, second, rows):
    out = first.astype(np.result_type(first, second)).copy()
    out[rows] = second[rows]
    return out


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "f4", "f8", ">i2", ">f8"])
def test_hounsfield_units_of_any_type_are_read_as_they_are(dtype):
    converted = pixels.convert(hu().astype(dtype), "x")
    assert converted.unit == "HU" and not converted.notes and converted.values.dtype == np.int16
    assert np.array_equal(converted.values, hu())


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i8", "f4", "f8"])
def test_grey_levels_of_any_type_are_recognised(dtype):
    values = grey(hu()).round().astype(dtype)
    converted = pixels.convert(values, "x")
    assert converted.unit == "8-bit, not HU" and np.array_equal(converted.values, values)
    assert bool(converted.notes) == (dtype != "u1")


CONVERTED = {
    "0 to 1": (lambda: grey(hu()) / 255, "8-bit, not HU", lambda: grey(hu()).round(), "multiplied by 255"),
    "a negative": (lambda: 255 - grey(hu()).astype("u1"), "8-bit, not HU", lambda: grey(hu()).astype("u1"), "Inverted"),
    "a negative of 0 to 1": (lambda: 1 - grey(hu()) / 255, "8-bit, not HU", lambda: grey(hu()), "Inverted"),
    "a negative of HU": (lambda: -hu(), "HU", hu, "sign was changed"),
    "HU without a sign": (lambda: hu().astype("u2"), "HU", hu, "sign was restored"),
    "the same, wider": (lambda: hu().astype("u2").astype("f4"), "HU", hu, "sign was restored"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_clear_cases_are_converted_and_noted(name):
    make, unit, expected, words = CONVERTED[name]
    converted = pixels.convert(make(), "x")
    assert converted.unit == unit and words in " ".join(converted.notes)
    assert np.abs(converted.values - expected()).max() <= 1


REFUSED = {
    "stored values": (lambda: (hu() + 1024).astype("u2"), ["lung is missing", "subtract 1024"]),
    "stored values with half the range": (lambda: hu().astype(int) + 32768, ["subtract 32768"]),
    "inverted stored values": (lambda: 4095 - (hu().astype(int) + 1024), ["lung is missing"]),
    "one grey patch": (lambda: mixed(hu(), grey(hu()), [7]), ["1 of 40 patches show neither air nor lung", "row 7 ("]),
    "every other patch grey": (lambda: mixed(hu(), grey(hu()), slice(0, 40, 2)), ["20 of 40 patches", "row 0"]),
    "some stored values": (lambda: mixed(hu(), hu() + 1024, [3, 4]), ["2 of 40 patches", "row 3"]),
    "a patch of 0 to 1": (lambda: mixed(grey(hu()), grey(hu()) / 255, [5]), ["1 of 40 patches span 0 to 1", "row 5"]),
    "an empty patch": (lambda: mixed(hu(), np.zeros_like(hu()), [39]), ["1 patches are blank, the first in row 39"]),
    "grey and stored values": (lambda: mixed(hu() + 1024, grey(hu()), [7]), ["1 of 40 patches span 0 to 255", "row 7"]),
    "negatives of stored values": (lambda: -(hu() + 1024), ["darker than the lung"]),
    "shifted": (lambda: hu() + 500, ["the median patch is -", "shift or scaling"]),
    "centred": (lambda: hu() - hu().mean(), ["lung is missing"]),
    "doubled": (lambda: hu() * 2, ["shift or scaling"]),
    "a few standardised": (lambda: mixed(hu() * 1.0, hu() / 500, [5]), ["1 of 40 patches", "row 5"]),
    "padded": (lambda: mixed(hu(), np.full_like(hu(), -9999), (3, slice(0, 9))), ["row 3", "set them to -1024"]),
    "16 bits of grey": (lambda: (grey(hu()) * 257).astype("u2"), ["scale them to grey levels 0 to 255"]),
    "overshot grey": (lambda: grey(hu()) * 1.1 - 9, ["clip them to grey levels"]),
    "-1 to 1": (lambda: grey(hu()) / 127.5 - 1, ["span only -0."]),
    "standardised": (lambda: (hu() - hu().mean()) / hu().std(), ["span only"]),
    "0 or 1 in bytes": (lambda: (grey(hu()) / 255).round().astype("u1"), ["span only 0 to 1"]),
    "thousandths": (lambda: hu() / 1000, ["span only"]),
    "far out": (lambda: hu().astype(int) * 100, ["far outside Hounsfield units"]),
    "no lung": (lambda: hu().clip(-200, 200), ["lung is missing", "unit='HU'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_doubtful_values_are_refused_with_what_was_seen_and_what_to_do(name):
    make, words = REFUSED[name]
    with pytest.raises(InputError) as caught:
        pixels.convert(make(), "own.npz: 'images'")
    message = str(caught.value)
    assert message.startswith("own.npz: 'images': ") and "\n" not in message and "; " in message
    assert all(word in message for word in words), message


def test_a_stated_unit_wins():
    soft = hu().clip(-200, 200)
    assert pixels.convert(soft, "x", "Hounsfield  Units").unit == "HU"
    assert pixels.convert(grey(hu()), "x", "HU").unit == "HU"
    assert pixels.convert(grey(hu()).astype("u1"), "x", "8-bit").unit == "8-bit, not HU"
    with pytest.raises(InputError, match="grey levels must be 0 to 255"):
        pixels.convert(hu(), "x", "8-bit")
    with pytest.raises(InputError, match="unknown unit 'mm'; use 'HU' or '8-bit'"):
        pixels.convert(hu(), "x", "mm")


def test_a_few_patches_without_lung_are_hounsfield_units_all_the_same():
    images = hu(60)
    images[:2] = images[:2].clip(-250, 300)
    converted = pixels.convert(images, "x")
    assert converted.unit == "HU" and converted.notes == ["2 patches show neither air nor lung, the first in row 0."]


@pytest.mark.parametrize("text", ["HU", "hounsfield_units", "Hounsfield Units (HU)", "[HU]", "Hounsfield unit"])
def test_units_are_stated_in_many_ways(text):
    assert pixels.convert(hu().clip(-200, 200), "x", text).unit == "HU"
    assert pixels.convert(hu(), "x", "").unit == "HU"


def test_real_patches_are_told_rightly(real):
    with np.load(real("lidc_hu_dev.npz")) as file:
        converted = pixels.convert(file["ct_slices"], "x")
        assert converted.unit == "HU" and not converted.notes
        assert pixels.convert(-file["ct_slices"], "x").notes
    with np.load(real("lidc_patches_dev.npz")) as file:
        converted = pixels.convert(file["images"], "x")
        assert converted.unit == "8-bit, not HU" and not converted.notes
        assert "Inverted" in pixels.convert(255 - file["images"], "x").notes[0]
