"""How numbers lie in a ciphertext, as a client encodes them. A packing is public: shapes and parameters, no weight; the
server compiles weights into plaintexts for it (:mod:`~primia_lite.encrypted.kernels`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tenseal.sealapi as sealapi

from primia_lite.config import UserError
from primia_lite.encrypted.parameters import Parameters, choose, choose_single_product
from primia_lite.encrypted.seal import Context

# Standard deviation of a fresh ciphertext's noise in SEAL: 21 coin flips less 21 others.
NOISE_STD = 3.24


class Packing:
    """What each packing says. The defaults are those of one product without rotations, one film at a time.

    Attributes
    ----------
    in_shape : of one film as the model takes it
    in_slots : whether slots are films, and every slot of a reply a logit
    uploads : ciphertexts of a film, or of a batch
    rotations, relinearise : what evaluation keys are needed for
    reply_level : rescalings behind a reply
    logit_places : of each reply, the coefficients that are its logits
    wrap_limit : the absolute value from which on logits wrap round
    error : a logit's standard deviation before the client rounds it; None of a CNN, where the noise of each layer is
        squared by the next, with the film and the weights
    encode : a film or a batch to plaintexts
    """

    kind: ClassVar[str]
    in_slots: ClassVar[bool] = False
    rotations: tuple[int, ...] = ()
    relinearise: ClassVar[bool] = False
    reply_level: int = 0

    @property
    def fresh_scale(self) -> float:
        return 2.0**self.parameters.scale_bits

    def most_logit(self, context: Context) -> float:
        """A client refuses larger logits. None by default: the server compiles no head that could pass the limit with
        features of the largest norm, and a client encodes no larger ones."""
        return math.inf

    def error(self, context: Context, weights: np.ndarray | None = None) -> float | None:
        return None


class HeadPacking(Packing):
    """The packing of a linear head of so many ``features`` and ``classes``."""

    # Features' L2 norm at most; those of a frozen network have 1.005 (primia_lite.models.frozen).
    most_norm: ClassVar[float] = 1.1
    weight_bits: int = 20

    def __post_init__(self):
        if min(self.features, self.classes) < 1 or self.classes > self.parameters.poly_modulus_degree:
            raise UserError(f"a head of {self.features} features and {self.classes} classes can't be packed")

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.features,)

    def reply_scale(self, context: Context) -> float:
        return self.fresh_scale * 2.0**self.weight_bits

    def noise(self, context: Context, norm: float) -> float:
        """Standard deviation of one coefficient's noise, in units of the reply's integers, by the norm of weights."""
        return NOISE_STD * math.hypot(norm * 2.0**self.weight_bits, math.sqrt(4 / 3 * context.n + 1))

    def check_norm(self, features: np.ndarray) -> None:
        if not (norm := float(np.linalg.norm(features, axis=1).max())) <= self.most_norm:
            raise UserError(f"these features have norm {norm:.4g}, above {self.most_norm}: scale them to norm 1")


@dataclass(frozen=True)
class LinearPacking(HeadPacking):
    """A linear head, lowest latency: features are coefficients, and so are the weights, reversed; a product of
    polynomials then holds each class's logit in one coefficient. No rotation, no evaluation key.

    Features lie in coefficients 0 to d - 1, class a's weights, reversed, in those from a d on; coefficient
    a d + d - 1 of the product is their inner product. Where classes x features is more than N, features go into
    several ciphertexts, whose products add up. N = 2048 is the smallest with room for a result: what a larger N saves
    in ciphertexts it loses on the reply, which is sealed whole. ``flooded`` leaves room for the noise of
    :mod:`~primia_lite.encrypted.flooding`: two primes and twice the bytes.
    """

    features: int
    classes: int
    flooded: bool = False
    kind: ClassVar[str] = "linear"

    @functools.cached_property
    def parameters(self) -> Parameters:
        # Flooding takes 22 bits by default, which one prime of N = 2048 doesn't have.
        return choose_single_product(self.weight_bits, primes=2 if self.flooded else 1)

    @property
    def weight_bits(self) -> int:
        return 16 if self.flooded else 20

    def wrap_limit(self, context: Context) -> float:
        return math.prod(context.moduli_at(0)) / self.reply_scale(context) / 2

    def noise_bound(self, context: Context) -> float:
        """Noise of a reply's logits together, L2 norm, in units of the reply's integers. An upload's noise, of standard
        deviation NOISE_STD, lies in all coefficients and so meets all classes' weights, each class's of the largest
        norm that the server compiles; re-randomising adds that of an encryption of zero, which meets a ternary key
        and a ternary draw. All are sums of coin flips, so ten standard deviations are passed less than once in 2^70.
        """
        return 10 * self.noise(context, self._largest_norm(context)) * math.sqrt(self.classes)

    def _largest_norm(self, context: Context) -> float:
        """The largest L2 norm of all classes' weights together that the server compiles."""
        return math.sqrt(self.classes) * self.wrap_limit(context) / self.most_norm

    def error(self, context: Context, weights: np.ndarray | None = None) -> float:
        """From noise, and what encoding features and weights as integers rounds away; of the largest weights that the
        server compiles, if they are left out."""
        norm = self._largest_norm(context) if weights is None else float(np.linalg.norm(weights))
        rounding = math.hypot(norm * 2.0**self.weight_bits, self.most_norm * self.fresh_scale) / math.sqrt(12)
        return math.hypot(self.noise(context, norm), rounding) / self.reply_scale(context)

    @property
    def uploads(self) -> int:
        return math.ceil(self.features / (self.parameters.poly_modulus_degree // self.classes))

    @property
    def part(self) -> int:
        """Features in one ciphertext."""
        return math.ceil(self.features / self.uploads)

    @property
    def parts(self) -> list[slice]:
        """Features of each ciphertext."""
        return [slice(a, min(a + self.part, self.features)) for a in range(0, self.features, self.part)]

    @property
    def logit_places(self) -> list[Sequence[int]]:
        return [range(self.part - 1, self.part * self.classes, self.part)]

    def encode(self, context: Context, film: np.ndarray) -> list[sealapi.Plaintext]:
        self.check_norm(film[None])
        return [context.encode_coefficients(film[part], self.fresh_scale) for part in self.parts]

    def reversed_rows(self, weights: np.ndarray, part: slice) -> np.ndarray:
        """Coefficients that a part's features are multiplied by: one class's weights [classes, features] after the
        other's, each reversed."""
        rows = np.zeros((self.classes, self.part))
        rows[:, : part.stop - part.start] = weights[:, part]
        return rows[:, ::-1].ravel()


@dataclass(frozen=True)
class CNNPacking(Packing):
    """A small CNN: convolution, square, dense, or with another square and dense layer.

    The client lays the film out as patches (im2col). A slot block of ``block`` slots holds one tap of the kernel at all
    positions; ``copies`` adjacent blocks hold the same tap, for as many channels. A sum over taps is a sum of products
    with plaintexts, over rotations by blocks. The last layer is one product: its weights, spread over the slots, times
    powers of X, bring class c's logit into coefficient c.

    Attributes
    ----------
    side, kernel, stride : of the film and of the convolution, px
    channels : of the convolution, a power of two
    hidden : units of the hidden dense layer, a power of two, or 0 without
    classes : logits
    """

    side: int
    kernel: int
    stride: int
    channels: int
    hidden: int
    classes: int
    kind: ClassVar[str] = "cnn"
    relinearise: ClassVar[bool] = True
    # Pixels' absolute value at most. Normalised ones reach 2 (primia_lite.models.prepare), and a film's own mean and
    # standard deviation make about 8 of a bright spot; grey values that nobody normalised are beyond it.
    most_pixel: ClassVar[float] = 10.0
    # More uploads spare the server rotations, and cost the client's line.
    most_uploads: ClassVar[int] = 16

    def __post_init__(self):
        if min(self.side, self.kernel, self.stride, self.channels, self.classes) < 1 or self.kernel > self.side:
            raise UserError("a convolution needs a film as large as its kernel or larger, a stride, channels, classes")
        self._check_layout()

    def _check_layout(self) -> None:
        for name, number in (("channels", self.channels), ("hidden", self.hidden)):
            if number & (number - 1):
                raise UserError(f"{name} is {number}: packing needs a power of two")
        if self.period > self.parameters.slots:
            raise UserError(
                f"channels x positions need {self.period} slots, more than a ciphertext has: take a larger stride"
            )
        if self.hidden > self.period:
            raise UserError(f"hidden is {self.hidden}, wider than the convolution's {self.period} outputs: narrow it")

    @functools.cached_property
    def parameters(self) -> Parameters:
        # 19 bits above a rescaling's error are a scale of 30 at N = 8192. With a hidden layer all 218 bits of that N
        # are used; without one there is room for another bit of the logits, see `wrap_limit`.
        integer_bits = 8 if self.hidden else 9
        return choose(self.reply_level, precision_bits=19, integer_bits=integer_bits, weight_bits=self.last_weight_bits)

    @property
    def last_weight_bits(self) -> int:
        return 11 if self.hidden else 13

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.side, self.side)

    def wrap_limit(self, context: Context) -> float:
        """About 128 with a hidden layer and 256 without; in a batch 256 with one and 128 without."""
        return context.moduli[0] / self.reply_scale(context) / 2

    def most_logit(self, context: Context) -> float:
        """Squares make a bound by the weights useless, so no network is refused for them when it is compiled; a logit
        that wrapped round may lie anywhere, and half of the range is refused here."""
        return self.wrap_limit(context) / 2

    @property
    def positions(self) -> int:
        return ((self.side - self.kernel) // self.stride + 1) ** 2

    @property
    def block(self) -> int:
        """Slots of one tap: the positions, and padding to a power of two."""
        return 1 << (self.positions - 1).bit_length()

    @property
    def blocks(self) -> int:
        return self.parameters.slots // self.block

    @property
    def period(self) -> int:
        """Slots after which the convolution's result repeats."""
        return self.channels * self.block

    @property
    def copies(self) -> int:
        copies = self.channels
        while copies > 1 and math.ceil(self.kernel**2 * copies / self.blocks) > self.most_uploads:
            copies //= 2
        return copies

    @property
    def uploads(self) -> int:
        return math.ceil(self.kernel**2 * self.copies / self.blocks)

    @property
    def baby_steps(self) -> int:
        return 1 << (self.hidden.bit_length() // 2)

    @property
    def steps(self) -> dict[str, list[int]]:
        """Rotations by what they are for."""
        out = {
            "channels": [m * self.copies * self.block for m in range(1, self.channels // self.copies)],
            "taps": _doublings(self.period, self.parameters.slots),
        }
        if self.hidden:
            baby = self.baby_steps
            out["diagonals"] = [*range(1, baby), *range(baby, self.hidden, baby)]
            out["columns"] = _doublings(self.hidden, self.period)
        return out

    @property
    def rotations(self) -> tuple[int, ...]:
        return tuple(sorted({step for steps in self.steps.values() for step in steps}))

    @property
    def reply_level(self) -> int:
        return 4 if self.hidden else 2

    @property
    def logit_places(self) -> list[Sequence[int]]:
        """As many a reply as the last layer's inputs repeat."""
        repeats = self.parameters.slots // (self.hidden or self.period)
        return [range(min(repeats, self.classes - a)) for a in range(0, self.classes, repeats)]

    def scales(self, context: Context) -> dict[str, float]:
        """The scales of weights and of results. Weights are scaled by the prime that rescaling takes away again."""
        primes = context.moduli_at(0)
        first = self.fresh_scale**2 / primes[-2]
        out = {"convolution": float(primes[-1]), "square": first}
        if self.hidden:
            # Brings the scale back to the fresh one.
            out["dense"] = primes[-3] * self.fresh_scale / first
            out["square 2"] = self.fresh_scale**2 / primes[-4]
        out["reply"] = (out["square 2"] if self.hidden else first) * 2.0**self.last_weight_bits
        return out

    def reply_scale(self, context: Context) -> float:
        return self.scales(context)["reply"]

    def patches(self, film: np.ndarray) -> np.ndarray:
        """[side, side] to [positions, taps]."""
        windows = np.lib.stride_tricks.sliding_window_view(film, (self.kernel, self.kernel))
        return windows[:: self.stride, :: self.stride].reshape(self.positions, -1)

    def tap_of(self, upload: int, block):
        """Which tap lies in a block (or in each of an array of blocks); from kernel² on: none."""
        return upload * (self.blocks // self.copies) + block // self.copies

    def check_pixels(self, films: np.ndarray) -> None:
        if not (largest := float(np.abs(films).max())) <= self.most_pixel:
            raise UserError(
                f"pixels reach {largest:.4g}, above {self.most_pixel:g}: normalise them (primia_lite.models.prepare)"
            )

    def encode(self, context: Context, film: np.ndarray) -> list[sealapi.Plaintext]:
        self.check_pixels(film)
        taps, out = self.patches(film).T, []
        for upload in range(self.uploads):
            slots = np.zeros((self.blocks, self.block))
            tap = self.tap_of(upload, np.arange(self.blocks))
            slots[tap < len(taps), : self.positions] = taps[tap[tap < len(taps)]]
            out.append(context.encode_slots(slots.ravel(), self.fresh_scale))
        return out


def _doublings(start: int, stop: int) -> list[int]:
    """start, 2 start, 4 start, ... below stop; both are powers of two."""
    return [start << k for k in range((stop // start).bit_length() - 1)]
