"""The networks by name, and films in the form that each of them takes.

``litenet`` and ``scatternet`` are a frozen extractor (:mod:`primia_lite.models.frozen`) and a linear head. The others
(:mod:`primia_lite.models.networks`) are trained whole.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError
from primia_lite.data import ChestXrays, phantom
from primia_lite.data.films import PIXEL_MEAN, PIXEL_STD, Films
from primia_lite.models import networks
from primia_lite.models.frozen import EXTRACTORS, changed_views, features

NORM_FILMS, NORM_SEED = 200, 7919


@dataclass(frozen=True)
class Spec:
    """How the trained part of a network is made, and the extractor of one that has a frozen part."""

    build: Callable[..., nn.Module]
    extract: Callable | None = None


def linear_head(n_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """One linear layer that starts at zero: every film begins at even odds. What would be its bias is the weight of a
    constant feature (see :func:`features`)."""
    head = nn.Linear(in_shape[-1], n_classes, bias=False)
    nn.init.zeros_(head.weight)
    return head


MODELS = {
    **{name: Spec(linear_head, extract) for name, extract in EXTRACTORS.items()},
    "ckksnet": Spec(networks.ckksnet),
    "resnet18": Spec(networks.resnet18),
    "convnet": Spec(networks.convnet),
    "mlp": Spec(networks.mlp),
    "imprintnet": Spec(networks.imprintnet),
}


def spec(name: str) -> Spec:
    """Raise UserError, listing the models, for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]


def check_options(name: str, options: dict) -> None:
    """Raise UserError for an option that a model's network doesn't have, naming those that it has."""
    known = list(inspect.signature(spec(name).build).parameters)[2:]  # after n_classes and in_shape
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"{name} has no option {unknown[0]!r}: choose from {', '.join(known) or 'none'}")


def build(name: str, n_classes: int, in_shape: tuple[int, ...], *, seed: int = 0, **options) -> nn.Module:
    """The trained part of a model.

    Parameters
    ----------
    in_shape
        Shape of one view of one film: ``films.inputs.shape[2:]``.
    seed
        Makes the initial weights; torch's global generator is left as it was.
    options
        The network's own, as its function in :mod:`primia_lite.models.networks` names them.
    """
    check_options(name, options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed queues calls for devices, too
        network = spec(name).build(n_classes, tuple(in_shape), **options)
    if any(isinstance(layer, networks.FixedNorm) for layer in network.modules()):
        networks.fit_norms(network, public_pixels(in_shape[-1]))
    return network


@functools.lru_cache(maxsize=4)
def public_pixels(side: int) -> torch.Tensor:
    """Phantom films for the constants of norms, each of mean 0 and standard deviation 1: float32 [N, 1, side, side]."""
    images = torch.from_numpy(phantom.generate(NORM_FILMS, int(np.clip(side, 28, 256)), NORM_SEED).images)
    pixels = images.float()[:, None]
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return standardised(pixels)


def standardised(pixels: torch.Tensor) -> torch.Tensor:
    """Each film [..., H, W] to mean 0 and standard deviation 1; a film of one grey stays at 0."""
    centred = pixels - pixels.mean((-2, -1), keepdim=True)
    return centred / centred.std((-2, -1), keepdim=True).clamp(min=1e-3)


def prepare(
    name: str,
    films: ChestXrays,
    *,
    augmentation: tuple[str, ...] = (),
    normalisation: tuple[float, float] | None = None,
    standardise: bool = False,
    cache: bool = True,
) -> Films:
    """Films in the form that a model takes.

    Parameters
    ----------
    augmentation
        For a frozen network ``flip``, ``shift``, ``jitter`` and ``stretch`` add 1, 2, 3 and 1 views of each film,
        computed once; with DP training averages their gradients, without it picks one at random. Networks that are
        trained whole draw anew at each step.
    normalisation
        Mean and standard deviation of pixels in [0, 1]; the public constants if left out. Frozen networks keep the
        constants that they were trained with.
    standardise
        Each film by itself, to mean 0 and standard deviation 1: exposure and contrast go, and nothing of other films
        comes in. Not for frozen networks.
    """
    labels = torch.from_numpy(films.labels)
    frozen = spec(name).extract is not None
    if normalisation is not None and (frozen or standardise):
        why = "is frozen, and keeps the one it was trained with" if frozen else "is given films standardised one by one"
        raise UserError(f"{name} {why}: leave the normalisation out")
    if frozen:
        if standardise:
            raise UserError(f"{name} is frozen: its films can't be standardised")
        views = [features(name, films.images, cache=cache)]
        views += [features(name, changed, cache=cache) for changed in changed_views(films.images, augmentation)]
        return Films(torch.from_numpy(np.stack(views, 1)), labels, films.patient_id, model=name)
    pixels = torch.from_numpy(np.array(films.images)).float()
    mean, std = (0.0, 1.0) if standardise else normalisation or (PIXEL_MEAN, PIXEL_STD)
    pixels = standardised(pixels) if standardise else (pixels / 255.0 - mean) / std
    return Films(pixels[:, None, None], labels, films.patient_id, (mean, std), model=name)
