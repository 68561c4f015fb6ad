"""Notebook 09's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import binom

import primia_lite as pl


def least(false, missed, delta):
    ways = [(1 - a - delta) / b for a, b in ((missed, false), (false, missed))]
    return max(0.0, *map(math.log, ways))


def one_way(false, missed, delta):
    return max(0.0, math.log((1 - missed - delta) / false))


def p_value(right, guesses, epsilon):
    return binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon)))


def quiet(state, films, training, privacy, rng, *, declared_size):
    less = replace(privacy, noise_multiplier=privacy.noise_multiplier / 3)
    return pl.local_update(state, films, training, less, rng, declared_size=declared_size)


@pytest.mark.parametrize(("number", "answer"), [("09.1", 5.6), ("09.2", least), ("09.3", p_value), ("09.4", quiet)])
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("09.1", math.log(1000), "3.7"),
        ("09.1", 1, "reaches"),
        ("09.2", one_way, "absence"),
        ("09.2", lambda false, missed, delta: 1.0, "largest"),
        ("09.2", lambda false, missed, delta: None, "nothing"),
        ("09.3", lambda right, guesses, epsilon: p_value(right + 1, guesses, epsilon), "this many"),
        ("09.3", lambda right, guesses, epsilon: 0.5, "probable"),
        ("09.4", pl.local_update, "found nothing"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
