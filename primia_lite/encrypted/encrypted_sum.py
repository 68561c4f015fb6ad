"""Aggregation under CKKS: hospitals encrypt under a key that they share, the server adds without reading.

The second way to hide single updates, for comparison with :mod:`primia_lite.secagg` (CKKS: Cheon, Kim, Kim,
Song, ASIACRYPT 2017). A round has two exchanges:

1. ``encrypt``: each hospital weights its update and encrypts it, 4,096 entries a ciphertext.
2. ``decrypt``: the server adds what came, and sends the sums to one hospital, which decrypts and *floods* them: adds
   noise before anything leaves. Bare decryptions would give the key away, as their noise depends on it (Li and
   Micciancio, EUROCRYPT 2021).

Threat model, weaker than that of masks:

- **The server and one hospital together see everything**: each hospital has the key to every other's upload. So the
  server must work with none of them, and no hospital may see another's upload on its way.
- The server must follow the protocol. One that passes a single hospital's ciphertexts off as the sum is told that
  update by whoever decrypts it. **One sum that the server makes up gives the key away**: flooding hides the noise of
  honest sums, while a ciphertext can be chosen so that its decryption is the key itself, far above any noise, and no
  hospital can tell it from a sum. With the key go all uploads that the server has or will get under it, of every
  hospital. Masks withstand both.
- What a server that follows the protocol is told, the flooded mean, doesn't help it to the key: see
  :mod:`primia_lite.encrypted.flooding` for the guarantee and what it assumes.
- As with masks, each of two survivors learns the other's update, and a hospital that lies within the clip passes.

Nothing is lost when hospitals vanish: any ciphertexts add up, and the weights of those who stay are public. A mean
isn't exact: its entries carry the flooding, whose standard deviation :attr:`Terms.flooding_std` tells beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from primia_lite.config import UserError
from primia_lite.encrypted.flooding import flooding_std
from primia_lite.encrypted.keys import SecretKey
from primia_lite.encrypted.packing import NOISE_STD
from primia_lite.encrypted.parameters import Parameters
from primia_lite.encrypted.seal import CiphertextError, Context, dump
from primia_lite.federation.aggregation import Aggregate, check, flat, length, unflat
from primia_lite.privacy.noise import rounded_gaussian
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.secagg import TooFewSurvivors
from primia_lite.secagg.fixed_point import check_clip

# Nothing is multiplied, so one prime does. SEAL stores each coefficient in 64 bits: the largest prime that it has, of
# 60, costs no more than a small one and leaves most room for flooding. N = 4,096 is the least at 128-bit security; a
# sum takes half of the modulus, so that what isn't one, under another key, is noticed.
PARAMETERS = Parameters(4096, (60,), 58)
_N, _SCALE = PARAMETERS.poly_modulus_degree, 2.0**PARAMETERS.scale_bits
_SLACK = 2.0**40  # far above noise and what encoding rounds, far below a sum's room
_TAIL = 60  # of a noise above its bound: e^-60


@dataclass(frozen=True)
class Terms:
    """What hospitals and server settle before the first round.

    Attributes
    ----------
    sizes : declared cohort size by hospital: a hospital's weight is its share of their sum
    length : entries of an update
    clip : the largest absolute value of an entry; what is above it is refused at the hospital
    threshold : fewest hospitals whose sum is decrypted
    rounds : that one key serves; more rounds or entries take more flooding
    statistical_bits : of flooding's guarantee, for all those rounds together
    """

    sizes: Mapping[str, int]
    length: int
    clip: float = 32.0
    threshold: int = 2
    rounds: int = 1000
    statistical_bits: float = 30.0

    def __post_init__(self):
        n = len(self.sizes)
        if n < 2 or min(self.sizes.values()) < 1 or self.length < 1:
            raise UserError("2 hospitals or more, declared sizes and an update's length of at least 1 are needed")
        if not 0 < self.clip < math.inf:
            raise UserError(f"clip is {self.clip}: it must be above 0 and finite")
        if not 2 <= self.threshold <= n:
            raise UserError(f"threshold is {self.threshold} of {n} hospitals: a sum of one would be its update; take 2")
        if not self.integer_std <= 2.0**41:
            raise UserError("flooding leaves no precision: take fewer rounds a key, or fewer statistical_bits")

    @property
    def chunks(self) -> int:
        """Ciphertexts of one update."""
        return -(-self.length // _N)

    def weight(self, *names: str) -> float:
        return sum(self.sizes[name] for name in names) / sum(self.sizes.values())

    @property
    def noise_bound(self) -> float:
        """Noise of a sum, L2 norm over a ciphertext, passed with probability e^-60 (Hsu, Kakade, Zhang 2012, for
        sub-Gaussian vectors; a fresh ciphertext's noise is that, and doesn't depend on the key)."""
        return NOISE_STD * math.sqrt(len(self.sizes) * (_N + 2 * math.sqrt(_N * _TAIL) + 2 * _TAIL))

    @property
    def integer_std(self) -> float:
        """Standard deviation of flooding, in a ciphertext's integers: a hospital decrypts each round's sum once."""
        queries = self.rounds * len(self.sizes) * self.chunks
        return flooding_std(self.noise_bound, queries, self.statistical_bits)

    def flooding_std(self, *survivors: str) -> float:
        """Standard deviation of an entry of their mean, from flooding."""
        return self.integer_std / _SCALE * self.clip / self.weight(*survivors)


class SumHospital:
    """A hospital's side: it has the key, which is the same for all hospitals. One makes it (``SecretKey(Context(
    PARAMETERS))``) and hands it to the others by a channel that the server can't read."""

    def __init__(self, name: str, key: SecretKey, terms: Terms):
        self.name, self.terms = name, terms
        self._key, self._sent, self._decrypted = key, 0, 0

    def encrypt(self, session: int, update: Callable[[], np.ndarray]) -> Iterator[bytes]:
        """Ciphertexts of its weighted update, one after the other; ``update`` returns float32 [L]. A second update in a
        round, another shape, or values that aren't finite or above the clip are a UserError, and nothing is sent."""
        if session <= self._sent:
            raise UserError(f"{self.name} was asked for round {session} after {self._sent}: it takes part in each once")
        values, clip = np.asarray(update()), self.terms.clip
        if values.shape != (self.terms.length,) or values.dtype != np.float32:
            found, agreed = f"{values.dtype} {values.shape}", f"float32 [{self.terms.length}]"
            raise UserError(f"hospital {self.name}'s update is {found}, {agreed} was agreed on")
        try:
            for part in _parts(values):
                check_clip(part.astype(np.float64), clip)
        except UserError as error:
            raise UserError(f"hospital {self.name}: {error}") from error
        self._sent = session
        context, factor = self._key.context, np.float64(self.terms.weight(self.name) / clip)
        return (self._key.encrypt(context.encode_coefficients(part * factor, _SCALE)) for part in _parts(values))

    def decrypt(self, session: int, survivors: Iterable[str], sums: Iterable[bytes]) -> Iterator[bytes]:
        """The survivors' mean, flooded, float32 of 4,096 entries at a time, as bytes. Whose ciphertexts are in the
        sums the server says: the hospital can't check it. Each round is decrypted once, and no sum of fewer than the
        threshold (TooFewSurvivors); what is no sum of the hospitals' ciphertexts is a CiphertextError."""
        names, terms = set(survivors), self.terms
        if not names <= terms.sizes.keys() or len(names) < terms.threshold:
            raise TooFewSurvivors(
                f"{self.name} was asked to decrypt a sum of {sorted(names)}: {terms.threshold} are the fewest"
            )
        if not self._decrypted < session <= terms.rounds:
            raise UserError(
                f"round {session} after {self._decrypted}: once each, and the key serves {terms.rounds} rounds"
            )
        self._decrypted = session
        return self._flooded(sums, terms.clip / terms.weight(*names))

    def _flooded(self, sums: Iterable[bytes], factor: float) -> Iterator[bytes]:
        for i, data in enumerate(sums):
            entries = min(_N, self.terms.length - i * _N)
            if entries < 1:
                raise CiphertextError(f"more than {self.terms.chunks} sums came")
            integers = self._key.polynomial(self._key.context.receive(data, scale=_SCALE, seeded=False))
            # Other keys give numbers all over the modulus, up to 2^59; what isn't used is 0 but for noise.
            if (np.abs(integers) > np.where(np.arange(_N) < entries, _SCALE, 0) + _SLACK).any():
                raise CiphertextError(f"sum {i} holds what was encrypted under another key, or altered")
            flooded = integers[:entries] + rounded_gaussian(entries, self.terms.integer_std, SecureGenerator())
            yield (flooded * (factor / _SCALE)).astype("<f4").tobytes()


class SumServer:
    """The server's side of one round. It has no key: it checks the form of ciphertexts and adds them."""

    def __init__(self, terms: Terms, session: int):
        self.terms, self.session = terms, session
        self._context = Context(PARAMETERS)
        self._coming: dict[str, list] = {}
        self._added: list[str] = []
        self._sums: list = []

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose ciphertexts are in the sums."""
        return tuple(sorted(self._added))

    def receive(self, name: str, data: bytes) -> None:
        """The next ciphertext of a hospital. Its update counts once all have come. If these bytes are none, or one too
        many, a CiphertextError; what the hospital sent before is dropped then, and it counts as gone."""
        if name not in self.terms.sizes:
            raise UserError(f"a ciphertext from {name!r}, which isn't one of {', '.join(sorted(self.terms.sizes))}")
        if name in self._added:
            raise CiphertextError(f"{name} sent its update twice: the first one counts")
        coming = self._coming.pop(name, [])
        try:
            coming.append(self._context.receive(data, scale=_SCALE))
        except CiphertextError as error:
            raise CiphertextError(f"hospital {name}: {error}") from error
        if len(coming) < self.terms.chunks:
            self._coming[name] = coming
            return
        for total, part in zip(self._sums, coming, strict=bool(self._added)):
            self._context.evaluator.add_inplace(total, part)
        self._sums = self._sums or coming
        self._added.append(name)

    def sums(self) -> Iterator[bytes]:
        """For a hospital to decrypt; TooFewSurvivors if fewer updates than the threshold came."""
        if len(self._added) < self.terms.threshold:
            gone = sorted(set(self.terms.sizes) - set(self._added))
            raise TooFewSurvivors(
                f"round {self.session} ended below the threshold of {self.terms.threshold}, without {', '.join(gone)}. "
                "There is no sum, and what was charged to ledgers stays charged. Ask again once they are back"
            )
        return map(dump, self._sums)

    def finish(self, parts: Iterable[bytes]) -> np.ndarray:
        """float32 [L]: the mean that a hospital sent back."""
        mean = np.frombuffer(b"".join(parts), "<f4")
        if len(mean) != self.terms.length:
            raise CiphertextError(f"a mean of {len(mean)} entries came back instead of {self.terms.length}")
        return mean.astype(np.float32)


class CkksAggregation:
    """This module's protocol between parties in this process, as the rounds use it.

    Parameters
    ----------
    threshold, clip : see :class:`Terms`
    rounds : after so many the hospitals take a new key
    listen
        Called with each message: round, step, ``request`` or ``reply``, the hospital, and the bytes. All that a server
        sees goes through here.

    Attributes
    ----------
    key : that all hospitals have, and the server doesn't; None before the first round
    terms : of the last round
    """

    def __init__(
        self,
        threshold: int = 2,
        clip: float = 32.0,
        rounds: int = 1000,
        *,
        listen: Callable[[int, str, str, str, bytes], None] = lambda *_: None,
    ):
        self.threshold, self.clip, self.rounds, self.listen = threshold, clip, rounds, listen
        self.terms: Terms | None = None
        self.key: SecretKey | None = None
        self._hospitals: dict[str, SumHospital] = {}
        self._session = 0

    @property
    def name(self) -> str:
        return f"CKKS aggregation, one key for all hospitals, clip {self.clip:g}"

    def min_revealed(self, hospitals: int) -> int:
        return self.threshold

    def aggregate(self, compute_update, sizes, template, number, *, integer_sum=False, question=None) -> Aggregate:
        check(compute_update, sizes)
        if integer_sum:
            raise UserError(
                "shared noise needs exact sums of integers, but CKKS approximates, and whoever works with the server "
                "has the key: use SecureAggregation, or let each hospital add its own noise"
            )
        self._agree(Terms(dict(sizes), length(template), self.clip, self.threshold, self.rounds))
        self._session += 1
        session, server = self._session, SumServer(self.terms, self._session)
        for name in sorted(compute_update):
            self.listen(number, "encrypt", "request", name, json.dumps(["encrypt", session]).encode())
            update = lambda name=name: flat(compute_update[name]().delta, template, name)  # noqa: E731
            for data in self._hospitals[name].encrypt(session, update):
                self.listen(number, "encrypt", "reply", name, data)
                server.receive(name, data)
        survivors, name = server.survivors, server.survivors[0]
        self.listen(number, "decrypt", "request", name, json.dumps(["decrypt", session, survivors]).encode())
        sums = self._heard(server.sums(), number, "request", name)
        parts = self._heard(self._hospitals[name].decrypt(session, survivors, sums), number, "reply", name)
        return Aggregate(unflat(server.finish(parts), template), survivors)

    def _heard(self, messages: Iterable[bytes], number: int, kind: str, name: str) -> Iterator[bytes]:
        for data in messages:
            self.listen(number, "decrypt", kind, name, data)
            yield data

    def _agree(self, terms: Terms) -> None:
        if terms != self.terms or self._session >= self.rounds:
            self.terms, self._session, self.key = terms, 0, SecretKey(Context(PARAMETERS))
            self._hospitals = {name: SumHospital(name, self.key, terms) for name in terms.sizes}


def read_upload(key: SecretKey, terms: Terms, name: str, ciphertexts: Iterable[bytes]) -> np.ndarray:
    """float32 [L]: the update of one hospital, from what it sent to the server and the key that every hospital has."""
    parts = [key.polynomial(key.context.receive(data, scale=_SCALE)) for data in ciphertexts]
    return (np.concatenate(parts)[: terms.length] * (terms.clip / terms.weight(name) / _SCALE)).astype(np.float32)


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[start : start + _N] for start in range(0, len(values), _N))
