import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nodules import learners, whole
from nodules.errors import InputError
from nodules.features import Bank

N, VIEWS, D = 400, 3, 8
TRAIN = 300


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(learners, "BATCH", 64)


@pytest.fixture(scope="module")
def toy():
    """A bank whose classes are far apart in every view, labels, and splits."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2
    array = rng.normal(0, 1, (N, VIEWS, D)) + 2 * (2 * y - 1)[:, None, None]
    return Bank(array.astype(np.float16), "toy", 1.0), y, np.repeat(["train", "valid", "test"], [TRAIN, 50, 50])


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


# Training


@pytest.mark.parametrize("draw", [False, True])
def test_a_seed_gives_the_same_head_bit_for_bit_and_another_another(toy, draw):
    before = generators()
    first, again, other = (learners.train(*toy, epochs=2, lr=1e-3, draw=draw, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state(first.model), state(again.model))
    pd.testing.assert_frame_equal(first.history, again.history, check_exact=True)
    pd.testing.assert_frame_equal(first.steps, again.steps, check_exact=True)
    assert not torch.equal(state(first.model), state(other.model))
    assert generators() == before


def test_a_head_learns_what_can_be_learnt(toy):
    bank, y, split = toy
    trained = learners.train(bank, y, split, epochs=5, lr=1e-2, draw=True)
    assert trained.steps["loss"].iloc[-1] < trained.steps["loss"].iloc[0] / 2
    assert trained.history["valid_loss"].iloc[-1] < trained.history["valid_loss"].iloc[0]
    assert trained.history["accuracy"].iloc[-1] > 0.95
    rows = np.flatnonzero(split == "test")
    p = learners.predict(trained.model, bank, rows)
    assert ((p >= 0.5) == (y[rows] == 1)[:, None]).mean() > 0.95


def test_five_patches_are_learnt_by_heart():
    rng = np.random.default_rng(0)
    bank = Bank(rng.normal(0, 1, (7, 1, 32)).astype(np.float16), "noise", 1.0)
    split = np.repeat(["train", "valid"], [5, 2])
    history = learners.train(bank, np.array([0, 1, 1, 0, 1, 0, 1]), split, epochs=150, lr=1e-2).history
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] / 10


@pytest.mark.parametrize("draw", [False, True])
def test_training_draws_views_where_it_should_and_validation_never(toy, draw):
    bank, y, split = toy
    fake = Recording(bank.features)
    learners.train(Bank(fake, "fake", 1.0), y, split, epochs=12, lr=1e-3, draw=draw)
    rows, views = (np.concatenate(part) for part in zip(*fake.read, strict=True))
    trained = split[rows] == "train"
    assert set(split[rows]) == {"train", "valid"}
    assert not views[~trained].any()
    shares = np.bincount(views[trained], minlength=VIEWS) / trained.sum()
    assert np.allclose(shares, [1 / 3] * 3 if draw else [1, 0, 0], atol=0.05)
    if draw:
        views_of_a_patch = pd.Series(views[trained]).groupby(rows[trained]).nunique()
        assert (views_of_a_patch > 1).mean() > 0.9, "a patch is seen in the same view in every epoch"


def test_an_epoch_is_a_row_and_a_batch_a_step(toy):
    trained = learners.train(*toy, epochs=3, lr=1e-3)
    batches = TRAIN // 64
    assert list(trained.history) == ["epoch", "train_loss", "valid_loss", "accuracy"]
    assert trained.history["epoch"].tolist() == [1, 2, 3] and np.isfinite(trained.history.to_numpy()).all()
    assert np.allclose(trained.steps["epoch"], np.arange(3 * batches) / batches)
    assert not trained.model.training and trained.seconds > 0


def test_repeated_trainings_are_those_of_the_seeds(toy):
    bank, y, split = toy
    history, p, seconds = learners.repeat(bank, y, split, [0, 1], epochs=2, lr=1e-3, draw=True)
    one = learners.train(bank, y, split, epochs=2, lr=1e-3, draw=True, seed=1)
    assert history["seed"].tolist() == [0, 0, 1, 1] and p.shape == (2, N) and seconds > 0
    assert np.array_equal(p[1], learners.predict(one.model, bank, np.arange(N))[:, 0])


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
    ("epochs", "options", "formula"),
    [
        (3, {"schedule": "constant"}, np.ones_like),
        (8, {"schedule": "one-cycle"}, one_cycle),
        (8, {"schedule": "flat-cosine"}, flat_cosine),
        (2, {"schedule": "restarts", "cycle_len": 2}, restarts(2)),
        (10, {"schedule": "restarts"}, restarts(*[1] * 10)),
        (6, {"schedule": "restarts", "cycle_len": 2}, restarts(2, 2, 2)),
        (7, {"schedule": "restarts", "cycle_mult": 2}, restarts(1, 2, 4)),
        (8, {"schedule": "restarts", "cycle_len": 2, "cycle_mult": 3}, restarts(2, 6)),
    ],
)
def test_recorded_learning_rates_are_those_of_the_formula(toy, epochs, options, formula):
    lr = 0.01
    steps = learners.train(*toy, epochs=epochs, lr=lr, **options).steps
    assert np.allclose(steps["lr"], lr * formula(steps["epoch"].to_numpy() / epochs), rtol=1e-3, atol=lr * 1e-5)
    assert np.isclose(steps["lr"].max(), lr)


@pytest.mark.parametrize(("mult", "starts"), [(1, range(6)), (2, (0, 2))])
def test_a_restart_leaps_from_almost_0_to_the_highest_rate(toy, mult, starts):
    options = {"schedule": "restarts", "cycle_len": 1 if mult == 1 else 2, "cycle_mult": mult}
    rates = learners.train(*toy, epochs=6, lr=1, **options).steps["lr"].to_numpy()
    batches = TRAIN // 64
    leaps = np.flatnonzero(np.diff(rates) > 0) + 1
    assert leaps.tolist() == [start * batches for start in starts if start]
    assert np.allclose(rates[[0, *leaps]], 1) and (rates[[*(leaps - 1), -1]] < 0.2).all()


@pytest.mark.parametrize("schedule", learners.SCHEDULES)
def test_a_slice_gives_each_layer_group_its_own_rate(toy, schedule):
    learn = learners.learner(*toy, draw=False, seed=0)
    learn.splitter = lambda model: [list(model[:3].parameters()), list(model[3:].parameters())]
    rates = whole.GroupRates()
    learn.add_cb(rates)
    with learn.no_bar(), learn.no_logging():
        learners.fit(learn, 2, slice(1e-4, 1e-3), schedule)
    first, last = np.array(rates.rates).T
    assert np.allclose(first, last / 10) and np.isclose(last.max(), 1e-3)


@pytest.mark.parametrize(
    ("epochs", "cycle_len", "cycle_mult", "lengths"),
    [(1, 1, 1, [1]), (4, 1, 1, [1] * 4), (6, 2, 1, [2] * 3), (7, 1, 2, [1, 2, 4]), (8, 2, 3, [2, 6])],
)
def test_cycles_fill_the_epochs(epochs, cycle_len, cycle_mult, lengths):
    assert learners.cycles(epochs, cycle_len, cycle_mult) == lengths


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, 2, 1), "take epochs=6"),
        ((6, 1, 2), "take epochs=7"),
        ((1, 2, 1), "take epochs=2"),
        ((4, 0, 1), "cycle_len=0"),
        ((4, 1, 0), "cycle_mult=0"),
        ((4, -1, 1), "cycle_len=-1"),
        ((4, 1, -2), "cycle_mult=-2"),
    ],
)
def test_cycles_that_are_not_whole_are_refused(arguments, named):
    with pytest.raises(InputError) as caught:
        learners.cycles(*arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0}, "lr=0"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"schedule": "linear"}, "constant, restarts, one-cycle, flat-cosine"),
        ({"schedule": "restarts", "cycle_len": 2}, "take epochs=4"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_one_line_before_any_work(change, named):
    with pytest.raises(InputError) as caught:
        learners.train(None, None, None, **{"epochs": 3, "lr": 1e-3} | change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_that_gives_no_numbers_is_refused_in_one_line(toy):
    bank = toy[0]
    diverged = torch.nn.Linear(bank.features.shape[2], 2)
    torch.nn.init.constant_(diverged.weight, float("nan"))
    with pytest.raises(InputError, match="diverged; take a lower learning rate"):
        learners.predict(diverged, bank, np.arange(5))


# The learning-rate finder


def test_the_finder_suggests_rates_repeats_and_leaves_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = generators()
    (table, rates), (again, same), (other, _) = (learners.find_lr(*toy, draw=True, seed=seed) for seed in (0, 0, 1))
    assert generators() == before and not list(tmp_path.iterdir())
    pd.testing.assert_frame_equal(table, again, check_exact=True)
    assert rates == same and not table.equals(other)
    low, high, steps = learners.FINDER
    assert list(rates) == ["valley", "slide", "minimum", "steep"]
    assert all(low <= rate <= high for rate in rates.values()), "NaN is not"
    expected = low * (high / low) ** (np.arange(len(table)) / steps)
    assert 20 < len(table) <= steps and np.allclose(table["lr"], expected)


def test_the_finder_puts_the_weights_back(toy):
    learn = learners.learner(*toy, draw=False, seed=0)
    before = state(learn.model).clone()
    changed = []
    finder = learners.MemoryLRFinder(1e-3, 1, 10)
    inner = finder.after_batch
    finder.after_batch = lambda: (changed.append(not torch.equal(state(learn.model), before)), inner())
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=finder)
    assert all(changed) and len(changed) == 10
    assert torch.equal(state(learn.model), before)


# Prediction and averages over views


def test_predictions_are_the_softmax_of_every_view(toy):
    bank, _, _ = toy
    torch.manual_seed(0)
    model = learners.head(D).eval()
    rows = np.arange(5, 200)
    p = learners.predict(model.to(learners.device()), bank, rows)
    assert p.shape == (len(rows), VIEWS)
    with torch.inference_mode():
        for view in range(VIEWS):
            logits = model.cpu()(torch.from_numpy(bank.features[rows, view]).float())
            exp = logits.double().exp()
            assert np.allclose(p[:, view], (exp[:, 1] / exp.sum(1)).numpy(), atol=1e-5)


P = np.array([[0.9, 0.6, 0.3], [0.2, 0.1, 0.5]])


def test_averages_are_those_of_their_formulas():
    assert np.allclose(learners.average(P, "mean"), [0.6, 0.8 / 3])
    malignant, benign = np.cbrt(P.prod(axis=1)), np.cbrt((1 - P).prod(axis=1))
    assert np.allclose(learners.average(P, "log"), malignant / (malignant + benign))
    assert np.allclose(learners.average(P, "beta"), [0.25 * 0.9 + 0.75 * 0.45, 0.25 * 0.2 + 0.75 * 0.3])
    for rule in learners.RULES:
        assert np.array_equal(learners.average(P[:, :1], rule), P[:, 0])


def test_certain_predictions_have_an_average():
    certain = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
    for rule in learners.RULES:
        found = learners.average(certain, rule)
        assert np.isfinite(found).all() and np.allclose(found[:2], [0, 1])


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="mean, log, beta"):
        learners.average(P, "median")


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(0, 1)),
    st.sampled_from(learners.RULES),
    st.randoms(use_true_random=False),
)
def test_an_average_lies_between_the_views_whatever_their_order(p, rule, shuffler):
    found = learners.average(p, rule)
    assert (p.min(axis=1) - 1e-9 <= found).all() and (found <= p.max(axis=1) + 1e-9).all()
    order = list(range(1, p.shape[1]))
    shuffler.shuffle(order)
    assert np.allclose(found, learners.average(p[:, [0, *order]], rule))
