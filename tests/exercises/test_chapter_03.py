"""Notebook 03's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

import primia_lite as pl


def beyond(losses, probabilities, epsilon):
    return sum(
        p * (1 - math.exp(epsilon - loss)) for loss, p in zip(losses, probabilities, strict=True) if loss > epsilon
    )


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("03.1", 1),
        ("03.2", lambda sigma: norm.cdf(np.sqrt(2) / (2 * sigma))),
        ("03.3", beyond),
        ("03.4", lambda release, delta: pl.epsilon([release] * 3, delta)),
    ],
)
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("03.1", 0.05, "share the noise"),
        ("03.1", 0.5, "choose"),
        ("03.2", lambda sigma: norm.cdf(1 / (2 * sigma)), "less noise"),
        ("03.2", lambda sigma: norm.cdf(1 / sigma), "√2"),
        ("03.2", lambda sigma: None, "nothing"),
        ("03.3", lambda losses, probabilities, epsilon: probabilities[losses > epsilon].sum(), "in full"),
        ("03.3", lambda losses, probabilities, epsilon: 0.0, "above ε"),
        ("03.4", lambda release, delta: pl.epsilon(release, delta), "one hospital"),
        ("03.4", lambda release, delta: 3 * pl.epsilon(release, delta), "loose"),
        ("03.4", lambda release, delta: 1.0, "compose"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
