"""Many films at once: a ciphertext holds one number of every film, so thousands cost the server what a few would.

A slot is a film (Gilad-Bachrach et al., CryptoNets, ICML 2016): weights are scalars, and nothing is rotated. Every slot
is a result, so there is nothing to mask: replies are re-randomised only, and the noise in them isn't hidden.

N // d films side by side in the coefficients of one ciphertext would be slower: a reply is sealed for every class and
every few films, and sealing is what costs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass
from typing import ClassVar

import numpy as np
import tenseal.sealapi as sealapi
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.kernels import EvaluationKeys, head_weights, layer_weights
from primia_lite.encrypted.packing import CNNPacking, HeadPacking, LinearPacking, Packing
from primia_lite.encrypted.parameters import Parameters, choose, choose_single_product
from primia_lite.encrypted.seal import Context, refuse_too_large

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
    """A linear head; ciphertext j holds feature j of all films, two films in a complex slot.

    Attributes
    ----------
    features, classes : shape of the head
    """

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
        if weights is None:
            norm = self.wrap_limit(context) / self.most_norm
        else:
            norm = float(np.linalg.norm(weights, axis=1).max())
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
                f"a batch of films of {self.side} px needs {size >> 20} MiB at the server, {MAX_BATCH_BYTES >> 20} are "
                "allowed: a ciphertext for each pixel; send films one at a time, or smaller ones"
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
        self.scalars = [[_scalar(context, w, 2.0**packing.weight_bits, 0) for w in row] for row in weights]

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        return [_weighted(self.context, inputs, row) for row in self.scalars]


class BatchCNNKernel:
    """Weights of a ``ckksnet`` for :class:`BatchCNNPacking`."""

    def __init__(self, packing: BatchCNNPacking, model: nn.Sequential, context: Context):
        self.packing, self.context, self.scales = packing, context, packing.scales(context)
        self.error = packing.error(context)
        layers = layer_weights(model)
        (kernel, self.bias), *self.dense = layers
        self._check(layers)
        self.taps = [
            [_scalar(context, w, self.scales["convolution"], 0) for w in row]
            for row in kernel.reshape(packing.channels, -1)
        ]

    def _check(self, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Numbers are encoded when they are needed; whether the largest of each layer can be is seen here."""
        p, scales = self.packing, self.scales
        places = [(scales["convolution"], 0, p.fresh_scale, 1)]
        if p.hidden:
            places.append((scales["dense"], 2, p.fresh_scale, 3))
        places.append((2.0**p.last_weight_bits, p.reply_level, scales["reply"], p.reply_level))
        for (weight, bias), (weight_scale, weight_level, bias_scale, bias_level) in zip(layers, places, strict=True):
            _scalar(self.context, np.abs(weight).max(), weight_scale, weight_level)
            _scalar(self.context, np.abs(bias).max(), bias_scale, bias_level)

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        p = self.packing
        grid = np.empty((p.seen, p.seen), object)
        grid.ravel()[:] = inputs
        patches = p.patches(grid)
        state = []
        for row, bias in zip(self.taps, self.bias, strict=True):
            for patch in patches:
                out = _weighted(self.context, patch, row)
                state.append(self._activate(out, bias, 1, self.scales["square"], keys))
        if p.hidden:
            weights, bias = self.dense[0]
            state = [
                self._activate(self._dense(state, row, "dense", 2), b, 3, self.scales["square 2"], keys)
                for row, b in zip(weights, bias, strict=True)
            ]
        replies = []
        for row, bias in zip(*self.dense[-1], strict=True):
            out = self._dense(state, row, None, p.reply_level)
            out.scale = self.scales["reply"]
            self.context.evaluator.add_plain_inplace(
                out, _scalar(self.context, bias, self.scales["reply"], p.reply_level)
            )
            replies.append(out)
        return replies

    def _dense(self, state, row: np.ndarray, layer: str | None, level: int) -> sealapi.Ciphertext:
        scale = self.scales[layer] if layer else 2.0**self.packing.last_weight_bits
        # All of them together would be gigabytes, and one is made in no time.
        return _weighted(self.context, state, (_scalar(self.context, w, scale, level) for w in row))

    def _activate(self, out: sealapi.Ciphertext, bias: float, level: int, scale: float, keys: EvaluationKeys):
        evaluator = self.context.evaluator
        evaluator.rescale_to_next_inplace(out)
        out.scale = self.packing.fresh_scale
        evaluator.add_plain_inplace(out, _scalar(self.context, bias, self.packing.fresh_scale, level))
        evaluator.square_inplace(out)
        evaluator.relinearize_inplace(out, keys.relin)
        evaluator.rescale_to_next_inplace(out)
        out.scale = scale
        return out


def _scalar(context: Context, value: float, scale: float, level: int) -> sealapi.Plaintext:
    """The same number in every slot."""
    out = sealapi.Plaintext()
    with refuse_too_large():
        context.encoder.encode(float(value), context.level_ids[level], scale, out)
    return out


def _weighted(context: Context, ciphertexts, scalars) -> sealapi.Ciphertext:
    """Sum of products."""
    evaluator, total, term = context.evaluator, None, sealapi.Ciphertext()
    for ciphertext, scalar in zip(ciphertexts, scalars, strict=True):
        if scalar.is_zero():
            continue
        if total is None:
            total = sealapi.Ciphertext()
            evaluator.multiply_plain(ciphertext, scalar, total)
        else:
            evaluator.multiply_plain(ciphertext, scalar, term)
            evaluator.add_inplace(total, term)
    if total is None:
        raise UserError("all weights of a unit are zero, and what doesn't depend on the films can't be sent: train it")
    return total
