"""Metrics with bootstrap intervals: every result of the course is scored here."""

import warnings

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from nodules.data.sources import CLASSES

RESAMPLES = 1000
SAME = 1e-12  # standard deviation of resamples that differ by rounding alone
GRID = np.linspace(0, 1, 101)  # where curves are evaluated
BINS = 10  # of the calibration error, of equally many patches
CALIPER = 1.15  # two nodules are matched in size if neither diameter is more than this many times the other


def auc(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the weighted share of (malignant, benign) pairs ranked correctly, ties counting half.

    The same as scikit-learn's ``roc_auc_score`` with sample weights, for many sets of weights at once.

    Args:
        y: labels in {0, 1}, shape (N,).
        p: scores, shape (N,).
        weights: shape (R, N).

    Returns:
        Shape (R,); NaN where the weights leave only one class.
    """
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=-np.inf))
    malignant = np.add.reduceat((weights * y)[:, order], starts, axis=1)
    benign = np.add.reduceat((weights * (1 - y))[:, order], starts, axis=1)
    below = benign.cumsum(axis=1) - benign / 2
    pairs = malignant.sum(axis=1) * benign.sum(axis=1)
    return (malignant * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)


def accuracy(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of patches classified correctly at probability 0.5; shapes as for :func:`auc`."""
    return weights @ ((p >= 0.5) == (y == 1)) / weights.sum(axis=1)


def log_loss(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood in nats, probabilities clipped at float32 precision; shapes as for :func:`auc`."""
    smallest = np.finfo(np.float32).eps
    likelihood = np.clip(np.where(y == 1, p, 1 - p), smallest, 1)
    return weights @ -np.log(likelihood) / weights.sum(axis=1)


def brier(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared difference between probability and label (Brier 1950); shapes as for :func:`auc`."""
    return weights @ (p - y) ** 2 / weights.sum(axis=1)


def binned(p: np.ndarray) -> np.ndarray:
    """The bin of each probability, (N,), of ``BINS`` with equally many; ties share a bin, so there may be fewer."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.searchsorted(edges, p, side="right")


def calibration_error(y: np.ndarray, p: np.ndarray, weights: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Root mean square of the gap between predicted probability and share of malignant patches, debiased.

    A perfect model has gaps too, by chance. Here the square of each bin's gap is the mean product of the residuals of
    two *different* ``units`` (N,), so that chance cancels: on average it is 0 for a perfect model, and a bootstrap's
    draws lie around the value. Kumar et al. 2019 (arXiv 1909.10155) correct for independent patches; the products of
    units correct for patches that are alike. A negative mean square counts as 0. Other shapes as for :func:`auc`.
    """
    _, first, member = np.unique(units, return_index=True, return_inverse=True)
    bin_of = binned(p)
    residuals, counts = np.zeros((2, len(first), bin_of.max() + 1))
    places = member, bin_of
    np.add.at(residuals, places, y - p)
    np.add.at(counts, places, 1)
    of_unit = weights[:, first]
    products, pairs = ((of_unit @ sums) ** 2 - of_unit**2 @ sums**2 for sums in (residuals, counts))
    squares = np.divide(products, pairs, out=np.zeros_like(pairs), where=pairs > 0)
    patches = of_unit @ counts
    return np.sqrt(np.maximum(0, (patches * squares).sum(axis=1) / patches.sum(axis=1)))


def matched_auc(y: np.ndarray, p: np.ndarray, weights: np.ndarray, diameters: np.ndarray) -> np.ndarray:
    """Size-matched AUC: as :func:`auc`, but among pairs whose ``diameters`` (N,) differ by at most ``CALIPER``.

    What a model knows beyond size: a ruler has hardly more than 0.5. A patch of unknown diameter (NaN) is in no pair.
    """
    malignant, benign = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    alike = _alike(y, diameters).astype(np.float32)
    right = (np.sign(np.subtract.outer(p[malignant], p[benign])) + 1) / 2
    ranked, pairs = (
        np.einsum("rb,rb->r", weights[:, malignant].astype(np.float32) @ chosen, weights[:, benign])
        for chosen in ((alike * right).astype(np.float32), alike)
    )
    return ranked / np.where(pairs > 0, pairs, np.nan)


def _alike(y: np.ndarray, diameters: np.ndarray) -> np.ndarray:
    """Which malignant patches, the rows, match which benign ones, the columns, in size."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(np.subtract.outer(np.log(diameters[y == 1]), np.log(diameters[y == 0])))
    return ratio <= np.log(CALIPER)


METRICS = {"auc": auc, "accuracy": accuracy, "log_loss": log_loss, "brier": brier}
CALIBRATION, MATCHED = "calibration_error", "matched_auc"  # need units or diameters, unlike METRICS
SHARES = ("auc", "accuracy", MATCHED)  # of pairs, of patches


def bootstrap_weights(units: np.ndarray, seed: int) -> np.ndarray:
    """How often each patch occurs in the sample itself, once, and in each of R samples of whole units, (1 + R, N).

    Patches of a patient are correlated, so patients are drawn with replacement (cluster bootstrap,
    Field & Welsh 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x). ``units`` has one label per patch, (N,).
    """
    names, members = np.unique(units, return_inverse=True)
    even = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), even, size=RESAMPLES)[:, members]
    return np.vstack([np.ones(len(members)), drawn])


def score(
    y: np.ndarray,
    p: np.ndarray,
    units: np.ndarray,
    seed: int = 0,
    *,
    fold: np.ndarray | int = 0,
    diameters: np.ndarray | float = np.nan,
) -> dict[str, float]:
    """All of ``METRICS`` and the calibration error, each with a 95% percentile bootstrap interval.

    Where pairs can be matched in size, ``matched_auc`` as well.

    Args:
        y: labels in {0, 1}, shape (N,), both present.
        p: predicted probability of malignancy, shape (N,); or (S, N) of S trainings, whose scores are averaged.
        units: what is resampled, shape (N,): the patient of each patch, or where unknown the patch.
        seed: of the bootstrap.
        fold: in cross-validation, the fold of each patch, (N,): scores are averaged over folds, since predictions of
            different models are not ranked against each other. Folds with a single class are left out.
        diameters: of each patch's nodule, (N,), mm.

    Returns:
        ``n``, and for each metric its value and ``<metric>_low``, ``<metric>_high``.
    """
    weights = bootstrap_weights(units, seed)
    out: dict[str, float] = {"n": len(y)}
    for name in [*METRICS, CALIBRATION] + [MATCHED] * bool(np.isfinite(diameters).any()):
        draws = _draws(name, y, np.atleast_2d(p), weights, units, fold, diameters)
        if name == MATCHED and np.isnan(draws[0]):
            continue  # no pair is matched in size
        ends = interval(draws)
        if name in SHARES and draws[0] in (0, 1):  # all resamples are alike
            counted = np.ones(len(y), dtype=bool)
            if name == MATCHED:
                pairs = _alike(y, np.broadcast_to(diameters, len(y)))
                counted[y == 1], counted[y == 0] = pairs.any(1), pairs.any(0)
            fewest = min(len(np.unique(units[counted & (y == label)])) for label in (0, 1))
            ends |= dict(zip(("low", "high"), wilson(draws[0], fewest), strict=True))
        out |= {name: ends["value"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
    return out


def _draws(
    name: str,
    y: np.ndarray,
    p: np.ndarray,
    weights: np.ndarray,
    units: np.ndarray,
    fold: np.ndarray | int,
    diameters: np.ndarray | float,
) -> np.ndarray:
    """A metric under each row of weights (R, N), averaged over the models (S, N) and over folds, (R,); NaN if none."""
    fold, diameters = np.broadcast_to(fold, len(y)), np.broadcast_to(diameters, len(y))
    both = [rows for k in np.unique(fold) if len(np.unique(y[rows := fold == k])) == 2]
    members = both or [np.ones(len(y), dtype=bool)]
    known = {
        CALIBRATION: lambda y, p, weights, rows: calibration_error(y, p, weights, units[rows]),
        MATCHED: lambda y, p, weights, rows: matched_auc(y, p, weights, diameters[rows]),
    }
    metric = known.get(name, lambda y, p, weights, _: METRICS[name](y, p, weights))
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        every = [metric(y[rows], scores[rows], weights[:, rows], rows) for scores in p for rows in members]
        # In a resample, a fold may be missing or have one class: it counts in the others
        return np.nanmean(every, axis=0)


def interval(draws: np.ndarray) -> dict[str, float]:
    """``value, low, high`` (95%, percentiles) of a value and its resamples, (1 + R,)."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}


def difference(draws: np.ndarray) -> dict[str, float]:
    """``value, low, high`` (95%, percentiles) of a difference and its resamples, (1 + R,), and ``p_value``, two-sided.

    The p value is by the normal distribution (Wald): the share of resamples beyond zero could not be less than 1 / R,
    and so never pass a correction for more than R / 20 comparisons. Where all resamples are alike, as with very few
    patients, nothing is sure: the interval reaches to 0, and p is 1.
    """
    ends, spread = interval(draws), float(np.nanstd(draws[1:]))
    if spread > SAME:
        return ends | {"p_value": float(2 * ndtr(-abs(draws[0]) / spread))}
    return ends | {"low": min(0.0, ends["low"]), "high": max(0.0, ends["high"]), "p_value": 1.0}


def paired(
    y: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    units: np.ndarray,
    metric: str = "auc",
    seed: int = 0,
    *,
    fold: np.ndarray | int = 0,
    diameters: np.ndarray | float = np.nan,
) -> dict[str, float]:
    """How much better ``p`` is than ``q`` on the same patches: paired bootstrap, arguments as for :func:`score`.

    Returns:
        ``value`` (the difference in the metric), ``low``, ``high`` (95% interval), ``p_value`` (two-sided).
    """
    weights = bootstrap_weights(units, seed)
    ours, theirs = (_draws(metric, y, np.atleast_2d(model), weights, units, fold, diameters) for model in (p, q))
    return difference(ours - theirs)


def against(
    y: np.ndarray, scores: dict[str, np.ndarray], others: list[str], units: np.ndarray, seed: int = 0
) -> pd.DataFrame:
    """Every model against each of a few ``others``, on the same patches: how much higher is its AUC?

    Few, planned comparisons: with n models, all pairs would be n (n - 1) / 2, and Holm's correction would leave none.

    Args:
        y: labels, (N,).
        scores: of each model, (N,).
        others: keys of ``scores``.
        units: as for :func:`score`.
        seed: of the bootstrap.

    Returns:
        ``name, other``, ``value, low, high, p_value`` as from :func:`paired`, and ``p_holm`` after :func:`holm`.
    """
    weights = bootstrap_weights(units, seed)
    draws = {name: auc(y, p, weights) for name, p in scores.items()}
    rows = []
    for other in others:
        for name in scores:
            if name != other and not (name in others and others.index(name) < others.index(other)):
                rows.append({"name": name, "other": other, **difference(draws[name] - draws[other])})
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_value"].to_numpy()))


def shares(numerator: np.ndarray, denominator: np.ndarray, units: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Ratios of sums over patches, of two arrays (N, X), with 95% bootstrap intervals as in :func:`score`.

    Returns:
        ``value, low, high``, X rows; NaN where nothing is counted.
    """
    weights = bootstrap_weights(units, seed)
    above, below = weights @ numerator, weights @ denominator
    ratios = above / np.where(below > 0, below, np.nan)
    ends = np.full((2, ratios.shape[1]), np.nan)
    seen = np.isfinite(ratios[1:]).any(axis=0)
    ends[:, seen] = np.nanpercentile(ratios[1:, seen], [2.5, 97.5], axis=0)
    return pd.DataFrame({"value": ratios[0], "low": ends[0], "high": ends[1]})


def rates(hits: np.ndarray, counted: np.ndarray, units: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """As :func:`shares`, of the cases ``counted`` (N, X), 0 or 1, that are ``hits`` (N, X).

    All resamples of a rate of 0 or 1 are alike; its interval is Wilson's, with units as the cases.
    """
    table = shares(hits, counted, units, seed)
    for k in np.flatnonzero(table["value"].isin([0, 1])):
        table.loc[k, ["low", "high"]] = wilson(table["value"][k], len(np.unique(units[counted[:, k] > 0])))
    return table


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of ``count`` independent cases (Wilson 1927), low and high."""
    from scipy.stats import binomtest  # takes seconds, which few users of this module need

    ends = binomtest(round(share * count), int(count)).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def mean(values: np.ndarray, units: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of (N,) values, a rate where they are 0 or 1: ``value, low, high`` as from :func:`rates`."""
    column = np.asarray(values, dtype=float)[:, None]
    return rates(column, np.ones_like(column), units, seed).iloc[0].to_dict()


def over_repeats(differences: np.ndarray, ratio: float) -> dict[str, float]:
    """``value, low, high``: mean over repeated splits, (R,), and the corrected 95% interval of Nadeau & Bengio 2003.

    Splits of the same patches overlap, so their spread is too small; the variance is increased by the ``ratio`` of
    test to training patches (https://doi.org/10.1023/A:1024068626366).
    """
    r = len(differences)
    value, spread = float(np.mean(differences)), np.std(differences, ddof=1)
    half = float(stdtrit(r - 1, 0.975) * spread * np.sqrt(1 / r + ratio))
    return {"value": value, "low": value - half, "high": value + half}


def counted(table: pd.DataFrame) -> np.ndarray:
    """Which of N patches count for their ``nodule``, (N,).

    Where ``slice_index`` is known, the middle half of a nodule's slices: the outer ones graze it.
    """
    if "slice_index" not in table:
        return np.ones(len(table), dtype=bool)
    slices = table.groupby("nodule")["slice_index"]
    quarter, rank = slices.transform("size") // 4, slices.rank(method="first")
    return ((rank > quarter) & (rank <= slices.transform("size") - quarter)).to_numpy()


def over_slices(predictions: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Replace each patch's predictions by their mean over the slices of its ``nodule`` that are :func:`counted`.

    Returns:
        As many rows as given; ``drop_duplicates("nodule")`` leaves one per nodule.
    """
    means = predictions[counted(predictions)].groupby("nodule")[columns].mean()
    return predictions.assign(**means.loc[predictions["nodule"]].set_index(predictions.index))


def confusion(y: np.ndarray, called: np.ndarray, units: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Counts by truth and call (0 benign, 1 malignant), and their share of the true class with 95% intervals.

    Returns:
        ``truth, called, patches, value, low, high``, four rows.
    """
    rows = []
    for truth in (0, 1):
        members = y == truth
        for call in (0, 1):
            share = mean((called[members] == call).astype(float), units[members], seed)
            patches = int((members & (called == call)).sum())
            rows.append({"truth": CLASSES[truth], "called": CLASSES[call], "patches": patches, **share})
    return pd.DataFrame(rows)


def curves(y: np.ndarray, p: np.ndarray, units: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """ROC and precision-recall curves with pointwise 95% bootstrap bands.

    Returns:
        ``curve`` (``ROC`` or ``PR``), ``x`` (1 - specificity, or recall), ``value`` (sensitivity, or precision),
        ``low``, ``high``.
    """
    weights = bootstrap_weights(units, seed)
    lines = {"ROC": _roc, "PR": _precision}
    parts = []
    for name, line in lines.items():
        every = np.stack([line(y, p, w) for w in weights if 0 < w @ y < w.sum()])
        low, high = np.percentile(every[1:], [2.5, 97.5], axis=0)
        parts.append(pd.DataFrame({"curve": name, "x": GRID, "value": every[0], "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


def _roc(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from sklearn.metrics import roc_curve  # takes seconds, too

    false, true, _ = roc_curve(y, p, sample_weight=weights)
    return np.interp(GRID, false, true)


def _precision(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(y, p, sample_weight=weights)
    return np.interp(GRID, recall[::-1], precision[::-1])


def holm(p_values: np.ndarray) -> np.ndarray:
    """P values corrected for multiple comparisons (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    raised = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(raised, 1)
    return corrected
