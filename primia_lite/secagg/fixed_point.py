"""Numbers as integers modulo 2^32: what masks can hide and sums keep exact.

The scale is chosen from what all know beforehand, the declared clip and the number of hospitals, so that no sum of
theirs can reach 2^31 and wrap round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from primia_lite.config import UserError

MODULUS_BITS = 32
_CHUNK = 1 << 16  # stays in the processor's cache


@dataclass(frozen=True)
class FixedPoint:
    """How a weighted update, no entry of which is above ``clip``, becomes integers, and a sum of theirs a mean."""

    clip: float
    hospitals: int

    def __post_init__(self):
        limits = np.finfo(np.float32)
        if not float(limits.tiny) <= self.clip <= float(limits.max):
            raise UserError(f"clip is {self.clip}: it must be above 0 and finite in float32")
        if not 1 <= self.hospitals < 2**20:
            raise UserError(f"hospitals is {self.hospitals}: it must be at least 1, and below 2^20")

    @property
    def scale(self) -> float:
        """Units to 1. Weights add up to 1, and each hospital's rounding adds at most half a unit."""
        return (2 ** (MODULUS_BITS - 1) - 1 - self.hospitals) / self.clip

    @property
    def error(self) -> float:
        """Largest difference of a mean of all hospitals to the exact one: half a unit for each of them."""
        return self.hospitals / 2 / self.scale

    def quantise(self, values: np.ndarray, weight: float) -> np.ndarray:
        """uint32 [L] (two's complement): float32 [L] times weight times scale, rounded; see :func:`check_clip`."""
        if not 0 < weight <= 1:
            raise UserError(f"weight is {weight}: it must be in (0, 1], or the sum could wrap around")
        out = np.empty(len(values), np.int32)
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK].astype(np.float64)
            check_clip(part, self.clip)
            part *= weight * self.scale
            out[start : start + _CHUNK] = np.rint(part, out=part)
        return out.view(np.uint32)

    def mean(self, total: np.ndarray, weight: float) -> np.ndarray:
        """float32 [L]: a sum (int32 [L]) over the weight of those who took part."""
        # In float64, and rounded as it goes: no copy in between.
        return np.multiply(total, 1.0 / (weight * self.scale), out=np.empty(len(total), np.float32))


def check_clip(values: np.ndarray, clip: float) -> None:
    """Raise UserError for a value that isn't finite, or whose absolute value is above the clip."""
    if not (largest := np.abs(values).max()) <= clip:
        raise UserError(
            "the update has values that aren't finite: lower learning_rate"
            if not np.isfinite(values).all()
            else f"the update has a value of {largest:.3g}, above the declared clip of {clip:g}: declare a larger clip "
            "for all hospitals, or lower learning_rate"
        )


def integers(values: np.ndarray) -> np.ndarray:
    """uint32 [L] (two's complement) of int64 [L] that were quantised elsewhere; UserError beyond 32 bits."""
    if len(values) and not (values.min() >= -(2**31) and values.max() < 2**31):
        raise UserError(
            f"the update has the value {values[np.abs(values).argmax()]}, which 32 bits can't hold: agree on a coarser "
            "scale (SharedNoise chooses one from the declared sizes)"
        )
    return values.astype(np.int32).view(np.uint32)


def centred(total: np.ndarray) -> np.ndarray:
    """int32 [L] in [-2^31, 2^31) of uint32 [L]."""
    return total.view(np.int32)
