"""The server's half of a packing: plain weights, compiled into plaintexts, and the circuit on ciphertexts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tenseal.sealapi as sealapi
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.packing import CNNPacking, HeadPacking, LinearPacking
from primia_lite.encrypted.seal import Context
from primia_lite.models.networks import FixedNorm, Square, folded


class EvaluationKeys(NamedTuple):
    """A client's keys for relinearisation and rotation."""

    relin: sealapi.RelinKeys | None = None
    galois: sealapi.GaloisKeys | None = None


def head_weights(packing: HeadPacking, model: nn.Linear, context: Context) -> np.ndarray:
    """float64 [classes, features]."""
    weights = model.weight.detach().double().numpy()
    if not weights.any():
        raise UserError("all weights of the head are 0: train it first")
    largest = float(np.linalg.norm(weights, axis=1).max()) * packing.most_norm
    limit = packing.wrap_limit(context)
    if not largest < limit:
        raise UserError(f"logits may reach {largest:.0f}, there is room for {limit:.0f}: scale the head down")
    return weights


def layer_weights(model: nn.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each layer, float64, with the norms folded in."""
    layers = [layer for layer in folded(model) if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in layers]


def weighted_sum(context: Context, ciphertexts, plaintexts) -> sealapi.Ciphertext:
    """Sum of products. SEAL doesn't multiply by 0, and there is nothing to add."""
    evaluator, total, term = context.evaluator, None, sealapi.Ciphertext()
    for ciphertext, plaintext in zip(ciphertexts, plaintexts, strict=True):
        if plaintext.is_zero():
            continue
        if total is None:
            total = sealapi.Ciphertext()
            evaluator.multiply_plain(ciphertext, plaintext, total)
        else:
            evaluator.multiply_plain(ciphertext, plaintext, term)
            evaluator.add_inplace(total, term)
    if total is None:
        raise UserError("all weights of a unit are zero, and what doesn't depend on the films can't be sent: train it")
    return total


def rescale(context: Context, state: sealapi.Ciphertext, scale: float) -> None:
    """Rescaling divides by a prime, which the scale was multiplied by: it is set to what the packing says."""
    context.evaluator.rescale_to_next_inplace(state)
    state.scale = scale


def square(context: Context, state: sealapi.Ciphertext, keys: EvaluationKeys, scale: float) -> None:
    context.evaluator.square_inplace(state)
    context.evaluator.relinearize_inplace(state, keys.relin)
    rescale(context, state, scale)


class LinearKernel:
    """Weights of a linear head for :class:`LinearPacking`. ``error`` is a logit's standard deviation with them."""

    def __init__(self, packing: LinearPacking, model: nn.Linear, context: Context):
        weights = head_weights(packing, model, context)
        self.context, self.error = context, packing.error(context, weights)
        rows = [packing.reversed_rows(weights, part) for part in packing.parts]
        self.plaintexts = {
            place: context.encode_coefficients(row, 2.0**packing.weight_bits)
            for place, row in enumerate(rows)
            if row.any()
        }

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        """In place, so that one product takes as little time as it can."""
        evaluator, terms = self.context.evaluator, [inputs[place] for place in self.plaintexts]
        for term, plaintext in zip(terms, self.plaintexts.values(), strict=True):
            evaluator.multiply_plain_inplace(term, plaintext)
        for term in terms[1:]:
            evaluator.add_inplace(terms[0], term)
        return terms[:1]


class CNNKernel:
    """Weights of a ``ckksnet`` for :class:`CNNPacking`."""

    def __init__(self, packing: CNNPacking, model: nn.Sequential, context: Context):
        self.packing, self.context, self.error = packing, context, packing.error(context)
        self.scales = packing.scales(context)
        convolution, *dense = layer_weights(model)
        self._convolution(*convolution)
        if packing.hidden:
            self._dense(*dense[0])
        self._last(*dense[-1])

    def _convolution(self, weight: np.ndarray, bias: np.ndarray) -> None:
        p = self.packing
        taps, block = weight.reshape(p.channels, -1), np.arange(p.blocks)
        self.taps = []  # [turns][uploads]
        for turn in range(p.channels // p.copies):
            row = []
            for upload in range(p.uploads):
                slots = np.zeros((p.blocks, p.block))
                # After turning by `turn` times the copies, a block has the tap of a later one.
                tap = p.tap_of(upload, (block + turn * p.copies) % p.blocks)
                there = tap < taps.shape[1]
                slots[there, : p.positions] = taps[block[there] % p.channels, tap[there], None]
                # Products come before the rotation, so the weights are turned back.
                slots = np.roll(slots, turn * p.copies, axis=0)
                row.append(self.context.encode_slots(slots.ravel(), self.scales["convolution"]))
            self.taps.append(row)
        spread = np.zeros((p.channels, p.block))
        spread[:, : p.positions] = bias[:, None]
        self.bias = self.context.encode_slots(np.tile(spread.ravel(), p.parameters.slots // p.period), p.fresh_scale, 1)

    def _columns(self, weight: np.ndarray) -> np.ndarray:
        """A dense layer's weights [out, channels x positions] for blocks padded to powers of two: [out, period]."""
        p = self.packing
        padded = np.zeros((len(weight), p.channels, p.block))
        padded[:, :, : p.positions] = weight.reshape(len(weight), p.channels, p.positions)
        return padded.reshape(len(weight), p.period)

    def _dense(self, weight: np.ndarray, bias: np.ndarray) -> None:
        """Diagonals, in baby and giant steps (Halevi and Shoup, CRYPTO 2014)."""
        p, matrix = self.packing, self._columns(weight)
        slot = np.arange(p.parameters.slots)
        self.diagonals = []
        for giant in range(0, p.hidden, p.baby_steps):
            row = []
            for baby in range(p.baby_steps):
                values = matrix[slot % p.hidden, (slot + giant + baby) % p.period]
                row.append(self.context.encode_slots(np.roll(values, giant), self.scales["dense"], 2))
            self.diagonals.append(row)
        self.hidden_bias = self.context.encode_slots(np.tile(bias, p.parameters.slots // p.hidden), p.fresh_scale, 3)

    def _last(self, weight: np.ndarray, bias: np.ndarray) -> None:
        """A slot's value times its weight, averaged over slots, is coefficient 0 of the product; X^c brings it to
        coefficient c. Both repeat, so nothing of other classes lies there."""
        p, context, first = self.packing, self.context, 0
        matrix = weight if p.hidden else self._columns(weight)
        period = p.hidden or p.period
        self.last, self.last_bias = [], []
        for places in p.logit_places:
            slots = np.zeros(p.parameters.slots, complex)
            for c in places:
                spread = np.tile(matrix[first + c] * period, p.parameters.slots // period)
                slots += spread * context.slots_of(np.eye(1, c + 1, c)[0])
            own = bias[first : first + len(places)]
            self.last.append(context.encode_slots(slots, 2.0**p.last_weight_bits, p.reply_level))
            self.last_bias.append(context.encode_coefficients(own, self.scales["reply"], p.reply_level))
            first += len(places)

    def __call__(self, inputs: list[sealapi.Ciphertext], keys: EvaluationKeys) -> list[sealapi.Ciphertext]:
        p, context, evaluator = self.packing, self.context, self.context.evaluator
        state, *turns = (weighted_sum(context, inputs, row) for row in self.taps)
        for step, turned in zip(p.steps["channels"], turns, strict=True):
            evaluator.rotate_vector_inplace(turned, step, keys.galois)
            evaluator.add_inplace(state, turned)
        self._activate(state, p.steps["taps"], self.bias, keys, self.scales["square"])
        if p.hidden:
            turned = [state]
            for step in range(1, p.baby_steps):
                turned.append(sealapi.Ciphertext())
                evaluator.rotate_vector(state, step, keys.galois, turned[-1])
            state, *parts = (weighted_sum(context, turned, row) for row in self.diagonals)
            for number, part in enumerate(parts, 1):
                evaluator.rotate_vector_inplace(part, number * p.baby_steps, keys.galois)
                evaluator.add_inplace(state, part)
            self._activate(state, p.steps["columns"], self.hidden_bias, keys, self.scales["square 2"])
        replies = []
        for weights, bias in zip(self.last, self.last_bias, strict=True):
            out = sealapi.Ciphertext()
            evaluator.multiply_plain(state, weights, out)
            out.scale = self.scales["reply"]
            evaluator.add_plain_inplace(out, bias)
            replies.append(out)
        return replies

    def _activate(self, state: sealapi.Ciphertext, steps, bias, keys: EvaluationKeys, scale: float) -> None:
        """Rescaled, added to itself turned by these steps, plus its bias, squared."""
        rescale(self.context, state, self.packing.fresh_scale)
        term = sealapi.Ciphertext()
        for step in steps:
            self.context.evaluator.rotate_vector(state, step, keys.galois, term)
            self.context.evaluator.add_inplace(state, term)
        self.context.evaluator.add_plain_inplace(state, bias)
        square(self.context, state, keys, scale)


def packing_for(model: nn.Module, in_shape: tuple[int, ...]) -> LinearPacking | CNNPacking:
    """The packing of a head without bias, or of convolution, square, dense (square, dense), with norms before dense
    layers or without.
    """
    if isinstance(model, nn.Linear) and model.bias is None:
        if tuple(in_shape) != (model.in_features,):
            raise UserError(f"this head takes ({model.in_features},) features, in_shape is {in_shape}: give that one")
        return LinearPacking(model.in_features, model.out_features)
    layers = list(model) if isinstance(model, nn.Sequential) else []
    layers = [layer for layer in layers if not isinstance(layer, (nn.Flatten, FixedNorm))]
    kinds = [type(layer) for layer in layers]
    if kinds in ([nn.Conv2d, Square, nn.Linear], [nn.Conv2d, Square, nn.Linear, Square, nn.Linear]):
        convolution, *dense = layers[::2]
        plain = (convolution.padding, convolution.dilation, convolution.groups) == ((0, 0), (1, 1), 1)
        square = len({*convolution.kernel_size, 0}) == 2 and len({*convolution.stride, 0}) == 2
        if convolution.in_channels == 1 and plain and square:
            return _cnn_packing(convolution, dense, tuple(in_shape))
    raise UserError(
        "no packing for this network: under CKKS run a linear head without bias (litenet, scatternet) or convolution, "
        "square, dense, with or without another square and dense layer (ckksnet)"
    )


def _cnn_packing(convolution: nn.Conv2d, dense: list[nn.Linear], in_shape: tuple[int, ...]) -> CNNPacking:
    side = in_shape[-1] if in_shape else 0
    if in_shape not in ((side, side), (1, side, side)):
        raise UserError(f"in_shape is {in_shape}: this network takes square films, (1, H, H)")
    if any(layer.bias is None for layer in (convolution, *dense)):
        raise UserError("a layer of this network has no bias: give it one, of zeros where it has none")
    hidden = dense[0].out_features if len(dense) == 2 else 0
    (kernel, _), (stride, _) = convolution.kernel_size, convolution.stride
    packing = CNNPacking(side, kernel, stride, convolution.out_channels, hidden, dense[-1].out_features)
    if (units := packing.channels * packing.positions) != dense[0].in_features:
        raise UserError(
            f"films of {side} px give {units} numbers, the next layer takes {dense[0].in_features}: in_shape?"
        )
    return packing
