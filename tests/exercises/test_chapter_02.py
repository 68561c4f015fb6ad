"""Notebook 02's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import numpy as np
import pytest

import primia_lite as pl


def average(weight, trained, patients):
    return weight + patients @ (trained - weight) / patients.sum()


def clip(gradient, C):
    return gradient * min(1, C / np.linalg.norm(gradient))


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("02.1", average),
        ("02.2", clip),
        ("02.3", (0.05, 0.2)),
        ("02.4", lambda sigma, rate, declared, p: sigma * p**0.5 / (rate * declared)),
    ],
)
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("02.1", lambda weight, trained, patients: trained.mean(), "share of all patients"),
        ("02.1", lambda weight, trained, patients: patients @ (trained - weight) / patients.sum(), "add the old"),
        ("02.1", lambda weight, trained, patients: 0.0, "share times update"),
        ("02.2", lambda gradient, C: gradient / np.linalg.norm(gradient), "made longer"),
        ("02.2", lambda gradient, C: np.clip(gradient, -C, C), "each entry"),
        ("02.2", lambda gradient, C: gradient, "min(1"),
        ("02.3", (0.5, 0.2), "divided by 10"),
        ("02.3", (0.05, 0.1), "five numbers"),
        ("02.4", lambda sigma, rate, declared, p: sigma / (rate * declared), "one entry"),
        ("02.4", lambda sigma, rate, declared, p: sigma * p**0.5, "in the sum"),
        ("02.4", lambda sigma, rate, declared, p: 1.0, "√p over"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
