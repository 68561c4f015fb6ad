"""An attacker who knows how chest films look: inversion by maximum a posteriori, of updates, features and models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.attacks.gradients import cosine_distance, expected_update, norm, total_variation
from primia_lite.attacks.labels import films_and_labels
from primia_lite.attacks.search import Loss, Reconstruction, Search, best_start
from primia_lite.attacks.view import AttackerView
from primia_lite.config import UserError


def principal_components(flat: torch.Tensor, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values [K] and directions [D, K] of centred rows [M, D]; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, size, directions = torch.pca_lowrank(flat, q=components, center=False, niter=3)
    return size, directions


def flat_pixels(films: np.ndarray, pixels: int | None = None) -> torch.Tensor:
    """The attacker's films, uint8 [M, H, W], as float32 [M, H * W] in [0, 1]; ``pixels`` is how many each must have."""
    flat = torch.from_numpy(films.reshape(len(films), -1).astype(np.float32)) / 255.0
    if pixels not in (None, flat.shape[1]):
        raise UserError(f"the attacker's films have {flat.shape[1]} pixels, the network takes {pixels}: use one size")
    return flat


@dataclass(frozen=True, eq=False)
class FilmPrior:
    """Films as mean + components @ (spread * z), z standard normal: a Gaussian on the principal components of films
    that the attacker owns.

    Attributes
    ----------
    mean : float32 [H, W] in [0, 1]
    components : float32 [H * W, K], orthonormal
    spread : float32 [K], standard deviation of each coordinate
    """

    mean: torch.Tensor
    components: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def fit(cls, films: np.ndarray, components: int = 128) -> FilmPrior:
        """From uint8 [M, H, W]: other children's films."""
        if len(films) <= components:
            raise UserError(f"{len(films)} films can't give {components} components: take fewer, or more films")
        flat = flat_pixels(films)
        mean = flat.mean(0)
        size, directions = principal_components(flat - mean, components)
        return cls(mean.view(films.shape[1:]), directions, size / len(films) ** 0.5)

    def films(self, z: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B, 1, H, W]."""
        return (self.mean.flatten() + (z * self.spread) @ self.components.T).view(-1, 1, *self.mean.shape)

    def search(self, what: str, loss: Loss, labels: torch.Tensor, iterations: int, start=None) -> Reconstruction:
        """Films of least loss, a function of their coordinates [B, K], by Adam from the mean film or ``start``."""
        search = Search(what, iterations)
        start = torch.zeros(len(labels), len(self.spread)) if start is None else start
        z, value = search.adam(start, loss, iterations, 0.1, show=lambda z: self.films(z).clamp(0, 1))
        return search.end(self.films(z), labels, value)


@dataclass(frozen=True)
class MapEstimator:
    """The likeliest films given a noisy update and the prior (maximum a posteriori), by Adam on its coordinates.

    Against a private step in which every film takes part and is a unit, the likelihood is exact: the sum of the films'
    gradients, each clipped, plus noise of known size; several rounds add up. For sampled steps or patients with several
    films it is only an approximation. Without noise the mean over layers of the cosine distance takes its
    place, for one film with the last layer's derivative set to the observed one: deep networks keep their gradient's
    length in few layers, and the others are what tells the film. Loss: negative log posterior, or that distance with
    the prior's pull.
    """

    prior: FilmPrior
    iterations: int = 150

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        prior = self.prior
        if tuple(view.in_shape[-2:]) != tuple(prior.mean.shape):
            raise UserError(f"films are {view.in_shape[-2:]}, the prior's {tuple(prior.mean.shape)}: use one size")
        if view.denominator and view.local_steps > 1:
            raise UserError("the likelihood of several private local steps isn't known here: attack rounds of one step")
        labels = films_and_labels(view, n_films)
        rounds = [(view.model(t), view.gradient(t)) for t in range(len(view.updates))]
        misfit, weight = (noisy_misfit, 0.5) if view.noisy else (_layer_distance, 1e-3 / len(labels))

        def loss(z: torch.Tensor) -> torch.Tensor:
            films = view.normalise(prior.films(z))
            value = sum(misfit(view, model, films, labels, target) for model, target in rounds)
            return value + weight * (z * z).sum()

        start = None
        if len(labels) > 1:  # equal films would stay equal
            generator = torch.Generator().manual_seed(seed)
            start = 0.3 * torch.randn(len(labels), len(prior.spread), generator=generator)
        return prior.search("attacker with a prior", loss, labels, self.iterations, start)


def noisy_misfit(view: AttackerView, model: nn.Module, films: torch.Tensor, labels, target) -> torch.Tensor:
    """Negative log likelihood of a private step's gradient ``target``, but for a constant, given films as the network
    takes them."""
    total = None
    for film, label in zip(films, labels, strict=True):
        gradient = expected_update(view, model, film[None], label[None])
        share = (view.max_grad_norm / norm(gradient)).clamp(max=1.0) / view.denominator
        total = [share * g + (t if total else 0) for g, t in zip(gradient, total or gradient, strict=True)]
    std = view.noise_std * view.hospitals**0.5 / view.denominator
    return sum(((a - b) ** 2).sum() for a, b in zip(total, target, strict=True)) / (2 * std**2)


def _layer_distance(view: AttackerView, model: nn.Module, films: torch.Tensor, labels, target) -> torch.Tensor:
    parameters = list(model.parameters())
    chosen = [i for i, p in enumerate(parameters) if p.dim() > 1]
    if len(films) == 1 and view.local_steps == 1 and target[-1].dim() == 1:
        score = (model(films) * target[-1]).sum()
        guess = torch.autograd.grad(score, [parameters[i] for i in chosen], create_graph=True)
    else:
        everything = expected_update(view, model, films, labels)
        guess = [everything[i] for i in chosen]
    return sum(cosine_distance([g], [target[i]]) for g, i in zip(guess, chosen, strict=True)) / len(chosen)


def head_features(view: AttackerView, constant: float) -> torch.Tensor:
    """Features of the one film behind an update of a linear head without bias, float32 [D], exactly.

    The gradient is (p - y) x^T: all rows are the features times a number, which the last feature, a ``constant``
    (``primia_lite.models.BIAS_INPUT``), gives away.
    """
    weight, *others = view.gradient()
    if others or weight.dim() != 2:
        raise UserError("this network isn't a linear head without bias: use InvertingGradients or DenseLayerInversion")
    scale = weight[:, -1] / constant
    if not float(scale.abs().max()):
        raise UserError("the update says nothing about the constant feature: there is nothing to invert")
    return (scale @ weight) / (scale @ scale)


@dataclass(frozen=True)
class FeatureInversion:
    """A film with the features that a linear head's update holds (:func:`head_features`): what a frozen, public network
    lets through (Mahendran and Vedaldi 2015). Loss: 1 - cosine of the features, with the prior's pull or total
    variation.

    Attributes
    ----------
    extract : grey values 0 to 255, [N, H, W] -> [N, D], differentiable
    constant : value of the last feature
    free_pixels : search over all pixels from the mean film on, instead of over the prior's coordinates
    """

    extract: Callable[[torch.Tensor], torch.Tensor]
    prior: FilmPrior
    constant: float
    iterations: int = 100
    free_pixels: bool = False

    def attack(self, view: AttackerView, n_films: int | None, seed: int) -> Reconstruction:
        prior, features, unknown = self.prior, head_features(view, self.constant), torch.tensor([-1])
        made = tuple(self.extract(255.0 * prior.mean[None]).shape)
        if made != (1, *features.shape):
            raise UserError(
                f"features are {tuple(features.shape)}, extract makes {made}: give the network that made them"
            )

        def distance(films: torch.Tensor) -> torch.Tensor:
            return 1 - F.cosine_similarity(self.extract(255.0 * films[:, 0]), features[None]).sum()

        what, steps = "inverting features", self.iterations
        if not self.free_pixels:
            return prior.search(what, lambda z: distance(prior.films(z)) + 1e-4 * (z * z).mean(), unknown, steps)
        search, start = Search(what, steps), prior.mean[None, None]
        x, value = search.adam(start, lambda x: distance(x) + 1e-2 * total_variation(x), steps, 0.02, pixels=True)
        return search.end(x, unknown, value)


def class_image(
    model: nn.Module,
    label: int,
    prior: FilmPrior,
    normalise: Loss,
    *,
    iterations: int = 100,
) -> Reconstruction:
    """Model inversion in Fredrikson's sense (Fredrikson, Jha, Ristenpart, CCS 2015): what the finished model takes for
    the essence of a class, from its weights alone. ``normalise`` makes of pixels in [0, 1] what the model takes. Loss:
    -log p(class), with the prior's pull."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        n_classes = model(normalise(prior.mean[None, None])).shape[-1]
    if not 0 <= label < n_classes:
        raise UserError(f"label is {label}: the model has classes 0 to {n_classes - 1}")
    target = torch.tensor([label])

    def loss(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(normalise(prior.films(z).clamp(0, 1))), target) + 0.01 * (z * z).mean()

    return best_start(lambda _: prior.search("model inversion", loss, target, iterations))
