"""Notebook 05: encrypted inference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Of the ciphertexts by hand in section 1.
Q, SCALE, KEY = 10_007, 100, 1_234


def largest_error(answer: float) -> str | None:
    """Ten noises of at most 3, over the scale."""
    answer = float(answer)
    if np.isclose(answer, 10 * 3 / SCALE):
        return None
    if np.isclose(answer, 10 * 3):
        return "that is the noise in whole steps: the decryption divides it by the scale, 100"
    if np.isclose(answer, 3 / SCALE):
        return "that is one noise: the ten noises are added, and may all have the same sign"
    return "each noise is at most 3, ten are added, and the decryption divides by the scale, 100"


def times_weight(function: Callable) -> str | None:
    """Both parts of a pair times the weight."""
    rng = np.random.default_rng(5)
    for message, weight in ((7, 3), (-4, 5), (11, -2)):
        c1, noise = int(rng.integers(Q)), int(rng.integers(-3, 4))
        pair = np.array([(SCALE * message + noise - c1 * KEY) % Q, c1])
        out = function(pair.copy(), weight)
        if out is None:
            return "nothing to check yet: the function returns None"
        if np.shape(out) != (2,):
            return f"a ciphertext is a pair: return two numbers, not an array of shape {np.shape(out)}"
        value = (int(out[0]) + int(out[1]) * KEY) % Q
        value = value - Q if value > Q // 2 else value
        if value != weight * (SCALE * message + noise):
            return (
                f"{weight} times an encrypted {message} decrypts to {value / SCALE:g}: multiply the equation "
                "c0 + c1 s by the weight, both of its parts"
            )
    return None


def first_depth(answer: int) -> str | None:
    """The first depth at which 30 bits of precision need more than N = 8,192."""
    from primia_lite.encrypted import choose

    right = next(d for d in range(20) if choose(d, precision_bits=30).poly_modulus_degree > 8192)
    if answer == right:
        return None
    n = choose(int(answer), precision_bits=30).poly_modulus_degree
    return f"at depth {int(answer)} N is {n:,}: look for the first depth where it is larger than 8,192"


def read_weights(function: Callable) -> str | None:
    """The other factor of a product modulo X^16 + 1."""
    rng = np.random.default_rng(5)
    for _ in range(3):
        film, model = rng.normal(size=16), rng.integers(-9, 10, 16).astype(float)
        full = np.append(np.convolve(film, model), 0)
        out = function(film.copy(), full[:16] - full[16:])
        if out is None:
            return "nothing to check yet: the function returns None"
        if np.shape(out) != (16,):
            return f"the model's polynomial has 16 coefficients, not shape {np.shape(out)}"
        if np.allclose(out, model, atol=1e-5):
            continue
        if np.allclose(np.append(np.convolve(film, out), 0)[:16], (full[:16] - full[16:]), atol=1e-5):
            return "what runs over X^15 comes back with the other sign: X^16 = -1"
        return (
            "film times your polynomial isn't the product: column k of the system is the film times X^k, with X^16 = -1"
        )
    return None


def minutes(answer: float) -> str | None:
    """One film for each weight of a class."""
    answer = float(answer)
    if abs(answer - 2369 / 120) < 0.5:
        return None
    if abs(answer - 3 * 2369 / 120) < 1.5:
        return "a film gives an equation for each of the three classes at once"
    return "2,369 unknowns a class take 2,369 equations, one a film: divide by the films of a minute"


CHECKS = {"1": largest_error, "2": times_weight, "3": first_depth, "4": read_weights, "5": minutes}
