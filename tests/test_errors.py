"""Ranges of numbers."""

import pytest

from nodules.errors import SEEDS, InputError, within


def test_what_is_within_passes():
    within(1, 10, epochs=1, views=10, slices=[1, 4, 10])
    within(0, SEEDS, seed=SEEDS)
    within(0, 10, spacing_mm=0.5)


@pytest.mark.parametrize("value", [0, 11, -1, float("nan"), float("inf"), [], [1, 0], [5, 11]])
def test_what_is_not_is_named_with_its_range_in_one_line(value):
    with pytest.raises(InputError) as caught:
        within(1, 10, first=3, repeats=value)
    assert str(caught.value) == f"repeats={value}: out of range; use 1 to 10"
