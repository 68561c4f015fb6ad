"""Gradients that films would give, and how far they lie from what was seen."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from primia_lite.attacks.view import AttackerView


def mean_gradient(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Gradient of the mean cross-entropy, differentiable."""
    return list(torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()), create_graph=True))


def expected_update(
    view: AttackerView, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, unroll: bool = True
) -> list[torch.Tensor]:
    """The mean gradient over a round's local steps that these films would give, differentiable. ``unroll`` follows the
    steps through (all films in each); else one step stands for all."""
    parameters = first = dict(model.named_parameters())
    if view.local_steps == 1 or not unroll:
        return mean_gradient(model, model(inputs), labels)
    for _ in range(view.local_steps):
        loss = F.cross_entropy(functional_call(model, parameters, (inputs,)), labels)
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {n: p - view.learning_rate * g for (n, p), g in zip(parameters.items(), gradient, strict=True)}
    return [(first[n] - parameters[n]) / (view.learning_rate * view.local_steps) for n in first]


def norm(gradient: list[torch.Tensor]) -> torch.Tensor:
    """Length of a gradient, all layers as one vector."""
    return sum((x * x).sum() for x in gradient).sqrt()


def cosine_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """1 - cosine of two gradients, all layers as one vector (Geiping et al. 2020, equation 4)."""
    product = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    return 1 - product / (norm(a) * norm(b) + 1e-20)


def total_variation(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours, in both directions."""
    return x.diff(dim=-2).abs().mean() + x.diff(dim=-1).abs().mean()


def smooth_variation(x: torch.Tensor) -> torch.Tensor:
    """:func:`total_variation` with rounded corners, for line searches."""
    return sum((x.diff(dim=d) ** 2 + 1e-8).sqrt().mean() for d in (-2, -1))
