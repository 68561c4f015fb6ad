"""Checks of notebook 04's exercises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from primia_lite import models
from primia_lite.attacks import imprint_weights, rero_bound
from primia_lite.data.films import PIXEL_MEAN, PIXEL_STD


def two_films(answer: str) -> str | None:
    """What the division of section 1 makes of a step that holds two films."""
    known = ("first", "clearer", "mixture")
    if answer not in known:
        return f"answer with one of {', '.join(map(repr, known))}"
    if answer != "mixture":
        return "a gradient of two films is the mean of theirs, and each row weighs the films by its own derivatives"
    return None


def likeliest(answer: Callable[[torch.Tensor, torch.Tensor], int | None]) -> str | None:
    """The attacker of section 4: candidates float [N, P] and an update [P] give the likeliest candidate's number."""
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.2]])
    named = [answer(candidates, candidate.clone()) for candidate in candidates]
    if None in named:
        return "nothing to check yet: put your score in place of None"
    if named == [0, 1, 2, 3]:
        return None
    if named[2] == 2:
        return "a long gradient has a large product with every update: half its squared length must be taken off"
    return f"of four updates without noise you name candidates {named}: is the largest score the likeliest?"


def noise_for_a_rate(answer: Callable[[float, int], float | None]) -> str | None:
    """The noise multiplier at which the bound is a given rate."""
    for rate, n_candidates in ((0.01, 624), (0.05, 100), (0.5, 10)):
        sigma = answer(rate, n_candidates)
        if sigma is None:
            return "nothing to check yet: put your formula in place of None"
        if not sigma > 0:
            return f"σ is {sigma:.2f} for a rate of {rate} among {n_candidates}: it must be above 0, look at the signs"
        if abs(rero_bound(sigma, n_candidates) - rate) > 1e-6:
            return (
                f"at σ = {sigma:.2f} the bound is {rero_bound(sigma, n_candidates):.3f} among {n_candidates}, "
                f"not {rate}: Φ⁻¹(rate) = Φ⁻¹(1/N) + 1/σ"
            )
    return None


def planted_layer(answer: Callable[[torch.Tensor], bool | None]) -> str | None:
    """Whether weights [units, pixels] are an imprint layer's."""
    films = np.random.default_rng(0).integers(0, 256, (60, 1, 1)) * np.ones((1, 16, 16))
    films = (films + np.random.default_rng(1).normal(0, 20, films.shape)).clip(0, 255).astype(np.uint8)
    for seed in range(3):
        state = models.build("imprintnet", 3, (1, 16, 16), seed=seed, bins=128).state_dict()
        honest = state["imprint.weight"]
        planted = imprint_weights(state, films, (PIXEL_MEAN, PIXEL_STD))["imprint.weight"]
        found = answer(planted), answer(honest)
        if None in found:
            return "nothing to check yet: return True or False"
        if not found[0]:
            return "a planted layer went through: all its rows are multiples of two directions"
        if found[1]:
            return "an honest layer was refused: its rows point in as many directions as there are units"
    return None


CHECKS = {"1": two_films, "2": likeliest, "3": noise_for_a_rate, "4": planted_layer}
