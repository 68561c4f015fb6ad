"""Noise of whole numbers, the only noise of DP here: floating-point noise gives away what it was added to.

The low bits of a floating-point sum of data and noise can tell two neighbouring data sets apart, whatever ε was claimed
(Mironov, CCS 2012). A sum is therefore brought to a grid of whole numbers, and a whole number is added to it.

:func:`rounded_gaussian` serves a hospital that adds all of its noise by itself. For a whole number q,
q + round(σ Z) = round(q + σ Z): the mechanism is a rounding of the Gaussian mechanism's output, and what
:mod:`primia_lite.privacy.accounting` says of that holds. :func:`discrete_gaussian` serves noise that hospitals make
together (:mod:`primia_lite.privacy.shared`), where the sum of roundings is no rounding of a sum.

Both are exact. A sample is worked out in float64 from 64 random bits with a bound on its error. Where that doesn't
settle the result, more random bits and :mod:`mpmath` do, as if there were infinitely many. How long a sample takes
depends on what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from primia_lite.config import UserError
from primia_lite.privacy.rng import SecureGenerator

if TYPE_CHECKING:
    from mpmath import mpf

_BLOCK = 1 << 15  # samples at a time: what the processor's cache holds
MAX_SIGMA = 1 << 41  # above, float64 settles too few samples
_NDTRI_ERROR = 4e-15  # stated as 7.2e-16, relative (Cephes, ndtri.c); a test compares it with mpmath
_EXTRA_BITS, _PRECISION = 192, 400

# By so much of C may computing a sum move it: see LinearGhostClipping for what of that is proven, and ClippedSum.
FLOAT32_MARGIN = 2.0**-8


def l2_sensitivity(scale: float, max_grad_norm: float, parameters: int) -> float:
    """How far one unit moves d computed sums on the grid of ``scale`` to 1, in L2: s C (1 + 2^-8) + √d.

    The exact sums move by at most s C, computing them in floating-point numbers counts for 2^-8 of that, and rounding
    moves each of the d by less than 1 more.
    """
    return scale * max_grad_norm * (1 + FLOAT32_MARGIN) + math.sqrt(parameters)


def local_noise(
    total: Mapping[str, torch.Tensor], noise_multiplier: float, max_grad_norm: float, rng: SecureGenerator
) -> dict[str, torch.Tensor]:
    """Sums of clipped gradients plus all the noise that they need: the Gaussian mechanism, rounded.

    The grid's scale is a power of two of at least 2^12 √d / C, so that rounding adds next to nothing to the noise;
    where σ is below 1, of that over σ (down to 2^-24), so that the grid stays finer than the noise. The noise's
    standard deviation is σ times :func:`l2_sensitivity`. Gives float64 by name, whole numbers over the scale.

    Parameters
    ----------
    total : floating-point sums by name, d numbers together, of which one unit moves at most ``max_grad_norm`` in L2
    """
    d = sum(value.numel() for value in total.values())
    finest = min(1.0, max(noise_multiplier, 2.0**-24)) * max_grad_norm
    scale = 2.0 ** math.ceil(math.log2(2**12 * math.sqrt(d) / finest))
    noise = rounded_gaussian(d, noise_multiplier * l2_sensitivity(scale, max_grad_norm, d), rng)
    parts = torch.from_numpy(noise).split([value.numel() for value in total.values()])
    return {
        # Held within 63 bits, which moves no two sums further apart.
        name: ((value.double() * scale).round().clamp(-(2.0**62), 2.0**62).long() + own.view_as(value)).double() / scale
        for (name, value), own in zip(total.items(), parts, strict=True)
    }


# --- samplers ---------------------------------------------------------------------------------------------------------


def rounded_gaussian(n: int, sigma: float, rng: SecureGenerator) -> np.ndarray:
    """int64 [n], independent samples of round(σ Z) for a standard normal Z, exact.

    By inversion: one bit of a word is the sign, the others begin a uniform U, and ``|Z|`` is the number that a normal
    exceeds with probability U / 2.
    """
    if not 0 < sigma <= MAX_SIGMA:
        raise UserError(f"noise with a sigma of {sigma} on its grid: whole-number noise takes one in (0, 2^41]")
    from scipy.special import ndtri  # takes longer to import than most steps

    sigma = float(sigma)
    out = np.empty(n, np.int64)
    for start in range(0, n, _BLOCK):
        word = rng.words(min(_BLOCK, n - start))
        tail = (word >> np.uint64(1)).astype(np.float64)
        with np.errstate(divide="ignore"):
            # What U / 2 in [tail, tail + 1) 2^-64 leaves open: the density at the tail's edge is at least 0.79 of it.
            error = sigma / tail
        size = -ndtri((tail + 0.5) * 2.0**-64) * sigma
        whole = np.rint(size)
        # By how far the error may be more than ndtri's: the tail was rounded to 53 bits.
        error += size * _NDTRI_ERROR + sigma * 2.0**-51
        for i in np.flatnonzero(0.5 - np.abs(size - whole) <= error):
            whole[i] = _settled(int(word[i]) >> 1, sigma, rng)
        np.negative(whole, out=whole, where=(word & np.uint64(1)).astype(bool))
        out[start : start + len(word)] = whole
    return out


def discrete_gaussian(n: int, sigma: int, rng: SecureGenerator) -> np.ndarray:
    """int64 [n], independent samples of N_Z(0, σ²), exact: x with a probability proportional to exp(-x² / 2σ²).

    By rejection from :func:`rounded_gaussian`. With V uniform in [-1/2, 1/2], r(x), the probability that σ Z rounds
    to x, is proportional to exp(-x² / 2σ²) E, for E = E exp(-x V / σ² - V² / 2σ²). So x is kept with probability
    a(x) = exp(-1 / 24σ²) / E. By Jensen's inequality that is at most 1, and as sinh(y) / y ≤ exp(y² / 6) it is at least
    1 - (1 + x² / σ²) / 24σ²: a uniform below this, which most are, settles it.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, np.integer)) or not 1 <= sigma <= MAX_SIGMA:
        raise UserError(f"sigma is {sigma!r}: exact sampling takes a whole number from 1 to 2^41; round it up")
    sigma = int(sigma)  # NumPy's own whole numbers overflow when squared
    x, redraw = np.empty(n, np.int64), np.arange(n)
    while len(redraw):
        x[redraw] = proposed = rounded_gaussian(len(redraw), sigma, rng)
        word = rng.words(len(redraw))
        certain = 1 - (1 + (proposed / sigma) ** 2) / (24.0 * sigma**2) - 2.0**-40
        open_ = np.flatnonzero((word >> np.uint64(11)) * 2.0**-53 >= certain)
        refused = [i for i in open_ if not _accepted(int(proposed[i]), sigma, int(word[i]), rng)]
        redraw = redraw[refused]
    return x


class _Uniform:
    """A uniform number in [0, 1) whose first 64 bits are known; further ones are drawn where they are needed."""

    def __init__(self, first: int, rng: SecureGenerator):
        self.number, self.bits, self.rng = first, 64, rng

    def draw(self) -> None:
        more = int.from_bytes(self.rng.words(_EXTRA_BITS // 64).tobytes(), "little")
        self.number, self.bits = self.number << _EXTRA_BITS | more, self.bits + _EXTRA_BITS

    def below(self, edge: Callable[[], mpf]) -> bool:
        """Whether it is below a number, which is worked out in as many bits as are drawn, and more."""
        from mpmath import mp, mpf

        while True:
            with mp.workprec(self.bits + _PRECISION):
                at, unit = edge(), mpf(2) ** -self.bits
                if (self.number + 1) * unit <= at - at * unit:
                    return True
                if self.number * unit >= at + at * unit:
                    return False
            self.draw()


def _settled(tail: int, sigma: float, rng: SecureGenerator) -> int:
    """round(σ |Z|), where |Z| is exceeded with a probability of ``tail`` 2^-64 and further bits."""
    from mpmath import erfc, log, mp, mpf, sqrt
    from scipy.special import ndtri_exp

    probability = _Uniform(tail, rng)
    probability.draw()
    with mp.workprec(probability.bits + _PRECISION):
        logarithm = float(log(mpf(probability.number + 1) / mpf(2) ** probability.bits))
        whole = max(0, round(-float(ndtri_exp(logarithm)) * sigma))

    def beyond(k: int) -> bool:
        """Whether σ |Z| is above k + 1/2."""
        return probability.below(lambda: erfc((k + mpf(1) / 2) / (mpf(sigma) * sqrt(2))) / 2)

    while beyond(whole):
        whole += 1
    while whole and not beyond(whole - 1):
        whole -= 1
    return whole


def _accepted(x: int, sigma: int, word: int, rng: SecureGenerator) -> bool:
    """Whether a uniform that begins with the bits of ``word`` is below a(x) of :func:`discrete_gaussian`."""
    from mpmath import erfc, exp, mpf, pi, sqrt

    def acceptance() -> mpf:
        s = mpf(sigma)
        low, high = ((abs(x) + half) / (s * sqrt(2)) for half in (-mpf(1) / 2, mpf(1) / 2))
        rounded = s * sqrt(pi / 2) * (erfc(low) - erfc(high))
        return exp(-(mpf(x) ** 2) / (2 * s * s) - 1 / (24 * s * s)) / rounded

    return _Uniform(word, rng).below(acceptance)
