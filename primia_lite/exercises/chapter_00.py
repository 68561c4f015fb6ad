"""Checks of notebook 00's exercises."""

import math

import numpy as np


def factor(answer: float) -> str | None:
    if math.isclose(answer, math.e, rel_tol=0.01):
        return None
    return "look at the formula of section 4: with δ = 0, what stands before P(outcome without) at ε = 1?"


def masked_share(answer) -> str | None:
    a, b, mask = np.array([1.0, 2.0]), np.array([5.0, -2.0]), np.array([0.3, -40.0])
    sent = [answer(a, 100, 400, mask), answer(b, 300, 400, -mask)]
    if sent[0] is None:
        return "nothing to check yet: let the function return what the hospital sends"
    if np.allclose(sent[0], 0.25 * a):
        return "the server can read this update: add the mask"
    if np.allclose(sent[0] + sent[1], 0.25 * a + 0.75 * b):
        return None
    if np.allclose(sent[0] + sent[1], a + b):
        return "the masks cancel, but this is the plain sum: weigh the update by n_own / n_all before you mask it"
    return "the masks must cancel in the sum: add the mask as it is, after weighing the update"


CHECKS = {"1": factor, "2": masked_share}
