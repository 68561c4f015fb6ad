"""DP-SGD at one hospital, by Opacus: per-film gradients, clipping, Gaussian noise (Abadi et al., CCS 2016).

Opacus computes the per-film gradients and clips them; the noise comes from
:class:`~primia_lite.privacy.rng.SecureGenerator`.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn

from primia_lite.config import UserError
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon
from primia_lite.privacy.rng import SecureGenerator

# Per-film gradients of a part of a batch stay below this; a larger batch is worked through in parts.
_GRADIENT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Privacy:
    """How much is protected, and what.

    Attributes
    ----------
    noise_multiplier : σ, the noise's standard deviation over ``max_grad_norm``
    max_grad_norm : C, the L2 norm to which each film's gradient is clipped
    target_epsilon, target_delta : the budget of a hospital; a step that would exceed it is refused
    unit : whose presence is hidden: ``film``
    """

    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float
    target_delta: float = 1e-4
    unit: str = "film"

    def __post_init__(self):
        Release(self.noise_multiplier, 1.0, 0)
        if not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: it must be above 0")
        if not 0 < self.target_epsilon < float("inf"):
            raise UserError(f"target_epsilon is {self.target_epsilon}: it must be above 0 and finite")
        if not 0 < self.target_delta < 1:
            raise UserError(f"target_delta is {self.target_delta}: it must be in (0, 1), below 1 / number of films")
        if self.unit != "film":
            raise UserError(f"unit is {self.unit!r}: only 'film' is implemented")

    @classmethod
    def for_budget(
        cls,
        target_epsilon: float,
        *,
        sample_rate: float,
        steps: int,
        max_grad_norm: float,
        target_delta: float = 1e-4,
        spare_steps: int = 0,
        also: tuple[Release, ...] = (),
    ) -> Privacy:
        """The least noise that keeps ``steps`` steps at ``sample_rate`` within the budget.

        Parameters
        ----------
        spare_steps
            Room for steps that are charged a second time: a run that is killed between charge and release computes
            that round anew, and without room for it could not end.
        also
            Other releases charged to the same ledger, such as a normalisation shared under DP.
        """
        sigma = calibrate_noise_multiplier(target_epsilon, target_delta, sample_rate, steps + spare_steps, tuple(also))
        return cls(sigma, max_grad_norm, target_epsilon, target_delta)

    def release(self, sample_rate: float, steps: int) -> Release:
        return Release(self.noise_multiplier, sample_rate, steps)

    def epsilon(self, sample_rate: float, steps: int) -> float:
        """ε of so many steps."""
        return epsilon(self.release(sample_rate, steps), self.target_delta)

    def as_dict(self) -> dict:
        return asdict(self)


class NoisyOptimizer(DPOptimizer):
    """Opacus's optimiser with noise from the cryptographic generator."""

    def __init__(self, *args, rng: SecureGenerator, **kwargs):
        super().__init__(*args, **kwargs)
        self.rng = rng

    def add_noise(self):
        for p in self.params:
            noise = torch.from_numpy(self.rng.normal(p.numel())).to(p.dtype).view_as(p)
            p.grad = p.summed_grad.view_as(p) + self.noise_multiplier * self.max_grad_norm * noise


def check_model(model: nn.Module) -> None:
    """Raise UserError, naming layer and fix, for a model that mixes films (BatchNorm) or that Opacus can't clip."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"layer {name!r} is {type(layer).__name__}: it mixes the films of a batch, so that no film's gradient "
                "is its own. Replace it by GroupNorm: model = opacus.validators.ModuleValidator.fix(model)"
            )
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise UserError(f"DP-SGD can't train this model: {errors[0]}")


def private_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, privacy: Privacy, expected_batch: float, rng: SecureGenerator
) -> PrivateStep:
    """Wrap a model and its optimiser for DP-SGD.

    Raises
    ------
    UserError
        See :func:`check_model`.
    """
    check_model(model)
    return PrivateStep(model, optimizer, privacy, expected_batch, rng)


class PrivateStep:
    """One step of DP-SGD: clip each film's gradient to C, sum, add noise σC, divide by the public expected batch.

    A film's gradient is the mean over its views (augmentation multiplicity, De et al. 2022), so its sensitivity stays
    C.
    """

    def __init__(self, model, optimizer, privacy: Privacy, expected_batch: float, rng: SecureGenerator):
        self.model = model
        self.wrapped = GradSampleModule(model, loss_reduction="sum")
        self.optimizer = NoisyOptimizer(
            optimizer,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=expected_batch,
            rng=rng,
        )
        self.part_size = max(1, _GRADIENT_BYTES // (4 * sum(p.numel() for p in model.parameters() if p.requires_grad)))

    def __call__(self, losses_of, index: torch.Tensor) -> float:
        """Take the step; returns the mean loss (private), nan for an empty batch."""
        total = 0.0
        parts = index.split(self.part_size)
        for number, part in enumerate(parts):
            self.optimizer.signal_skip_step(do_skip=number < len(parts) - 1)
            if len(part):
                with warnings.catch_warnings():
                    # Opacus's hooks sit on modules whose input needs no gradient: harmless, and said at every step.
                    warnings.filterwarnings("ignore", message=".*(backward hook|non-full backward).*")
                    losses = losses_of(self.wrapped, part)
                    loss = losses.mean(0).sum()
                    loss.backward()
                self._average_views(len(losses))
                total += float(loss.detach())
            else:
                self._no_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total / len(index) if len(index) else float("nan")

    def _average_views(self, n: int):
        # The loss is already a mean over views, so the sum over a film's views is its one gradient.
        for p in self.optimizer.params if n > 1 else ():
            p.grad_sample = p.grad_sample.unflatten(0, (n, -1)).sum(0)

    def _no_gradients(self):
        # An empty batch still takes its step: noise alone. Leaving it out would tell that nobody was sampled.
        for p in self.optimizer.params:
            p.grad_sample = torch.zeros(0, *p.shape)
