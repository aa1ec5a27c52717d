"""From probabilities to decisions: calibration, thresholds, net benefit, conformal sets, abstention.

Everything is fitted and chosen on validation patches; test patches are only measured.
"""

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.metrics import roc_curve

from nodules.evaluation import metrics

RATES = (0.9, 0.95)  # sensitivities and specificities that screening and referral require
ALPHA = 0.1  # miscoverage allowed to a conformal set
THRESHOLDS = np.linspace(0.05, 0.8, 31)  # of the decision curve
SURE = 0.05  # p value, corrected for several comparisons, below which a difference is claimed
KEPT = np.linspace(0.2, 1.0, 17)  # shares of patches on which a cautious model decides
SMALLEST = np.finfo(np.float32).eps  # probability, clipped as in the log-loss


def tempered(p: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities whose logits are divided by ``temperature``: above 1, less confident; in the same order."""
    return expit(logit(np.clip(p, SMALLEST, 1 - SMALLEST)) / temperature)


def temperature(y: np.ndarray, p: np.ndarray) -> float:
    """The temperature with the lowest log-loss (Guo et al. 2017, arXiv 1706.04599), between 0.05 and 20."""

    def loss(log_t: float) -> float:
        return float(metrics.log_loss(y, tempered(p, np.exp(log_t)), np.ones((1, len(y))))[0])

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def reliability(y: np.ndarray, p: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Share of malignant patches against predicted probability, in ``metrics.BINS`` bins of equally many patches.

    Returns:
        One row per bin: ``x`` (mean probability), ``value`` (share of malignant patches), ``low, high, patches``.
    """
    bin_of = metrics.binned(p)
    member = (bin_of[:, None] == np.unique(bin_of)).astype(float)
    table = metrics.rates(y[:, None] * member, member, units, seed)
    return table.assign(x=(p @ member) / member.sum(axis=0), patches=member.sum(axis=0).astype(int))


def threshold(y: np.ndarray, p: np.ndarray, rate: str, at_least: float) -> float:
    """The threshold at which ``rate`` (``sensitivity`` or ``specificity``) reaches ``at_least`` on these patches.

    Of all such thresholds, the one that costs least of the other rate.
    """
    if rate == "sensitivity":
        return float(-np.quantile(-p[y == 1], at_least, method="inverted_cdf"))
    return float(np.nextafter(np.quantile(p[y == 0], at_least, method="inverted_cdf"), np.inf))


def youden(y: np.ndarray, p: np.ndarray) -> float:
    """The threshold with the highest sensitivity + specificity (Youden 1950), halfway to the next lower score."""
    false, true, thresholds = roc_curve(y, p, drop_intermediate=False)
    best = 1 + int(np.argmax((true - false)[1:]))  # the first threshold is infinite
    below = p[p < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if len(below) else float(thresholds[best])


def operating_points(
    valid: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], units: np.ndarray, seed: int
) -> pd.DataFrame:
    """Sensitivity and specificity on test at thresholds that reach ``RATES`` on valid.

    Args:
        valid: labels and probabilities, (M,) each.
        test: labels and probabilities, (N,) each.
        units: what the bootstrap resamples, such as the patient of each test patch, (N,).
        seed: of the bootstrap.

    Returns:
        ``name`` (the target on valid), ``threshold``, ``part`` (the rate measured), ``value, low, high``.
    """
    y, p = test
    truth = np.column_stack([y == 1, y == 0]).astype(float)
    rows = []
    for rate in ("specificity", "sensitivity"):
        for wanted in RATES:
            line = threshold(*valid, rate, wanted)
            right = truth * np.column_stack([p >= line, p < line])
            table = metrics.rates(right, truth, units, seed)
            about = {"name": f"{rate} {wanted:.0%} on valid", "threshold": line, "part": ["sensitivity", "specificity"]}
            rows.append(table.assign(**about))
    return pd.concat(rows, ignore_index=True)


def net_benefit(y: np.ndarray, p: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Decision curve (Vickers & Elkin 2006, https://doi.org/10.1177/0272989X06295361): ``x, value, low, high``.

    ``x`` is the threshold probability for follow-up: an unnecessary follow-up costs x / (1 - x) of the benefit of a
    detected cancer. The net benefit is in detected cancers per patch.
    """
    called = p[:, None] >= THRESHOLDS
    gain = called * np.where(y[:, None] == 1, 1, -THRESHOLDS / (1 - THRESHOLDS))
    return metrics.shares(gain, np.ones_like(gain), units, seed).assign(x=THRESHOLDS)


def conformal(valid: tuple[np.ndarray, np.ndarray], p: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Split-conformal sets (Vovk et al. 2005; Angelopoulos & Bates 2021, arXiv 2107.07511): the plausible classes.

    Args:
        valid: labels and probabilities to calibrate on, (M,) each.
        p: probabilities of the patches to judge, (N,).
        alpha: miscoverage allowed, if these patches and those of valid are exchangeable.

    Returns:
        (N, 2) bool: whether ``benign`` and ``malignant`` are in the set; both, one or none.
    """
    return np.column_stack([p, 1 - p]) <= conformal_line(*valid, alpha)


def conformal_line(y: np.ndarray, p: np.ndarray, alpha: float = ALPHA) -> float:
    """The probability against a class up to which it stays in a conformal set, from labels and probabilities (M,)."""
    strange = np.sort(np.where(y == 1, 1 - p, p))
    rank = int(np.ceil((len(y) + 1) * (1 - alpha)))
    return float(strange[rank - 1]) if rank <= len(y) else np.inf


def coverage(y: np.ndarray, sets: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """How often conformal sets contain the truth, overall and by class, and how many classes they name.

    Returns:
        ``name, value, low, high``: shares of the patches (of that class).
    """
    counted = np.column_stack([np.ones(len(y)), y == 0, y == 1, np.ones((len(y), 3))])
    named = sets.sum(axis=1)
    held = sets[np.arange(len(y)), y]
    hits = counted * np.column_stack([held, held, held, named == 1, named == 2, named == 0])
    names = ["truth in the set", "truth in the set, benign", "truth in the set, malignant"]
    names += ["one class named", "both named: no opinion", "none named: unlike any"]
    return metrics.rates(hits, counted, units, seed).assign(name=names)


def abstention(y: np.ndarray, p: np.ndarray, units: np.ndarray, seed: int) -> pd.DataFrame:
    """Accuracy where the model is most confident: ``x`` (share of patches kept), ``value, low, high``."""
    sure = np.abs(p - 0.5)
    kept = (sure[:, None] >= np.quantile(sure, 1 - KEPT)).astype(float)
    right = ((p >= 0.5) == (y == 1))[:, None]
    return metrics.rates(right * kept, kept, units, seed).assign(x=KEPT)


def challenged(incumbent: str, gains: pd.DataFrame) -> str:
    """The incumbent, unless others are surely better: then the best of those.

    A choice of the highest score turns on its last digits, and so on the machine. This one turns only where a paired
    difference becomes sure.

    Args:
        incumbent: the model to keep.
        gains: of each other model over it, indexed by name: ``value, p_value`` as from
            :func:`nodules.evaluation.metrics.paired`.
    """
    sure = gains[(gains["value"] > 0) & (metrics.holm(gains["p_value"].to_numpy()) < SURE)]
    return str(sure["value"].idxmax()) if len(sure) else incumbent
