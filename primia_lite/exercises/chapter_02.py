"""Checks of notebook 02's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def averaging(average: Callable[[float, np.ndarray, np.ndarray], float]) -> str | None:
    """The student's new weight, from the old one, the hospitals' trained ones and their numbers of patients."""
    for weight, trained, patients in ((1.0, [1.6, 0.7, 1.2], [10, 20, 30]), (-2.0, [0.0, 4.0], [3, 1])):
        trained, patients = np.array(trained), np.array(patients)
        found = average(weight, trained, patients)
        if found is None:
            return "nothing to check yet: return the new weight"
        if math.isclose(found, trained.mean()):
            return "each hospital counts alike there: weight its update by its share of all patients"
        if math.isclose(found, patients @ (trained - weight) / patients.sum()):
            return "that is the averaged update: add the old weight"
        if not math.isclose(found, patients @ trained / patients.sum()):
            return "new weight = old weight + sum of share times update, with update = trained - old"
    return None


def clipping(clip: Callable[[np.ndarray, float], np.ndarray]) -> str | None:
    for gradient in (np.array([3.0, 4.0]), np.array([0.3, -0.4]), np.array([0.0, -2.0, 0.0])):
        found = clip(gradient.copy(), 1.0)
        if found is None:
            return "nothing to check yet: return the clipped gradient"
        length = np.linalg.norm(gradient)
        if length < 1 and np.allclose(found, gradient / length):
            return "a short gradient was made longer: only longer ones are scaled, by min(1, C / length)"
        if np.allclose(found, np.clip(gradient, -1, 1)) and np.linalg.norm(found) > 1:
            return "each entry is within C, but the length isn't: scale the whole gradient"
        if not np.allclose(found, gradient * min(1.0, 1.0 / length)):
            return "multiply the gradient by min(1, C / its length)"
    return None


def moved(answer: tuple[float, float]) -> str | None:
    public, actual = answer
    if not math.isclose(public, 0.05, abs_tol=1e-6):
        return "with the public number the sum is divided by 10 in both worlds, and the child moves it by 0.5"
    if not math.isclose(actual, 0.2, abs_tol=1e-6):
        return "compare the mean of five numbers with the mean of four"
    return None


def noise(noise_to_signal: Callable[[float, float, float, int], float]) -> str | None:
    for sigma, rate, declared, p in ((1.5, 0.25, 100, 2369), (2.0, 0.5, 1000, 7107)):
        found = noise_to_signal(sigma, rate, declared, p)
        if found is None:
            return "nothing to check yet: return a length"
        if math.isclose(found, sigma / (rate * declared), rel_tol=0.01):
            return "that is one entry's: a vector of p independent entries is √p times as long"
        if math.isclose(found, sigma * math.sqrt(p), rel_tol=0.01):
            return "that is the noise in the sum: the step divides it by the expected number of patients"
        if not math.isclose(found, sigma * math.sqrt(p) / (rate * declared), rel_tol=0.01):
            return "σ C √p over (q n), in units of C"
    return None


CHECKS = {"1": averaging, "2": clipping, "3": moved, "4": noise}
