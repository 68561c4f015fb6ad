"""Scores of a classifier, and intervals over patients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

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


# --- films that an attacker reconstructs ------------------------------------------------------------------------------


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1]; equal images get 200."""
    image, truth = _same_size(image, truth)
    return float(-10 * np.log10(np.maximum(1e-20, np.mean((image - truth) ** 2))))


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two films [H, W] in [0, 1], by scikit-image."""
    from skimage.metrics import structural_similarity

    image, truth = _same_size(image, truth)
    return float(structural_similarity(image, truth, data_range=1.0))


def _same_size(image: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, truth = np.squeeze(np.asarray(image, dtype=np.float64)), np.squeeze(np.asarray(truth, dtype=np.float64))
    if image.shape != truth.shape:
        raise UserError(f"films of {image.shape} and {truth.shape} pixels can't be compared: give one size")
    return image, truth


class Gallery:
    """Which of these films is a reconstruction of? By correlation with the constant and the mean film regressed out of
    both (pncc): what all children share, and an attacker's brightness and contrast, count for nothing.

    Parameters
    ----------
    films : uint8 or float [N, H, W], those among which to identify; uint8 is scaled to [0, 1]
    mean_film : float [H, W] in [0, 1], of films outside the gallery
    """

    def __init__(self, films: np.ndarray, mean_film: np.ndarray):
        self.films = films.astype(np.float32) / (255.0 if films.dtype == np.uint8 else 1.0)
        self.mean_film = np.asarray(mean_film, dtype=np.float32)
        if self.mean_film.shape != self.films.shape[1:]:
            raise UserError(
                f"the mean film has {self.mean_film.shape} pixels, films {self.films.shape[1:]}: use one size"
            )
        flat = self.mean_film.ravel().astype(np.float64)
        self._shared, _ = np.linalg.qr(np.stack([np.ones_like(flat), flat], 1))
        self._own = self._residual(self.films)

    def _residual(self, images: np.ndarray) -> np.ndarray:
        flat = np.asarray(images, dtype=np.float64).reshape(len(images), -1)
        whole = np.linalg.norm(flat, axis=1, keepdims=True)
        flat = flat - (flat @ self._shared) @ self._shared.T
        length = np.linalg.norm(flat, axis=1, keepdims=True)
        # Of the mean film itself, or its like, nothing is left but float32's rounding.
        return np.where(length > 1e-6 * whole, flat / np.maximum(length, 1e-12), 0.0)

    def pncc(self, images: np.ndarray) -> np.ndarray:
        """float64 [B, N] in [-1, 1], of images [B, H, W] (or [B, 1, H, W]) with each film of the gallery."""
        images = np.asarray(images)
        return self._residual(images.reshape(len(images), -1)) @ self._own.T

    def rank(self, image: np.ndarray, index: int) -> int:
        """Place of film ``index`` by pncc, 1 the best; films that equal it count as it. An image that says nothing
        about anyone is last."""
        scores = self.pncc(np.asarray(image).reshape(1, -1))[0]
        if not scores.any():
            return len(scores)
        return 1 + int((scores > scores[index] + 1e-9).sum())

    def match(self, images: np.ndarray, index: Sequence[int]) -> np.ndarray:
        """Reorder images [B, ...] so that they are next to films ``index`` [B], by least squared error in all."""
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

        images = np.asarray(images)
        index = list(index)
        if len(images) != len(index):
            raise UserError(f"{len(images)} reconstructions for {len(index)} films: give as many")
        flat, truth = images.reshape(len(images), -1), self.films[index].reshape(len(index), -1)
        return images[linear_sum_assignment(cdist(truth, flat, "sqeuclidean"))[1]]

    def score(self, images: np.ndarray, index: Sequence[int]) -> list[dict[str, float]]:
        """For each film ``index`` [B] and its reconstruction [B, ...] in [0, 1]: ``psnr`` (dB), ``ssim``, their gains
        over the mean film, ``pncc``, ``identified`` (0 or 1) among the gallery."""
        rows = []
        for image, i in zip(self.match(images, index), index, strict=True):
            truth = self.films[i]
            row = {"psnr": psnr(image, truth), "ssim": ssim(image, truth)}
            row["psnr_gain"] = row["psnr"] - psnr(self.mean_film, truth)
            row["ssim_gain"] = row["ssim"] - ssim(self.mean_film, truth)
            row["pncc"] = float(self.pncc(np.asarray(image).reshape(1, -1))[0, i])
            row["identified"] = float(self.rank(image, i) == 1)
            rows.append(row)
        return rows
