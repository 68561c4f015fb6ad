"""What was released: some steps of a subsampled Gaussian mechanism, and sums of those."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError

if TYPE_CHECKING:  # imported where used: a process that only trains is there in half the time
    import dp_accounting


@dataclass(frozen=True, order=True)
class Release:
    """Some steps of one subsampled Gaussian mechanism.

    Attributes
    ----------
    noise_multiplier : σ, standard deviation of the noise over the L2 sensitivity of one unit
    sample_rate : q in (0, 1], the probability with which each unit takes part in a step
    steps : how many times
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self):
        if not 1e-12 <= float(self.noise_multiplier) <= 1e100:
            raise UserError(f"noise_multiplier is {self.noise_multiplier}: it must be from 1e-12 to 1e100")
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"sample_rate is {self.sample_rate}: it must be in (0, 1]")
        if not (isinstance(self.steps, (int, np.integer)) and self.steps >= 0):
            raise UserError(f"steps is {self.steps}: it must be a whole number, not negative")
        # Plain numbers: NumPy's are refused by JSON and SQLite.
        for name, number in (("noise_multiplier", float), ("sample_rate", float), ("steps", int)):
            object.__setattr__(self, name, number(getattr(self, name)))

    def event(self) -> dp_accounting.DpEvent:
        import dp_accounting

        step = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(self.sample_rate, step)
        return dp_accounting.SelfComposedDpEvent(step, self.steps)


Releases = Release | Iterable[Release]


def merge(releases: Releases) -> tuple[Release, ...]:
    """Add up the steps of equal mechanisms; the order of composition doesn't matter."""
    steps: dict[tuple[float, float], int] = {}
    for release in [releases] if isinstance(releases, Release) else releases:
        key = (release.noise_multiplier, release.sample_rate)
        steps[key] = steps.get(key, 0) + release.steps
    return tuple(sorted(Release(*key, count) for key, count in steps.items() if count))


def one_gaussian(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    """The same with all full batches as one step: Gaussians compose to a Gaussian, exactly."""
    full = [r for r in releases if r.sample_rate == 1]
    rest = tuple(r for r in releases if r.sample_rate < 1)
    return (*rest, Release(1 / unsampled_mu(full), 1.0, 1)) if full else rest


def unsampled_mu(releases: Iterable[Release]) -> float:
    """μ, sensitivity over noise, of the same noise in full batches: μ² = Σ steps / σ²."""
    return math.hypot(*(math.sqrt(r.steps) / r.noise_multiplier for r in releases))


def check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta}: it must be in (0, 1), and well below 1 / number of units")
