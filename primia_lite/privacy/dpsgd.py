"""DP-SGD at one hospital: per-unit gradients, clipping, Gaussian noise (Abadi et al., CCS 2016).

The unit is a patient with all their films (McMahan et al. 2018 call it user-level), or a single film. What is hidden is
whether a unit is there or empty; how many there are is public (zero-out adjacency, see
:mod:`primia_lite.privacy.accounting`): an empty unit's gradient is zero, sampled or not. Sampling and noise come from
:class:`~primia_lite.privacy.rng.SecureGenerator`, and the noise is of whole numbers (:mod:`primia_lite.privacy.noise`).
ε doesn't cover that a step is refused because a gradient isn't finite: that can be seen from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.data.films import Films, Units, ranges
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon
from primia_lite.privacy.clipping import clipped_sum
from primia_lite.privacy.ledger import UNITS
from primia_lite.privacy.noise import local_noise
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.privacy.shared import Grid, SharedNoise

# Rows that a linear head adds up in float32; see HeadGram.
_SUMMED_ROWS = 64
# Inputs and activations of a part of a batch stay near this; a larger batch is worked through in parts.
_PART_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Privacy:
    """How much is protected, and what.

    Attributes
    ----------
    noise_multiplier : σ, the noise's standard deviation over ``max_grad_norm``
    max_grad_norm : C, the L2 norm to which each unit's gradient is clipped
    target_epsilon, target_delta : the budget of a hospital; a step that would exceed it is refused. With ``shared`` the
        ledger counts at this δ, and :meth:`promised_delta` is what holds in all
    unit : what may be there or empty without anybody's knowing: a ``patient`` (with all their films at the hospital) or
        a ``film``. How many there are is public (zero-out adjacency)
    plan : the releases that are fixed in advance; without one the ledger counts by a filter
    shared : how hospitals make the noise together, as whole numbers within a secure sum; None: each by itself
    """

    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float
    target_delta: float = 1e-4
    unit: str = "patient"
    plan: tuple[Release, ...] = ()
    shared: SharedNoise | None = None

    def __post_init__(self):
        Release(self.noise_multiplier, 1.0, 0)
        if not 0 < self.max_grad_norm < float("inf"):
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: it must be above 0 and finite")
        if not 0 < self.target_epsilon < float("inf"):
            raise UserError(f"target_epsilon is {self.target_epsilon}: it must be above 0 and finite")
        if not 0 < self.target_delta < 1:
            raise UserError(f"target_delta is {self.target_delta}: it must be in (0, 1), below 1 / number of patients")
        if self.unit not in UNITS:
            raise UserError(f"unit is {self.unit!r}: choose one of {', '.join(UNITS)}")
        if self.shared:
            _ = self.grid  # refused here if 32 bits don't hold it

    @classmethod
    def for_budget(
        cls,
        target_epsilon: float,
        *,
        sample_rate: float,
        steps: int,
        max_grad_norm: float,
        target_delta: float = 1e-4,
        unit: str = "patient",
        spare_steps: int = 0,
        also: tuple[Release, ...] = (),
        shared: SharedNoise | None = None,
    ) -> Privacy:
        """The least noise that keeps ``steps`` steps at ``sample_rate`` within the budget, and the plan to take them.

        Parameters
        ----------
        spare_steps
            Room for steps that are charged a second time: a run that is killed between charge and release computes
            that round anew, and without room for it could not end.
        also
            Other releases charged to the same ledger, such as a normalisation shared under DP.
        shared
            Hospitals make the noise together. ``target_delta`` is what holds in all: the result's is less by what
            whole-number noise costs (see :mod:`primia_lite.privacy.shared`).

        Raises
        ------
        UserError
            The budget is out of reach, or whole-number noise alone costs more than ``target_delta``.
        """
        steps += spare_steps
        slack, delta = 0.0, target_delta
        sigma = calibrate_noise_multiplier(target_epsilon, delta, sample_rate, steps, tuple(also))
        # More noise costs less slack, so this ends; 1 % is for the scale's being whole.
        while shared and (cost := shared.grid(sigma, max_grad_norm).delta_slack(steps, target_epsilon)) > slack:
            slack, delta = 1.01 * cost, target_delta - 1.01 * cost
            if delta <= 0:
                raise UserError(
                    f"whole-number noise alone costs a delta of {cost:.2g} over {steps} steps at epsilon "
                    f"{target_epsilon:g}, and target_delta is {target_delta:g}: take a smaller epsilon, fewer steps or "
                    "fewer parameters"
                )
            sigma = calibrate_noise_multiplier(target_epsilon, delta, sample_rate, steps, tuple(also))
        plan = (*also, Release(sigma, sample_rate, steps))
        return cls(sigma, max_grad_norm, target_epsilon, delta, unit, plan, shared)

    @property
    def grid(self) -> Grid:
        """The whole numbers of shared noise."""
        return self.shared.grid(self.noise_multiplier, self.max_grad_norm)

    def promised_delta(self, steps: int) -> float:
        """δ that holds in all after so many steps at ``target_epsilon``: with shared noise more than the ledger's."""
        return self.target_delta + (self.grid.delta_slack(steps, self.target_epsilon) if self.shared else 0.0)

    def release(self, sample_rate: float, steps: int) -> Release:
        return Release(self.noise_multiplier, sample_rate, steps)

    def epsilon(self, sample_rate: float, steps: int) -> float:
        """ε of so many steps, fixed in advance."""
        return epsilon(self.release(sample_rate, steps), self.target_delta)

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if not (name == "shared" and value is None)}


def check_model(model: nn.Module) -> None:
    """Raise UserError, naming layer and fix, for a model that mixes films (BatchNorm) or whose gradients can't be
    clipped."""
    if type(model) is nn.Linear:
        return  # nothing to find, and what would look for it is slow to import
    from opacus.validators import ModuleValidator

    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"layer {name!r} is {type(layer).__name__}: it mixes the films of a batch, so that no film's gradient "
                "is its own. Replace it by GroupNorm: model = opacus.validators.ModuleValidator.fix(model)"
            )
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise UserError(f"DP-SGD can't train this model: {errors[0]}")


# --- who takes part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoissonBatch:
    """The units that take part in a step, int64 [m] (may be empty), drawn independently with one probability."""

    units: torch.Tensor
    sample_rate: float

    def __len__(self) -> int:
        return len(self.units)


def poisson_batches(n_units: int, sample_rate: float, steps: int, rng: SecureGenerator) -> Iterator[PoissonBatch]:
    """Each unit takes part in each step with probability ``sample_rate``, independently; a batch may be empty."""
    for _ in range(steps):
        yield PoissonBatch(torch.from_numpy(np.flatnonzero(rng.bernoulli(n_units, sample_rate))), sample_rate)


# --- a step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What a network sees of some units in a step: one row for each view of each of their films.

    Attributes
    ----------
    inputs : float32 [R, ...], the rows of a unit together, film by film and view by view
    units : int64 [U], the numbers of the units, in that order
    count : int64 [U], how many rows each has
    target : float32 [R, K], label (smoothed, class-weighted) times the row's share of its unit, so that a unit's rows
        add up to the mean cross-entropy over its films and views
    """

    inputs: torch.Tensor
    units: torch.Tensor
    count: torch.Tensor
    target: torch.Tensor

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [R] of logits [R, K]."""
        return -(self.target * logits.log_softmax(1)).sum(1)

    @property
    def owner(self) -> torch.Tensor:
        """int64 [R]: which of the ``units`` a row belongs to."""
        return torch.arange(len(self.units)).repeat_interleave(self.count)


class ClippedSum:
    """The sum of a batch's gradients, each unit's clipped to C, in float64.

    A patient's gradient is the mean over their films and over the films' views (augmentation multiplicity, De et al.
    2022), so its sensitivity stays C. A record that is replaced by an empty one keeps its rows, which count for
    nothing, so the other units' gradients are computed alike and only the sum's rounding differs: :class:`HeadGram`
    bounds that for a linear head. Where rows are missing instead (the unit isn't sampled, or had fewer films), the
    others' rows lie elsewhere and round differently, and a network trained whole adds up in float32 throughout: nothing
    proves that this stays within :data:`~primia_lite.privacy.noise.FLOAT32_MARGIN`; tests measure less than a hundredth
    of it.

    Parameters
    ----------
    films
        The hospital's; the Gram matrices that a linear head's norms need are kept with them.

    Raises
    ------
    UserError
        See :func:`check_model`.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, unit: str, films: Films | None = None):
        check_model(model)
        self.model, self.max_grad_norm = model, max_grad_norm
        # A linear head on features that don't change needs no backward pass through anything.
        linear = isinstance(model, nn.Linear) and model.bias is None
        self.head = HeadGram.of(films, unit) if linear and films is not None else None

    def __call__(self, batch: PoissonBatch, parts: Iterator[Rows]) -> tuple[dict[str, torch.Tensor], float]:
        """The sum by name of parameter, and the sum of the losses (private).

        Parameters
        ----------
        parts
            The batch's units, each whole in one part.

        Raises
        ------
        UserError
            The batch wasn't drawn by :func:`poisson_batches`.
        FloatingPointError
            A unit's gradient isn't finite.
        """
        if not isinstance(batch, PoissonBatch):
            raise UserError(
                "this batch was not drawn by Poisson sampling: the ε of DP-SGD holds for that alone, not for shuffled "
                "batches of fixed size. Draw it by poisson_batches"
            )
        total = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        loss, bound = 0.0, self.max_grad_norm
        for rows in parts:
            if self.head:
                part, norms, losses = self.head.clipped_sum(self.model, rows, bound)
            else:
                run = partial(_losses, rows)
                part, norms, losses = clipped_sum(self.model, run, rows.owner, len(rows.units), bound)
            if not torch.isfinite(norms).all():
                raise FloatingPointError("a gradient isn't finite")
            loss += float(losses.sum())
            for name, value in part.items():
                total[name] += value
        return total, loss


class ClippedStep:
    """One step on the clipped sum of a Poisson batch's gradients over the expected batch: without noise no DP.

    Parameters
    ----------
    expected_batch
        Sample rate times the declared number of units.

    Raises
    ------
    UserError
        See :func:`check_model`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipped_sum: ClippedSum, expected_batch: float):
        self.optimizer, self.clipped_sum, self.expected_batch = optimizer, clipped_sum, expected_batch

    def __call__(self, batch: PoissonBatch, parts: Iterator[Rows]) -> float:
        """Take the step; returns the mean loss (private), nan for an empty batch.

        ``parts`` and errors are as of :class:`ClippedSum`; after an error the model is as it was.
        """
        total, loss = self.clipped_sum(batch, parts)
        total = self.released(total)
        for name, p in self.clipped_sum.model.named_parameters():
            if name in total:
                p.grad = (total[name] / self.expected_batch).to(p.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss / len(batch) if len(batch) else float("nan")

    def released(self, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of the sum, by name of parameter, goes into the model: here all of it, as it is."""
        return total


class PrivateStep(ClippedStep):
    """One step of DP-SGD: the clipped sum of the gradients, plus noise σC, over the public expected batch.

    The noise is of whole numbers (:func:`primia_lite.privacy.noise.local_noise`). An empty batch still takes its step:
    noise alone. Leaving it out would tell that nobody was sampled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        privacy: Privacy,
        expected_batch: float,
        rng: SecureGenerator,
        films: Films | None = None,
    ):
        super().__init__(optimizer, ClippedSum(model, privacy.max_grad_norm, privacy.unit, films), expected_batch)
        self.privacy, self.rng = privacy, rng

    def released(self, total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return local_noise(total, self.privacy.noise_multiplier, self.privacy.max_grad_norm, self.rng)


def _losses(rows: Rows, model: nn.Module) -> torch.Tensor:
    return rows.losses(model(rows.inputs))


class HeadGram:
    """Inner products of the feature rows that belong to one unit: all that a linear head's gradient norms need.

    The gradient of a unit is the sum over its rows of e_i x_i^T, e_i the loss's derivative by the logits, so its
    squared norm is the sum over pairs of rows of (e_i . e_j) (x_i . x_j) (the identity behind ghost clipping,
    Goodfellow 2015; Li et al. 2022). The features don't change, so the second factors are computed once, in float64.

    Why a sampled unit moves a computed sum by at most C (1 + 2^-8) against an empty one with as many rows: rows are
    added up in float32 by blocks of 64, and blocks in float64. A unit replaced by an empty record keeps its rows,
    with e = 0, so that only the blocks with its rows in them differ: its own, and at most 63 rows of others at each
    end. A float32 sum of 64 products is off by at most about 64 · 2^-24 of the sum of their absolute values (Higham
    2002, section 3.1). So what counts is the length |e_i| |x_i| of a row: at most 2 C, and 64 C over a unit's rows,
    since a unit is clipped by the largest of its norm, half of its longest row, and a 64th of all its rows' lengths
    (its norm decides unless rows cancel). That gives 2^-18 · (2 · 126 · 2 + 64) C, less than 2^-8 C.
    """

    def __init__(self, inputs: torch.Tensor, units: Units):
        """inputs : float32 [N, V, D]"""
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
    def of(cls, films: Films, unit: str) -> HeadGram:
        key = ("gram", unit, films.inputs._version)  # films that were changed in place have other norms
        if key not in films.cache:
            films.cache[key] = cls(films.inputs, films.units(unit))
        return films.cache[key]

    def clipped_sum(self, head: nn.Linear, rows: Rows, max_grad_norm: float):
        """As :func:`primia_lite.privacy.clipping.clipped_sum`, in closed form; the sum is float64."""
        with torch.no_grad():
            logp = (head.weight @ rows.inputs.T).T.log_softmax(1)  # for few classes faster than head(inputs)
            losses = -(rows.target * logp).sum(1)
            error = (
                rows.target.sum(1, keepdim=True) * logp.exp() - rows.target
            )  # derivative of the losses by the logits
        count = self.count[rows.units]
        pair = ranges(self.start[rows.units], count)
        unit = torch.arange(len(count)).repeat_interleave(count)
        begin = (rows.count.cumsum(0) - rows.count).index_select(0, unit)
        exact = error.double()
        first, second, product = (t.index_select(0, pair) for t in (self.first, self.second, self.product))
        dot = (exact.index_select(0, first + begin) * exact.index_select(0, second + begin)) @ exact.new_ones(
            exact.shape[1]
        )
        square = torch.zeros(len(count), dtype=torch.float64).index_add_(0, unit, dot * product)
        norms = square.clamp(min=0).sqrt()
        length = exact.norm(dim=1) * self.length.index_select(0, ranges(self.row_start[rows.units], rows.count))
        longest, whole = (torch.segment_reduce(length, how, lengths=rows.count) for how in ("max", "sum"))
        factor = max_grad_norm / torch.stack([norms, longest / 2, whole / 64]).amax(0)
        error = error * factor.clamp(max=1.0).float().repeat_interleave(rows.count)[:, None]
        n = len(error) - len(error) % _SUMMED_ROWS
        blocks = (t[:n].view(-1, _SUMMED_ROWS, t.shape[1]) for t in (error, rows.inputs))
        total = torch.bmm(next(blocks).mT, next(blocks)).sum(0, dtype=torch.float64) + error[n:].T @ rows.inputs[n:]
        return {"weight": total}, norms, losses
