"""The phantom: reproducibility, HU that follow the ratings, and nuisance that doesn't follow the label."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import distance_transform_edt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nodules.data import lidc, phantom

NUISANCE = ["noise_hu", "kernel", "dose", "offset_x_px", "offset_y_px", "wall"]


@pytest.fixture(scope="module")
def rendered():
    return phantom.render(500, 700, seed=1, workers=2)


@pytest.fixture(scope="module")
def stacks():
    """Some nodules with all the slices that the default phantom has of them."""
    table = phantom._choose(2526, 4165, seed=1)
    table = table[table["nodule"].isin(table["nodule"].unique()[::30])].reset_index(drop=True)
    images = np.concatenate([rendered[0] for rendered in map(phantom._render_nodule, phantom._jobs(table, seed=1))])
    return images, table


def grouped_auc(features: pd.DataFrame, label: pd.Series, patient: pd.Series) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = GroupKFold(5)
    score = cross_val_predict(model, features, label, groups=patient, cv=folds, method="predict_proba")
    return roc_auc_score(label, score[:, 1])


def inside_hu(images, masks):
    return np.array([image[mask].mean() for image, mask in zip(images, masks, strict=True)])


def test_render_gives_the_counts_types_and_ranges(rendered):
    images, masks, table = rendered
    assert images.shape == masks.shape == (1200, 64, 64) and images.dtype == np.int16 and masks.dtype == bool
    assert table["malignant"].value_counts().to_dict() == {0: 700, 1: 500}
    assert images.min() >= -1024 and images.max() <= 3071
    assert -950 < np.median(images) < -750
    assert table["id"].is_unique and table["patient"].nunique() > 250
    assert (table["nodule"].str.rsplit("_", n=1).str[0] == table["patient"]).all()
    assert table["wall"].dtype == bool and not table.isna().any().any()
    order = table[["patient", "nodule", "slice_index"]]
    assert order.equals(order.sort_values(list(order), ignore_index=True))
    assert len(np.unique(images.reshape(1200, -1), axis=0)) == 1200


def test_render_is_the_same_for_any_number_of_workers_and_differs_between_seeds():
    images, masks, table = phantom.render(20, 30, seed=3, workers=1)
    images_of_two, masks_of_two, table_of_two = phantom.render(20, 30, seed=3, workers=2)
    other_images, _, other_table = phantom.render(20, 30, seed=4, workers=1)
    assert (images == images_of_two).all() and (masks == masks_of_two).all() and table.equals(table_of_two)
    assert (images != other_images).any() and not table["id"].equals(other_table["id"])


def test_a_patch_does_not_depend_on_how_many_are_rendered(rendered):
    images, _, table = rendered
    few, _, few_table = phantom.render(20, 30, seed=1, workers=1)
    rows = table.set_index("id").index.get_indexer(few_table["id"])
    assert (rows >= 0).all() and (images[rows] == few).all()


def test_masks_lie_on_the_nodule(rendered):
    images, masks, table = rendered
    area = masks.sum(axis=(1, 2))
    assert area.min() >= 1 and area.max() < 0.9 * 64**2
    assert np.corrcoef(np.sqrt(area) * table["pixel_spacing_mm"], table["diameter_mm"])[0, 1] > 0.8
    solid = (table["texture"] == 5) & (area > 20) & ~table["wall"]
    inside, outside = inside_hu(images, masks)[solid], inside_hu(images, ~masks)[solid]
    assert (inside > outside + 200).mean() > 0.97


def test_offset_is_where_the_nodule_lies(rendered):
    _, masks, table = rendered
    x = np.array([np.nonzero(mask)[1].mean() for mask in masks]) - 31.5
    assert table["offset_x_px"].abs().max() <= phantom.MAX_OFFSET
    # an outline's centre of mass is not that of its nodule's box: the smaller, the closer
    small = table["diameter_mm"] < 10
    assert np.corrcoef(x[small], table["offset_x_px"][small])[0, 1] > 0.8


def test_hu_follow_texture_and_calcification(rendered):
    images, masks, table = rendered
    hu = pd.Series(inside_hu(images, masks))[masks.sum(axis=(1, 2)) > 20]
    plain = table["calcification"] == 6
    glass, solid = hu[plain & (table["texture"] <= 2)].median(), hu[plain & (table["texture"] == 5)].median()
    calcified = hu[table["calcification"] == 3].median()
    assert glass < -400 < -150 < solid < 100 < 300 < calcified


def test_slices_of_a_nodule_are_neighbours_around_its_middle():
    table = phantom._choose(2526, 4165, seed=0)
    assert table["malignant"].value_counts().to_dict() == {0: 4165, 1: 2526}
    runs = table.groupby(["nodule", "annotation"])["slice_index"].agg(["min", "max", "size"]).reset_index()
    assert runs["nodule"].is_unique and runs["size"].max() <= phantom.MAX_SLICES
    assert (runs["max"] - runs["min"] + 1 == runs["size"]).all() and (runs["size"] > 1).mean() > 0.9
    few = phantom._choose(60, 90, seed=0)
    assert set(few["id"]) <= set(table["id"]) and (few.groupby("nodule").size() > 1).mean() > 0.7
    slices = lidc.contours()[1].groupby("annotation")["z"].nunique()
    middle = (runs["annotation"].map(slices) - 1) / 2
    assert ((runs["min"] + runs["max"]) / 2 - middle).abs().max() <= 0.5


def test_slices_of_a_nodule_look_alike(stacks):
    images, table = stacks
    table = table.reset_index()
    pairs = table.merge(table.assign(slice_index=table["slice_index"] + 1), on=["nodule", "slice_index"])
    flat = np.clip(images, -1000, 400).reshape(len(images), -1)
    rng = np.random.default_rng(0)
    neighbours = [np.corrcoef(flat[i], flat[j])[0, 1] for i, j in zip(pairs["index_x"], pairs["index_y"], strict=True)]
    strangers = [np.corrcoef(*flat[rng.choice(len(flat), 2, replace=False)])[0, 1] for _ in range(200)]
    assert np.median(neighbours) > 0.7 > 0.4 > np.median(strangers)


def test_noise_is_shared_as_far_as_slices_overlap():
    thicknesses = np.arange(0, 3, 0.25)
    noise = np.array([phantom._noise([0, 4, 1], height).ravel() for height in thicknesses])
    correlation = np.corrcoef(noise)
    assert (correlation[0, 1:4] > 0.25).all() and np.abs(correlation[0, 4:]).max() < 0.06
    assert np.abs(noise.std(axis=1) - 1).max() < 0.05
    assert (phantom._noise([0, 4, 1], -0.25) != phantom._noise([0, 4, 1], 0.75)).all()


def test_textures_run_on_between_slices():
    frame = phantom.Frame(0.7, 0.8, np.array([31.5, 31.5]), np.zeros((1, 64)), np.zeros((64, 1)))
    cuts = [phantom._cut(np.array([3, 5, 7]), frame._replace(z=z))[0].ravel() for z in (0.0, 0.1, 0.7, 2.1, 20.0)]
    likeness = np.corrcoef(cuts)[0]
    assert likeness[1] > 0.99 and (np.diff(likeness) < 0).all() and abs(likeness[-1]) < 0.3


def test_lobes_are_not_periodic():
    angle = np.arange(360) * np.pi / 180
    alike = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        bumps = phantom._bumps(angle, 0.0, phantom._waves(rng))
        assert -0.6 <= bumps.min() < bumps.max() <= 0.4
        turned = [np.corrcoef(bumps, np.roll(bumps, degrees))[0, 1] for degrees in range(20, 181)]
        alike.append(max(turned))
    assert np.median(alike) < 0.6 and np.mean(np.array(alike) > 0.9) < 0.05


def test_every_malignant_nodule_shows(rendered):
    images, masks, table = rendered
    free = (table["malignant"] == 1) & ~table["wall"] & (table["internal_structure"] == 1)
    contrast = []
    for image, mask in zip(images[free], masks[free], strict=True):
        away = distance_transform_edt(~mask)
        contrast.append(image[mask].mean() - np.median(image[(away > 4) & (away < 12)]))
    assert min(contrast) > 80 and np.percentile(contrast, 5) > 150


def test_patients_keep_their_scanner(rendered):
    table = rendered[2]
    assert (table.groupby("patient")[["noise_hu", "kernel", "dose"]].nunique() == 1).all(axis=None)
    assert (table.groupby("nodule")[["offset_x_px", "offset_y_px"]].nunique() == 1).all(axis=None)
    assert table.drop_duplicates("patient")["noise_hu"].std() > 5


def test_noise_in_the_image_follows_the_style(rendered):
    images, masks, table = rendered
    left = np.diff(images.astype(float), axis=1)  # along y: streaks don't hide it
    quiet = (images < -700) & ~masks
    noise = [
        np.median(np.abs(d[q[1:] & q[:-1]])) if q.sum() > 500 else np.nan for d, q in zip(left, quiet, strict=True)
    ]
    assert pd.Series(noise).corr(table["noise_hu"], method="spearman") > 0.8


def test_nuisance_does_not_tell_the_label(rendered):
    table = rendered[2].drop_duplicates("nodule")
    assert table["wall"].mean() == pytest.approx(0.75, abs=0.15)
    auc = grouped_auc(table[NUISANCE].astype(float), table["malignant"], table["patient"])
    assert 0.4 < auc < 0.6


def test_surroundings_do_not_tell_the_label(rendered):
    images, _, table = rendered
    small = ((table["diameter_mm"] < 10) & ~table["nodule"].duplicated()).to_numpy()
    border = np.ones((64, 64), bool)
    border[12:52, 12:52] = False
    features = pd.DataFrame(np.percentile(images[small][:, border], [5, 25, 50, 75, 95], axis=1).T)
    assert grouped_auc(features, table["malignant"][small], table["patient"][small]) < 0.62


def test_ratings_change_nothing_away_from_the_nodule():
    low = dict.fromkeys(lidc.ATTRIBUTES, 1.0) | {"calcification": 3.0}
    high = dict.fromkeys(lidc.ATTRIBUTES, 5.0) | {
        "calcification": 6.0,
        "internal_structure": 1.0,
        "spiculation": 1.0,
    }
    jobs = phantom._jobs(phantom._choose(15, 15, seed=2), seed=2)
    away = []
    for job in jobs:
        job = job._replace(chosen=list(range(len(job.z))))
        benign, mask, nuisance = phantom._render_nodule(job._replace(ratings=low))
        spiked, other_mask, other = phantom._render_nodule(job._replace(ratings=high, diameter=2 * job.diameter))
        assert nuisance == other and (benign != spiked).any()
        # the widest edge at the finest spacing, and the point spread, end within 15 pixels
        near = distance_transform_edt(~(mask | other_mask).any(axis=0)) < 15
        away.append(~near.all())
        assert (benign[:, ~near] == spiked[:, ~near]).all()
    assert np.mean(away) > 0.8


def test_scene_is_drawn_without_the_nodule():
    first, second = (phantom._scene(np.random.default_rng(5)) for _ in range(2))
    assert (first.tissue == second.tissue).all() and (first.origin == second.origin).all()
    frame = phantom.Frame(0.7, 0.8, np.array([31.5, 31.5]), np.zeros((1, 64)), np.zeros((64, 1)))
    filled = [
        np.mean(
            [phantom._rasterise(phantom._vessels(np.random.default_rng(s))[0], frame._replace(z=z)) for s in range(40)]
        )
        for z in (0.0, 20.0)
    ]
    assert filled[0] == pytest.approx(filled[1], rel=0.3)


def test_size_and_ratings_tell_the_label():
    table = lidc.nodules()
    label, patient = table["malignant"], table["patient"]
    assert 0.8 < grouped_auc(np.log(table[["diameter_mm"]]), label, patient) < 0.95
    assert grouped_auc(table[lidc.ATTRIBUTES], label, patient) > 0.88


@pytest.mark.parametrize(("counts", "name"), [((10**5, 1), "malignant"), ((1, 10**5), "benign")])
def test_too_many_patches_are_refused(counts, name):
    with pytest.raises(ValueError, match=rf"^100000 {name} patches were requested, but only \d+ exist$"):
        phantom.render(*counts, workers=1)


def test_the_version_changes_with_the_code_that_renders(tmp_path, monkeypatch):
    before = phantom.version()
    assert before == phantom.version() and len(before) == 12
    (tmp_path / "phantom.py").write_bytes(Path(phantom.__file__).read_bytes() + b"#")
    monkeypatch.setattr(phantom, "__file__", str(tmp_path / "phantom.py"))
    assert phantom.version() != before


def test_another_scanner_sees_the_same_nodules(monkeypatch):
    images, _, table = phantom.render(20, 30, seed=3, workers=1)
    every = {name: [1.0, amounts[0], amounts[-1]] for name, amounts in phantom.SHIFTS.items()}
    every["HU offset"][0] = 0
    monkeypatch.setattr(phantom, "SHIFTS", every)
    ids = list(table["id"][::3])
    seen, about = phantom.rescan(ids, 20, 30, seed=3, workers=1)
    assert len(seen) == len(about) == len(every) * 3 * len(ids)
    blocks = {key: seen[block.index] for key, block in about.groupby(["shift", "severity"])}
    assert all(list(block["id"]) == ids for _, block in about.groupby(["shift", "severity"]))
    original = images[::3].astype(int)
    for name in every:
        same, little, much = (np.abs(blocks[name, k] - original).mean() for k in (1, 2, 3))
        assert same == 0 < little < much, name


def spread(images):
    """Of pixels against those below, across the streaks of a low dose: noise raises it, a smooth kernel lowers it."""
    return np.diff(images.astype(float), axis=1).std()


@pytest.fixture(scope="module")
def rescanned():
    _, _, table = phantom.render(20, 30, seed=3, workers=1)
    return phantom.rescan(list(table["id"]), 20, 30, seed=3, workers=1)


@pytest.mark.parametrize(
    ("shift", "louder"), [("noise", True), ("low dose", True), ("sharp kernel", True), ("smooth kernel", False)]
)
def test_a_shift_does_to_the_noise_what_its_name_says(rescanned, shift, louder):
    seen, about = rescanned
    of_shift = about[about["shift"] == shift]
    spreads = [spread(seen[of_shift[of_shift["severity"] == k].index]) for k in range(1, 6)]
    assert spreads == sorted(spreads, reverse=not louder)


def test_a_miscalibrated_scale_shifts_every_value():
    images, _, table = phantom.render(10, 10, seed=3, workers=1)
    seen, about = phantom.rescan(list(table["id"]), 10, 10, seed=3, workers=1)
    for k, offset in enumerate(phantom.SHIFTS["HU offset"], 1):
        block = seen[about.index[(about["shift"] == "HU offset") & (about["severity"] == k)]].astype(int)
        free = (images > -900) & (images < 2500)  # away from where the scale ends
        assert np.abs(block - images - offset)[free].max() == 0
