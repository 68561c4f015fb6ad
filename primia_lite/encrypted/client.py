"""The hospital's side of an encrypted diagnosis: it owns the secret key, encrypts films, and reads logits."""

from __future__ import annotations

import math
import threading
import time

import numpy as np

from primia_lite.config import UserError
from primia_lite.encrypted.costs import Costs
from primia_lite.encrypted.flooding import Flooding, flooding_std, wide_gaussian
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.packing import LinearPacking, Packing
from primia_lite.encrypted.seal import CiphertextError, Context
from primia_lite.encrypted.wire import join_keys

# With more, a batch's slots are the whole plaintext, and give the key away. Rounding to 6 decimals leaves every
# coefficient of it unknown by a standard deviation of 2^17 or more; a fresh ciphertext's noise has 3.
MAX_DECIMALS = 6


class CkksClient:
    """The hospital. It learns a few rounded logits.

    Parameters
    ----------
    packing : from the server (:func:`~primia_lite.encrypted.wire.packing_from`), or of a plan
    decimals : logits are rounded to so many, at most 6: a heuristic against attackers who are shown them, not a proof
    flooding : noise before the rounding, for logits that are shared; a proof, see
        :mod:`~primia_lite.encrypted.flooding` for what it assumes

    Attributes
    ----------
    key : the secret key, which stays here
    costs : of its last steps, see :class:`~primia_lite.encrypted.costs.Cost`
    flooding_std : of the noise, in logits; 0 without
    queries_left : decryptions that the flooding still covers
    """

    def __init__(self, packing: Packing, decimals: int = 3, flooding: Flooding | None = None):
        if decimals not in range(MAX_DECIMALS + 1):
            raise UserError(f"decimals is {decimals}: take 0 to {MAX_DECIMALS}; more of a batch give the key away")
        started = time.perf_counter()
        self.packing, self.decimals = packing, decimals
        self.costs = Costs("client", packing.parameters.levels)
        self.context = Context(packing.parameters)
        self.flooding_std, self.queries_left, self._lock = 0.0, None, threading.Lock()
        if flooding is not None:
            if not (isinstance(packing, LinearPacking) and packing.flooded):
                raise UserError("this packing has no room for flooding: take a linear head, and flooded=True")
            self._flood = flooding_std(packing.noise_bound(self.context), flooding.queries, flooding.statistical_bits)
            self.flooding_std, self.queries_left = self._flood / packing.reply_scale(self.context), flooding.queries
            if self.flooding_std > 1:
                raise UserError(
                    f"flooding of {self.flooding_std:.3g} leaves nothing of the logits: take fewer queries or bits"
                )
        self.key = SecretKey(self.context)
        self.costs.note("make keys", started)

    def public(self) -> bytes:
        """What the server needs: the packing, the public key, and the evaluation keys that the packing asks for."""
        started = time.perf_counter()
        keys = [self.key.public_key()]
        keys += [self.key.relin_keys()] if self.packing.relinearise else []
        keys += [self.key.galois_keys(self.packing.rotations)] if self.packing.rotations else []
        out = join_keys(self.packing, keys)
        self.refuse_secret(out)
        self.costs.note("publish keys", started, len(out))
        return out

    def refuse_secret(self, data: bytes) -> None:
        """A UserError if the secret key, in SEAL's form or as coefficients, is inside ``data``."""
        if self.key.is_inside(data):
            raise UserError("the secret key is inside what is about to be sent: send public() and encrypt() only")

    def encrypt(self, film: np.ndarray) -> list[bytes]:
        """The ciphertexts of a film's features [D] or pixels [H, W], as the model takes them; or of a batch of them."""
        started = time.perf_counter()
        film = np.asarray(film, dtype=np.float64)
        shape = film.shape[1:] if self.packing.in_slots else film.shape
        if shape != self.packing.in_shape:
            raise UserError(f"this film has shape {shape}, the model takes {self.packing.in_shape}: prepare it so")
        if self.packing.in_slots and not 1 <= len(film) <= self.packing.films:
            raise UserError(f"{len(film)} films, a batch has 1 to {self.packing.films}: split them")
        if not np.isfinite(film).all():
            raise UserError("the film has values that aren't finite: leave it out, or prepare it again")
        out = [self.key.encrypt(plaintext) for plaintext in self.packing.encode(self.context, film)]
        for data in out:
            self.refuse_secret(data)
        self.costs.note("encrypt", started, sum(map(len, out)))
        return out

    def decrypt(self, replies: list[bytes]) -> np.ndarray:
        """Logits, float64 [classes], rounded to ``decimals``; of a batch [films, classes], as many films as a batch can
        have: those behind the ones that were sent mean nothing.

        A CiphertextError for a reply that isn't one of this packing; a UserError for more decryptions than the flooding
        covers, or for logits of a CNN so large that they may have wrapped round.
        """
        started = time.perf_counter()
        logits = self.decrypt_exact(replies)
        largest, most = float(np.abs(logits).max()), self.packing.most_logit(self.context)
        if largest > most:
            raise UserError(f"logits of {largest:.1f} may have wrapped round ({most:.1f} is safe): normalise the film")
        error = self.packing.error(self.context)
        if error is not None:
            error = math.hypot(error, self.flooding_std, 10.0**-self.decimals / math.sqrt(12))
        self.costs.note("decrypt", started, level=self.packing.reply_level, error=error)
        return np.round(logits, self.decimals)

    def decrypt_exact(self, replies: list[bytes]) -> np.ndarray:
        """Logits before rounding, with the flooding: for measurements. Shown to others they give the key away."""
        if len(replies) != len(self.packing.logit_places):
            raise CiphertextError(f"{len(replies)} replies came, {len(self.packing.logit_places)} belong to a film")
        scale, level = self.packing.reply_scale(self.context), self.packing.reply_level
        if self.packing.in_slots:
            slots = [self.key.slots(reply, scale, level) for reply in replies]
            return np.stack([self.packing.decode(each) for each in slots], axis=1)
        out = []
        for reply, places in zip(replies, self.packing.logit_places, strict=True):
            integers = self.context.integers(reply, scale=scale, level=level)
            out += self.key.coefficients(integers, places, level)
        if self.queries_left is not None:
            with self._lock:
                if not self.queries_left:
                    raise UserError("the flooding covers no more decryptions: make a new CkksClient")
                self.queries_left -= 1
            out = [a + b for a, b in zip(out, wide_gaussian(len(out), self._flood), strict=True)]
        return np.array(out, dtype=np.float64) / scale
