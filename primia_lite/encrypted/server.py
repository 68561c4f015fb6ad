"""The model owner's side of an encrypted diagnosis: it has the plain model, and no secret key.

It learns nothing of the film: CKKS is IND-CPA secure for an honest but curious server that is never told a decryption
(Li and Micciancio, EUROCRYPT 2021).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import tenseal.sealapi as sealapi
from torch import nn

from primia_lite.config import UserError
from primia_lite.encrypted.batch import (
    BatchCNNKernel,
    BatchCNNPacking,
    BatchLinearKernel,
    BatchLinearPacking,
    batch_packing,
)
from primia_lite.encrypted.costs import Costs
from primia_lite.encrypted.kernels import CNNKernel, EvaluationKeys, LinearKernel, packing_for
from primia_lite.encrypted.packing import CNNPacking, LinearPacking, Packing
from primia_lite.encrypted.reply_masks import Blind
from primia_lite.encrypted.seal import CiphertextError, Context
from primia_lite.encrypted.wire import spec_of, split_keys

_KERNELS = {
    LinearPacking: LinearKernel,
    CNNPacking: CNNKernel,
    BatchLinearPacking: BatchLinearKernel,
    BatchCNNPacking: BatchCNNKernel,
}
_REASONS = {
    LinearPacking: "features of a public network are computed by the hospital, so one product with the head is left, "
    "without rotations or evaluation keys",
    CNNPacking: "the hospital lays the film out as patches, so the convolution is products and few rotations",
}


@dataclass(frozen=True)
class Plan:
    """How a model is run under encryption, and why so."""

    packing: Packing
    reason: str

    def __str__(self) -> str:
        p = self.packing.parameters
        return (
            f"{self.packing.kind}: {self.reason}; N = {p.poly_modulus_degree}, primes of {p.coeff_mod_bit_sizes} bits, "
            f"{self.packing.uploads} ciphertext(s) up, {len(self.packing.logit_places)} down, "
            f"{len(self.packing.rotations)} Galois keys"
        )


def plan(model: nn.Module, in_shape: tuple[int, ...], batch_size: int = 1, flooded: bool = False) -> Plan:
    """The packing for one film at a time, or for many at once.

    Parameters
    ----------
    in_shape : of one film as the model takes it, [D] features or [1, H, W] pixels
    batch_size : films that come together
    flooded : with room for the client's flooding; a linear head only, one film at a time
    """
    packing = packing_for(model, in_shape)
    if flooded:
        if batch_size > 1 or not isinstance(packing, LinearPacking):
            raise UserError("flooding takes a linear head, one film at a time: noise after a square has no good bound")
        packing = replace(packing, flooded=True)
    if batch_size > 1:
        return Plan(*batch_packing(packing, batch_size))
    return Plan(packing, _REASONS[type(packing)])


class Session:
    """One client's public material at the server; a CiphertextError if ``public`` isn't that for this model."""

    def __init__(self, server: CkksServer, public: bytes):
        context, packing, self.server = server.context, server.packing, server
        keys, steps = split_keys(public, packing), packing.rotations
        kinds = [sealapi.PublicKey, *[sealapi.RelinKeys] * packing.relinearise, *[sealapi.GaloisKeys] * bool(steps)]
        if len(keys) != len(kinds):
            raise CiphertextError(f"{len(keys)} keys came, this model needs {len(kinds)}: send CkksClient.public()")
        loaded = {kind: context.receive_keys(key, kind, len(steps)) for kind, key in zip(kinds, keys, strict=True)}
        self.keys = EvaluationKeys(loaded.get(sealapi.RelinKeys), loaded.get(sealapi.GaloisKeys))
        if not all(self.keys.galois.has_key(pow(3, step, 2 * context.n)) for step in steps):
            raise CiphertextError("Galois keys that this model needs are missing: send CkksClient.public()")
        self.encryptor = sealapi.Encryptor(context.seal, loaded[sealapi.PublicKey])
        self._blinds: list[list[Blind]] = []

    @property
    def prepared(self) -> int:
        """Films whose replies' masks are made."""
        return len(self._blinds)

    def prepare(self) -> None:
        """Make, in idle time, what will hide the replies to one more film; others get theirs when they come."""
        self._blinds.append(self._new_blinds())

    def _new_blinds(self) -> list[Blind]:
        context, packing = self.server.context, self.server.packing
        return [Blind(context, self.encryptor, packing.reply_level, places) for places in packing.logit_places]

    def diagnose(self, uploads: list[bytes]) -> list[bytes]:
        """One film's ciphertexts in, masked and re-randomised replies out; a CiphertextError for those that aren't of
        this packing, before any work, or that SEAL can't compute with."""
        server, packing, note = self.server, self.server.packing, self.server.costs.note
        started = time.perf_counter()
        inputs = server.receive(uploads)
        note("receive", started)
        started = time.perf_counter()
        try:
            products = server.kernel(inputs, self.keys)
        except (RuntimeError, ValueError) as error:  # SEAL's; the weights were tried when they were compiled
            raise CiphertextError(f"SEAL can't compute with these keys and ciphertexts: {error}") from error
        note("compute", started, level=packing.reply_level, error=server.kernel.error)
        started = time.perf_counter()
        out = self.seal(products)
        note("mask", started, sum(map(len, out)), packing.reply_level)
        return out

    def seal(self, products: list[sealapi.Ciphertext]) -> list[bytes]:
        """The replies: products masked and re-randomised, as bytes."""
        try:
            blinds = self._blinds.pop()  # in one step, so that no two threads get the same
        except IndexError:
            blinds = self._new_blinds()
        return [blind.seal(product) for blind, product in zip(blinds, products, strict=True)]


class CkksServer:
    """The model's owner: has the plain model, and of a client its public material and ciphertexts, never more. For the
    parameters see :func:`plan`."""

    def __init__(self, model: nn.Module, in_shape: tuple[int, ...], flooded: bool = False, batch_size: int = 1):
        self.packing = plan(model, in_shape, batch_size, flooded).packing
        self.context = Context(self.packing.parameters)
        self.costs = Costs("server", self.packing.parameters.levels)
        started = time.perf_counter()
        self.kernel = _KERNELS[type(self.packing)](self.packing, model, self.context)
        self.costs.note("compile", started)

    def describe(self) -> dict:
        """What a client needs to know, for JSON."""
        return spec_of(self.packing)

    def open(self, public: bytes) -> Session:
        return Session(self, public)

    def receive(self, uploads: list[bytes]) -> list[sealapi.Ciphertext]:
        """A film's ciphertexts, checked."""
        if len(uploads) != self.packing.uploads:
            raise CiphertextError(f"{len(uploads)} ciphertexts came, {self.packing.uploads} belong to a film")
        return [self.context.receive(data, scale=self.packing.fresh_scale) for data in uploads]
