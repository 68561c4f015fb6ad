"""CKKS parameters: how large, how many levels, how precise (Cheon, Kim, Kim, Song, ASIACRYPT 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from primia_lite.config import UserError

# Most bits of the coefficient modulus, special prime included, at 128-bit security for a ternary secret and classical
# attackers: HomomorphicEncryption.org security standard (Albrecht et al. 2018), table 1, as in Microsoft SEAL 4.
MAX_BITS_128 = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
# Of one prime: SEAL's limits (60), and room for a few primes p = 1 mod 2N of that size.
_LEAST_BITS, _MOST_BITS = 20, 60


@dataclass(frozen=True)
class Parameters:
    """A set of CKKS parameters. Refused are those weaker than 128 bits, whose scale rescaling would take apart, or
    without room for the result.

    Attributes
    ----------
    poly_modulus_degree : N, a power of two; a ciphertext has N / 2 slots, or N coefficients
    coeff_mod_bit_sizes : bits of each prime of the coefficient modulus: first what is left for the result, then one for
        each rescaling, last the special prime of key switching. A single prime: no rescaling, no key switching.
    scale_bits : log2 of the scale of what is encrypted
    rescaled : whether the circuit rescales; if not, all primes but the special one are one modulus together
    """

    poly_modulus_degree: int
    coeff_mod_bit_sizes: tuple[int, ...]
    scale_bits: int
    rescaled: bool = True

    def __post_init__(self):
        n, bits, most = self.poly_modulus_degree, self.coeff_mod_bit_sizes, MAX_BITS_128.get(self.poly_modulus_degree)
        if most is None:
            raise UserError(f"poly_modulus_degree is {n}: choose one of {', '.join(map(str, MAX_BITS_128))}")
        if not bits or min(bits) < _LEAST_BITS or max(bits) > _MOST_BITS:
            raise UserError(f"coeff_mod_bit_sizes are {bits}: give primes of {_LEAST_BITS} to {_MOST_BITS} bits")
        if sum(bits) > most:
            raise UserError(
                f"{sum(bits)} bits at N = {n} are weaker than 128-bit security, which allows {most}: take fewer"
            )
        if uneven := [b for b in bits[1:-1] if self.rescaled and b != self.scale_bits]:
            raise UserError(
                f"a middle prime has {uneven[0]} bits, the scale {self.scale_bits}: rescaling divides by the prime, so "
                "the scale would run away and results come out wrong; make the middle primes as large as the scale"
            )
        if len(bits) > 1 and bits[-1] < max(bits):
            raise UserError(f"the last prime has {bits[-1]} bits: the special prime must be the largest, {max(bits)}")
        room = bits[0] if self.rescaled else sum(bits[:-1] or bits)
        if not 1 <= self.scale_bits < room:
            raise UserError(
                f"scale_bits is {self.scale_bits} of {room}: the difference is the result's room; make it smaller"
            )

    @property
    def levels(self) -> int:
        """Rescalings that a fresh ciphertext allows."""
        return max(0, len(self.coeff_mod_bit_sizes) - 2) if self.rescaled else 0

    @property
    def slots(self) -> int:
        return self.poly_modulus_degree // 2


def rescaling_error_bits(poly_modulus_degree: int) -> float:
    """log2 of a slot's standard deviation after one rescaling, in units of 1 / scale. Rescaling rounds both parts of a
    ciphertext, each coefficient by a uniform error of variance 1/12; the second part is multiplied by the key, of N
    coefficients of variance 2/3; a slot's real part is the sum of N of the results, each times a cosine of variance
    1/2. That is N / 6 for N in the thousands."""
    n = poly_modulus_degree
    return 0.5 * math.log2(n * (1 + 2 * n / 3) / 24)


def choose(depth: int, *, precision_bits: int = 18, integer_bits: int = 8, weight_bits: int = 0) -> Parameters:
    """The smallest parameters at 128-bit security for a circuit in slots.

    The scale is ``precision_bits`` above the error of a rescaling (:func:`rescaling_error_bits`); each level has a
    prime of that size; first prime and special prime have ``integer_bits`` and ``weight_bits`` more.

    Parameters
    ----------
    depth : multiplications one after the other that are rescaled
    precision_bits : log2 of 1 / the standard deviation of one rescaling's error
    integer_bits : room for the result's integer part and sign
    weight_bits : log2 of the scale of a last product's weights, which isn't rescaled
    """
    if min(depth, weight_bits) < 0 or min(precision_bits, integer_bits) < 1:
        raise UserError("depth must be at least 0, precision_bits and integer_bits at least 1")
    for n in MAX_BITS_128:
        scale = math.ceil(precision_bits + rescaling_error_bits(n))
        edge = scale + integer_bits + weight_bits
        bits = (edge, *[scale] * depth, edge)
        if sum(bits) <= MAX_BITS_128[n] and scale >= _LEAST_BITS and edge <= _MOST_BITS:
            return Parameters(n, bits, scale)
    raise UserError(f"no CKKS parameters have depth {depth} and {precision_bits} bits of precision: take less of one")


def choose_single_product(weight_bits: int, primes: int = 1) -> Parameters:
    """The smallest parameters at 128-bit security for one product with plain weights, which isn't rescaled.

    All bits that N allows are used, for one prime, or for so many equal ones, one modulus together, and the special
    prime that SEAL asks for beside them. What weights (``weight_bits`` is log2 of their scale) and 8 bits for the
    result's integer part and sign leave is the scale of what is encrypted, at least 20 bits.
    """
    for n, most in MAX_BITS_128.items():
        each = min(most // (primes + (primes > 1)), _MOST_BITS)
        scale = primes * each - 8 - weight_bits
        if each >= _LEAST_BITS and scale >= _LEAST_BITS:
            special = (min(most - primes * each, _MOST_BITS),) if primes > 1 else ()
            return Parameters(n, (each,) * primes + special, scale, rescaled=False)
    raise UserError(f"no CKKS parameters have room for weights of {weight_bits} bits in {primes} prime(s)")
