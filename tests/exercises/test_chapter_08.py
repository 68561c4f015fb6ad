"""Notebook 08's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import pytest

import primia_lite as pl


def beaver(server, opened_x, opened_w, r, s, rs):
    return (opened_x * opened_w * (server == 0) - opened_x * s - r * opened_w + rs) % 2**32


def twice(server, opened_x, opened_w, r, s, rs):
    return (opened_x * opened_w - opened_x * s - r * opened_w + rs) % 2**32


def negative(m, r, bits):
    half = 2 ** (bits - 1)
    return (m // half) ^ (r // half) ^ (m % half < r % half)


@pytest.mark.parametrize(("number", "answer"), [("08.1", 38), ("08.2", beaver), ("08.3", negative), ("08.4", 11)])
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("08.1", 39, "how far"),
        ("08.1", 0, "mixed terms"),
        ("08.2", twice, "only server 0"),
        ("08.2", lambda server, opened_x, opened_w, r, s, rs: rs, "take off"),
        ("08.2", lambda server, opened_x, opened_w, r, s, rs: None, "nothing"),
        ("08.3", lambda m, r, bits: m >> (bits - 1), "borrow"),
        ("08.4", 10, "cancels"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
