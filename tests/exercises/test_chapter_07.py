"""Notebook 07's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import pytest

import primia_lite as pl


def own_entry(name, secret):
    return [secret if name == other else 0 for other in "ABC"]


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("07.1", "acd"),
        ("07.1", "D, A and C"),
        ("07.2", (2, 0)),
        ("07.3", own_entry),
        ("07.4", lambda hospitals, studies, rounds: (hospitals * studies, hospitals * studies * rounds)),
    ],
)
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("07.1", "abcd", "global weights"),
        ("07.1", "a", "bytes"),
        ("07.2", (3, 2), "gone"),
        ("07.2", (2, 1), "no sum"),
        ("07.3", lambda name, secret: [secret] * 3, "entry of its own"),
        ("07.3", lambda name, secret: [secret], "three numbers"),
        ("07.3", lambda name, secret: None, "nothing"),
        ("07.4", lambda hospitals, studies, rounds: (studies, rounds), "each hospital"),
        ("07.4", lambda hospitals, studies, rounds: (hospitals * studies, rounds), "every hospital"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
