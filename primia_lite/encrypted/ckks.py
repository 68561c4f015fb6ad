"""Encrypted diagnosis between two parties that exchange bytes: the client has films and the key, the server the model.

The client learns a few rounded logits, the server nothing of the film: CKKS is IND-CPA secure for an honest but
curious server that is never told a decryption (Li and Micciancio, EUROCRYPT 2021).
"""

from __future__ import annotations

import collections
import json
import math
import struct
import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import tenseal.sealapi as sealapi
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.batch import batch_packing, compile_batch
from primia_lite.encrypted.flooding import Flooding, flooding_std, wide_gaussian
from primia_lite.encrypted.kernels import EvaluationKeys, compile_model, packing_for
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.masks import Blind
from primia_lite.encrypted.packing import LinearPacking, Packing, packing_from, spec_of
from primia_lite.encrypted.seal import CiphertextError, Context

_MAGIC = b"PLCK0001"
_COSTS = 10_000
# Of a client's public material; Galois keys of a network with a hidden layer are most of it.
MAX_PUBLIC_BYTES = 256 << 20
# With more, a batch's slots are the whole plaintext, and give the key away. Rounding to 6 decimals leaves every
# coefficient of it unknown by a standard deviation of 2^17 or more; a fresh ciphertext's noise has 3.
MAX_DECIMALS = 6


@dataclass(frozen=True)
class Cost:
    """One step's cost.

    Attributes
    ----------
    step, party : what, and who
    seconds : wall clock
    kib : bytes that go out of it, over 1,024
    levels_left : rescalings that remain
    error
        Standard deviation of a logit where the step is ``compute`` or ``decrypt``: at the server with its weights; at
        the client, which doesn't know them, at most, with flooding and rounding. None of a CNN, where nobody knows it
        beforehand.
    """

    step: str
    party: str
    seconds: float
    kib: float = 0.0
    levels_left: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Plan:
    """How a model is run under encryption, and why so."""

    packing: Packing
    reason: str

    def __str__(self) -> str:
        p = self.packing.parameters
        return (
            f"{self.packing.kind}: {self.reason}; N = {p.poly_modulus_degree}, primes of {p.coeff_mod_bit_sizes} bits, "
            f"{self.packing.uploads} ciphertext(s) up, {len(self.packing.keep)} down, "
            f"{len(self.packing.rotations)} Galois keys"
        )


def plan(model: nn.Module, in_shape: tuple[int, ...], batch_size: int = 1, flooded: bool = False) -> Plan:
    """The packing for one film at a time, or for many at once.

    Parameters
    ----------
    in_shape : of one film as the model takes it, [D] features or [1, H, W] pixels
    batch_size : films that come together
    flooded : with room for the client's flooding, see :class:`Client`; a linear head only, one film at a time

    Raises
    ------
    UserError
        A network that can't be run under encryption here, or not so.
    """
    packing = packing_for(model, in_shape)
    if flooded:
        if batch_size > 1 or not isinstance(packing, LinearPacking):
            raise UserError(
                "flooding takes a linear head, one film at a time: noise after a square has no useful bound"
            )
        packing = replace(packing, flooded=True)
    if batch_size > 1:
        return Plan(*batch_packing(packing, batch_size))
    reason = {
        "linear": "features of a public network are computed by the hospital, so one product with the head is left, "
        "without rotations or evaluation keys",
        "cnn": "the hospital lays the film out as patches, so the convolution is products and few rotations",
    }[packing.kind]
    return Plan(packing, reason)


class Client:
    """The hospital: owns the secret key, encrypts films, reads logits.

    Parameters
    ----------
    packing : from the server (:func:`~primia_lite.encrypted.packing.packing_from`), or of a plan
    decimals
        Logits are rounded to so many, 6 at most. What isn't shown can't help an attacker; but this is a heuristic, not
        a proof.
    flooding : noise before the rounding, for logits that are shared; a proof, see
        :mod:`~primia_lite.encrypted.flooding` for what it assumes

    Attributes
    ----------
    costs : rows of Cost, one for each of the last 10,000 steps
    flooding_std : of the noise, in logits; 0 without
    queries_left : decryptions that the flooding still covers

    Raises
    ------
    UserError
        Flooding for a packing without room for it, or decimals beyond 0 to 6.
    """

    def __init__(self, packing: Packing, decimals: int = 3, flooding: Flooding | None = None):
        if decimals not in range(MAX_DECIMALS + 1):
            raise UserError(
                f"decimals is {decimals}: take 0 to {MAX_DECIMALS}; with more, logits of a batch give the key away"
            )
        self.packing, self.decimals = packing, decimals
        self.costs: collections.deque[Cost] = collections.deque(maxlen=_COSTS)
        started = time.perf_counter()
        self.context = Context(packing.parameters)
        self.flooding, self.flooding_std, self.queries_left, self._lock = flooding, 0.0, None, threading.Lock()
        if flooding is not None:
            if not (isinstance(packing, LinearPacking) and packing.flooded):
                raise UserError(
                    "this packing has no room for flooding: take a linear head, and Server(..., flooded=True)"
                )
            bound = packing.noise_bound(self.context)
            self._flood = flooding_std(bound, flooding.queries, flooding.statistical_bits)
            self.flooding_std = self._flood / packing.reply_scale(self.context)
            if self.flooding_std > 1:
                raise UserError(
                    f"flooding by noise of standard deviation {self.flooding_std:.3g} leaves nothing of the logits: "
                    "take fewer queries or statistical bits"
                )
            self.queries_left = flooding.queries
        self._key = SecretKey(self.context)
        self._note("make keys", started, 0)

    def _note(self, step: str, started: float, size: int, level: int = 0, error: float | None = None) -> None:
        left = max(0, self.packing.parameters.levels - level)
        self.costs.append(Cost(step, "client", time.perf_counter() - started, size / 1024, left, error))

    @property
    def _error(self) -> float | None:
        """Of a logit that was decrypted, see :class:`Cost`."""
        if (error := self.packing.error(self.context)) is None:
            return None
        return math.hypot(error, self.flooding_std, 10.0**-self.decimals / math.sqrt(12))

    def public(self) -> bytes:
        """What the server needs: the packing, the public key, and the evaluation keys that the packing asks for."""
        started = time.perf_counter()
        parts = [self._key.public_key()]
        if self.packing.relinearise:
            parts.append(self._key.relin_keys())
        if self.packing.rotations:
            parts.append(self._key.galois_keys(list(self.packing.rotations)))
        head = json.dumps({"packing": spec_of(self.packing), "bytes": [len(part) for part in parts]}).encode()
        out = b"".join([_MAGIC, struct.pack("<I", len(head)), head, *parts])
        self.refuse_secret(out)
        self._note("publish keys", started, len(out))
        return out

    def refuse_secret(self, data: bytes) -> None:
        """
        Raises
        ------
        UserError
            The secret key, in SEAL's form or as coefficients, is inside ``data``.
        """
        if self._key.is_inside(data):
            raise UserError(
                "the secret key is inside what is about to be sent: send Client.public() and encrypt() only"
            )

    def encrypt(self, film: np.ndarray) -> list[bytes]:
        """One film's features [D] or pixels [H, W], as the model takes them; for a batch [films, D] or [films, H, W].

        Raises
        ------
        UserError
            Another shape, numbers that aren't finite, or larger ones than the parameters have room for.
        """
        started = time.perf_counter()
        film = np.asarray(film, dtype=np.float64)
        shape = film.shape[1:] if self.packing.in_slots else film.shape
        if shape != self.packing.in_shape:
            raise UserError(f"this film has shape {shape}, the model takes {self.packing.in_shape}: prepare it so")
        if self.packing.in_slots and not 1 <= len(film) <= self.packing.films:
            raise UserError(f"{len(film)} films, a batch has 1 to {self.packing.films}: split them")
        if not np.isfinite(film).all():
            raise UserError("the film has values that aren't finite: leave it out, or prepare it again")
        out = [self._key.encrypt(plaintext) for plaintext in self.packing.encode(self.context, film)]
        for data in out:
            self.refuse_secret(data)
        self._note("encrypt", started, sum(map(len, out)))
        return out

    def decrypt(self, replies: list[bytes]) -> np.ndarray:
        """Logits, float64 [classes], rounded to ``decimals``; of a batch [films, classes], as many films as a batch can
        have: those behind the ones that were sent mean nothing.

        Raises
        ------
        CiphertextError
            A reply that isn't one of this packing.
        UserError
            More decryptions than the flooding covers, or logits of a CNN so large that they may have wrapped round.
        """
        started = time.perf_counter()
        logits = self._decrypt_exact(replies)
        largest, most = float(np.abs(logits).max()), self.packing.most_logit(self.context)
        if largest > most:
            raise UserError(
                f"logits reach {largest:.1f}, beyond {most:.1f} they may have wrapped round: normalise the film as the "
                "network's training films were; if it is, the network's last layer must be scaled down"
            )
        self._note("decrypt", started, 0, self.packing.reply_level, self._error)
        return np.round(logits, self.decimals)

    def _decrypt_exact(self, replies: list[bytes]) -> np.ndarray:
        """Before rounding, with the flooding: for tests and measurements. Shown to others it gives the key away."""
        if len(replies) != len(self.packing.keep):
            raise CiphertextError(f"{len(replies)} replies came, {len(self.packing.keep)} belong to a film")
        scale, level = self.packing.reply_scale(self.context), self.packing.reply_level
        if self.packing.in_slots:
            slots = [self._key.slots(reply, scale, level) for reply in replies]
            return np.stack([self.packing.decode(each) for each in slots], axis=1)
        out = []
        for reply, keep in zip(replies, self.packing.keep, strict=True):
            integers = self.context.integers(reply, scale=scale, level=level)
            out += self._key.coefficients(integers, keep, level)
        if self.flooding is not None:
            with self._lock:
                if not self.queries_left:
                    raise UserError(
                        f"{self.flooding.queries} decryptions are what the flooding covers: make a new Client"
                    )
                self.queries_left -= 1
            out = [a + b for a, b in zip(out, wide_gaussian(len(out), self._flood), strict=True)]
        return np.array(out, dtype=np.float64) / scale


class Session:
    """One client's public material at the server."""

    def __init__(self, server: Server, data: bytes):
        context, self.server = server.context, server
        parts = _split(data, server.packing)
        kinds = [sealapi.PublicKey]
        kinds += [sealapi.RelinKeys] if server.packing.relinearise else []
        kinds += [sealapi.GaloisKeys] if server.packing.rotations else []
        if len(parts) != len(kinds):
            raise CiphertextError(f"{len(parts)} keys came, this model needs {len(kinds)}: send Client.public()")
        turns = len(server.packing.rotations)
        keys = {kind: context.receive_keys(part, kind, turns) for kind, part in zip(kinds, parts, strict=True)}
        galois = keys.get(sealapi.GaloisKeys)
        elements = [pow(3, step, 2 * context.n) for step in server.packing.rotations]
        if galois is not None and not all(galois.has_key(element) for element in elements):
            raise CiphertextError("Galois keys that this model needs are missing: send Client.public()")
        self.encryptor = sealapi.Encryptor(context.seal, keys[sealapi.PublicKey])
        self.keys = EvaluationKeys(keys.get(sealapi.RelinKeys), galois)
        self._blinds: list[list[Blind]] = []

    @property
    def prepared(self) -> int:
        """Films whose replies' masks are made."""
        return len(self._blinds)

    def prepare(self, films: int = 1) -> None:
        """Make, in idle time, what will hide the replies to so many films; later ones get theirs when they come."""
        for _ in range(films):
            self._blinds.append(self._new_blinds())

    def _new_blinds(self) -> list[Blind]:
        context, packing = self.server.context, self.server.packing
        return [Blind(context, self.encryptor, packing.reply_level, keep) for keep in packing.keep]

    def diagnose(self, uploads: list[bytes]) -> list[bytes]:
        """One film's ciphertexts in, masked and re-randomised replies out.

        Raises
        ------
        CiphertextError
            Ciphertexts that aren't of this packing, checked before any work; or that SEAL can't compute with.
        """
        server, packing = self.server, self.server.packing
        started = time.perf_counter()
        if len(uploads) != packing.uploads:
            raise CiphertextError(f"{len(uploads)} ciphertexts came, {packing.uploads} belong to a film")
        inputs = [server.context.receive(data, scale=packing.fresh_scale) for data in uploads]
        server._note("receive", started)
        started = time.perf_counter()
        try:
            products = server.kernel(inputs, self.keys)
        except (RuntimeError, ValueError) as error:  # SEAL's; the weights were tried when they were compiled
            if "transparent" in str(error):
                raise CiphertextError("these keys or ciphertexts cancel to 0: send what Client made") from error
            raise CiphertextError(f"SEAL can't compute with these keys and ciphertexts: {error}") from error
        server._note("compute", started, level=packing.reply_level, error=server.kernel.error)
        started = time.perf_counter()
        out = self._seal(products)
        server._note("mask", started, sum(map(len, out)), packing.reply_level)
        return out

    def _seal(self, products: list[sealapi.Ciphertext]) -> list[bytes]:
        try:
            blinds = self._blinds.pop()  # in one step, so that no two threads get the same
        except IndexError:
            blinds = self._new_blinds()
        return [blind.seal(product) for blind, product in zip(blinds, products, strict=True)]


class Server:
    """The model's owner: has the plain model, and of a client its public material and ciphertexts, never more.

    Parameters
    ----------
    model : the trained part, see :func:`plan`
    in_shape : of one film as it takes it
    batch_size : films that come together, see :func:`plan`
    flooded : with room for the client's flooding, see :class:`Client`
    """

    def __init__(
        self,
        model: nn.Module,
        in_shape: tuple[int, ...],
        keep_costs: bool = True,
        flooded: bool = False,
        batch_size: int = 1,
    ):
        self.packing = plan(model, in_shape, batch_size, flooded).packing
        self.context = Context(self.packing.parameters)
        self.costs: collections.deque[Cost] = collections.deque(maxlen=_COSTS if keep_costs else 0)
        started = time.perf_counter()
        compiler = compile_batch if self.packing.in_slots else compile_model
        self.kernel = compiler(model, self.packing, self.context)
        self._note("compile", started)

    def _note(self, step: str, started: float, size: int = 0, level: int = 0, error: float | None = None) -> None:
        left = max(0, self.packing.parameters.levels - level)
        self.costs.append(Cost(step, "server", time.perf_counter() - started, size / 1024, left, error))

    def describe(self) -> dict:
        """What a client needs to know, for JSON."""
        return spec_of(self.packing)

    def open(self, public: bytes) -> Session:
        """
        Raises
        ------
        CiphertextError
            Bytes that aren't the public material for this model.
        """
        return Session(self, public)


def _split(data: bytes, packing: Packing) -> list[bytes]:
    if len(data) > MAX_PUBLIC_BYTES:
        raise CiphertextError(f"{len(data)} bytes of keys are more than the {MAX_PUBLIC_BYTES} allowed")
    start = len(_MAGIC) + 4
    if len(data) < start or data[: len(_MAGIC)] != _MAGIC:
        raise CiphertextError("these bytes are no public material: send what Client.public returned")
    (size,) = struct.unpack_from("<I", data, len(_MAGIC))
    try:
        head = json.loads(data[start : start + min(size, 4096)])
        theirs, lengths = packing_from(head["packing"]), [int(n) for n in head["bytes"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UserError) as error:
        raise CiphertextError("the public material's head can't be read: send what Client.public returned") from error
    if theirs != packing:
        raise CiphertextError("these keys are for another model: ask the server for its description first")
    if min(lengths, default=-1) < 0 or start + size + sum(lengths) != len(data):
        raise CiphertextError("the public material was cut, or has bytes too many")
    parts, place = [], start + size
    for length in lengths:
        parts.append(data[place : place + length])
        place += length
    return parts
