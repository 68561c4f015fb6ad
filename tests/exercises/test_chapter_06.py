"""Notebook 06's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import pytest

import primia_lite as pl


def send(name, x, masks):
    for other, m in masks.items():
        x = x + m if name < other else x - m
    return x % 2**32


def never_subtracts(name, x, masks):
    return (x + sum(masks.values())) % 2**32


def secret_of(f1, f2, f3):
    return (3 * f1 - 3 * f2 + f3) % 97


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("06.1", (33, 34)),
        ("06.2", send),
        ("06.3", secret_of),
        ("06.4", 15),
        ("06.5", 1.41),
    ],
)
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("06.1", (67, 34), "vanish"),
        ("06.1", (33, 67), "two lists"),
        ("06.2", lambda name, x, masks: x, "bare"),
        ("06.2", never_subtracts, "cancel"),
        ("06.3", lambda f1, f2, f3: None, "nothing"),
        ("06.3", lambda f1, f2, f3: (2 * f1 - f2) % 97, "parabola"),
        ("06.3", lambda f1, f2, f3: 3 * f1 - 3 * f2 + f3 - 97 * 500, "modulo"),
        ("06.4", 3405691567, "subtract"),
        ("06.5", 7.07, "share is smaller"),
        ("06.5", 2.0, "25 shares"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
