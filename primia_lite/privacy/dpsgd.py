"""DP-SGD at one hospital: per-unit gradients, clipping, Gaussian noise (Abadi et al., CCS 2016).

The unit is a patient with all their films (McMahan et al. 2018 call it user-level), or a single film. What is hidden is
whether a unit is there or empty; how many there are is public (zero-out adjacency, see
:mod:`primia_lite.privacy.accounting`): an empty unit's gradient is zero, sampled or not. Sampling and noise come from
:class:`~primia_lite.privacy.rng.SecureGenerator`, and the noise is of whole numbers (:mod:`primia_lite.privacy.noise`).
ε doesn't cover that a step is refused because a gradient isn't finite: that can be seen from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import nn

from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon
from primia_lite.privacy.clipping import clipped_sum, trained_layers
from primia_lite.privacy.ledger import check_budget
from primia_lite.privacy.linear_head import LinearGhostClipping
from primia_lite.privacy.noise import local_noise
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.privacy.shared import Quantizer, SharedNoise


@dataclass(frozen=True)
class Privacy:
    """How much is protected, and what.

    Attributes
    ----------
    noise_multiplier : σ, the noise's standard deviation over ``max_grad_norm``
    max_grad_norm : C, the L2 norm to which each unit's gradient is clipped
    target_epsilon, target_delta : the budget of a hospital; a step that would exceed it is refused. With ``shared`` the
        ledger counts at this δ, and :meth:`promised_delta` is what holds in all
    unit : what may be there or empty unnoticed: a ``patient`` (with all their films at the hospital) or a ``film``
    planned : sample rate and number of steps, if fixed in advance; without them the ledger counts by a filter
    also : other releases that are planned beside the steps
    shared : how hospitals make the noise together, as whole numbers within a secure sum; None: each by itself
    """

    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float
    target_delta: float = 1e-4
    unit: str = "patient"
    planned: tuple[float, int] | None = None
    also: tuple[Release, ...] = ()
    shared: SharedNoise | None = None

    def __post_init__(self):
        self.release(*self.planned or (1.0, 0))  # refused here, as is what 32 bits don't hold
        if not 0 < self.max_grad_norm < float("inf"):
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: it must be above 0 and finite")
        check_budget(self.target_epsilon, self.target_delta, self.unit)
        if self.shared:
            _ = self.quantizer

    @classmethod
    def for_budget(
        cls,
        target_epsilon: float,
        *,
        sample_rate: float,
        steps: int,
        spare_steps: int = 0,
        target_delta: float = 1e-4,
        **options,
    ) -> Privacy:
        """The least noise that keeps ``steps`` steps at ``sample_rate`` within the budget, and the plan to take them.

        Parameters
        ----------
        spare_steps
            Room for steps that are charged twice: a run that is killed between charge and release computes that round
            anew.
        target_delta
            What holds in all. With ``shared`` noise the result's is less, by what whole-number noise costs.
        options
            ``max_grad_norm``, ``unit``, ``also``, ``shared``, as of :class:`Privacy`.
        """
        steps += spare_steps
        also, slack = tuple(options.pop("also", ())), 0.0
        while True:
            delta = target_delta - slack
            if delta <= 0:
                raise UserError(
                    f"whole-number noise alone costs a delta of {slack:.2g} over {steps} steps at epsilon "
                    f"{target_epsilon:g}, and target_delta is {target_delta:g}: take a smaller epsilon, fewer steps or "
                    "fewer parameters"
                )
            sigma = calibrate_noise_multiplier(target_epsilon, delta, sample_rate, steps, also)
            privacy = cls(
                sigma, target_epsilon=target_epsilon, target_delta=delta, planned=(sample_rate, steps), also=also,
                **options,
            )  # fmt: skip
            cost = privacy.quantizer.delta_slack(steps, target_epsilon) if privacy.shared else 0.0
            if cost <= slack:
                return privacy
            slack = 1.01 * cost  # more noise costs less, so this ends; 1 % is for the scale's being whole

    @property
    def plan(self) -> tuple[Release, ...]:
        """All releases that are fixed in advance."""
        return (*self.also, self.release(*self.planned)) if self.planned else ()

    @cached_property
    def quantizer(self) -> Quantizer:
        """The whole numbers of shared noise."""
        return Quantizer(self.shared, self.noise_multiplier, self.max_grad_norm)

    def promised_delta(self, steps: int) -> float:
        """δ that holds in all after so many steps at ``target_epsilon``: with shared noise more than the ledger's."""
        return self.target_delta + (self.quantizer.delta_slack(steps, self.target_epsilon) if self.shared else 0.0)

    def release(self, sample_rate: float, steps: int) -> Release:
        return Release(self.noise_multiplier, sample_rate, steps)

    def epsilon(self, sample_rate: float, steps: int) -> float:
        """ε of so many steps, fixed in advance."""
        return epsilon(self.release(sample_rate, steps), self.target_delta)

    def add_noise(self, total: dict[str, torch.Tensor], rng: SecureGenerator) -> dict[str, torch.Tensor]:
        """A clipped sum as a hospital may release it."""
        return local_noise(total, self.noise_multiplier, self.max_grad_norm, rng)

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if not (name == "shared" and value is None)}


# --- a step -----------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class PhysicalBatch:
    """A part of a batch, of whole units, as a network sees it at once: one row for each view of each of their films.

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

    def losses(self, model: nn.Module) -> torch.Tensor:
        """Cross-entropy [R] of a model."""
        return -(self.target * model(self.inputs).log_softmax(1)).sum(1)

    @property
    def owner(self) -> torch.Tensor:
        """int64 [R]: which of the ``units`` a row belongs to."""
        return torch.arange(len(self.units)).repeat_interleave(self.count)


class ClippedSum:
    """The sum of a batch's gradients, each unit's clipped to C, in float64.

    A patient's gradient is the mean over their films and the films' views (augmentation multiplicity, De et al. 2022),
    so its sensitivity stays C. A record that is replaced by an empty one keeps its rows, which count for nothing, so
    that only the sum's rounding differs: :class:`~primia_lite.privacy.linear_head.LinearGhostClipping` bounds that for
    a linear head. Where rows are missing instead, the others' lie elsewhere and round differently, and a network
    trained whole adds up in float32 throughout: nothing proves that this stays within
    :data:`~primia_lite.privacy.noise.FLOAT32_MARGIN`; tests measure less than a hundredth of it.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float, unit: str, films: Films | None = None):
        trained_layers(model)  # refused here, before anything is computed
        self.model, self.max_grad_norm = model, max_grad_norm
        # A linear head on features that don't change needs no backward pass through anything.
        linear = isinstance(model, nn.Linear) and model.bias is None
        self.head = LinearGhostClipping.of(films, unit) if linear and films is not None else None

    def __call__(self, batch: PoissonBatch, parts: Iterable[PhysicalBatch]) -> tuple[dict[str, torch.Tensor], float]:
        """The sum by name of parameter, and the sum of the losses (private). Each unit is whole in one of the parts;
        FloatingPointError for a gradient that isn't finite."""
        if not isinstance(batch, PoissonBatch):
            raise UserError("the ε of DP-SGD holds for Poisson sampling alone: draw batches by poisson_batches")
        named = self.model.named_parameters()
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named if p.requires_grad}
        loss, bound = 0.0, self.max_grad_norm
        for rows in parts:
            if self.head:
                part, norms, losses = self.head.clipped_sum(self.model, rows, bound)
            else:
                part, norms, losses = clipped_sum(self.model, rows.losses, rows.owner, len(rows.units), bound)
            if not torch.isfinite(norms).all():
                raise FloatingPointError("a gradient isn't finite")
            loss += float(losses.sum())
            for name, value in part.items():
                total[name] += value
        return total, loss


class Optimizer(Protocol):
    """Moves parameters by their gradients."""

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def clipped_step(
    clipped_sum: ClippedSum,
    optimizer: Optimizer,
    batch: PoissonBatch,
    parts: Iterable[PhysicalBatch],
    expected_batch: float,
    noise: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None,
) -> float:
    """Take a step of SGD on the clipped sum of a batch's gradients, plus noise, over the expected batch, which is the
    sample rate times the declared number of units.

    An empty batch takes a step of noise alone: leaving it out would tell that nobody was sampled. After an error the
    model is as it was. ``noise`` is :meth:`Privacy.add_noise`; without it nobody is protected. Gives the mean loss
    (private), nan for an empty batch.
    """
    total, loss = clipped_sum(batch, parts)
    if noise:
        total = noise(total)
    for name, p in clipped_sum.model.named_parameters():
        if name in total:
            p.grad = (total[name] / expected_batch).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return loss / len(batch) if len(batch) else float("nan")
