"""Many films at once: a ciphertext holds one number of every film, so thousands cost the server what a few would.

A slot is a film (Gilad-Bachrach et al., CryptoNets, ICML 2016): weights are scalars, and nothing is rotated. Every slot
is a result, so there is nothing to mask: replies are re-randomised only, and the noise in them isn't hidden.

The other way, N // d films side by side in the coefficients of one ciphertext, isn't here: a reply is sealed for every
class and every few films, and sealing is what costs. Tried by hand at N = 4096, which heads of single films had then
(no benchmark holds it), server CPU for a film: of 1,280 features 3 films fit, and take 1.8 ms each, as one alone did;
of 243 features 16 fit, 0.29 ms each. Slots take 0.18 ms and 0.03 ms in a batch of 2,048 films.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tenseal.sealapi as sealapi

from primia_lite.config import UserError
from primia_lite.encrypted.kernels import EvaluationKeys, LinearKernel
from primia_lite.encrypted.packing import NOISE_STD, CNNPacking, LinearPacking, check_norm, check_pixels
from primia_lite.encrypted.parameters import Parameters, choose, choose_single_product
from primia_lite.encrypted.seal import Context, refuse_too_large
from primia_lite.models.networks import folded

# Of the ciphertexts of one batch at the server.
MAX_BATCH_BYTES = 1 << 30
# A film alone costs the server as much as so many ciphertexts of a batch: most of it goes into sealing the reply.
_UPLOADS_PER_LONE_FILM = 6


@dataclass(frozen=True)
class BatchLinearPacking:
    """A linear head; ciphertext j holds feature j of all films, two films in a complex slot.

    Attributes
    ----------
    features, classes : shape of the head
    """

    features: int
    classes: int
    kind: ClassVar[str] = "linear batch"
    in_slots: ClassVar[bool] = True
    weight_bits: ClassVar[int] = 20
    parameters: ClassVar[Parameters] = choose_single_product(weight_bits)
    most_norm: ClassVar[float] = LinearPacking.most_norm
    rotations: ClassVar[tuple[int, ...]] = ()
    relinearise: ClassVar[bool] = False
    reply_level: ClassVar[int] = 0

    def __post_init__(self):
        if min(self.features, self.classes) < 1:
            raise UserError(f"a head of {self.features} features and {self.classes} classes can't be packed")

    @property
    def films(self) -> int:
        """At most, in a batch."""
        return 2 * self.parameters.slots

    @property
    def uploads(self) -> int:
        return self.features

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def fresh_scale(self) -> float:
        return 2.0**self.parameters.scale_bits

    @property
    def keep(self) -> list[range]:
        """Everything, so that masks are empty."""
        return [range(self.parameters.poly_modulus_degree)] * self.classes

    def reply_scale(self, context: Context) -> float:
        return self.fresh_scale * 2.0**self.weight_bits

    def room(self, context: Context) -> float:
        """Logits of this absolute value and above can wrap round. Two films share a complex slot, whose absolute value,
        and so a coefficient, is up to sqrt(2) times the larger logit."""
        return context.moduli[0] / self.reply_scale(context) / 2 / math.sqrt(2)

    def most_logit(self, context: Context) -> float:
        """As of :class:`LinearPacking`: a client refuses none."""
        return math.inf

    def error(self, context: Context, norm: float | None = None) -> float:
        """As of :class:`LinearPacking`; ``norm`` is of one class's weights. All coefficients' noise meets in a slot."""
        norm = self.room(context) / self.most_norm if norm is None else norm
        noise = math.hypot(norm * 2.0**self.weight_bits, math.sqrt(4 / 3 * context.n + 1)) * NOISE_STD
        encoding = norm * 2.0**self.weight_bits / math.sqrt(12)
        weights = self.most_norm * self.fresh_scale / math.sqrt(12)
        slots = math.sqrt(context.n / 2)
        return math.hypot(slots * noise, slots * encoding, weights) / self.reply_scale(context)

    def encode(self, context: Context, films: np.ndarray) -> list[sealapi.Plaintext]:
        """[films, D] to D plaintexts."""
        check_norm(films, self.most_norm)
        whole = np.zeros((self.films, self.features))
        whole[: len(films)] = films
        first, second = np.split(whole, 2)
        return [context.encode_slots(column, self.fresh_scale) for column in (first + 1j * second).T]

    def decode(self, slots: np.ndarray) -> np.ndarray:
        """One class's logits, [films], from a reply's slots."""
        return np.concatenate([slots.real, slots.imag])


@dataclass(frozen=True)
class BatchCNNPacking(CNNPacking):
    """A ``ckksnet``; a ciphertext holds one pixel of all films.

    A ciphertext for each pixel is much memory: 28 x 28 px fit, 64 x 64 don't, and are refused.
    """

    kind: ClassVar[str] = "cnn batch"
    in_slots: ClassVar[bool] = True
    last_weight_bits: ClassVar[int] = 18
    rotations: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self):
        if min(self.side, self.kernel, self.stride, self.channels, self.classes) < 1 or self.kernel > self.side:
            raise UserError("a convolution needs a film at least as large as its kernel, a stride, channels, classes")
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
        return (self.out_side - 1) * self.stride + self.kernel

    @property
    def uploads(self) -> int:
        return self.seen**2

    @property
    def keep(self) -> list[range]:
        return [range(self.parameters.poly_modulus_degree)] * self.classes

    def encode(self, context: Context, films: np.ndarray) -> list[sealapi.Plaintext]:
        """[films, H, W] to a plaintext for each pixel, row by row."""
        check_pixels(films, self.most_pixel)
        columns = films[:, : self.seen, : self.seen].reshape(len(films), -1).T
        return [context.encode_slots(column, self.fresh_scale) for column in columns]

    def decode(self, slots: np.ndarray) -> np.ndarray:
        return slots.real


def batch_packing(single: LinearPacking | CNNPacking, batch_size: int) -> tuple[object, str]:
    """The better packing for so many films, and why.

    Raises
    ------
    UserError
        A CNN on films that are too large for it.
    """
    if isinstance(single, LinearPacking):
        batch = BatchLinearPacking(single.features, single.classes)
        if batch_size * _UPLOADS_PER_LONE_FILM < batch.uploads:
            return single, (
                f"{batch_size} films are sent one at a time: a batch takes {batch.uploads} ciphertexts, one for each "
                "feature, however few films it has; it is cheaper for the server from "
                f"{-(-batch.uploads // _UPLOADS_PER_LONE_FILM)} films on"
            )
    else:
        batch = BatchCNNPacking(
            single.side, single.kernel, single.stride, single.channels, single.hidden, single.classes
        )
    return batch, (
        f"a slot is a film, up to {batch.films} of them in {batch.uploads} ciphertexts, one for each "
        f"{'feature' if isinstance(single, LinearPacking) else 'pixel'}, with scalars for weights and no rotation; "
        "replies are re-randomised, not masked, for every slot is a result"
    )


class BatchLinearKernel:
    """Weights of a linear head, [classes, features], for :class:`BatchLinearPacking`.

    Raises
    ------
    UserError
        As :class:`LinearKernel`.
    """

    def __init__(self, packing: BatchLinearPacking, weights: np.ndarray, context: Context):
        LinearKernel.check_room(packing, weights, context)
        self.context, self.error = context, packing.error(context, float(np.linalg.norm(weights, axis=1).max()))
        self.scalars = [[_scalar(context, w, 2.0**packing.weight_bits, 0) for w in row] for row in weights]

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        return [_weighted(self.context, inputs, row) for row in self.scalars]


class BatchCNNKernel:
    """Weights of a ``ckksnet`` for :class:`BatchCNNPacking`.

    Raises
    ------
    UserError
        Weights or biases that are too large for the parameters, or not finite.
    """

    def __init__(self, packing: BatchCNNPacking, layers: list, context: Context):
        self.packing, self.context, self.scales = packing, context, packing.scales(context)
        self.error = packing.error(context)
        layers = [(w.detach().double().numpy(), b.detach().double().numpy()) for w, b in layers]
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


def compile_batch(model, packing: BatchLinearPacking | BatchCNNPacking, context: Context):
    if isinstance(packing, BatchLinearPacking):
        return BatchLinearKernel(packing, model.weight.detach().double().numpy(), context)
    layers = [(layer.weight, layer.bias) for layer in folded(model) if hasattr(layer, "weight")]
    return BatchCNNKernel(packing, layers, context)


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
