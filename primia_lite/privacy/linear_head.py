"""Ghost clipping of a linear head on features that don't change: no backward pass, no gradient of a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from primia_lite.data.films import Films, Units, ranges

if TYPE_CHECKING:
    from primia_lite.privacy.dpsgd import PhysicalBatch

_BLOCK_ROWS = 64  # are added up in float32
_PART_BYTES = 256 * 2**20  # of inputs that are worked on at once


class LinearGhostClipping:
    """Gradient norms and clipped sums of a linear head from inner products of the rows of each unit.

    The gradient of a unit is the sum over its rows of e_i x_i^T, e_i the loss's derivative by the logits, so its
    squared norm is the sum over pairs of rows of (e_i . e_j) (x_i . x_j) (the identity behind ghost clipping,
    Goodfellow 2015; Li et al. 2022). The features don't change, so the second factors are computed once, in float64.

    Why a sampled unit moves a computed sum by at most C (1 + 2^-8) against an empty one with as many rows: rows are
    added up in float32 by blocks of 64, and blocks in float64. The empty one's rows have e = 0, so that only blocks
    with its rows in them differ: its own, and at most 63 rows of others at each end. A float32 sum of 64 products is
    off by at most about 64 · 2^-24 of the sum of their absolute values (Higham 2002, section 3.1). So what counts is
    the length |e_i| |x_i| of a row: at most 2 C, and 64 C over a unit's rows, since a unit is clipped by the largest of
    its norm, half of its longest row, and a 64th of all its rows' lengths (its norm decides unless rows cancel). That
    gives 2^-18 · (2 · 126 · 2 + 64) C, less than 2^-8 C.
    """

    def __init__(self, inputs: torch.Tensor, units: Units):  # inputs: float32 [N, V, D]
        views, d = inputs.shape[1:]
        first, second, product, pairs_of = [], [], [], []
        for m in units.count.unique().tolist():  # units with as many films go together
            alike = (units.count == m).nonzero()[:, 0]
            i, j = torch.triu_indices(m * views, m * views)
            weight = torch.where(i == j, 1.0, 2.0)  # (i, j) stands for (j, i), too
            for some in alike.split(max(1, _PART_BYTES // (8 * m * views * d))):
                x = inputs[units.films(some)].view(len(some), m * views, d).double()
                gram = torch.bmm(x, x.transpose(1, 2))[:, i, j]
                product.append((gram * weight).flatten())
                first.append(i.repeat(len(some)))
                second.append(j.repeat(len(some)))
                pairs_of.append(some.repeat_interleave(len(i)))
        order = torch.argsort(torch.cat(pairs_of), stable=True)
        # Rows of a pair, counted from the first row of their unit.
        self.first, self.second, self.product = (torch.cat(each)[order] for each in (first, second, product))
        self.length = self.product[self.first == self.second].sqrt()  # of each row, unit by unit
        rows = units.count * views
        self.row_start = rows.cumsum(0) - rows
        self.count = rows * (rows + 1) // 2
        self.start = self.count.cumsum(0) - self.count

    @classmethod
    def of(cls, films: Films, unit: str) -> LinearGhostClipping:
        key = ("gram", unit, films.inputs._version)  # films that were changed in place have other norms
        if key not in films.cache:
            films.cache[key] = cls(films.inputs, films.units(unit))
        return films.cache[key]

    def clipped_sum(self, head: nn.Linear, rows: PhysicalBatch, max_grad_norm: float):
        """As :func:`primia_lite.privacy.clipping.clipped_sum`, in closed form; the sum is float64."""
        with torch.no_grad():
            logp = (head.weight @ rows.inputs.T).T.log_softmax(1)  # for few classes faster than head(inputs)
            losses = -(rows.target * logp).sum(1)
            # The derivative of the losses by the logits.
            error = rows.target.sum(1, keepdim=True) * logp.exp() - rows.target
        count = self.count[rows.units]
        pair = ranges(self.start[rows.units], count)
        unit = torch.arange(len(count)).repeat_interleave(count)
        begin = (rows.count.cumsum(0) - rows.count).index_select(0, unit)
        exact = error.double()
        first, second, product = (t.index_select(0, pair) for t in (self.first, self.second, self.product))
        products = exact.index_select(0, first + begin) * exact.index_select(0, second + begin)
        dot = products @ exact.new_ones(exact.shape[1])
        square = torch.zeros(len(count), dtype=torch.float64).index_add_(0, unit, dot * product)
        norms = square.clamp(min=0).sqrt()
        length = exact.norm(dim=1) * self.length.index_select(0, ranges(self.row_start[rows.units], rows.count))
        longest, whole = (torch.segment_reduce(length, how, lengths=rows.count) for how in ("max", "sum"))
        factor = max_grad_norm / torch.stack([norms, longest / 2, whole / 64]).amax(0)
        error = error * factor.clamp(max=1.0).float().repeat_interleave(rows.count)[:, None]
        n = len(error) - len(error) % _BLOCK_ROWS
        blocks = (t[:n].view(-1, _BLOCK_ROWS, t.shape[1]) for t in (error, rows.inputs))
        total = torch.bmm(next(blocks).mT, next(blocks)).sum(0, dtype=torch.float64) + error[n:].T @ rows.inputs[n:]
        return {"weight": total}, norms, losses
