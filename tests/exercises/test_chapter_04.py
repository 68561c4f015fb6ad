"""The checks of notebook 04's exercises: a right answer passes, typical wrong ones get a sentence."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

import primia_lite as pl


def name_film(candidates, update):
    return int((candidates @ update - (candidates**2).sum(1) / 2).argmax())


def sigma_for_bound(rate, n_candidates):
    return 1 / (norm.ppf(rate) - norm.ppf(1 / n_candidates))


def looks_planted(weight):
    sizes = torch.linalg.svdvals(torch.nn.functional.normalize(weight, dim=1))
    return bool(sizes[2] < 1e-3 * sizes[0])


@pytest.mark.parametrize(
    ("number", "answer"), [("04.1", "mixture"), ("04.2", name_film), ("04.3", sigma_for_bound), ("04.4", looks_planted)]
)
def test_right_answers(number, answer):
    verdict = pl.check(number, answer)
    assert verdict, verdict.sentence


@pytest.mark.parametrize(
    ("number", "answer", "word"),
    [
        ("04.1", "first", "mean"),
        ("04.1", 3, "one of"),
        ("04.2", lambda candidates, update: int((candidates @ update).argmax()), "squared length"),
        ("04.2", lambda candidates, update: int((candidates @ update).argmin()), "largest"),
        ("04.2", lambda candidates, update: None, "nothing to check"),
        ("04.3", lambda rate, n: -sigma_for_bound(rate, n), "signs"),
        ("04.3", lambda rate, n: 1 / norm.ppf(1 - 1 / n), "the bound is"),
        ("04.3", lambda rate, n: None, "nothing to check"),
        ("04.4", lambda weight: True, "honest"),
        ("04.4", lambda weight: False, "planted"),
        ("04.4", lambda weight: None, "nothing to check"),
    ],
)
def test_wrong_answers_get_a_sentence(number, answer, word):
    verdict = pl.check(number, answer)
    assert not verdict and word in verdict.sentence
