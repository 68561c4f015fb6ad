"""Noise that hospitals make together: each adds a share, and only a sum of enough shares is ever seen.

Secure aggregation adds whole numbers modulo 2^32, so each hospital sends the sum of its clipped gradients on a grid of
whole numbers, and adds discrete Gaussian noise (the distributed discrete Gaussian of Kairouz, Liu and Steinke, ICML
2021). What has to hold, for C the clip, s the scale, d the parameters:

Sensitivity. One unit moves the rounded sum by at most s C (1 + 2^-8) + √d
(:func:`primia_lite.privacy.noise.l2_sensitivity`). Before rounding each coordinate is held within ±C times the declared
units: that moves no two sums further apart.

Shares. A sum is revealed only with at least t hospitals in it, of whom c may tell their own noise: t - c shares remain.
Each has the variance (σ sensitivity)² / (t - c), so the sum keeps σ whoever drops out.

Accounting. The sum of shares is a discrete Gaussian p = N_Z(0, S²) but for a factor e^±τ with τ about
10 d exp(-π² share²) (Kairouz, Liu and Steinke 2021): from a share of 128 on, below e^-100000. p is nearly a rounded
normal r, the probability that a sample of N(0, S²) rounds to x. With u uniform in [-1/2, 1/2],
r(x) = φ(x) E exp(-x u / S² - u² / 2S²); Jensen's inequality from below, and sinh(y) / y ≤ exp(y² / 6) from above, give

    -x² / 24 S⁴ ≤ log p(x) / r(x) ≤ 1 / 24 S²

(the lower bound but for e^-19 S²). So χ²(p, r) ≤ (1 + 3) / 576 S⁴ · (1 + 1 / S²), and over d coordinates the total
variation is at most √((1 + χ²)^d - 1) / 2, about √d / 24 S². A whole number plus rounded normal noise is the rounding
of that number plus normal noise: post-processing, so what :mod:`primia_lite.privacy.accounting` says of the subsampled
Gaussian holds for r. Putting p for r costs steps · (1 + e^ε) · TV of δ, :meth:`Quantizer.delta_slack`, which is taken
off the δ that a ledger counts at. Whether a sum wraps around 2^32 doesn't matter for privacy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as shortened

import torch

from primia_lite.config import UserError
from primia_lite.privacy.noise import discrete_gaussian, l2_sensitivity
from primia_lite.privacy.rng import SecureGenerator

MODULUS_BITS = 32
WRAP_PROBABILITY = 2.0**-40
_LEAST_SHARE = 2**7


@dataclass(frozen=True)
class SharedNoise:
    """What hospitals agree on before they make noise together, in whole numbers. All of it is public.

    Attributes
    ----------
    threshold : t, the fewest hospitals whose sum is ever revealed
    colluding : c, how many hospitals may tell the server their own noise; 0 ≤ c < t
    parameters : d, how many numbers are trained
    declared : the declared number of units of each hospital that may take part (n of them)
    """

    threshold: int
    colluding: int
    parameters: int
    declared: tuple[int, ...]

    def __post_init__(self):
        try:
            for name in ("threshold", "colluding", "parameters"):
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            object.__setattr__(self, "declared", tuple(map(operator.index, self.declared)))
        except TypeError as error:
            raise UserError(f"shared noise is agreed on in whole numbers ({error})") from error
        if not self.declared or min(self.declared) < 1:
            raise UserError(f"declared is {self.declared}: give each hospital's number of units, at least 1")
        if not 0 <= self.colluding < self.threshold <= self.hospitals:
            raise UserError(
                f"threshold is {self.threshold}, colluding {self.colluding}, with {self.hospitals} hospitals: "
                "0 <= colluding < threshold <= hospitals must hold, or nobody's noise is left"
            )
        if self.parameters < 1:
            raise UserError(f"parameters is {self.parameters}: give how many numbers the model trains")

    @property
    def hospitals(self) -> int:
        return len(self.declared)

    def check(self, declared: Collection[int], fewest: int) -> None:
        """Raise UserError unless the noise suffices for hospitals that declare so many units each, of whom a sum of the
        ``fewest`` may be revealed."""
        if sorted(self.declared) != sorted(declared):
            raise UserError(
                f"noise was shared out among hospitals that declare {shortened(sorted(self.declared))}, but these "
                f"declare {shortened(sorted(declared))}: give SharedNoise their numbers"
            )
        if fewest < self.threshold:
            raise UserError(
                f"noise is shared so that {self.threshold} hospitals together have enough, but a sum of {fewest} may "
                f"be revealed: use secure aggregation with a threshold of {self.threshold}, or Privacy without shared"
            )


@dataclass(frozen=True)
class Quantizer:
    """Sums and noise in whole numbers, the finest for which a round's sum stays below 2^31 but once in 2^40 rounds."""

    shared: SharedNoise
    noise_multiplier: float
    max_grad_norm: float

    def __post_init__(self):
        why = ""
        if self.scale < 1:
            why = "sum and noise together are too large: take less noise, a smaller max_grad_norm, or fewer units"
        elif self.share_sigma < _LEAST_SHARE:
            why = f"a share of the noise would be below {_LEAST_SHARE}: take more noise, or fewer units together"
        if why:
            raise UserError(
                f"{MODULUS_BITS} bits are too few for noise_multiplier {self.noise_multiplier:g}, max_grad_norm "
                f"{self.max_grad_norm:g} and {sum(self.shared.declared)} declared units: {why}"
            )

    @cached_property
    def scale(self) -> int:
        """s, whole units to one unit of a gradient."""
        n, declared = self.shared.hospitals, sum(self.shared.declared)
        # A discrete Gaussian is sub-Gaussian (Canonne, Kamath and Steinke 2020): P(|sum| > z std) ≤ 2 exp(-z² / 2).
        z = math.sqrt(2 * math.log(2 * self.shared.parameters / WRAP_PROBABILITY))

        def room(scale: int) -> float:
            """What the sums of all hospitals leave for their noise; rounding may add 1/2 to each."""
            return 2 ** (MODULUS_BITS - 1) - declared * scale * self.max_grad_norm - n

        low, high = 0, int(room(0) / (declared * self.max_grad_norm)) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if room(middle) > z * math.sqrt(n) * self._share_sigma(middle):
                low = middle
            else:
                high = middle
        return low

    def _share_sigma(self, scale: int) -> int:
        moved = l2_sensitivity(scale, self.max_grad_norm, self.shared.parameters)
        return math.ceil(self.noise_multiplier * moved / math.sqrt(self.shared.threshold - self.shared.colluding))

    @property
    def sensitivity(self) -> float:
        """How far one unit moves a hospital's numbers, L2, rounding included."""
        return l2_sensitivity(self.scale, self.max_grad_norm, self.shared.parameters)

    @property
    def share_sigma(self) -> int:
        """σ of a hospital's discrete Gaussian share."""
        return self._share_sigma(self.scale)

    @property
    def total_sigma(self) -> float:
        """σ of the fewest honest shares in a sum that is revealed."""
        return self.share_sigma * math.sqrt(self.shared.threshold - self.shared.colluding)

    def delta_slack(self, steps: int, epsilon: float) -> float:
        """What accounting for normal noise leaves out of δ over so many steps, at ε; see the module's text."""
        if epsilon > 700:
            return 1.0
        return min(
            1.0, steps * (1 + math.exp(epsilon)) * total_variation_distance(self.total_sigma, self.shared.parameters)
        )

    def share(self, total: Mapping[str, torch.Tensor], declared: int, rng: SecureGenerator) -> dict[str, torch.Tensor]:
        """A hospital's message, int64: its sum of clipped gradients in whole numbers, plus its share of the noise.

        ``declared`` is the hospital's number of units. FloatingPointError for a gradient that isn't finite.
        """
        self.check_parameters(sum(value.numel() for value in total.values()))
        noise = torch.from_numpy(discrete_gaussian(self.shared.parameters, self.share_sigma, rng))
        parts = noise.split([value.numel() for value in total.values()])
        bound, out = self.max_grad_norm * declared, {}
        for (name, value), own in zip(total.items(), parts, strict=True):
            if not torch.isfinite(value).all():
                raise FloatingPointError("a gradient isn't finite")
            out[name] = (value.double().clamp(-bound, bound) * self.scale).round().long() + own.view_as(value)
        return out

    def check_parameters(self, number: int) -> None:
        """Raise UserError for a model that trains another number of parameters than was agreed on."""
        if number != self.shared.parameters:
            raise UserError(
                f"the model trains {number} numbers, shared noise was agreed on for {self.shared.parameters} parameters"
            )


def total_variation_distance(sigma: float, d: int) -> float:
    """At most so far is N_Z(0, σ²) from a rounded N(0, σ²) over d coordinates, σ ≥ 1; about √d / 24 σ²."""
    chi_square = (1 + sigma**-2) / (144 * sigma**4)
    exponent = d * math.log1p(chi_square)
    return min(1.0, math.sqrt(math.expm1(exponent)) / 2) if exponent < 1 else 1.0
