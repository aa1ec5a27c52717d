"""Repeated experiments: leaking splits, few patients, augmentations, other scanners.

The quick model is a logistic regression on principal components of a frozen body's features. It trains in a fraction
of a second, so an experiment can be repeated to measure its spread.
"""

import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from nodules.data import split
from nodules.data.split import Part, Parts
from nodules.errors import InputError
from nodules.evaluation import metrics
from nodules.networks import bank, bodies, heads
from nodules.networks.bank import Bank
from nodules.workers import allowed, processes

COMPONENTS, STRENGTH = 128, 1e-2  # of the quick model: components, inverse regularisation
LEAKS = {"auc": "AUC", "accuracy": "accuracy", "log_loss": "log-loss"}
REFITS = 200  # of the power law of a learning curve
# Comparison of augmentations: augmented views per patch, heads per kind, epochs per head
ABLATION_VIEWS, ABLATION_SEEDS, ABLATION_EPOCHS = 2, 3, 20


def components(bank: Bank, seed: int) -> np.ndarray:
    """Principal components of the plain view's features, unit variance, (N, 128) float32; labels are not used."""
    plain = StandardScaler().fit_transform(np.asarray(bank.features[:, 0], dtype=np.float32))
    kept = min(COMPONENTS, *plain.shape)
    return PCA(kept, whiten=True, svd_solver="randomized", random_state=seed).fit_transform(plain)


def quick(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Probability of malignancy for features ``at`` (M, D), by the quick model fitted on ``x`` (N, D)."""
    return LogisticRegression(C=STRENGTH, max_iter=500).fit(x, y).predict_proba(at)[:, 1]


def leakage(x: np.ndarray, table: pd.DataFrame, most: list[int], repeats: int, seed: int) -> pd.DataFrame:
    """Score the quick model on splits that leak and on otherwise equal splits that do not.

    Each repeat makes a split in which no ``group`` is in two parts, then shuffles its patches within each class
    (:func:`nodules.data.split.dealt`).

    Args:
        x: features, (N, D).
        table: ``id, malignant, group`` (patient or cluster), ``nodule`` of each patch.
        most: levels, each the most slices of one nodule.
        repeats: splits per level.
        seed: of the first repeat.

    Returns:
        ``slices, repeat, arm`` (``apart`` or ``random``), ``ratio`` (of test to training patches), and each of
        ``metrics.METRICS`` on test. Levels at which the units can't be kept apart with both classes in all parts are
        left out.
    """
    rows, y, seeds = [], table["malignant"].to_numpy(), range(seed, seed + repeats)
    with processes(allowed()) as pool:  # to cut takes longer than to train
        cuts_of = {level: pool.map(partial(_cut, table, level), seeds) for level in most}
        for level in tqdm(most, "leakage", unit="level"):
            cuts = list(cuts_of[level])
            for repeat, (few, apart) in enumerate(cuts if None not in cuts else []):
                arms = {"apart": apart, "random": split.dealt(apart, y[few], seed + repeat)}
                for arm, parts in arms.items():
                    train, test = few[parts == "train"], few[parts == "test"]
                    p, every = quick(x[train], y[train], x[test]), np.ones((1, len(test)))
                    scores = {name: float(metric(y[test], p, every)[0]) for name, metric in metrics.METRICS.items()}
                    about = {"slices": level, "repeat": repeat, "arm": arm, "ratio": len(test) / len(train)}
                    rows.append(about | scores)
    return pd.DataFrame(rows, columns=["slices", "repeat", "arm", "ratio", *metrics.METRICS])


def _cut(table: pd.DataFrame, level: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows of at most ``level`` slices per nodule, and a split that keeps units apart; None if there is none."""
    drawn = table.sample(frac=1, random_state=seed)
    few = np.sort(table.index.get_indexer(drawn[drawn.groupby("nodule").cumcount() < level].index))
    grouped = table.iloc[few].assign(patient=table["group"].iloc[few])
    with suppress(InputError):
        return few, split.assign(grouped, "patient", seed)["split"].to_numpy()


def inflation(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of both arms of :func:`leakage` over repeats, and how much better the leaking one looks.

    Returns:
        ``metric`` (a title), ``slices``, ``arm`` (``apart``, ``random``, or ``gain``: random minus apart, for losses
        apart minus random), ``value, low, high`` as from :func:`nodules.evaluation.metrics.over_repeats`.
    """
    rows = []
    for (name, title), (slices, level) in itertools.product(LEAKS.items(), scores.groupby("slices")):
        arms = level.pivot(index="repeat", columns="arm", values=name)
        arms["gain"] = (arms["random"] - arms["apart"]) * (-1 if name == "log_loss" else 1)
        for arm in arms:
            score = metrics.over_repeats(arms[arm].to_numpy(), level["ratio"].mean())
            rows.append({"metric": title, "slices": slices, "arm": arm, **score})
    return pd.DataFrame(rows)


def learning_curve(
    x: np.ndarray, parts: Parts, sizes: list[int], repeats: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """Test AUC of the quick model, trained on subsets of the training units, such as patients.

    Args:
        x: features of all patches, (N, D).
        parts: their split.
        sizes: numbers of units to train on.
        repeats: draws per size; draws of a single class are repeated.
        seed: of the draws and the bootstrap.

    Returns:
        ``x`` (size), ``value, low, high`` of the mean over draws; and 1 - that mean on the test patches and on
        their resamples, (1 + R, sizes).
    """
    rng, train, test = np.random.default_rng(seed), parts.train, parts.test
    names, rows = np.unique(train.units), []
    weights = metrics.bootstrap_weights(test.units, seed)
    errors = np.empty((len(weights), len(sizes)))
    for column, size in enumerate(tqdm(sizes, "learning curve", unit="size")):
        draws: list[np.ndarray] = []
        while len(draws) < repeats:
            chosen = np.isin(train.units, rng.choice(names, size, replace=False))
            if len(np.unique(train.y[chosen])) == 2:
                draws.append(quick(x[train.rows[chosen]], train.y[chosen], x[test.rows]))
        aucs = np.mean([metrics.auc(test.y, p, weights) for p in draws], axis=0)
        errors[:, column] = 1 - aucs
        rows.append({"x": size, **metrics.interval(aucs)})
    return pd.DataFrame(rows), errors


def extrapolate(sizes: np.ndarray, errors: np.ndarray, at: np.ndarray) -> pd.DataFrame:
    """Learning curves extrapolated by power laws: ``x, value, low, high`` of 1 - error.

    Errors fall roughly as floor + scale * size ** -power (Hestness et al. 2017, arXiv 1712.00409).

    Args:
        sizes: (S,), ascending.
        errors: 1 - AUC on the test patches and on resamples of them, (1 + R, S), as from :func:`learning_curve`; a law
            is fitted to each, so the band holds what is uncertain about the measurements.
        at: sizes to show, (X,).
    """

    def law(size: np.ndarray, floor: float, scale: float, power: float) -> np.ndarray:
        return floor + scale * (size / sizes[0]) ** -power

    def fitted(error: np.ndarray) -> np.ndarray:
        start, bounds = (error.min() / 2, error.max(), 0.5), ([0, 0, 0.01], [0.5, 1, 3])
        # Unlike curve_fit, it gives its best after so many steps, where a noisy curve has no clear law
        fit = least_squares(lambda parameters: law(sizes, *parameters) - error, start, bounds=bounds, max_nfev=50)
        return law(at, *fit.x)

    whole = np.isfinite(errors).all(axis=1)  # not where a resample has one class
    first, *resampled = (1 - fitted(error) for error in errors[whole][: 1 + REFITS])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return pd.DataFrame({"x": at, "value": first, "low": low, "high": high})


def ablation_heads(body: bodies.Body, part: Part, pool: str, kind: str, seed: int) -> list[nn.Module]:
    """Heads with several seeds, trained on the same patches with one kind of augmentation.

    Args:
        body: the frozen network.
        part: patches to train on; every tenth is for validation only.
        pool: as for :func:`nodules.networks.bank.compute`.
        kind: of augmentation, ``none`` or one of :func:`nodules.data.transforms.vary`.
        seed: of the augmentation; the heads have this one and those after it.
    """
    images, places = part.images, np.arange(len(part))
    features = bank.compute(body, images, pool, kind, ABLATION_VIEWS, seed)
    alone = replace(part, source=images, rows=places)
    parts = split.divide(alone, np.where(places % 10 == 9, "valid", "train"))
    recipe = heads.Recipe(ABLATION_EPOCHS, heads.LR, augment=kind != "none")
    return [heads.train(features, parts, recipe, seed + i).model for i in range(ABLATION_SEEDS)]


def predict(models: list[nn.Module], features: Bank, rows: np.ndarray) -> np.ndarray:
    """Each head's probabilities for the plain view of some patches, (heads, rows)."""
    return np.stack([heads.predict(model, features, rows)[:, 0] for model in models])


def by_severity(
    about: pd.DataFrame, y: np.ndarray, p: np.ndarray, units: np.ndarray, seed: int, names: dict[str, str]
) -> pd.DataFrame:
    """How a model degrades under each shift.

    Args:
        about: ``shift, severity`` of each of the M patches; severity 0 is unshifted.
        y: labels, (M,).
        p: probabilities, (M,), or (S, M) of S trainings.
        units: patient of each patch, (M,).
        seed: of the bootstrap.
        names: titles of the wanted metrics by name.

    Returns:
        ``shift, metric`` (its title), ``x`` (severity), ``value, low, high``.
    """
    rows, p = [], np.atleast_2d(p)
    start = (about["severity"] == 0).to_numpy()
    scored = {}
    for (shift, severity), block in about.groupby(["shift", "severity"], sort=False):
        at = block.index.to_numpy()
        scored[shift, severity] = metrics.score(y[at], p[:, at], units[at], seed)
    (zero,) = (score for (_, severity), score in scored.items() if severity == 0)
    for shift in about.loc[~start, "shift"].unique():
        grades = {0: zero} | {severity: score for (name, severity), score in scored.items() if name == shift}
        for (severity, score), (name, title) in itertools.product(grades.items(), names.items()):
            ends = {"value": score[name], "low": score[f"{name}_low"], "high": score[f"{name}_high"]}
            rows.append({"shift": shift, "metric": title, "x": severity, **ends})
    return pd.DataFrame(rows)


def gains(
    about: pd.DataFrame, y: np.ndarray, p: dict[str, np.ndarray], units: np.ndarray, seed: int, reference: str
) -> pd.DataFrame:
    """AUC of each training recipe minus that of the ``reference``, by shift, averaged over severities.

    Args:
        about: as for :func:`by_severity`; every block holds the same patches in the same order.
        y: labels, (M,).
        p: probabilities of each recipe, (S, M) of S trainings.
        units: patient of each patch, (M,).
        seed: of the paired bootstrap.
        reference: a key of ``p``.

    Returns:
        ``row`` (recipe), ``column`` (shift), ``value, low, high, p_value``, and ``p_holm`` after
        :func:`nodules.evaluation.metrics.holm`.
    """
    first = next(block.index for _, block in about.groupby(["shift", "severity"], sort=False))
    weights = metrics.bootstrap_weights(units[first], seed)
    rows = []
    for shift, of_shift in about.groupby("shift", sort=False):
        blocks = [block.index.to_numpy() for _, block in of_shift.groupby("severity")]
        auc = {
            name: np.mean(
                [metrics.auc(y[at], probabilities[at], weights) for at in blocks for probabilities in trainings], axis=0
            )
            for name, trainings in p.items()
        }
        for name in auc.keys() - {reference}:
            rows.append({"row": name, "column": shift, **metrics.difference(auc[name] - auc[reference])})
    order = [name for name in p if name != reference]
    table = pd.DataFrame(rows).sort_values("row", key=lambda names: names.map(order.index), kind="stable")
    return table.assign(p_holm=metrics.holm(table["p_value"].to_numpy()))


def simulate(patients: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float]]:
    """A model of known performance: one hidden value per patient, a little noise per patch.

    Returns:
        Labels, probabilities and patients, (patients * slices,), and the true ``auc`` and ``accuracy``.
    """
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(patients), slices)
    y = units % 2
    score = 2 * y - 1 + np.repeat(rng.normal(0, 1, patients), slices) + rng.normal(0, 0.3, len(y))
    apart = 1 / np.hypot(1, 0.3)  # from the middle to either class, in standard deviations
    truth = {"auc": float(norm.cdf(apart * np.sqrt(2))), "accuracy": float(norm.cdf(apart))}
    return y, 1 / (1 + np.exp(-score)), units, truth


def coverage(patients: int, slices: int, simulations: int, seed: int) -> pd.DataFrame:
    """How often 95% intervals contain the truth when resampling patients and, wrongly, patches.

    Returns:
        ``name`` (a metric), ``part`` (what is resampled), ``value`` (share of simulations), ``low, high`` (95%).
    """
    hits: dict[tuple[str, str], list[bool]] = {}
    for simulation in tqdm(range(simulations), "coverage", unit="simulation"):
        y, p, units, truth = simulate(patients, slices, seed + simulation)
        for part, resampled in (("patients", units), ("patches", np.arange(len(y)))):
            weights = metrics.bootstrap_weights(resampled, simulation)
            for name, value in truth.items():
                ends = metrics.interval(metrics.METRICS[name](y, p, weights))
                hits.setdefault((name, part), []).append(ends["low"] <= value <= ends["high"])
    rows = []
    for (name, part), held in hits.items():
        low, high = metrics.wilson(np.mean(held), simulations)
        rows.append({"name": name, "part": part, "value": np.mean(held), "low": low, "high": high})
    return pd.DataFrame(rows)
