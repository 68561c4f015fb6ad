"""One program, four readers: a network is a list of steps (:mod:`primia_lite.smpc.program`) that an engine takes.

:class:`Plain` computes it in float64. :class:`Dealer` runs it on shapes alone and makes the keys of one inference.
:class:`Preparation` runs it on shapes at a server and turns keys into what a film will need. :class:`Online` runs it on
a film's shares. What a server sees of the other is a share plus a mask that nobody but the dealer knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from primia_lite.smpc import dcf
from primia_lite.smpc.gates import Gate
from primia_lite.smpc.ring import Factor, Stream, pack, packed_bits, product, unpack

if TYPE_CHECKING:
    from primia_lite.smpc.keys import Key

Exchange = Callable[[bytes], bytes]  # sends to the other server, and returns as many bytes from it


class Wire:
    """A tensor on its way through the network: a share of it, or only its shape. Once opened under a mask it stays
    open: two convolutions of one input need one opening."""

    def __init__(self, shape, share: np.ndarray | None = None) -> None:
        self.shape, self.share, self.mask, self.opened = tuple(shape), share, None, None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Engine:
    """What programs call. Subclasses say how to multiply (:meth:`conv`) and how to compare (:meth:`select`)."""

    def conv(self, x: Wire, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Wire:
        raise NotImplementedError

    def select(self, y: Wire, gate: Gate) -> Wire:
        raise NotImplementedError

    def local(self, function: Callable[..., np.ndarray], *wires: Wire) -> Wire:
        """A linear function of shares: no message and no key."""
        if wires[0].share is not None:
            out = function(*[wire.share for wire in wires])
            return Wire(out.shape, out)
        return Wire(function(*[np.zeros(wire.shape, np.uint32) for wire in wires]).shape)

    def add(self, a: Wire, b: Wire) -> Wire:
        return self.local(lambda x, y: x + y, a, b)

    def lift(self, a: Wire, by: int) -> Wire:
        """``by`` more bits behind the point."""
        return self.local(lambda x: x << np.uint32(by), a)

    def pad(self, x: Wire, left: int, right: int, top: int, bottom: int) -> Wire:
        return self.local(lambda t: np.pad(t, ((0, 0), (0, 0), (top, bottom), (left, right))), x)

    def flatten(self, x: Wire) -> Wire:
        return self.local(lambda t: t.reshape(len(t), -1), x)

    def sum_pool(self, x: Wire) -> Wire:
        return self.local(lambda t: t.sum((2, 3), dtype=t.dtype), x)

    def maximum(self, a: Wire, b: Wire) -> Wire:
        """b + ReLU(a - b)."""
        return self.add(b, self.select(self.local(lambda x, y: x - y, a, b), Gate(0)))

    def max_pool(self, y: Wire) -> Wire:
        """3 x 3, stride 2, padding 1: along rows, then along columns; a pixel beyond the edge repeats the last."""
        for axis in (2, 3):
            size = y.shape[axis]
            middle = np.arange(0, size, 2)
            places = np.maximum(middle - 1, 0), middle, np.minimum(middle + 1, size - 1)
            left, middle, right = (self.local(partial(np.take, indices=at, axis=axis), y) for at in places)
            y = self.maximum(self.maximum(left, middle), right)
        return y


def product_shape(x: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int) -> tuple[int, ...]:
    if len(weight) == 2:
        return x[0], weight[0]
    sides = ((side + 2 * padding - kernel) // stride + 1 for side, kernel in zip(x[2:], weight[2:], strict=True))
    return x[0], weight[0], *sides


class Plain(Engine):
    """The reference, in float64, with weights in the clear (``name: (weight, bias)``)."""

    def __init__(self, weights: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.weights = weights

    def conv(self, x, name, stride=1, padding=0, groups=1):
        weight, bias = (torch.from_numpy(np.asarray(t, np.float64)) for t in self.weights[name])
        pixels = torch.from_numpy(x.share)
        if weight.ndim == 2:
            out = F.linear(pixels, weight, bias).numpy()
        else:
            out = F.conv2d(pixels, weight, bias, stride, padding, 1, groups).numpy()
        return Wire(out.shape, out)

    def lift(self, a, by):
        return a

    def select(self, y, gate):
        if not gate.thresholds:
            return y
        return Wire(y.shape, np.clip(y.share, 0, 6 if len(gate.thresholds) == 2 else None))

    def maximum(self, a, b):
        return Wire(a.shape, np.maximum(a.share, b.share))


class Dealer(Engine):
    """Makes the keys of one inference. It knows every mask, and sees no film, no weight and no message of a server.

    ``seeds``: of each server's stream for this inference; ``masks``: of the weights (:func:`weight_masks`);
    ``write(b, array)`` hands server b its next key.
    """

    def __init__(
        self, seeds: tuple[bytes, bytes], masks: Mapping[str, Factor], write: Callable[[int, np.ndarray], None]
    ) -> None:
        self.streams, self.masks, self.write = [Stream(seed) for seed in seeds], masks, write

    def _mask(self, shape) -> np.ndarray:
        return self.streams[0].draw(shape) + self.streams[1].draw(shape)

    def _share(self, value: np.ndarray) -> None:
        """Server 0 draws its share, and server 1 is sent the other."""
        self.write(1, value - self.streams[0].draw(value.shape))

    def conv(self, x, name, stride=1, padding=0, groups=1):
        if x.mask is None:
            x.mask = self._mask(x.shape)
        out = product(x.mask, self.masks[name], stride, padding, groups)
        self._share(out)
        return Wire(out.shape)

    def select(self, y, gate):
        mask = self._mask(y.size) >> np.uint32(gate.shift)
        if gate.thresholds:
            words = gate.keys(mask, tuple(stream.draw((y.size, 2), np.uint64) for stream in self.streams))
            self.write(0, words)
            self.write(1, words)
        flips = [self.streams[0].bits(y.size) ^ self.streams[1].bits(y.size) for _ in gate.thresholds]
        self._share(gate.table(mask, flips))
        return Wire(y.shape)


@dataclass
class SharedWeight:
    """A layer's weight at a server: W + s opened once, under a mask s that only the dealer knows, this server's share
    of W (for the public side of products), and its share of the bias."""

    opened: Factor
    own: Factor
    bias: np.ndarray


@dataclass
class ReadyProduct:
    """``mask``: this server's share of the input's, or None where that is open already; ``rest``: all of the product
    that doesn't depend on the film."""

    mask: np.ndarray | None
    rest: np.ndarray


@dataclass
class ReadyGate:
    mask: np.ndarray
    seeds: np.ndarray | None
    words: Callable[[], np.ndarray] | None
    flips: list[np.ndarray]
    table: np.ndarray


class Preparation(Engine):
    """At a server, before a film comes: keys are read, streams drawn, and what doesn't depend on the film computed.
    ``ready`` holds the result, in the program's order."""

    def __init__(self, server: int, weights: Mapping[str, SharedWeight], key: Key) -> None:
        self.server, self.stream, self.weights, self.key = server, Stream(key.seed), weights, key
        self.ready: list[ReadyProduct | ReadyGate] = []

    def _share(self, shape) -> np.ndarray:
        return self.key.read(shape, np.uint32) if self.server else self.stream.draw(shape)

    def conv(self, x, name, stride=1, padding=0, groups=1):
        first, weight = x.mask is None, self.weights[name]
        if first:
            x.mask = self.stream.draw(x.shape)
        rest = self._share(product_shape(x.shape, weight.opened.shape, stride, padding))
        rest = rest - product(x.mask, weight.opened, stride, padding, groups)
        rest += weight.bias.reshape((1, -1) + (1,) * (rest.ndim - 2))
        self.ready.append(ReadyProduct(x.mask if first else None, rest))
        return Wire(rest.shape)

    def select(self, y, gate):
        mask, seeds, words = self.stream.draw(y.size), None, None
        if gate.thresholds:
            seeds = self.stream.draw((y.size, 2), np.uint64)
            words = self.key.later((dcf.depth(gate.bits) + 1, y.size, 2), np.uint64)
        flips = [self.stream.bits(y.size) for _ in gate.thresholds]
        self.ready.append(ReadyGate(mask, seeds, words, flips, self._share((gate.columns, y.size))))
        return Wire(y.shape)


class Online(Engine):
    """At a server, with its share of a film. Each prepared gate serves once, and is forgotten."""

    def __init__(
        self,
        server: int,
        weights: Mapping[str, SharedWeight],
        ready: list[ReadyProduct | ReadyGate],
        exchange: Exchange,
    ) -> None:
        self.server, self.weights, self.exchange = server, weights, exchange
        self._ready: Iterator = _consumed(ready)
        self.seconds = {"products": 0.0, "comparisons": 0.0}

    def _open(self, share: np.ndarray, bits: int = 32) -> np.ndarray:
        """Both servers send their share, and add."""
        width = packed_bits(bits)
        other = unpack(self.exchange(pack(share, width)), width, share.size)
        return share + other.reshape(share.shape)

    def _open_bits(self, share: np.ndarray) -> np.ndarray:
        other = np.frombuffer(self.exchange(np.packbits(share).tobytes()), np.uint8)
        return share ^ np.unpackbits(other, count=share.size)

    def conv(self, x, name, stride=1, padding=0, groups=1):
        prepared = next(self._ready)
        if prepared.mask is not None:
            x.opened = self._open(x.share + prepared.mask)
        started = time.thread_time()
        out = product(x.opened, self.weights[name].own, stride, padding, groups) + prepared.rest
        self.seconds["products"] += time.thread_time() - started
        return Wire(out.shape, out)

    def select(self, y, gate):
        prepared = next(self._ready)
        share = y.share.reshape(-1) + prepared.mask
        if self.server == 0 and gate.shift:  # half a unit: two shares that are cut lose one between them on average
            share += np.uint32((gate.offset << gate.shift) + (1 << (gate.shift - 1)))
        opened = gate.wrapped(self._open(share >> np.uint32(gate.shift), gate.ring))
        bits = np.zeros((0, y.size), np.uint8)
        if gate.thresholds:
            points = gate.points(opened - np.uint32(gate.offset))
            started = time.thread_time()
            words = prepared.words()
            less = [
                dcf.evaluate(self.server, low, gate.bits, prepared.seeds, words) ^ flip
                for (_, low), flip in zip(points, prepared.flips, strict=True)
            ]
            self.seconds["comparisons"] += time.thread_time() - started
            bits = self._open_bits(np.concatenate(less)).reshape(len(less), -1)
        out = gate.result(self.server, opened, bits, prepared.table)
        return Wire(y.shape, out.reshape(y.shape))


def _consumed(items: list) -> Iterator:
    items.reverse()
    while items:
        yield items.pop()


def weight_masks(shapes: Mapping[str, tuple[int, ...]], seeds: tuple[bytes, bytes]) -> dict[str, Factor]:
    """The dealer's side of :func:`open_weights`."""
    streams = [Stream(seed) for seed in seeds]
    return {name: Factor(streams[0].draw(shape) + streams[1].draw(shape)) for name, shape in shapes.items()}


def open_weights(
    server: int, shares: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: bytes, exchange: Exchange
) -> dict[str, SharedWeight]:
    """Once for a model and a dealing: weights are opened under masks, biases stay shares."""
    stream, weights = Stream(seed), {}
    for name, (weight, bias) in shares.items():
        mask = stream.draw(weight.shape)
        masked = weight + mask
        opened = masked + np.frombuffer(exchange(masked.tobytes()), np.uint32).reshape(weight.shape)
        weights[name] = SharedWeight(Factor(opened), Factor(np.uint32(server) * opened - mask), bias)
    return weights
