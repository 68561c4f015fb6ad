"""Noise of floating-point numbers betrays what it was added to (Mironov, CCS 2012).

With float32 noise, the difference of a released number and the right sum is one that such noise can take. With a wrong
sum it often isn't.
"""

from __future__ import annotations

import numpy as np
import torch

from primia_lite import models
from primia_lite.data.films import Films
from primia_lite.privacy.dpsgd import ClippedSum, PoissonBatch, Privacy
from primia_lite.training import Training, private_rows

DENOMINATOR = 32  # a power of two, so that dividing by it loses nothing


def clipped_sum(films: Films, training: Training, privacy: Privacy) -> np.ndarray:
    """What a step on all units adds noise to, at weights of zero: float32 [K, D]."""
    model = models.build(training.model, training.n_classes, films.inputs.shape[2:])
    batch = PoissonBatch(torch.arange(len(films.units(privacy.unit))), 1.0)
    rows = private_rows(films, batch, training, privacy.unit, None, torch.Generator())
    return ClippedSum(model, privacy.max_grad_norm, privacy.unit, films)(batch, rows)[0]["weight"].float().numpy()


def share_consistent(released: np.ndarray, total: np.ndarray, privacy: Privacy) -> float:
    """The share of numbers that ``total`` plus σC times a float32 can have become, in float32 throughout.

    Looked at where the released number is the smaller one, so that the difference is a float32 itself.
    """
    std = privacy.noise_multiplier * privacy.max_grad_norm
    near = (np.abs(released) < np.abs(total) / 2) & (total != 0)
    noise = released[near].astype(np.float64) - total[near].astype(np.float64)
    fits = np.zeros(len(noise), bool)
    for towards in (-np.inf, np.inf):
        candidate = (noise / std).astype(np.float32)
        for _ in range(3):
            fits |= (torch.from_numpy(candidate) * std).numpy() == noise
            candidate = np.nextafter(candidate, np.float32(towards))
    return float(fits.mean()) if len(fits) else 0.0
