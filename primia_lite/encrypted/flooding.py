"""Noise on logits that a hospital shares, so that the sharing provably tells nothing of its key.

A CKKS decryption is the result plus the ciphertext's noise, and that noise depends on the key (Li and Micciancio,
EUROCRYPT 2021). Gaussian noise that is much wider hides it: Li, Micciancio, Schultz and Sorrell, "Securing approximate
homomorphic encryption using differential privacy" (CRYPTO 2022).

What is guaranteed: to tell the shared logits from those of a scheme whose decryptions don't depend on the key is as
hard as ``statistical_bits`` say, for ``queries`` decryptions under one key, if the noise of every ciphertext is below
the bound. The bound assumes a server that computes as the packing says: a server that answers with something else can
have more noise in it, and then nothing is guaranteed. Logits that stay in the hospital don't need any of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from primia_lite.config import UserError
from primia_lite.privacy.noise import rounded_gaussian
from primia_lite.privacy.rng import SecureGenerator


def flooding_std(noise_bound: float, queries: int, statistical_bits: float) -> float:
    """Standard deviation that hides noise of L2 norm up to ``noise_bound`` in each of ``queries`` decryptions,
    sqrt(12 queries) · 2^(statistical_bits / 2) · noise_bound.

    Two Gaussians ``noise_bound`` apart have a Kullback-Leibler divergence of bound² / (2 std²), and ``queries`` of them
    together 2^-statistical_bits / 24.
    """
    if not (noise_bound > 0 and queries >= 1 and statistical_bits > 0 and math.isfinite(noise_bound)):
        raise UserError("flooding needs a noise bound and bits above 0, and at least 1 query")
    return math.sqrt(12 * queries) * 2 ** (statistical_bits / 2) * noise_bound


@dataclass(frozen=True)
class Flooding:
    """How much noise a client adds before it rounds: ``statistical_bits`` of the guarantee for so many ``queries``,
    decryptions under one key; the client refuses more."""

    queries: int = 1000
    statistical_bits: float = 30.0

    @property
    def cost_bits(self) -> float:
        """Bits of precision it takes: log2 of the flooding's standard deviation over the noise bound."""
        return math.log2(flooding_std(1.0, self.queries, self.statistical_bits))


_FINE_STD, _STEP_BITS = 2.0**40, 30


def wide_gaussian(size: int, std: float) -> list[int]:
    """Whole numbers: normal samples from the operating system's generator, rounded, of any width.

    An integer plus such a number is a function of the integer plus a Gaussian, so rounding gives nothing away. Above
    2^41 it is the sum of a fine sample of 2^40 and a coarse one in steps of 2^30. Both are 1,024 steps wide and more,
    so by Poisson's summation formula the sum is distributed as a Gaussian of ``std`` plus a uniform number one step
    wide, rounded, to within e^(-2 pi^2 1024^2), and so is again a (randomised) function of the integer plus the
    Gaussian.
    """
    fine = std if std <= 2 * _FINE_STD else _FINE_STD
    out = rounded_gaussian(size, fine, SecureGenerator()).tolist()
    if std > fine:
        coarse = wide_gaussian(size, std * math.sqrt(1 - (fine / std) ** 2) / 2**_STEP_BITS)
        out = [a + (b << _STEP_BITS) for a, b in zip(out, coarse, strict=True)]
    return out
