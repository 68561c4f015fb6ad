"""Against noise: the film that an update makes likely, estimated from films that the attacker owns.

Inverting a noisy gradient as if it were exact draws noise. The linear estimate here knows how films vary, how their
clipped gradients vary with them, and how much noise was added; it draws the mean film where the update says nothing.
A malicious server hands out weights under which the little that the noise lets through is about the film's coarse
structure (:func:`pca_weights`).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from primia_lite.attacks.prior import flat_pixels, principal_components
from primia_lite.attacks.search import Reconstruction
from primia_lite.attacks.view import AttackerView, State
from primia_lite.config import UserError


class LinearEstimator:
    """One film from a noisy update: the linear estimate of least mean squared error (Kay 1993, section 12.3), for each
    label, weighed by how likely the update makes that label.

    Mean and covariance of (film, gradient) are those of the attacker's films of that label. With G their centred
    gradients [m, P], X their centred pixels, u the update: x = mean + Xᵀ (G Gᵀ + m σ² I)⁻¹ G (u - mean gradient).

    Parameters
    ----------
    gradients
        float [M, P], the clipped gradients of the attacker's films under the weights that the view will have, over C
        (:func:`~primia_lite.attacks.identify.clipped_gradients`).
    films : uint8 [M, H, W], the attacker's, not the victim's
    labels : int [M]
    """

    def __init__(self, gradients: torch.Tensor, films: np.ndarray, labels):
        gradients, labels = torch.as_tensor(gradients), torch.as_tensor(labels)
        if not len(gradients) == len(films) == len(labels):
            raise UserError(f"{len(gradients)} gradients, {len(films)} films, {len(labels)} labels: give one each")
        flat = torch.from_numpy(films.reshape(len(films), -1) / 255.0)
        self.classes = {}
        for label in labels.unique().tolist():
            own = labels == label
            if int(own.sum()) < 2:
                raise UserError(f"the attacker owns {int(own.sum())} films of label {label}: give two at least")
            self.classes[label] = _Gaussian(gradients[own].double(), flat[own])

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        """The film that the update makes likely. Loss: negative log likelihood of the update, but for a constant."""
        if not view.noisy or view.local_steps > 1 or view.hospitals > 1 or view.n_films != 1:
            raise UserError("this estimate is for one private step on one film, with noise: use MapEstimator otherwise")
        update = torch.cat([g.flatten() for g in view.gradient()]).double() * view.denominator / view.max_grad_norm
        known = next(iter(self.classes.values()))
        if (len(update), math.prod(view.in_shape)) != (known.spread.shape[1], known.films.shape[1]):
            raise UserError(
                "the view's parameters or pixels aren't as many as the attacker's: use one network and size"
            )
        labels = list(self.classes) if view.labels is None else view.labels.tolist()
        if missing := set(labels) - set(self.classes):
            raise UserError(f"the attacker owns no film of label {min(missing)}: add some")
        variance = (view.noise_std / view.max_grad_norm) ** 2
        films, scores = zip(*(self.classes[label].posterior(update, variance) for label in labels), strict=True)
        scores = torch.tensor(scores, dtype=torch.float64)
        image = (scores.softmax(0)[:, None] * torch.stack(films)).sum(0).float().view(1, *view.in_shape).clamp(0, 1)
        label = torch.tensor([labels[int(scores.argmax())]])
        return Reconstruction(image, label, -float(scores.logsumexp(0)), iterations=1)


class _Gaussian:
    """Film and gradient of one label as jointly Gaussian: float64 gradients [m, P] and films [m, D]."""

    def __init__(self, gradients: torch.Tensor, films: torch.Tensor):
        self.centre, self.mean, self.films = gradients.mean(0), films.mean(0), films - films.mean(0)
        self.spread = gradients - self.centre
        value, self.vector = torch.linalg.eigh(self.spread @ self.spread.T)
        self.value = value.clamp(min=0)

    def posterior(self, update: torch.Tensor, variance: float) -> tuple[torch.Tensor, float]:
        """Mean of the film given the update, float64 [D], and log likelihood of the update, but for a constant."""
        noise = len(self.films) * variance
        rest = update - self.centre
        seen = self.vector.T @ (self.spread @ rest)  # the update along each direction, times that direction's length
        film = self.mean + self.films.T @ (self.vector @ (seen / (self.value + noise)))
        # Covariance: that of the gradients, plus the variance; outside the gradients' span the latter alone.
        distance = (rest @ rest - (seen**2 / (self.value + noise)).sum()) / variance
        return film, -0.5 * float((self.value / noise).log1p().sum() + distance)


def pca_weights(state: State, films: np.ndarray, normalisation: tuple[float, float], components: int = 4) -> State:
    """A malicious server's weights for an ``mlp`` with ReLU: its hidden units are a film's principal scores, and the
    last layer is 0, so that all of a clipped gradient is derivative times those scores.

    Nothing of the clipping bound is spent on pixels that noise would drown. A component has two units, one a sign.

    Parameters
    ----------
    state : weights of an ``mlp`` with at least 2 x ``components`` hidden units
    films : uint8 [M, H, W], the attacker's: their mean and principal components
    normalisation : mean and standard deviation that the victim scales pixels with
    """
    if list(state) != ["1.weight", "1.bias", "3.weight", "3.bias"]:
        raise UserError("pca_weights sets up an mlp: build model='mlp' and give its weights")
    units, pixels = state["1.weight"].shape
    flat = flat_pixels(films, pixels)
    if not 1 <= components <= min(units // 2, len(films) - 1):
        raise UserError(f"{components} components need {2 * components} hidden units and more films than components")
    mean = flat.mean(0)
    size, directions = principal_components(flat - mean, components)
    # So long that the scores outweigh the bias's gradient, and clipping does the rest.
    rows = directions.T * 30 * len(films) ** 0.5 / size[0]
    out = {name: torch.zeros_like(value) for name, value in state.items()}
    weight, bias = torch.cat([rows, -rows]) * normalisation[1], rows @ (normalisation[0] - mean)
    out["1.weight"][: len(weight)], out["1.bias"][: len(weight)] = weight, torch.cat([bias, -bias])
    return out
