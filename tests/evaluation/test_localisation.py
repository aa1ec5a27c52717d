import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from nodules.evaluation import localisation
from nodules.networks.device import device


def test_pointing_by_hand():
    masks = np.zeros((3, 64, 64), bool)
    masks[:, :32, :32] = True
    maps = np.zeros((3, 2, 2))
    maps[0, 0, 0] = 1  # inside
    maps[1, 1, 1] = 1  # outside
    pointed = localisation.pointing(maps, masks)  # the third is empty
    assert pointed["hit"].tolist() == [1, 0, 0]
    assert pointed["mass"][0] > 0.7 and pointed["mass"][1] < 0.1 and pointed["mass"][2] == 0


def test_controls_score_as_what_they_are():
    """In the middle of the patch the blob finds a nodule and noise does not; noise has the share of the area."""
    yy, xx = np.mgrid[:64, :64]
    mask = (yy - 31.5) ** 2 + (xx - 31.5) ** 2 < 8**2
    masks = np.repeat(mask[None], 400, 0)
    table = localisation.scores(localisation.controls(400, 0), masks, np.arange(400), 0)
    assert list(table) == ["name", "part", "value", "low", "high"]
    table = table.set_index(["name", "part"])
    assert table.loc[("centred blob", "hit"), "value"] == 1
    assert abs(table.loc[("random map", "mass"), "value"] - mask.mean()) < 0.01
    assert abs(table.loc[("random map", "hit"), "value"] - mask.mean()) < 0.04
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_scores_are_less_sure_where_few_patients_bring_the_patches():
    masks = np.zeros((200, 64, 64), bool)
    masks[:, :32, :32] = True
    maps = np.zeros((200, 2, 2))
    maps[:100, 0, 0] = maps[100:, 1, 1] = 1  # half the patients are found in every patch, half in none
    widths = []
    for units in (np.arange(200), np.arange(200) // 20):
        hit = localisation.scores({"m": maps}, masks, units, 0).set_index("part").loc["hit"]
        assert hit["value"] == 0.5
        widths.append(hit["high"] - hit["low"])
    assert widths[1] > 3 * widths[0]


def test_controls_repeat_for_a_seed():
    first, again, other = (localisation.controls(3, seed) for seed in (0, 0, 1))
    assert all(maps.shape == (3, 64, 64) for maps in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["random map"], other["random map"])
    assert np.array_equal(first["centred blob"], other["centred blob"])


def test_the_lead_of_one_map_over_another_is_paired_by_patient():
    masks = np.zeros((40, 64, 64), bool)
    masks[:, :32, :32] = True
    right, wrong = np.zeros((2, 40, 2, 2))
    right[:, 0, 0] = wrong[:, 1, 1] = 1
    units, half = np.arange(40) // 4, np.where(np.arange(40)[:, None, None] % 2, right, wrong)
    by_patch = localisation.lead(half, wrong, masks, np.arange(40), 0)
    assert by_patch["value"] == 0.5 and by_patch["low"] < 0.4 < 0.6 < by_patch["high"]
    assert localisation.lead(wrong, half, masks, np.arange(40), 0)["value"] == -0.5
    mostly = np.where(np.arange(40)[:, None, None] < 4, wrong, half)
    by_patient, by_patch = (localisation.lead(mostly, wrong, masks, by, 0) for by in (units, np.arange(40)))
    assert by_patient["value"] == by_patch["value"] == 18 / 40
    assert by_patient["high"] == 0.5 < by_patch["high"], "half of each patient's patches but one's"
    alike = localisation.lead(half, wrong, masks, units, 0)
    assert (alike["low"], alike["p_value"]) == (0, 1), "the same in each patient: nothing to resample"


def test_likeness_is_the_rank_correlation_of_each_map():
    rng = np.random.default_rng(0)
    maps, others = rng.random((5, 4, 4)), rng.random((5, 4, 4))
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(maps, others, strict=True)]
    assert np.allclose(localisation.likeness(maps, others), expected)
    assert np.allclose(localisation.likeness(maps, maps**3), 1), "order counts, not size"
    assert not localisation.likeness(maps, np.zeros_like(maps)).any()


class Brightness(nn.Module):
    """Malignant is what is bright in the middle."""

    def forward(self, images):
        shown = images[:, :, 28:36, 28:36].mean((1, 2, 3)) - images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(shown), shown], 1)


def test_erasing_what_counts_lowers_the_probability_and_showing_it_raises_it():
    images = np.zeros((4, 64, 64))
    images[:, 28:36, 28:36] = 5.0
    right = images / 5
    wrong = np.zeros_like(images)
    wrong[:, :8, :8] = 1
    curves = {
        name: localisation.erasure(Brightness().to(device()), images, grid)
        for name, grid in (("right", right), ("wrong", wrong))
    }
    few = list(localisation.SHARES).index(0.02)
    assert curves["right"]["deletion"].shape == (4, len(localisation.SHARES))
    assert (curves["right"]["deletion"][:, few] < 0.55).all() and (curves["wrong"]["deletion"][:, few] > 0.9).all()
    assert (curves["right"]["insertion"][:, few] > 0.9).all() and (curves["wrong"]["insertion"][:, few] < 0.55).all()
    table = localisation.erasure_curves(curves, np.arange(4), 0)
    assert list(table) == ["name", "panel", "x", "value", "low", "high"] and len(table) == 4 * len(localisation.SHARES)
    assert table["x"].max() == 70 and set(table["panel"]) == {"deletion", "insertion"}
