import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai import learner as fastai
from fastai.torch_core import no_random
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nodules.data import split
from nodules.errors import InputError
from nodules.networks import heads
from nodules.networks.bank import Bank
from nodules.networks.heads import Recipe

N, VIEWS, D = 400, 3, 8
TRAIN = 300
SIDES = np.repeat(["train", "valid", "test"], [TRAIN, 50, 50])
BATCH = 64
BATCHES = TRAIN // BATCH
QUICK = Recipe(epochs=2, lr=1e-3)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(heads, "HEAD_BATCH", BATCH)


def divided(y, sides):
    """Parts of patches whose pixels don't matter."""
    rows = np.arange(len(y))
    images = np.zeros((len(y), 64, 64), np.int16)
    return split.divide(split.Part(images, y, rows, pd.DataFrame({"malignant": y}), rows), sides)


@pytest.fixture(scope="module")
def toy():
    """A bank whose classes are far apart in every view, and its parts."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2
    array = rng.normal(0, 1, (N, VIEWS, D)) + 2 * (2 * y - 1)[:, None, None]
    return Bank(array.astype(np.float16), "toy", 1.0), divided(y, SIDES)


class Recording:
    """An array that remembers which rows and views were read."""

    def __init__(self, array):
        self.array, self.shape, self.read = array, array.shape, []

    def __getitem__(self, index):
        self.read.append(index)
        return self.array[index]


def generators():
    return str((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002


def state(model):
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()]).cpu()


# Recipes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0}, "lr=0"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 100_001}, "epochs=100001"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_one_line_when_the_recipe_is_made(change, named):
    makers = (lambda: Recipe(**{"epochs": 3, "lr": 1e-3} | change), lambda: replace(Recipe(3, 1e-3), **change))
    for make in makers:
        with pytest.raises(InputError) as caught:
            make()
        assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("epochs", "cycle_len", "cycle_mult", "lengths"),
    [(1, 1, 1, [1]), (4, 1, 1, [1] * 4), (6, 2, 1, [2] * 3), (7, 1, 2, [1, 2, 4]), (8, 2, 3, [2, 6])],
)
def test_cycles_fill_the_epochs(epochs, cycle_len, cycle_mult, lengths):
    assert heads.cycles(epochs, cycle_len, cycle_mult) == lengths


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, 2, 1), "use epochs=6"),
        ((6, 1, 2), "use epochs=7"),
        ((1, 2, 1), "use epochs=2"),
        ((4, 0, 1), "cycle_len=0"),
        ((4, 1, 0), "cycle_mult=0"),
        ((4, -1, 1), "cycle_len=-1"),
        ((4, 1, -2), "cycle_mult=-2"),
    ],
)
def test_cycles_that_are_not_whole_are_refused(arguments, named):
    with pytest.raises(InputError) as caught:
        heads.cycles(*arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)


# Training


@pytest.mark.parametrize("augment", [False, True])
def test_a_seed_gives_the_same_head_bit_for_bit_and_another_another(toy, augment):
    before = generators()
    first, again, other = (heads.train(*toy, replace(QUICK, augment=augment), seed) for seed in (0, 0, 1))
    assert torch.equal(state(first.model), state(again.model))
    pd.testing.assert_frame_equal(first.history, again.history, check_exact=True)
    pd.testing.assert_frame_equal(first.steps, again.steps, check_exact=True)
    assert not torch.equal(state(first.model), state(other.model))
    assert generators() == before


def test_a_head_learns_what_can_be_learnt(toy):
    bank, parts = toy
    trained = heads.train(bank, parts, Recipe(epochs=5, lr=1e-2, augment=True))
    assert trained.steps["loss"].iloc[-1] < trained.steps["loss"].iloc[0] / 2
    assert trained.history["valid_loss"].iloc[-1] < trained.history["valid_loss"].iloc[0]
    assert trained.history["accuracy"].iloc[-1] > 0.95
    p = heads.predict(trained.model, bank, parts.test.rows)
    assert ((p >= 0.5) == (parts.test.y == 1)[:, None]).mean() > 0.95


def test_five_patches_are_learnt_by_heart():
    rng = np.random.default_rng(0)
    bank = Bank(rng.normal(0, 1, (7, 1, 32)).astype(np.float16), "noise", 1.0)
    parts = divided(np.array([0, 1, 1, 0, 1, 0, 1]), np.repeat(["train", "valid"], [5, 2]))
    history = heads.train(bank, parts, Recipe(epochs=150, lr=1e-2)).history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] / 10


@pytest.mark.parametrize("augment", [False, True])
def test_training_draws_views_where_it_should_and_validation_never(toy, augment):
    bank, parts = toy
    fake = Recording(bank.features)
    heads.train(Bank(fake, "fake", 1.0), parts, Recipe(epochs=12, lr=1e-3, augment=augment))
    rows, views = (np.concatenate(part) for part in zip(*fake.read, strict=True))
    trained = SIDES[rows] == "train"
    assert set(SIDES[rows]) == {"train", "valid"}
    assert not views[~trained].any()
    shares = np.bincount(views[trained], minlength=VIEWS) / trained.sum()
    assert np.allclose(shares, [1 / 3] * 3 if augment else [1, 0, 0], atol=0.05)
    if augment:
        views_of_a_patch = pd.Series(views[trained]).groupby(rows[trained]).nunique()
        assert (views_of_a_patch > 1).mean() > 0.9, "a patch is seen in the same view in every epoch"


def test_parts_are_trained_on_with_the_features_and_labels_of_their_rows(toy):
    bank, parts = toy
    shuffled = parts._replace(train=parts.train.take(np.random.default_rng(0).permutation(TRAIN)))
    for part, loader in zip(shuffled[:2], heads.dataloaders(bank, shuffled), strict=False):
        features, labels = (torch.cat(batches).cpu().numpy() for batches in zip(*loader, strict=True))
        row_of = {bank.features[row, 0].tobytes(): row for row in part.rows}
        rows = [row_of[vector.tobytes()] for vector in features.astype(np.float16)]
        assert len(set(rows)) == len(rows) and (labels == np.array(rows) % 2).all()


def test_an_epoch_is_a_row_and_a_batch_a_step(toy):
    trained = heads.train(*toy, replace(QUICK, epochs=3))
    assert list(trained.history) == ["epoch", "train_loss", "valid_loss", "accuracy"]
    assert trained.history["epoch"].tolist() == [1, 2, 3] and np.isfinite(trained.history.to_numpy()).all()
    assert np.allclose(trained.steps["epoch"], np.arange(3 * BATCHES) / BATCHES)
    assert not trained.model.training and trained.seconds > 0


def test_repeated_trainings_are_those_of_the_seeds(toy):
    recipe = replace(QUICK, augment=True)
    history, p, seconds = heads.repeat(*toy, recipe, [0, 1])
    second = heads.train(*toy, recipe, 1)
    assert history["seed"].tolist() == [0, 0, 1, 1] and p.shape == (2, N) and seconds > 0
    assert np.array_equal(p[1], heads.predict(second.model, toy[0], np.arange(N))[:, 0])
    pd.testing.assert_frame_equal(
        history[history["seed"] == 1].drop(columns="seed").reset_index(drop=True), second.history
    )


def test_a_learner_is_silent(toy, capfd):
    learn = heads.learner(*toy)
    learn.fit_one_cycle(2, 1e-3)
    learn.lr_find()
    learn.fit_sgdr(1, 1, 1e-3)
    assert capfd.readouterr() == ("", "")


# Schedules


def cosine(start, end, share):
    return end + (start - end) * (1 + np.cos(np.pi * share)) / 2


def one_cycle(t):
    return np.where(t < 0.25, cosine(1 / 25, 1, t / 0.25), cosine(1, 1e-5, (t - 0.25) / 0.75))


def flat_cosine(t):
    return np.where(t < 0.75, 1, cosine(1, 1e-5, (t - 0.75) / 0.25))


def restarts(*lengths):
    ends = np.cumsum(lengths)

    def rate(t):
        cycle = np.searchsorted(ends, t * ends[-1] + 1e-9, side="right")
        return cosine(1, 0, (t * ends[-1] - ends[cycle]) / np.array(lengths)[cycle] + 1)

    return rate


@pytest.mark.parametrize(
    ("epochs", "fit", "formula"),
    [
        (3, lambda learn, lr: learn.fit(3, lr), np.ones_like),
        (8, lambda learn, lr: learn.fit_one_cycle(8, lr), one_cycle),
        (8, lambda learn, lr: learn.fit_flat_cos(8, lr), flat_cosine),
        (2, lambda learn, lr: learn.fit_sgdr(1, 2, lr), restarts(2)),
        (10, lambda learn, lr: learn.fit_sgdr(10, 1, lr), restarts(*[1] * 10)),
        (6, lambda learn, lr: learn.fit_sgdr(3, 2, lr), restarts(2, 2, 2)),
        (7, lambda learn, lr: learn.fit_sgdr(3, 1, lr, 2), restarts(1, 2, 4)),
        (8, lambda learn, lr: learn.fit_sgdr(2, 2, lr, 3), restarts(2, 6)),
    ],
)
def test_recorded_learning_rates_are_those_of_the_formula(toy, epochs, fit, formula):
    lr, learn = 0.01, heads.learner(*toy)
    fit(learn, lr)
    steps = heads.steps(learn)
    assert np.allclose(steps["lr"], lr * formula(steps["epoch"].to_numpy() / epochs), rtol=1e-3, atol=lr * 1e-5)
    assert np.isclose(steps["lr"].max(), lr)


@pytest.mark.parametrize(("mult", "starts"), [(1, range(6)), (2, (0, 2))])
def test_a_restart_leaps_from_almost_0_to_the_highest_rate(toy, mult, starts):
    learn = heads.learner(*toy)
    learn.fit_sgdr(len(heads.cycles(6, mult, mult)), mult, 1, mult)
    rates = heads.steps(learn)["lr"].to_numpy()
    leaps = np.flatnonzero(np.diff(rates) > 0) + 1
    assert leaps.tolist() == [start * BATCHES for start in starts if start]
    assert np.allclose(rates[[0, *leaps]], 1) and (rates[[*(leaps - 1), -1]] < 0.2).all()


@pytest.mark.parametrize(("cycle_mult", "lengths"), [(1, [2, 2, 2]), (2, [2, 4]), (1, [2])])
def test_a_learner_restarts_also_in_cycles_of_equal_length(toy, cycle_mult, lengths):
    learn = heads.learner(*toy)
    learn.fit_sgdr(len(lengths), 2, 0.01, cycle_mult)
    assert len(learn.recorder.lrs) == sum(lengths) * BATCHES and len(learn.recorder.values) == sum(lengths)
    done = np.arange(len(learn.recorder.lrs)) / len(learn.recorder.lrs)
    assert np.allclose(learn.recorder.lrs, 0.01 * restarts(*lengths)(done), rtol=1e-3)


def test_where_fastai_can_restart_the_rates_are_fastais(toy):
    ours, theirs = heads.learner(*toy), heads.learner(*toy)
    ours.fit_sgdr(2, 1, 0.01, cycle_mult=2)
    fastai.Learner.fit_sgdr(theirs, 2, 1, 0.01, cycle_mult=2)
    assert np.allclose(ours.recorder.lrs, theirs.recorder.lrs)
    with pytest.raises(ZeroDivisionError):
        fastai.Learner.fit_sgdr(theirs, 2, 1, 0.01, cycle_mult=1)


def test_a_head_that_gives_no_numbers_is_refused_in_one_line(toy):
    bank = toy[0]
    diverged = torch.nn.Linear(bank.width, 2).to(heads.device())
    torch.nn.init.constant_(diverged.weight, float("nan"))
    with pytest.raises(InputError, match="diverged; use a lower learning rate"):
        heads.predict(diverged, bank, np.arange(5))


# The learning-rate finder


def searched(toy, seed):
    """A learner after the search, and what was suggested."""
    with no_random(seed):
        learn = heads.learner(*toy, augment=True, seed=seed)
        return learn, learn.lr_find()


def test_the_finder_suggests_rates_repeats_and_leaves_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (learn, rates), (again, same), (other, _) = (searched(toy, seed) for seed in (0, 0, 1))
    assert not list(tmp_path.iterdir())
    losses = [np.array(searcher.recorder.losses, dtype=float) for searcher in (learn, again, other)]
    assert np.array_equal(losses[0], losses[1]) and learn.recorder.lrs == again.recorder.lrs
    assert rates == same and not np.array_equal(losses[0], losses[2])
    assert list(rates) == ["valley", "slide", "minimum", "steep"]
    assert all(1e-7 <= rate <= 10 for rate in rates.values()), "NaN is not"
    steps = len(learn.recorder.lrs)
    assert 20 < steps <= 100 and np.allclose(learn.recorder.lrs, 1e-7 * 1e8 ** (np.arange(steps) / 100))


def test_the_finder_searches_where_it_is_told(toy):
    learn = heads.learner(*toy)
    rates = learn.lr_find(start_lr=1e-5, end_lr=1e-2, num_it=40)
    assert np.allclose(learn.recorder.lrs, 1e-5 * 1e3 ** (np.arange(40) / 40))
    assert all(1e-5 <= rate <= 1e-2 for rate in rates.values())


def test_the_finder_puts_the_weights_back(toy):
    learn = heads.learner(*toy)
    before = state(learn.model).clone()
    changed = []
    finder = heads.MemoryLRFinder(1e-3, 1, 10)
    inner = finder.after_batch
    finder.after_batch = lambda: (changed.append(not torch.equal(state(learn.model), before)), inner())
    learn.fit(3, cbs=finder)
    assert all(changed) and len(changed) == 10
    assert torch.equal(state(learn.model), before)


def test_a_learner_trains_after_a_search_as_if_there_had_been_none(toy):
    """The weights and the optimizer's averages are as before, and only the batches were drawn on."""
    plain, after = (searched(toy, 0)[0] if search else heads.learner(*toy) for search in (False, True))
    plain.model.load_state_dict(after.model.state_dict())
    for learn in (plain, after):
        learn.dls = heads.dataloaders(*toy, seed=5)
        with no_random(5):
            learn.fit(1, 1e-3)
    assert torch.equal(state(plain.model), state(after.model))


# Prediction and averages over views


def test_predictions_are_the_softmax_of_every_view(toy):
    bank, _ = toy
    torch.manual_seed(0)
    model = heads.head(D).eval()
    rows = np.arange(5, 200)
    p = heads.predict(model.to(heads.device()), bank, rows)
    assert p.shape == (len(rows), VIEWS)
    with torch.inference_mode():
        for view in range(VIEWS):
            logits = model.cpu()(torch.from_numpy(bank.features[rows, view]).float())
            exp = logits.double().exp()
            assert np.allclose(p[:, view], (exp[:, 1] / exp.sum(1)).numpy(), atol=1e-5)


def test_a_head_is_described_by_what_it_has():
    described = heads.describe_head(D)
    # Two layers of batch norm, with a scale and a shift each, and two of weights without biases
    assert described["channels"] == D
    assert described["parameters"] == 2 * D + 2 * heads.HIDDEN + D * heads.HIDDEN + heads.HIDDEN * 2


P = np.array([[0.9, 0.6, 0.3], [0.2, 0.1, 0.5]])


def test_averages_are_those_of_their_formulas():
    assert np.allclose(heads.average(P, "mean"), [0.6, 0.8 / 3])
    malignant, benign = np.cbrt(P.prod(axis=1)), np.cbrt((1 - P).prod(axis=1))
    assert np.allclose(heads.average(P, "log"), malignant / (malignant + benign))
    assert np.allclose(heads.average(P, "beta"), [0.25 * 0.9 + 0.75 * 0.45, 0.25 * 0.2 + 0.75 * 0.3])
    for rule in heads.RULES:
        assert np.array_equal(heads.average(P[:, :1], rule), P[:, 0])


def test_certain_predictions_have_an_average():
    certain = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
    for rule in heads.RULES:
        averages = heads.average(certain, rule)
        assert np.isfinite(averages).all() and np.allclose(averages[:2], [0, 1])


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="mean, log, beta"):
        heads.average(P, "median")


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(0, 1)),
    st.sampled_from(heads.RULES),
    st.randoms(use_true_random=False),
)
def test_an_average_lies_between_the_views_whatever_their_order(p, rule, shuffler):
    averages = heads.average(p, rule)
    assert (p.min(axis=1) - 1e-9 <= averages).all() and (averages <= p.max(axis=1) + 1e-9).all()
    order = list(range(1, p.shape[1]))
    shuffler.shuffle(order)
    assert np.allclose(averages, heads.average(p[:, [0, *order]], rule))
