"""Many films at once: a ciphertext holds one number of every film, so thousands cost the server what a few would.

A slot is a film (Gilad-Bachrach et al., CryptoNets, ICML 2016): weights are scalars, and nothing is rotated. Every slot
is a result, so there is nothing to mask: replies are re-randomised only, and the noise in them isn't hidden.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import tenseal.sealapi as sealapi
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.kernels import (
    EvaluationKeys,
    head_weights,
    layer_weights,
    rescale,
    square,
    weighted_sum,
)
from primia_lite.encrypted.packing import CNNPacking, HeadPacking, LinearPacking, Packing
from primia_lite.encrypted.parameters import Parameters, choose, choose_single_product
from primia_lite.encrypted.seal import Context

# Of the ciphertexts of one batch at the server.
MAX_BATCH_BYTES = 1 << 30
# A film alone costs the server as much as so many ciphertexts of a batch: most of it goes into sealing the reply.
_UPLOADS_PER_LONE_FILM = 6


class _BatchPacking(Packing):
    """Every slot is a film."""

    in_slots: ClassVar[bool] = True

    @property
    def logit_places(self) -> list[range]:
        """Everything, so that masks are empty."""
        return [range(self.parameters.poly_modulus_degree)] * self.classes


@dataclass(frozen=True)
class BatchLinearPacking(_BatchPacking, HeadPacking):
    """A linear head; ciphertext j holds feature j of all films, two films in a complex slot."""

    features: int
    classes: int
    kind: ClassVar[str] = "linear batch"
    parameters: ClassVar[Parameters] = choose_single_product(HeadPacking.weight_bits)

    @property
    def films(self) -> int:
        """At most, in a batch."""
        return 2 * self.parameters.slots

    @property
    def uploads(self) -> int:
        return self.features

    def wrap_limit(self, context: Context) -> float:
        """Two films share a complex slot, whose absolute value, and so a coefficient, is up to sqrt(2) times the larger
        logit."""
        return context.moduli[0] / self.reply_scale(context) / 2 / math.sqrt(2)

    def error(self, context: Context, weights: np.ndarray | None = None) -> float:
        """As of :class:`LinearPacking`. All coefficients' noise meets in a slot."""
        largest = self.wrap_limit(context) / self.most_norm
        norm = largest if weights is None else float(np.linalg.norm(weights, axis=1).max())
        noise = math.hypot(self.noise(context, norm), norm * 2.0**self.weight_bits / math.sqrt(12))
        rounding = self.most_norm * self.fresh_scale / math.sqrt(12)
        return math.hypot(math.sqrt(context.n / 2) * noise, rounding) / self.reply_scale(context)

    def encode(self, context: Context, films: np.ndarray) -> list[sealapi.Plaintext]:
        """[films, D] to D plaintexts."""
        self.check_norm(films)
        whole = np.zeros((self.films, self.features))
        whole[: len(films)] = films
        first, second = np.split(whole, 2)
        return [context.encode_slots(column, self.fresh_scale) for column in (first + 1j * second).T]

    def decode(self, slots: np.ndarray) -> np.ndarray:
        """One class's logits, [films], from a reply's slots."""
        return np.concatenate([slots.real, slots.imag])


@dataclass(frozen=True)
class BatchCNNPacking(_BatchPacking, CNNPacking):
    """A ``ckksnet``; a ciphertext holds one pixel of all films.

    A ciphertext for each pixel is much memory: 28 x 28 px fit, 64 x 64 don't, and are refused.
    """

    kind: ClassVar[str] = "cnn batch"
    last_weight_bits: ClassVar[int] = 18
    rotations: ClassVar[tuple[int, ...]] = ()

    def _check_layout(self) -> None:
        size = self.uploads * 16 * self.parameters.poly_modulus_degree * (self.parameters.levels + 1)
        if size > MAX_BATCH_BYTES:
            raise UserError(
                f"a batch of films of {self.side} px is larger than {MAX_BATCH_BYTES >> 20} MiB, a ciphertext a pixel"
            )

    @functools.cached_property
    def parameters(self) -> Parameters:
        # Weights of the last layer are single numbers here, and rounding them shows: they get more bits. With a hidden
        # layer those are taken from the scale, which four levels share.
        return choose(
            self.reply_level,
            precision_bits=16 if self.hidden else 19,
            integer_bits=9 if self.hidden else 8,
            weight_bits=self.last_weight_bits,
        )

    @property
    def films(self) -> int:
        return self.parameters.slots

    @property
    def seen(self) -> int:
        """Pixels of a side that the kernel gets to."""
        return (self.side - self.kernel) // self.stride * self.stride + self.kernel

    @property
    def uploads(self) -> int:
        return self.seen**2

    def encode(self, context: Context, films: np.ndarray) -> list[sealapi.Plaintext]:
        """[films, H, W] to a plaintext for each pixel, row by row."""
        self.check_pixels(films)
        columns = films[:, : self.seen, : self.seen].reshape(len(films), -1).T
        return [context.encode_slots(column, self.fresh_scale) for column in columns]

    def decode(self, slots: np.ndarray) -> np.ndarray:
        return slots.real


def batch_packing(single: LinearPacking | CNNPacking, batch_size: int) -> tuple[Packing, str]:
    """The better packing for so many films, and why."""
    linear = isinstance(single, LinearPacking)
    batch = BatchLinearPacking(single.features, single.classes) if linear else BatchCNNPacking(*astuple(single))
    if linear and batch_size * _UPLOADS_PER_LONE_FILM < batch.uploads:
        return single, (
            f"{batch_size} films are sent one at a time: a batch takes {batch.uploads} ciphertexts, one for each "
            "feature, however few films it has; it is cheaper for the server from "
            f"{-(-batch.uploads // _UPLOADS_PER_LONE_FILM)} films on"
        )
    return batch, (
        f"a slot is a film, up to {batch.films} of them in {batch.uploads} ciphertexts, one for each "
        f"{'feature' if linear else 'pixel'}, with scalars for weights and no rotation; "
        "replies are re-randomised, not masked, for every slot is a result"
    )


class BatchLinearKernel:
    """Weights of a linear head for :class:`BatchLinearPacking`."""

    def __init__(self, packing: BatchLinearPacking, model: nn.Linear, context: Context):
        weights = head_weights(packing, model, context)
        self.context, self.error = context, packing.error(context, weights)
        self.scalars = [[context.encode_slots(w, 2.0**packing.weight_bits) for w in row] for row in weights]

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        return [weighted_sum(self.context, inputs, row) for row in self.scalars]


class _Layer(NamedTuple):
    """Weights [units, inputs] and biases [units] of a layer, what they are scaled by and at which levels, and the scale
    of its squares; None in the last layer, which has none."""

    weights: np.ndarray
    biases: np.ndarray
    scale: float
    level: int
    bias_scale: float
    bias_level: int
    squared: float | None


class BatchCNNKernel:
    """Weights of a ``ckksnet`` for :class:`BatchCNNPacking`."""

    def __init__(self, packing: BatchCNNPacking, model: nn.Sequential, context: Context):
        self.packing, self.context, self.error = packing, context, packing.error(context)
        scales, fresh, last = packing.scales(context), packing.fresh_scale, packing.reply_level
        places = [(scales["convolution"], 0, fresh, 1, scales["square"])]
        if packing.hidden:
            places.append((scales["dense"], 2, fresh, 3, scales["square 2"]))
        places.append((2.0**packing.last_weight_bits, last, scales["reply"], last, None))
        self.layers = [
            _Layer(weights.reshape(len(weights), -1), biases, *place)
            for (weights, biases), place in zip(layer_weights(model), places, strict=True)
        ]
        # Numbers are encoded when they are needed; whether the largest of each layer can be is seen here.
        for layer in self.layers:
            context.encode_slots(np.abs(layer.weights).max(), layer.scale, layer.level)
            context.encode_slots(np.abs(layer.biases).max(), layer.bias_scale, layer.bias_level)
        first = self.layers[0]
        self.taps = [[context.encode_slots(w, first.scale) for w in row] for row in first.weights]

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        convolution, *dense = self.layers
        grid = np.array(inputs, object).reshape(self.packing.seen, self.packing.seen)
        state = [
            self._unit(convolution, patch, row, bias, keys)
            for row, bias in zip(self.taps, convolution.biases, strict=True)
            for patch in self.packing.patches(grid)
        ]
        for layer in dense:
            # All scalars together would be gigabytes, and one is made in no time.
            encode = lambda w, layer=layer: self.context.encode_slots(w, layer.scale, layer.level)  # noqa: E731
            state = [
                self._unit(layer, state, map(encode, row), bias, keys)
                for row, bias in zip(layer.weights, layer.biases, strict=True)
            ]
        return state

    def _unit(self, layer: _Layer, inputs, scalars, bias: float, keys: EvaluationKeys) -> sealapi.Ciphertext:
        out = weighted_sum(self.context, inputs, scalars)
        if layer.squared is None:
            out.scale = layer.bias_scale
        else:
            rescale(self.context, out, layer.bias_scale)
        bias = self.context.encode_slots(bias, layer.bias_scale, layer.bias_level)
        self.context.evaluator.add_plain_inplace(out, bias)
        if layer.squared is not None:
            square(self.context, out, keys, layer.squared)
        return out
