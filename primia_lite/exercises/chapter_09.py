"""Checks of notebook 09's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import beta, binom

from primia_lite.attacks.auditing import audit
from primia_lite.attacks.bounds import clopper_pearson_epsilon
from primia_lite.privacy import Privacy
from primia_lite.training import Training


def no_error(answer: float) -> str | None:
    right = -math.log(beta.ppf(0.975, 1, 1000))
    if abs(answer - right) < 0.15:
        return None
    if abs(answer - math.log(1000)) < 0.1:
        return "no error in 1,000 runs still allows a rate of 3.7 in 1,000"
    return "the false positive rate may be 3.7 / 1,000: which e^ε times that reaches a true positive rate of almost 1?"


def refuted(least: Callable[[float, float, float], float]) -> str | None:
    for false, missed, delta in ((0.01, 0.3, 1e-4), (0.3, 0.01, 1e-4), (0.5, 0.5, 0.0)):
        found = least(false, missed, delta)
        if found is None:
            return "nothing to check yet: return an ε"
        if not np.isclose(found, clopper_pearson_epsilon((false, missed), delta)):
            if false > missed:
                return "an attack may also be sure of absence: try the two rates the other way round, too"
            return "the largest ε with 1 - missed > e^ε false + δ, and never below 0"
    return None


def by_chance(p_value: Callable[[int, int, float], float]) -> str | None:
    for right, guesses, epsilon in ((95, 100, 2.0), (5, 10, 0.0), (10, 10, 1.0)):
        found = p_value(right, guesses, epsilon)
        if found is None:
            return "nothing to check yet: return a probability"
        chance = 1 / (1 + math.exp(-epsilon))
        if np.isclose(found, binom.sf(right, guesses, chance)):
            return "that is the probability of more than so many: count this many, too"
        if not np.isclose(found, binom.sf(right - 1, guesses, chance)):
            return "each guess is right with probability e^ε / (1 + e^ε): how probable are so many or more?"
    return None


def broken(step: Callable) -> str | None:
    training = Training(sample_rate=1.0)
    privacy = Privacy.for_budget(8, sample_rate=1.0, steps=1, max_grad_norm=0.25)
    (found,) = audit(training, privacy, n=150, alpha=0.01, compute_update=step, seed=0)
    return None if found.refuted else f"the audit found nothing: {found}. Take away noise, or clip later"


CHECKS = {"1": no_error, "2": refuted, "3": by_chance, "4": broken}
