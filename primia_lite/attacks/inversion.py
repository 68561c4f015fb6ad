"""Films from an update: what a curious server can compute from what it is sent.

:func:`reconstruct` takes an :class:`~primia_lite.attacks.view.AttackerView` and a method; of several starts the one
with the least loss *as the attacker sees it* wins. Where a dense layer is among the network's layers, its gradient
gives away which space its inputs lie in, and an attack that uses this needs no luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from primia_lite.attacks.gradients import (
    cosine_distance,
    expected_update,
    mean_gradient,
    norm,
    smooth_variation,
    total_variation,
)
from primia_lite.attacks.labels import films_and_labels, infer_labels, last_dense
from primia_lite.attacks.search import Reconstruction, Search, best_start, noise_films
from primia_lite.attacks.view import AttackerView
from primia_lite.config import UserError
from primia_lite.models.networks import Square


class Method(Protocol):
    """A way to make films of a view, with its settings."""

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        """Films from one start; a UserError for a view that the method can't use, or that says nothing."""


def reconstruct(
    view: AttackerView, method: Method | None = None, *, n_films: int | None = None, restarts: int = 1, seed: int = 0
) -> Reconstruction:
    """Films out of what an attacker sees; a UserError where nothing can be inverted, or no loss was finite.

    Parameters
    ----------
    method
        :class:`InvertingGradients` (the default), :class:`DeepLeakage`, :class:`DenseLayerInversion`, or one of
        ``ImprintReading``, ``MapEstimator``, ``FeatureInversion`` and ``LinearEstimator``.
    n_films : a guess at the number of films, where the threat model doesn't grant it
    restarts : starts, of seeds ``seed``, ``seed + 1`` and so on; the least loss wins
    """
    method = method or InvertingGradients()
    return best_start(lambda number: method.attack(view, n_films, seed + number), restarts)


# --- what a dense layer gives away ------------------------------------------------------------------------------------


def _dense(view: AttackerView) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """Name, weight gradient and bias gradient of the first dense layer with a bias."""
    gradient = view.named_gradient()
    for name, layer in view.network.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            key = f"{name}." if name else ""  # a network may be a single layer
            return name, gradient[f"{key}weight"], gradient[f"{key}bias"]
    return None


def _traced(model: nn.Module, x: torch.Tensor, layers: list[nn.Module]) -> tuple[torch.Tensor, list[tuple]]:
    """Logits, and what went into and came out of some layers on the way."""
    seen = {}
    handles = [layer.register_forward_hook(lambda own, i, out: seen.update({own: (i[0], out)})) for layer in layers]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[layer] for layer in layers]


@dataclass(frozen=True)
class DenseLayerInversion:
    """A film in closed form, where a dense layer with a bias sees the pixels.

    Row k of the weight gradient is the film times row k of the bias gradient (Phong et al. 2018; Geiping et al. 2020,
    proposition 3.1). Of more films it returns a weighted mean. Loss: 0.
    """

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        found, pixels = _dense(view), math.prod(view.in_shape)
        if found is None or found[1].shape[1] != pixels:
            raise UserError(f"no dense layer with a bias sees the film's {pixels} pixels: use InvertingGradients")
        _, weight, bias = found
        if not float(bias.abs().max()):
            raise UserError("no unit of the dense layer was active: there is nothing to invert")
        # All rows say the same; weighted by their size they average out rounding, and noise.
        film = view.denormalise((bias @ weight) / (bias @ bias)).view(1, *view.in_shape).clamp(0, 1)
        labels = view.labels if view.labels is not None else infer_labels(view, 1)
        return Reconstruction(film, labels[:1], 0.0)


# Of films as the network takes them: squared distance from what is known over squared length, and their logits.
_Residual = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _dense_residual(view: AttackerView, model: nn.Module, n_films: int) -> tuple[_Residual | None, bool]:
    """What the first dense layer gives away about its inputs, as a loss on films, and whether it is the convolution's.

    The gradient of its weight and bias is a sum over films of outer products of (derivative, [input, 1]), so its rows
    span the inputs, as long as there are no more films than units; an SVD finds that space (the first step of SPEAR,
    Dimitrov et al. 2024). For one film this is its features, exactly, with their scale; behind a ReLU there is more
    (:func:`_convolution_residual`). Both are first-order losses without dead units; matching gradients is neither.
    """
    found = _dense(view)
    if found is None or view.local_steps > 1 or view.noisy:  # steps and noise blur it
        return None, False
    name, weight, bias = found
    rows = torch.cat([weight, bias[:, None]], 1)
    _, size, basis = torch.linalg.svd(rows, full_matrices=False)
    # As many directions as films, all clear of rounding. The outputs' derivatives add up to 0: a rank less.
    last = name == last_dense(view.network)[0]
    if n_films > min(rows.shape) - last or size[n_films - 1] < 1e-5 * size[0]:
        return None, False
    if n_films == 1 and (residual := _convolution_residual(view, model, name, weight, bias)):
        return residual, True
    layer, basis = model.get_submodule(name), basis[:n_films]

    def residual(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, ((inputs, _),) = _traced(model, x, [layer])
        inputs = F.pad(inputs, (0, 1), value=1.0)
        inside = (inputs @ basis.T) @ basis
        return ((inputs - inside) ** 2).sum() / (inputs**2).sum(), logits

    return residual, False


def _convolution_residual(view: AttackerView, model: nn.Module, dense: str, weight, bias) -> _Residual | None:
    """The residual of one film, where the dense layer sees a convolution's rectified outputs.

    The film's features say which units were active; with the dense layer's bias gradient, which is the derivative of
    its outputs, this gives the derivative at the convolution's outputs, and the convolution's weight gradient becomes a
    *linear* function of its inputs (R-GAP, Zhu and Blaschko 2021).
    """
    names, layers = zip(*model.named_modules(), strict=True)
    convs = [i for i in range(names.index(dense)) if isinstance(layers[i], nn.Conv2d) and layers[i].groups == 1]
    if not convs:
        return None
    layer, last = layers[convs[-1]], model.get_submodule(dense)
    with torch.no_grad():
        probe = torch.randn(1, *view.in_shape, generator=torch.Generator().manual_seed(0))
        (_, after), (inputs, _) = _traced(model, probe, [layer, last])[1]
    if after.shape[1:].numel() != weight.shape[1] or not torch.equal(after.relu().flatten(), inputs.flatten()):
        return None
    features = (bias @ weight / (bias @ bias)).view(after.shape)
    if float(features.max()) <= 0:
        raise UserError("no unit before the dense layer was active: there is nothing to invert")
    active = features > 1e-5 * features.max()
    derivative = (bias @ last.weight.detach()).view(after.shape) * active
    known = view.named_gradient()[f"{names[convs[-1]]}.weight"]

    def residual(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, ((before, after),) = _traced(model, x, [layer])
        # Before the ReLU, so that a unit known to be active is pulled up even where it is off.
        miss = torch.where(active, after - features, after.clamp(min=0))
        guess = conv2d_weight(before, known.shape, derivative, layer.stride, layer.padding, layer.dilation)
        return (miss**2).sum() / (features**2).sum() + ((guess - known) ** 2).sum() / (known**2).sum(), logits

    return residual


# --- matching an update -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InvertingGradients:
    """Inverting Gradients (Geiping et al., NeurIPS 2020): films whose gradient points where the observed one does.

    Minimises cosine distance and total variation by signed Adam within [0, 1]. With ``closed_form`` it also uses what
    a dense layer gives away about its inputs, where there is one and neither noise nor local steps blur it: as a term
    beside the others, or, for one film behind a ReLU, in place of the cosine. L-BFGS without the bounds then sharpens
    it. Loss: cosine distance, plus what the dense layer says where it is used.

    Attributes
    ----------
    iterations
        Steps of Adam; 200 for smooth activations, 400 for those with kinks (ReLU, squares, max pooling) if left out;
        L-BFGS takes half as many.
    total_variation_weight
        If left out, 1e-4 for smooth activations, 1e-2 for those with kinks, and 0.3 behind a ReLU in closed form, whose
        loss is steeper (trained networks with few live units need it, others don't mind).
    start : films to start from, float32 [B, 1, H, W] in [0, 1], or the method that finds them; noise if left out
    unroll : follow several local steps through, instead of taking their sum for one gradient
    """

    iterations: int | None = None
    total_variation_weight: float | None = None
    closed_form: bool = True
    step: float = 0.1
    start: torch.Tensor | Method | None = None
    unroll: bool = True

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        model, target, labels = view.model(), view.gradient(), films_and_labels(view, n_films)
        x = self._first(view, labels, n_films, seed)
        kinked = any(isinstance(layer, (nn.ReLU, nn.MaxPool2d, Square)) for layer in model.modules())
        dense, alone = _dense_residual(view, model, len(labels)) if self.closed_form else (None, False)
        weight = self.total_variation_weight
        if weight is None:
            weight = 1e-4 if not kinked else 0.3 if alone else 1e-2
        iterations = self.iterations or (400 if kinked else 200)
        polish = iterations // 2 if dense else 0
        search = Search("inverting gradients", iterations + polish)

        def match(x: torch.Tensor) -> list[torch.Tensor]:
            """Cosine distance, and what the dense layer says."""
            inputs = view.normalise(x)
            if dense is None:
                return [cosine_distance(expected_update(view, model, inputs, labels, unroll=self.unroll), target)]
            residual, logits = dense(inputs)
            return [cosine_distance(mean_gradient(model, logits, labels), target), residual]

        def loss(x: torch.Tensor) -> torch.Tensor:
            if alone:
                return dense(view.normalise(x))[0] + weight * total_variation(x)
            distance, *residual = match(x)
            # Behind kinks the span is a trap at first.
            return sum([] if kinked else residual, distance + weight * total_variation(x))

        def sharpen(x: torch.Tensor) -> torch.Tensor:
            return dense(view.normalise(x))[0] + (1e-4 if kinked else 1e-6) * smooth_variation(x)

        def own_loss(x: torch.Tensor) -> float:
            # The cosine is blind below rounding, where the features still see.
            value = sum(float(part.detach()) for part in match(x))
            return value if math.isfinite(value) else math.inf

        x, _ = search.adam(x, loss, iterations, self.step, pixels=True)
        if polish and not search.stopped:
            finer = search.lbfgs(x, sharpen, polish).clamp(0, 1)
            x = finer if own_loss(finer) < own_loss(x) else x
            search.history.append((search.done, own_loss(x), x))
        return search.end(x, labels, own_loss(x))

    def _first(self, view: AttackerView, labels: torch.Tensor, n_films: int | None, seed: int) -> torch.Tensor:
        shape = (len(labels), *view.in_shape)
        if self.start is None:
            return noise_films(shape, seed)
        found = self.start if isinstance(self.start, torch.Tensor) else self.start.attack(view, n_films, seed).images
        if tuple(found.shape) != shape:
            raise UserError(f"start has shape {tuple(found.shape)}, the attack needs {shape}: films of the view's size")
        return found


@dataclass(frozen=True)
class DeepLeakage:
    """Deep Leakage from Gradients (Zhu, Liu, Han, NeurIPS 2019), the first of its kind, with the labels given or
    inferred first (iDLG): squared distance of gradients, by L-BFGS. Loss: that distance over the observed gradient's
    squared length. It wants smooth activations; and where clipping shortened the gradient, its length misleads.
    """

    iterations: int = 150

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        labels = films_and_labels(view, n_films)
        # The mean over films, of a sum over films or hospitals.
        share = view.denominator / len(labels) if view.denominator else 1 / view.hospitals
        model, target = view.model(), [share * g for g in view.gradient()]
        size = float(norm(target)) ** 2
        search = Search("deep leakage", self.iterations)

        def loss(x: torch.Tensor) -> torch.Tensor:
            guess = expected_update(view, model, view.normalise(x), labels)
            return sum(((a - b) ** 2).sum() for a, b in zip(guess, target, strict=True)) / size

        x = search.lbfgs(noise_films((len(labels), *view.in_shape), seed), loss, self.iterations, record=True)
        return search.end(x.detach(), labels, float(loss(x).detach()))
