"""Scores of a classifier, and intervals over patients."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from primia_lite.config import UserError


def pneumonia_score(probabilities: np.ndarray) -> np.ndarray:
    """One minus the probability of ``normal``: [N, K] -> [N]."""
    return 1.0 - probabilities[:, 0]


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, normal versus pneumonia of any kind; nan where only one of them is present."""
    positive = labels > 0
    if positive.all() or not positive.any():
        return float("nan")
    return float(sk.roc_auc_score(positive, pneumonia_score(probabilities)))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of films whose likeliest class is the true one."""
    return float((probabilities.argmax(1) == labels).mean())


def mcc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient over all classes (Gorodkin 2004); 0 where only one is called or present."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(sk.matthews_corrcoef(labels, probabilities.argmax(1)))


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``auroc`` (normal versus pneumonia), ``accuracy`` and ``mcc`` (over all classes), ``loss`` (nats per film).

    Parameters
    ----------
    probabilities : float [N, K]
    labels : int [N]
    """
    likelihood = probabilities[np.arange(len(labels)), labels].clip(1e-12)
    return {
        "auroc": auroc(probabilities, labels),
        "accuracy": accuracy(probabilities, labels),
        "mcc": mcc(probabilities, labels),
        "loss": float(-np.log(likelihood).mean()),
    }


def best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The pneumonia score that maximises sensitivity + specificity (Youden 1950). To be chosen on validation films."""
    false_positive_rate, true_positive_rate, thresholds = sk.roc_curve(labels > 0, pneumonia_score(probabilities))
    return float(thresholds[1:][np.argmax((true_positive_rate - false_positive_rate)[1:])])


def sensitivity_specificity(
    probabilities: np.ndarray, labels: np.ndarray, threshold: float = 0.5
) -> tuple[float, float]:
    """Of calling pneumonia where the score reaches ``threshold``."""
    called = pneumonia_score(probabilities) >= threshold
    return float(called[labels > 0].mean()), float((~called[labels == 0]).mean())


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, int [K, K]: true class by row, called class by column."""
    return sk.confusion_matrix(labels, probabilities.argmax(1), labels=range(probabilities.shape[1]))


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Mean score and observed share of pneumonia, in quantile bins."""
    score = pneumonia_score(probabilities)
    observed, predicted = calibration_curve(labels > 0, score, n_bins=bins, strategy="quantile")
    return predicted, observed


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Mean gap of score and observed share over quantile bins, weighted by their films (Naeini et al. 2015)."""
    score = pneumonia_score(probabilities)
    edges = np.quantile(score, np.linspace(0, 1, bins + 1))
    films_in = np.bincount(np.searchsorted(edges[1:-1], score), minlength=bins)  # ties make bins unequal, or empty
    predicted, observed = calibration(probabilities, labels, bins)
    return float(np.average(np.abs(predicted - observed), weights=films_in[films_in > 0]))


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    patient_id: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic, resampling whole patients (Efron and Tibshirani 1993).

    Parameters
    ----------
    statistic
        Function of film indices, int [M]. For a paired comparison it returns a difference of two models.
    """
    if draws < 100:
        raise UserError(f"draws is {draws}: an interval needs at least 100")
    rng = np.random.default_rng(seed)
    order = np.argsort(patient_id, kind="stable")
    films_of = np.split(order, np.flatnonzero(np.diff(np.unique(patient_id, return_inverse=True)[1][order])) + 1)
    values = []
    for _ in range(draws):
        chosen = rng.integers(len(films_of), size=len(films_of))
        values.append(statistic(np.concatenate([films_of[i] for i in chosen])))
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)
