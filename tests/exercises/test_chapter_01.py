"""Notebook 01's exercises: right answers pass, and likely wrong ones are told what to look at."""

from __future__ import annotations

import pytest

import primia_lite as pl


def disjoint(patient_id, split):
    return not set(patient_id[split == "train"]) & set(patient_id[split == "test"])


@pytest.mark.parametrize(
    ("number", "answer"), [("01.1", "about the same"), ("01.2", disjoint), ("01.3", 1.0), ("01.4", 2000.0)]
)
def test_right(number, answer):
    assert pl.check(number, answer), pl.check(number, answer)


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("01.1", "more", "outline"),
        ("01.1", "a lot", "answer"),
        ("01.2", lambda patient_id, split: True, "both parts"),
        ("01.2", lambda patient_id, split: False, "one part"),
        ("01.2", lambda patient_id, split: None, "nothing"),
        ("01.3", 0.02, "white pixel"),
        ("01.4", 200, "σ/n"),
    ],
)
def test_wrong(number, answer, says):
    verdict = pl.check(number, answer)
    assert not verdict and says in verdict.sentence
