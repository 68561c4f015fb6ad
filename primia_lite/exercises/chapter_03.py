"""Checks of notebook 03's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from primia_lite.privacy import Release, calibrate_noise_multiplier, federation_epsilon
from primia_lite.privacy.accounting import epsilon

DELTA = 1e-4


def best_rate(answer: float) -> str | None:
    if answer == 1:
        return None
    if answer not in (0.05, 0.25):
        return "choose 0.05, 0.25 or 1"
    left = {q: round(calibrate_noise_multiplier(1.0, DELTA, q, 41) / q, 1) for q in (answer, 1.0)}
    return f"sampling hides a patient, but fewer share the noise: σ/q is {left[answer]} there, and {left[1.0]} at 1"


def right_of_two(right: Callable[[float], float]) -> str | None:
    for sigma in (0.5, 2.0, 7.0):
        found = right(sigma)
        if found is None:
            return "nothing to check yet: return a probability"
        if math.isclose(found, _normal(1 / (2 * sigma)), abs_tol=1e-3):
            return "that is right for one answer: the mean of two has less noise"
        if not math.isclose(found, _normal(1 / (math.sqrt(2) * sigma)), abs_tol=1e-3):
            return "the mean of two answers has noise σ/√2: put that in place of σ"
    return None


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def delta(delta_of: Callable[[np.ndarray, np.ndarray, float], float]) -> str | None:
    losses, probabilities = np.array([-1.0, 0.5, 1.0, 2.0, 3.0]), np.array([0.3, 0.4, 0.15, 0.1, 0.05])
    found = delta_of(losses, probabilities, 1.0)
    if found is None:
        return "nothing to check yet: return δ"
    if math.isclose(found, 0.15, abs_tol=1e-9):
        return "that counts each loss beyond ε in full: weight it by 1 - exp(ε - loss)"
    weighted = 0.1 * -math.expm1(-1.0) + 0.05 * -math.expm1(-2.0)
    return None if math.isclose(found, weighted, abs_tol=1e-9) else "add p (1 - exp(ε - loss)) over losses above ε"


def three(epsilon_of: Callable[[Release, float], float]) -> str | None:
    release = Release(10.0, 0.5, 41)
    found, alone = epsilon_of(release, DELTA), epsilon(release, DELTA)
    if found is None:
        return "nothing to check yet: return the child's ε"
    if math.isclose(found, alone, rel_tol=1e-3):
        return "that is a child's who is at one hospital only: the releases of all three saw this one"
    if math.isclose(found, 3 * alone, rel_tol=1e-3):
        return "three times ε is a bound, but a loose one: give the accountant all three releases"
    want = federation_epsilon(dict.fromkeys("ABC", release), DELTA, shared_patients=True)
    return None if math.isclose(found, want, rel_tol=1e-3) else "compose: pl.epsilon takes a list of releases"


CHECKS = {"1": best_rate, "2": right_of_two, "3": delta, "4": three}
