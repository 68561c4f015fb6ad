"""Scores of a classifier, and intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from primia_lite.config import UserError


def pneumonia_score(probabilities: np.ndarray) -> np.ndarray:
    """One minus the probability of ``normal``: [N, K] -> [N]."""
    return 1.0 - probabilities[:, 0]


def _counted(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)


def _share(among: np.ndarray, found: np.ndarray, weights: np.ndarray | None) -> float | np.ndarray:
    among = _counted(among, weights) * among
    with np.errstate(invalid="ignore"):
        return among @ found / among.sum(-1)


def auroc(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Area under the ROC curve, normal versus pneumonia of any kind; nan where only one of them is present.

    ``weights``, here and below: float [..., N], how often each film counts, for a score [...]; default once.
    """
    score, ill, weights = pneumonia_score(probabilities), labels > 0, _counted(labels, weights)
    if not np.isfinite(score).all():
        raise ValueError("probabilities hold NaN or infinity")
    order = np.flatnonzero(~ill)[np.argsort(score[~ill])]
    # Normals that score less than a film, and half of those that score the same (Mann and Whitney 1947).
    below = np.insert(np.cumsum(weights[..., order], -1), 0, 0.0, -1)
    first, last = (np.searchsorted(score[order], score[ill], side) for side in ("left", "right"))
    wins = (weights[..., ill] * (below[..., first] + below[..., last])).sum(-1) / 2
    with np.errstate(invalid="ignore"):
        return wins / ((weights @ ill) * (weights @ ~ill))


def accuracy(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Share of films whose likeliest class is the true one."""
    return _share(np.ones(len(labels), dtype=bool), probabilities.argmax(1) == labels, weights)


def mcc(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Matthews correlation coefficient over all classes (Gorodkin 2004); 0 where only one is called or present."""
    weights, classes = _counted(labels, weights), np.eye(probabilities.shape[1])
    true, called = classes[labels], classes[probabilities.argmax(1)]
    n, right = weights.sum(-1), weights @ (true * called).sum(1)
    of_true, of_called = weights @ true, weights @ called
    spread = (n**2 - (of_true**2).sum(-1)) * (n**2 - (of_called**2).sum(-1))
    with np.errstate(invalid="ignore"):
        found = (right * n - (of_true * of_called).sum(-1)) / np.sqrt(spread)
    return np.where(spread > 0, found, 0.0)[()]


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``auroc`` (normal versus pneumonia), ``accuracy`` and ``mcc`` (over all classes), ``loss`` (nats per film)."""
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


def sensitivity(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, threshold: float = 0.5
) -> float | np.ndarray:
    """Share of the pneumonias whose score reaches ``threshold``."""
    return _share(labels > 0, pneumonia_score(probabilities) >= threshold, weights)


def specificity(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, threshold: float = 0.5
) -> float | np.ndarray:
    """Share of the normals whose score stays below ``threshold``."""
    return _share(labels == 0, pneumonia_score(probabilities) < threshold, weights)


def sensitivity_at(probabilities: np.ndarray, labels: np.ndarray, specificity: float) -> float:
    """The largest sensitivity of a point of the ROC curve that has at least this specificity."""
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(labels > 0, pneumonia_score(probabilities))
    return float(true_positive_rate[1 - false_positive_rate >= specificity - 1e-9].max())


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
    score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    runs: Sequence[np.ndarray],
    labels: np.ndarray,
    patient_id: np.ndarray,
    minus: Sequence[np.ndarray] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a score's mean over runs, resampling runs and whole patients (Efron and Tibshirani 1993).

    Each draw takes as many runs as there are, and the same patients for all of them. Few runs understate their own
    spread: the variance of the mean of three by a third.

    Parameters
    ----------
    score
        Such as :func:`auroc`: of probabilities [N, K], labels [N] and weights [draws, N].
    runs
        Class probabilities [N, K] by each run of one way to train.
    minus
        Those of another way, run by run with the same seeds: the interval is of the paired difference.
    """
    if draws < 100:
        raise UserError(f"draws is {draws}: an interval needs at least 100")
    if minus is not None and len(minus) != len(runs):
        raise UserError(f"{len(runs)} runs and {len(minus)} to subtract can't be paired: give as many, in one order")
    rng = np.random.default_rng(seed)

    def taken(n: int) -> np.ndarray:
        """How often each of n is drawn, int64 [draws, n]."""
        return rng.multinomial(n, np.full(n, 1 / n), size=draws)

    patients, patient_of_film = np.unique(patient_id, return_inverse=True)
    weights = taken(len(patients))[:, patient_of_film].astype(float)
    values = np.stack([score(p, labels, weights) for p in runs], 1)
    if minus is not None:
        values -= np.stack([score(p, labels, weights) for p in minus], 1)
    means = (taken(len(runs)) * values).sum(1) / len(runs)
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(means, [tail, 100 - tail])
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
        return self._residual(images) @ self._own.T

    def rank(self, image: np.ndarray, index: int) -> int:
        """Place of film ``index`` by pncc, 1 the best; films that equal it count as it. An image that says nothing
        about anyone is last."""
        scores = self.pncc(np.asarray(image)[None])[0]
        return 1 + int((scores > scores[index] + 1e-9).sum()) if scores.any() else len(scores)

    def match(self, images: np.ndarray, index: Sequence[int]) -> np.ndarray:
        """Reorder images [B, ...] so that they are next to films ``index`` [B], by least squared error in all."""
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

        images, truth = np.asarray(images), self.films[list(index)].reshape(len(index), -1)
        if len(images) != len(index):
            raise UserError(f"{len(images)} reconstructions for {len(index)} films: give as many")
        flat = images.reshape(len(images), -1)
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
            row["pncc"] = float(self.pncc(np.asarray(image)[None])[0, i])
            row["identified"] = float(self.rank(image, i) == 1)
            rows.append(row)
        return rows
