"""Checks of notebook 06's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

MODULUS = 2**32
PRIME = 97


def accomplices(answer: tuple[int, int]) -> str | None:
    vanish, lie = answer
    if vanish != 33:
        return "67 of 100 hospitals must stay to the end; the others may vanish"
    if lie != 34:
        return "a lying server needs 67 signatures under each of two lists, and honest hospitals sign one list each"
    return None


def sent(send: Callable[[str, int, dict[str, int]], int]) -> str | None:
    """Three and four hospitals' messages from the student's ``send(name, x, masks)``."""
    for numbers in ({"A": 12, "B": 7, "C": 5}, {"A": 1, "B": MODULUS - 2, "C": 30, "D": 4}):
        shared = {pair: 3_000_000_019 * 3**k % MODULUS for k, pair in enumerate(combinations(numbers, 2), 1)}
        messages = {}
        for name, x in numbers.items():
            masks = {a if name == b else b: m for (a, b), m in shared.items() if name in (a, b)}
            messages[name] = send(name, x, masks)
        if any(messages[name] == x for name, x in numbers.items()):
            return "a message is still the bare number: add or subtract each mask"
        if sum(messages.values()) % MODULUS != sum(numbers.values()) % MODULUS:
            return "the masks don't cancel: of each pair, one must add what the other one subtracts"
    return None


def secret(secret_of: Callable[[int, int, int], int]) -> str | None:
    """Shares of parabolas modulo 97, whose value at 0 is asked for."""
    for s, r1, r2 in ((7, 3, 5), (0, 96, 1), (96, 40, 77)):
        found = secret_of(*((s + r1 * x + r2 * x * x) % PRIME for x in (1, 2, 3)))
        if found is None:
            return "nothing to check yet: return the secret"
        if found != s and found % PRIME == s:
            return "right up to a multiple of 97: take the result modulo 97"
        if found != s:
            return "the parabola through the three points has another value at 0: Lagrange gives 3 f(1) - 3 f(2) + f(3)"
    return None


def change(answer: int) -> str | None:
    return None if answer in (15, -15) else "the same masks stand in both messages: subtract one from the other"


def noise(answer: float) -> str | None:
    if math.isclose(answer, math.sqrt(2), rel_tol=0.01):
        return None
    if math.isclose(answer, math.sqrt(50), rel_tol=0.01):
        return "that is the sum where each adds all of the noise; a share is smaller"
    return "a sum holds at least t = 50 - 10 hospitals, of whom 15 may tell: 25 shares must bring one σC"


CHECKS = {"1": accomplices, "2": sent, "3": secret, "4": change, "5": noise}
