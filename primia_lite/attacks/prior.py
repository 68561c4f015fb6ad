"""An attacker who knows how chest films look: inversion by maximum a posteriori, of updates, features and models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.attacks.inversion import (
    Reconstruction,
    Search,
    cosine_distance,
    expected_update,
    films_and_labels,
    total_variation,
)
from primia_lite.attacks.view import AttackerView
from primia_lite.config import UserError


@dataclass(frozen=True, eq=False)
class FilmPrior:
    """Films as mean + components @ (spread * z), z standard normal: a Gaussian on the principal
    components of films that the attacker owns.

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
    def fit(cls, films: np.ndarray, components: int = 128, seed: int = 0) -> FilmPrior:
        """From uint8 [M, H, W]: other children's films."""
        if len(films) <= components:
            raise UserError(f"{len(films)} films can't give {components} components: take fewer, or more films")
        flat = torch.from_numpy(films.reshape(len(films), -1).astype(np.float32)) / 255.0
        mean = flat.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, size, directions = torch.pca_lowrank(flat - mean, q=components, center=False, niter=3)
        return cls(mean.view(films.shape[1:]), directions, size / len(films) ** 0.5)

    def films(self, z: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B, 1, H, W]."""
        return (self.mean.flatten() + (z * self.spread) @ self.components.T).view(-1, 1, *self.mean.shape)


def map_films(
    view: AttackerView, prior: FilmPrior, *, iterations: int = 150, step: float = 0.1, n_films: int | None = None
) -> Reconstruction:
    """The likeliest films given a noisy update and the prior: MAP, by Adam on the prior's coordinates.

    Against a private step in which every film takes part and is a unit, the likelihood is exact: the sum of the films'
    gradients, each clipped, plus noise of known size; several rounds add up. For sampled steps or patients with several
    films it is only an approximation. Without noise the mean over layers of the cosine distance takes its
    place, for one film with the last layer's derivative set to the observed one: deep networks keep their gradient's
    length in few layers, and the others are what tells the film. Loss: negative log posterior, or that distance with
    the prior's pull.

    Raises
    ------
    UserError
        The prior's films have another size than the view's, or a private round has several local steps.
    """
    if tuple(view.in_shape[-2:]) != tuple(prior.mean.shape):
        raise UserError(
            f"the prior's films are {tuple(prior.mean.shape)}, the view's {view.in_shape[-2:]}: use one size"
        )
    if view.denominator and view.local_steps > 1:
        raise UserError("the likelihood of several private local steps isn't known here: attack rounds of one step")
    started = time.process_time()
    labels = films_and_labels(view, n_films)
    rounds = [(view.model(t), view.gradient(t)) for t in range(len(view.updates))]
    likelihood = _noisy_likelihood if view.noisy else _layer_distance
    search = Search("attacker with a prior", iterations, 1, started=started)

    def loss(z: torch.Tensor) -> torch.Tensor:
        films = view.normalise(prior.films(z))
        value, weight = 0.0, 1e-3 / len(z)
        for model, target in rounds:
            part, weight = likelihood(view, model, films, labels, target)
            value = value + part
        return value + weight * (z * z).sum()

    start = torch.zeros(len(labels), len(prior.spread))
    if len(labels) > 1:  # equal films would stay equal
        start = 0.3 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    z, value, history = search.adam(
        start, loss, iterations, step, lambda z: None, lambda z: prior.films(z).clamp(0, 1), signed=False
    )
    images = prior.films(z).clamp(0, 1)
    cpu_s = search.close(value)
    return Reconstruction(images, labels, value, history, search.done, stopped=search.stopped, cpu_s=cpu_s)


def _noisy_likelihood(view, model, films, labels, target) -> tuple[torch.Tensor, float]:
    total = None
    for film, label in zip(films, labels, strict=True):
        gradient = expected_update(view, model, film[None], label[None])
        norm = sum((g * g).sum() for g in gradient).sqrt()
        share = (view.max_grad_norm / norm).clamp(max=1.0) / view.denominator
        total = [share * g + (t if total else 0) for g, t in zip(gradient, total or gradient, strict=True)]
    std = view.noise_std * view.hospitals**0.5 / view.denominator
    return sum(((a - b) ** 2).sum() for a, b in zip(total, target, strict=True)) / (2 * std**2), 0.5


def _layer_distance(view, model, films, labels, target) -> tuple[torch.Tensor, float]:
    parameters = list(model.parameters())
    chosen = [i for i, p in enumerate(parameters) if p.dim() > 1]
    if len(films) == 1 and view.local_steps == 1 and target[-1].dim() == 1:
        score = (model(films) * target[-1]).sum()
        guess = torch.autograd.grad(score, [parameters[i] for i in chosen], create_graph=True)
    else:
        everything = expected_update(view, model, films, labels)
        guess = [everything[i] for i in chosen]
    distance = sum(cosine_distance([g], [target[i]]) for g, i in zip(guess, chosen, strict=True)) / len(chosen)
    return distance, 1e-3 / films[:, 0, 0, 0].numel()


def _try(function: Callable[[], torch.Tensor], prior: FilmPrior) -> torch.Tensor:
    """What a network makes of the prior's mean film, or a UserError in place of torch's own."""
    try:
        with torch.no_grad():
            return function()
    except RuntimeError as error:
        raise UserError(
            f"the network doesn't take films of {tuple(prior.mean.shape)} pixels, the prior's: fit the prior to films "
            f"of the network's size ({str(error).splitlines()[0]})"
        ) from error


def head_features(view: AttackerView, constant: float) -> torch.Tensor:
    """Features of the one film behind an update of a linear head without bias, float32 [D], exactly.

    The gradient is (p - y) x^T: all rows are the features times a number, which the constant among them gives away.

    Parameters
    ----------
    constant : value of the last feature (see :func:`primia_lite.models.frozen`)

    Raises
    ------
    UserError
        Another network, several rounds, or an update that says nothing about the constant.
    """
    view.check_one_round()
    if len(view.gradient()) != 1 or view.gradient()[0].dim() != 2:
        raise UserError("this network isn't a linear head without bias: use invert_gradients or dense_layer")
    (weight,) = view.gradient()
    scale = weight[:, -1] / constant
    if not float(scale.abs().max()):
        raise UserError("the update says nothing about the constant feature: there is nothing to invert")
    return (scale @ weight) / (scale @ scale)


def invert_features(
    features: torch.Tensor, extract: Callable[[torch.Tensor], torch.Tensor], prior: FilmPrior, *, iterations: int = 100,
    free_pixels: bool = False,
) -> Reconstruction:  # fmt: skip
    """A film whose features are those: what a frozen, public network lets through (Mahendran and Vedaldi 2015).

    Loss: 1 - cosine of the features, with the prior's pull or total variation.

    Parameters
    ----------
    extract
        Grey values 0 to 255, [N, H, W] -> [N, D], differentiable.
    free_pixels
        Search over all pixels from the mean film on, instead of over the prior's coordinates.

    Raises
    ------
    UserError
        ``extract`` makes features of another length, or can't take the prior's films.
    """
    made = tuple(_try(lambda: extract(255.0 * prior.mean[None]), prior).shape)
    if made != (1, *features.shape):
        raise UserError(
            f"features of shape {tuple(features.shape)}, but extract makes {made} of one film: give those of one film, "
            "[D], by the same network"
        )
    search = Search("inverting features", iterations, 1)

    def distance(films: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(extract(255.0 * films[:, 0]), features[None]).sum()

    if free_pixels:
        x, value, history = search.adam(
            prior.mean[None, None], lambda x: distance(x) + 1e-2 * total_variation(x), iterations, 0.02,
            lambda x: x.clamp_(0, 1),
        )  # fmt: skip
    else:
        z, value, history = search.adam(
            torch.zeros(1, len(prior.spread)), lambda z: distance(prior.films(z)) + 1e-4 * (z * z).mean(), iterations,
            0.1, lambda z: None, lambda z: prior.films(z).clamp(0, 1), signed=False,
        )  # fmt: skip
        x = prior.films(z)
    unknown = torch.tensor([-1])
    cpu_s = search.close(value)
    return Reconstruction(x.clamp(0, 1), unknown, value, history, search.done, stopped=search.stopped, cpu_s=cpu_s)


def class_image(
    model: nn.Module, label: int, prior: FilmPrior, normalise: Callable[[torch.Tensor], torch.Tensor], *,
    iterations: int = 100,
) -> Reconstruction:  # fmt: skip
    """Model inversion in Fredrikson's sense (Fredrikson, Jha, Ristenpart, CCS 2015): what the finished model takes for
    the essence of a class, from its weights alone. Loss: -log p(class), with the prior's pull.

    Parameters
    ----------
    normalise
        Pixels in [0, 1] as the model takes them.

    Raises
    ------
    UserError
        The model can't take the prior's films, or has no such class.
    """
    model = copy.deepcopy(model).eval()
    n_classes = _try(lambda: model(normalise(prior.mean[None, None])), prior).shape[-1]
    if not 0 <= label < n_classes:
        raise UserError(f"label is {label}: the model has classes 0 to {n_classes - 1}")
    search = Search("model inversion", iterations, 1)
    target = torch.tensor([label])

    def loss(z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(normalise(prior.films(z).clamp(0, 1))), target) + 0.01 * (z * z).mean()

    z, value, history = search.adam(
        torch.zeros(1, len(prior.spread)), loss, iterations, 0.1, lambda z: None,
        lambda z: prior.films(z).clamp(0, 1), signed=False,
    )  # fmt: skip
    images = prior.films(z).clamp(0, 1)
    cpu_s = search.close(value)
    return Reconstruction(images, target, value, history, search.done, stopped=search.stopped, cpu_s=cpu_s)
