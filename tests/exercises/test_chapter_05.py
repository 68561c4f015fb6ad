"""The exercises of notebook 05: a right answer passes, and a typical wrong one gets a sentence that helps."""

import numpy as np
import pytest

import primia_lite as pl


def read_weights(film, product, sign=-1):
    system = np.array([np.concatenate([sign * film[16 - k :], film[: 16 - k]]) for k in range(16)]).T
    return np.linalg.solve(system, product)


RIGHT = {
    "1": 0.3,
    "2": lambda pair, weight: weight * pair % 10_007,
    "3": 3,
    "4": read_weights,
    "5": 2369 / 120,
}
WRONG = {
    "1": [(30, "scale"), (0.03, "ten noises")],
    "2": [
        (lambda pair, weight: np.array([weight * pair[0], pair[1]]) % 10_007, "both"),
        (lambda pair, weight: weight * pair[0], "pair"),
        (lambda pair, weight: None, "yet"),
    ],
    "3": [(2, "larger"), (5, "first")],
    "4": [(lambda film, product: read_weights(film, product, 1), "X^16"), (lambda film, product: product[:3], "16")],
    "5": [(3 * 2369 / 120, "classes"), (2369, "divide")],
}


@pytest.mark.parametrize("number", RIGHT)
def test_right_answer_passes(number):
    assert pl.check(f"05.{number}", RIGHT[number])


@pytest.mark.parametrize(("number", "answer", "word"), [(n, *each) for n, cases in WRONG.items() for each in cases])
def test_wrong_answer_gets_a_sentence(number, answer, word):
    verdict = pl.check(f"05.{number}", answer)
    assert not verdict and word in verdict.sentence
