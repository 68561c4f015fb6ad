"""How a masked value is cut and compared: what the dealer puts into a gate's key, and what a server makes of it.

A server sees m = y + r modulo 2³² (or its upper bits), where r is a mask that only the dealer knows. That y is negative
shows in the top bit of m - r, which is the top bit of m, that of r and a borrow: whether the lower bits of m are *less*
than those of r. A comparison of public bits with secret ones is what :mod:`primia_lite.smpc.dcf` computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from primia_lite.smpc import dcf
from primia_lite.smpc.ring import RING_BITS

COMPARED = 15  # bits of a comparison: a value nearer to zero than their last one may be taken for one of the other sign
ONE = np.uint32(1)


@dataclass(frozen=True)
class Gate:
    """Cuts ``shift`` bits off, then takes max(0, y - t₀) - max(0, y - t₁) for ascending ``thresholds`` t: one makes a
    ReLU, two a ReLU6, none only cuts. Thresholds are at the scale after the cut.

    The range of y before the cut is [-2³⁰, 2³⁰ - 2^shift), and without a cut [-2³¹ + 2¹⁶, 2³¹ - 2¹⁶).
    """

    shift: int
    thresholds: tuple[int, ...] = (0,)

    @property
    def ring(self) -> int:
        """Bits that are opened."""
        return RING_BITS - self.shift

    @property
    def offset(self) -> int:
        """Makes a value that is cut positive, so that a wrap around the smaller ring can be told."""
        return 1 << (self.ring - 2) if self.shift else 0

    @property
    def bits(self) -> int:
        return min(COMPARED, self.ring - 1)

    @property
    def half(self) -> int:
        """What a comparison may err by."""
        return (1 << (self.ring - 1 - self.bits)) >> 1

    @property
    def rows(self) -> int:
        """Of a table: without a wrap and, after a cut, with one."""
        return 2 if self.shift else 1

    @property
    def columns(self) -> int:
        """Words of the table for each value."""
        return (1 + 2 * self.rows) * len(self.thresholds) or self.rows

    def wrapped(self, x: np.ndarray) -> np.ndarray:
        return x & np.uint32((1 << self.ring) - 1)

    def parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The top bit, and the bits below it that are compared."""
        skipped = np.uint32(self.ring - 1 - self.bits)
        return (x >> np.uint32(self.ring - 1)) & ONE, (x & np.uint32((1 << (self.ring - 1)) - 1)) >> skipped

    def points(self, value: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """:meth:`parts` of a masked value's distance to each threshold, rounded to what is compared."""
        return [self.parts(self.wrapped(value - np.uint32(t + self.half))) for t in self.thresholds]

    def table(self, mask: np.ndarray, flips: list[np.ndarray]) -> np.ndarray:
        """What the dealer shares, uint32 [columns, values]: products of secrets, one of which the opened bits pick.

        ``mask`` [values], cut; ``flips``: bits that hide each threshold's comparison.
        """
        top, _ = self.parts(mask)
        unmask = [np.uint32(0) - mask, (top << np.uint32(self.ring % RING_BITS)) - mask][: self.rows]
        if not self.thresholds:
            return np.stack(unmask)
        rows = []
        for flip in flips:
            above = (top ^ ONE) ^ flip  # where the opened bit is 0
            rows += [above] + [case * value for case in (above, above ^ ONE) for value in unmask]
        return np.stack(rows)

    def result(self, server: int, opened: np.ndarray, bits: np.ndarray, table: np.ndarray) -> np.ndarray:
        """A server's share of the output.

        ``opened`` [values]: y + r, cut; ``bits`` [thresholds, values]: opened comparisons; ``table``: this server's
        share of :meth:`table`.
        """
        value, wrap = opened - np.uint32(self.offset), (opened >> np.uint32(self.ring - 1)) ^ ONE
        if not self.thresholds:
            return np.where(wrap, table[-1], table[0]) + (value if server == 0 else np.uint32(0))
        out, per = np.zeros(len(opened), np.uint32), 1 + 2 * self.rows
        for i, (threshold, (top, _), bit) in enumerate(zip(self.thresholds, self.points(value), bits, strict=True)):
            case, part = bit ^ top.astype(np.uint8), table[i * per : (i + 1) * per]
            above = np.where(case, np.uint32(server) - part[0], part[0])
            off, on = (np.where(wrap, each[-1], each[0]) for each in (part[1 : 1 + self.rows], part[1 + self.rows :]))
            term = (value - np.uint32(threshold)) * above + np.where(case, on, off)
            out = out - term if i else term
        return out

    def keys(self, mask: np.ndarray, seeds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Correction words for comparisons with a cut mask [values]: one key serves all thresholds."""
        return dcf.generate(self.parts(mask)[1], self.bits, seeds)
