"""Secure aggregation: the server learns the sum of the hospitals' updates and no single one.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017), figure 4, with the
neighbours of Bell et al. (CCS 2020) where hospitals are many. A round has five exchanges:

1. ``advertise``: each hospital makes two X25519 keys for this round alone.
2. ``share``: it draws the seed of a mask of its own and splits that seed, and its key for masks, among its neighbours
   (Shamir), each share encrypted for its receiver.
3. ``mask``: it computes its update, in integers modulo 2^32, and adds its own mask and one for each neighbour; the
   latter cancel in the sum.
4. ``confirm``: it signs the list of those whose masked updates arrived, and the keys of this round.
5. ``unmask``: given signatures of at least the threshold under one list, it hands out shares: for a hospital on the
   list of its own mask's seed, for one that vanished of its key, never both.

All that a hospital sends is signed by its Ed25519 identity, which the others have pinned in the :class:`Agreement`.

What holds: a server that follows the protocol, and up to ``threshold - 1`` hospitals that tell it all they know, learn
the sum of the others' updates and nothing else. So does a server that lies, if fewer than ``2 threshold - n`` hospitals
work with it: two lists of survivors can't both get enough signatures. Where hospitals have neighbours (above 100), a
tenth of them may work with the server, but for 2^-40 over 2^40 graphs that it tries; one that follows the protocol
learns the sum of the others, one that lies may split it into sums of groups, and gets no single update.

One round, one answer. Two sums of the same updates with different survivors give their difference away. So where no
noise protects an update, a hospital is told which :class:`Question` it answers. The question goes into the masks:
updates of other rounds, or from other weights, don't cancel. And a hospital signs one list of survivors for a round of
a study, and one set of weights, whatever the session, and remembers it for good (see :meth:`Client.save`). What was
signed may be asked for again, and gives the same sum. A round that ended before ``confirm`` may be asked again with
anybody; one that ended later only with the hospitals that were on the list: others may have opened that sum, and nobody
can tell. If these don't come back, take another study. With DP no such memory is kept: each answer is charged to a
ledger, or is a noisy update that was charged and is sent again.

What doesn't hold: with two survivors each learns the other's update, from the sum; a hospital that lies about its
update within the clip isn't noticed; nor is anybody kept from spoiling a round, or a server from giving the same
weights out in a later round of the study, with other hospitals, and subtracting: it gets as many sums as rounds were
agreed on. What sums tell of their parts is a matter for DP.

The server's code never holds an unmasked update: masked ones are added up as they come.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from primia_lite.config import UserError
from primia_lite.federation import neighbours as graphs
from primia_lite.federation import shamir
from primia_lite.federation.fixed_point import FixedPoint, centred, integers
from primia_lite.federation.masks import MAX_WORDS, add_masks
from primia_lite.federation.neighbours import default_threshold

STEPS = ("advertise", "share", "mask", "confirm", "unmask")
_PROTOCOL = "primia_lite secure aggregation 3"  # signed: who masks otherwise is refused, not summed


class ProtocolError(UserError):
    """A message that the protocol doesn't allow. Whoever gets it acts as if it had not come."""


class TooFewSurvivors(UserError):
    """Fewer hospitals than the threshold: the round ends without a sum, partial or whole."""


# --- what all agree on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """What hospitals and server settle before the first round; each hospital has its own copy.

    Attributes
    ----------
    identities : Ed25519 public key, 32 bytes, by hospital
    sizes : declared cohort size by hospital: a hospital's weight is its share of their sum
    length : entries of an update
    clip : the largest absolute value of an entry; what is above it is refused at the hospital
    threshold : fewest hospitals whose sum is revealed; above half of them. Left out, two thirds, rounded up
    weighted : False where updates are integers that are summed as they are (noise shared among hospitals)
    degree : how many others a hospital shares masks with. Left out, all of them up to 100 hospitals, then
        :func:`primia_lite.federation.neighbours.choose_degree`; where noise is shared always all, for a group of them
        would have too few shares of it
    share_threshold : how many shares give a secret; ``threshold`` where all share with all. With a ``degree``, above
        half of neighbours and oneself: else a server that lies unmasks a hospital alone

    Raises
    ------
    UserError
        Values that don't fit together, naming them.
    """

    identities: Mapping[str, bytes]
    sizes: Mapping[str, int]
    length: int
    clip: float = 32.0
    threshold: int | None = None
    weighted: bool = True
    degree: int | None = None
    share_threshold: int | None = None

    def __post_init__(self):
        n = len(self.identities)
        if n < 2:
            raise UserError(f"secure aggregation hides an update among others: {n} hospital has none, take 2 or more")
        if self.identities.keys() != self.sizes.keys():
            raise UserError(f"identities of {list(self.identities)} but sizes of {list(self.sizes)}")
        if odd := [name for name in self.identities if not (isinstance(name, str) and name and name.isprintable())]:
            raise UserError(f"{odd[0]!r} is no name of a hospital: take printable text")
        sizes = {name: _whole(size, f"{name}'s declared size") for name, size in self.sizes.items()}
        length = _whole(self.length, "length")
        if min(sizes.values()) < 1 or not 1 <= length < MAX_WORDS:
            raise UserError(f"declared sizes must be at least 1, the update's length 1 to {MAX_WORDS - 1}")
        keys = set(self.identities.values())
        if len(keys) < n or any(not isinstance(key, bytes) or len(key) != 32 for key in keys):
            raise UserError("each hospital needs an Ed25519 public key of its own, 32 bytes")
        if weak := [name for name, key in self.identities.items() if _is_weak(key)]:
            raise UserError(f"{weak[0]}'s public key is one that anybody could sign for: it has to make another")
        threshold = default_threshold(n) if self.threshold is None else _whole(self.threshold, "threshold")
        if not n / 2 < threshold <= n:
            raise UserError(
                f"threshold is {threshold} of {n} hospitals: it must be above half of them (else a server that names "
                f"different survivors to different hospitals learns single updates) and at most {n}"
            )
        degree, shares = n - 1, threshold
        if self.degree is not None and _whole(self.degree, "degree") < n - 1:
            degree, shares = int(self.degree), self.share_threshold
            most = min(degree + 1, threshold)
            if (
                degree % 2
                or degree < 2
                or shares is None
                or not (degree + 1) / 2 < _whole(shares, "share_threshold") <= most
            ):
                raise UserError(
                    f"degree is {degree}, share_threshold {shares}: take an even degree, 2 or more, and shares of more "
                    f"than half of it and one, up to {most}"
                )
        elif self.degree is None and n > graphs.COMPLETE_UP_TO and self.weighted:
            degree, shares = graphs.choose_degree(n, threshold=threshold)
        FixedPoint(self.clip, n)  # checks the clip
        # Copies, and one type each (the clip's is that of updates): equal agreements have one digest, and none changes.
        settled = {
            "identities": dict(self.identities), "sizes": sizes, "length": length,
            "clip": float(np.float32(self.clip)), "threshold": threshold, "weighted": bool(self.weighted),
            "degree": degree, "share_threshold": int(shares),
        }  # fmt: skip
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @property
    def names(self) -> list[str]:
        return sorted(self.identities)

    @cached_property
    def point(self) -> dict[str, int]:
        """Where each hospital's shares are taken."""
        return {name: i for i, name in enumerate(self.names, 1)}

    @property
    def fixed_point(self) -> FixedPoint:
        return FixedPoint(self.clip, len(self.identities))

    def weight(self, *names: str) -> float:
        """The share of some hospitals in all declared sizes, in (0, 1]."""
        return sum(self.sizes[name] for name in names) / sum(self.sizes.values())

    @cached_property
    def digest(self) -> str:
        """Goes into every signature and every key: parties with different agreements understand nothing."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def keys(self) -> dict[str, Ed25519PublicKey]:
        return {name: Ed25519PublicKey.from_public_bytes(key) for name, key in self.identities.items()}

    def as_dict(self) -> dict:
        """JSON-able; :meth:`from_dict` undoes it."""
        return {
            "identities": {name: key.hex() for name, key in sorted(self.identities.items())},
            "sizes": dict(sorted(self.sizes.items())), "length": self.length, "clip": self.clip,
            "threshold": self.threshold, "weighted": self.weighted, "degree": self.degree,
            "share_threshold": self.share_threshold,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict) -> Agreement:
        """The agreement that :meth:`as_dict` gave.

        Raises
        ------
        UserError
            Something else.
        """
        try:
            identities = {name: bytes.fromhex(key) for name, key in content["identities"].items()}
            return cls(**content | {"identities": identities})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no agreement on secure aggregation ({error}): take one that was saved") from error

    def neighbours(self, advertised: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """Who shares with whom, from the keys that all of them advertised."""
        seed = json.dumps([self.digest, sorted(advertised.items())]).encode()
        return graphs.neighbours(list(advertised), self.degree, seed)


@lru_cache(maxsize=2**14)
def _is_weak(identity: bytes) -> bool:
    """Whether a point has small order, so that a signature of one message passes for others, or is written oddly.

    The point's u on Curve25519 (RFC 7748, section 4.1) has small order where it has, and that is refused there.
    """
    p = 2**255 - 19
    y = int.from_bytes(identity, "little") % 2**255
    try:
        u = (1 + y) * pow(1 - y, -1, p) % p  # y = 1 has none
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(
            X25519PublicKey.from_public_bytes(u.to_bytes(32, "little"))
        )
    except ValueError:
        return True
    return y >= p


def _whole(value: object, what: str) -> int:
    try:
        return operator.index(None if isinstance(value, bool) else value)
    except TypeError as error:
        raise UserError(f"{what} is {value!r}: it must be a whole number") from error


class Question(NamedTuple):
    """What a round asks of every hospital, where no noise protects the answers.

    Attributes
    ----------
    round : names it for ever: of which study, and its number
    weights : the global ones' digest
    """

    round: str
    weights: str

    @classmethod
    def of(cls, round_: str, weights: Mapping[str, np.ndarray]) -> Question:
        """For weights by parameter, as arrays or tensors."""
        digest = hashlib.sha256()
        for name, value in sorted(weights.items()):
            array = np.asarray(value)
            digest.update(json.dumps([name, array.dtype.str, array.shape]).encode() + array.tobytes())
        return cls(round_, digest.hexdigest())


# --- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a hospital sends: a step's content, signed.

    Attributes
    ----------
    sender, session, step : of the message
    body : texts, lists of texts, and texts by name
    signature : Ed25519, 64 bytes, over the agreement's digest and everything else here
    vector : uint32 [L] in step ``mask``, else None
    """

    sender: str
    session: int
    step: str
    body: dict
    signature: bytes = b""
    vector: np.ndarray | None = None

    def signed(self, agreement: Agreement) -> bytes:
        """What the signature is over."""
        vector = "" if self.vector is None else hashlib.sha256(np.ascontiguousarray(self.vector).view("u1")).hexdigest()
        content = [_PROTOCOL, agreement.digest, self.session, self.step, self.sender, self.body, vector]
        return json.dumps(content, sort_keys=True).encode()

    def to_bytes(self) -> bytes:
        """The head's length (4 bytes), the head, and the vector in little-endian words."""
        head, tail = self.split()
        return b"".join([struct.pack("<I", len(head)), head, b"" if tail is None else memoryview(tail).cast("B")])

    def split(self) -> tuple[bytes, np.ndarray | None]:
        """All but the vector, and the vector: for transports that carry arrays as they are."""
        head = [self.sender, self.session, self.step, self.body, self.signature.hex()]
        return json.dumps(head).encode(), self.vector

    @classmethod
    def from_bytes(cls, content: bytes) -> Reply:
        """The inverse of :meth:`to_bytes`.

        Raises
        ------
        ProtocolError
            The bytes are cut short or can't be read.
        """
        if len(content) < 4 or len(content) < 4 + (size := struct.unpack_from("<I", content)[0]):
            raise ProtocolError("a message that was cut short")
        vector = None
        if len(content) > 4 + size:
            if (len(content) - 4 - size) % 4:
                raise ProtocolError("a message whose vector was cut short")
            vector = np.frombuffer(content, "<u4", offset=4 + size)
        return cls.joined(content[4 : 4 + size], vector)

    @classmethod
    def joined(cls, head: bytes, vector: np.ndarray | None) -> Reply:
        """The inverse of :meth:`split`.

        Raises
        ------
        ProtocolError
            The head can't be read.
        """
        try:
            sender, session, step, body, signature = json.loads(head)
            if type(session) is not int or not (_texts([sender, step]) and isinstance(body, dict)):
                raise TypeError
            if not all(isinstance(v, str) or _texts(v.values() if isinstance(v, dict) else v) for v in body.values()):
                raise TypeError
            return cls(sender, session, step, body, bytes.fromhex(signature), vector)
        except (ValueError, TypeError, RecursionError) as error:
            raise ProtocolError("a message that can't be read") from error

    def check(self, agreement: Agreement, session: int, step: str) -> Reply:
        """Itself, if an agreed hospital signed it for this step of this round.

        Raises
        ------
        ProtocolError
            It isn't from such a hospital, from another round or step, or forged.
        """
        if self.sender not in agreement.keys:
            raise ProtocolError(f"a message from {self.sender!r}, which isn't one of {', '.join(agreement.names)}")
        if (self.session, self.step) != (session, step):
            raise ProtocolError(
                f"a message of {self.sender} for {self.step} of round {self.session}, but this is {step} of {session}: "
                "it came late, or was sent again"
            )
        try:
            agreement.keys[self.sender].verify(self.signature, self.signed(agreement))
        except InvalidSignature as error:
            raise ProtocolError(f"a message in {self.sender}'s name that {self.sender} didn't sign") from error
        return self


def _texts(values: Iterable) -> bool:
    return set(map(type, values)) <= {str}


def _request(step: str, session: int, **body) -> bytes:
    return json.dumps({"step": step, "session": session, **body}).encode()


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _is_hex(text: object, size: int) -> bool:
    """Whether a text stands for so many bytes, in the one way that we write them."""
    return isinstance(text, str) and len(text) == 2 * size and set(text) <= set("0123456789abcdef")


def _decode(text: str, size: int, what: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"{what} can't be read") from error
    if len(content) != size:
        raise ProtocolError(f"{what} has {len(content)} bytes, not {size}")
    return content


# --- keys -------------------------------------------------------------------------------------------------------------


def _derive(secret: X25519PrivateKey, public: bytes, *what: object) -> bytes:
    """32 bytes that the two ends of a key exchange share, for one purpose."""
    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order
        raise ProtocolError("a key that no honest hospital sends") from error
    info = json.dumps([_PROTOCOL, *what]).encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)


def _mask_seed(
    agreement: Agreement, session: int, a: str, b: str, secret: X25519PrivateKey, public: bytes,
    question: Iterable[str] = (),
) -> bytes:  # fmt: skip
    return _derive(secret, public, "mask", agreement.digest, session, *sorted((a, b)), *question)


def _sign(mine: str, other: str) -> int:
    """Of the mask that two share, at the first: the second has the other sign, so that they cancel."""
    return 1 if mine < other else -1


_BOTH = 2 * shamir.SHARE_BYTES  # a share of the key for masks, then one of the own mask's seed
_SEALED = _BOTH + 16


# --- a hospital -------------------------------------------------------------------------------------------------------


@dataclass
class _Round:
    """A hospital's secrets and what it has seen, in one round."""

    session: int
    step: str  # the last one that it took part in
    mask_key: bytes
    share_key: bytes
    own_seed: bytes = b""
    advertised: dict[str, list[str]] = field(default_factory=dict)
    neighbours: list[str] = field(default_factory=list)
    shares: dict[str, str] = field(default_factory=dict)  # by whose secrets they are parts of, both, hexadecimal
    survivors: list[str] = field(default_factory=list)
    question: list[str] | None = None  # round and weights


class Client:
    """The hospital's side.

    Parameters
    ----------
    name, identity
        Who it is; its public key is in the agreement.
    last_session
        Number of the last round that it took part in. It answers later ones only: the server could otherwise have one
        update summed twice, with other hospitals each time, and subtract. Rounds of an agreement never start anew at 1:
        keep the number (see :meth:`save`), or agree on new identities.
    answered
        By round: the weights and survivors that it has signed for (see the module's text), to which it adds. One for
        all of a hospital's clients, whatever their agreement; :meth:`save` and :meth:`restore` know of it.

    Raises
    ------
    UserError
        The identity isn't the one that was agreed on.
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        agreement: Agreement,
        last_session: int = 0,
        answered: dict[str, list[str]] | None = None,
    ):
        if agreement.identities.get(name) != identity.public_key().public_bytes_raw():
            raise UserError(f"{name}'s identity isn't the one in the agreement")
        self.name, self.agreement, self.last_session = name, agreement, last_session
        self._identity, self._answered = identity, {} if answered is None else answered
        self._round: _Round | None = None
        self._lock = threading.Lock()  # two requests at once would both be answered

    def answer(self, request: bytes, update: Callable[[], np.ndarray], question: Question | None = None) -> Reply:
        """The reply to a request of the server.

        Parameters
        ----------
        update
            Called in step ``mask`` alone. Returns float32 [L], or int64 [L] where the agreement isn't ``weighted``.
        question
            In step ``mask``: what the update answers, as the hospital itself sees it. None where DP protects it.

        Raises
        ------
        ProtocolError
            The server asks for what the protocol doesn't allow. The hospital's secrets of the round are gone then.
        UserError
            The update has another shape, values that aren't finite or above the clip. Nothing was sent.
        """
        with self._lock:
            try:
                return self._answer(request, update, question)
            except BaseException:
                self._round = None
                raise

    def _answer(self, request: bytes, update: Callable[[], np.ndarray], question: Question | None) -> Reply:
        handlers = {
            "advertise": self._advertise, "share": self._share, "mask": self._open,
            "confirm": self._confirm, "unmask": self._unmask,
        }  # fmt: skip
        try:
            content = json.loads(request)
            step, session = content.pop("step"), content.pop("session")
            handle = handlers[step]
            self._expect(step, session)
            body = handle(session, **content)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ProtocolError(f"{self.name} was asked for something that can't be understood") from error
        vector = None
        if step == "mask":
            body["question"] = list(question or ())
            vector = self._masked(session, update, question)
        if step == "unmask":
            self._round = None  # it answers once
        else:
            self._round.step = step
        reply = Reply(self.name, session, step, body, vector=vector)
        signature = self._identity.sign(reply.signed(self.agreement))
        return Reply(self.name, session, step, body, signature, vector)

    def _expect(self, step: str, session: int) -> None:
        if type(session) is not int:
            raise ProtocolError(f"round {session!r} has no number")
        if step == STEPS[0]:
            if session <= self.last_session:
                raise ProtocolError(
                    f"{self.name} was asked for round {session} after round {self.last_session}: it takes part in each "
                    "once"
                )
            self._round = None
            return
        before = STEPS[STEPS.index(step) - 1]
        if self._round is None or (self._round.session, self._round.step) != (session, before):
            now = f"{self._round.step} of round {self._round.session} was last" if self._round else "it is in no round"
            raise ProtocolError(f"{self.name} was asked for {step} of round {session}, but {now}")

    # Each handler takes what a request holds, and returns the reply's body.

    def _advertise(self, session: int) -> dict:
        self.last_session = session
        self._round = _Round(session, "", os.urandom(32), os.urandom(32))
        keys = [X25519PrivateKey.from_private_bytes(k) for k in (self._round.mask_key, self._round.share_key)]
        return {"keys": [key.public_key().public_bytes_raw().hex() for key in keys]}

    def _share(self, session: int, advertised: list[str]) -> dict:
        mine, agreement = self._round, self.agreement
        mine.advertised = _advertised(advertised, agreement, session)
        own = [X25519PrivateKey.from_private_bytes(k).public_key().public_bytes_raw().hex()
               for k in (mine.mask_key, mine.share_key)]  # fmt: skip
        if mine.advertised.get(self.name) != own:
            raise ProtocolError(f"{self.name}'s own keys aren't among those that the server gave")
        mine.own_seed = os.urandom(32)
        mine.neighbours = list(agreement.neighbours(mine.advertised)[self.name])
        everyone = (*mine.neighbours, self.name)
        points = [agreement.point[name] for name in everyone]
        parts = [shamir.split(secret, agreement.share_threshold, points) for secret in (mine.mask_key, mine.own_seed)]
        both = {name: b"".join(part[agreement.point[name]] for part in parts) for name in everyone}
        mine.shares[self.name] = both.pop(self.name).hex()
        sealed = {
            other: _encode(self._cipher(self.name, other).encrypt(bytes(12), shares, None))
            for other, shares in both.items()
        }
        return {"shares": sealed, "commitment": hashlib.sha256(mine.own_seed).hexdigest()}

    def _cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """For one message, from one to the other: the key is used once, so the nonce may be 0."""
        mine = self._round
        other = receiver if sender == self.name else sender
        public = bytes.fromhex(mine.advertised[other][1])
        secret = X25519PrivateKey.from_private_bytes(mine.share_key)
        purpose = ("shares", self.agreement.digest, mine.session, sender, receiver)
        return ChaCha20Poly1305(_derive(secret, public, *purpose))

    def _open(self, session: int, shares: dict[str, str]) -> dict:
        mine, agreement = self._round, self.agreement
        if not shares.keys() <= set(mine.neighbours):
            raise ProtocolError(f"{self.name} got shares of hospitals that aren't its neighbours")
        unopened = []
        for other, sealed in sorted(shares.items()):
            try:
                content = _decode(sealed, _SEALED, f"{other}'s share")
                mine.shares[other] = self._cipher(other, self.name).decrypt(bytes(12), content, None).hex()
            except (InvalidTag, ProtocolError):
                unopened.append(other)  # as if it hadn't come
        if len(mine.shares) < agreement.share_threshold:
            odd = f"; what came in the name of {', '.join(unopened)} doesn't open" if unopened else ""
            raise ProtocolError(
                f"{self.name} got shares of {len(mine.shares) - 1} others: its update would hide among too few "
                f"(needed: {agreement.share_threshold - 1}){odd}"
            )
        return {"unopened": unopened}

    def _masked(self, session: int, update: Callable[[], np.ndarray], question: Question | None) -> np.ndarray:
        mine, agreement = self._round, self.agreement
        if question:
            mine.question = list(question)
            if self._answered.get(question.round, [question.weights])[0] != question.weights:
                raise ProtocolError(
                    f"{self.name} has answered this round for other weights: without DP it answers once. For more "
                    "rounds, or to start anew, agree on another study"
                )
        secret = X25519PrivateKey.from_private_bytes(mine.mask_key)
        seeds = [(mine.own_seed, 1)]
        for other in sorted(mine.shares.keys() - {self.name}):
            public = bytes.fromhex(mine.advertised[other][0])
            seed = _mask_seed(agreement, session, self.name, other, secret, public, question or ())
            seeds.append((seed, _sign(self.name, other)))
        values = np.asarray(update())
        wanted = np.float32 if agreement.weighted else np.int64
        if values.shape != (agreement.length,) or values.dtype != wanted:
            raise UserError(
                f"hospital {self.name}'s update is {values.dtype} {list(values.shape)}: "
                f"{np.dtype(wanted)} [{agreement.length}] was agreed on"
            )
        try:
            if agreement.weighted:
                vector = agreement.fixed_point.quantise(values, agreement.weight(self.name))
            else:
                vector = integers(values)
        except UserError as error:
            raise UserError(f"hospital {self.name}: {error}") from error
        add_masks(vector, seeds)
        mine.mask_key = mine.share_key = mine.own_seed = b""  # not needed again
        return vector

    def _confirm(self, session: int, survivors: list[str]) -> dict:
        mine, agreement = self._round, self.agreement
        taking_part = set(mine.advertised)
        if (
            not isinstance(survivors, list)
            or len(set(survivors)) < len(survivors)
            or not {self.name} <= set(survivors) <= taking_part
        ):
            raise ProtocolError(f"{self.name} got a list of survivors that isn't one")
        if len(survivors) < agreement.threshold:
            raise ProtocolError(
                f"{self.name} got {len(survivors)} survivors, fewer than the threshold of {agreement.threshold}"
            )
        if not set(mine.neighbours) & set(survivors) <= mine.shares.keys():
            raise ProtocolError(f"{self.name} got survivors that it shares no mask with")
        mine.survivors = sorted(survivors)
        confirmation = _confirmation(mine.survivors, mine.advertised)
        if mine.question:
            round_, weights = mine.question
            answer = [weights, confirmation["survivors"]]
            if self._answered.setdefault(round_, answer) != answer:
                raise ProtocolError(
                    f"{self.name} has signed other survivors, or weights, of this round: without DP two sums would "
                    "give their difference away. Ask again with the same hospitals, or agree on another study"
                )
        return confirmation

    def _unmask(self, session: int, confirmed: list[str]) -> dict:
        mine, agreement = self._round, self.agreement
        if len(confirmed) > len(agreement.names):
            raise ProtocolError(f"{self.name} got more confirmations than there are hospitals")
        wanted, signers = _confirmation(mine.survivors, mine.advertised), set()
        for text in confirmed:
            reply = _relayed(text).check(agreement, session, "confirm")
            if reply.body != wanted:
                raise ProtocolError(
                    f"{reply.sender} signed other survivors or keys than {self.name}: the server told them different "
                    "things"
                )
            signers.add(reply.sender)
        if not signers <= set(mine.survivors) or len(signers) < agreement.threshold or self.name not in signers:
            raise ProtocolError(
                f"{len(signers)} hospitals confirmed the survivors, but {agreement.threshold} are needed, "
                f"{self.name} among them"
            )
        keys, seeds = {}, {}
        for name, both in mine.shares.items():
            share = bytes.fromhex(both)
            if name in mine.survivors:
                seeds[name] = share[shamir.SHARE_BYTES :].hex()
            else:
                keys[name] = share[: shamir.SHARE_BYTES].hex()
        return {"keys": keys, "seeds": seeds}

    # A process that ends between two steps keeps its round at the hospital.

    def save(self) -> bytes:
        """The round that it is in, secrets included: for the hospital's own disk and nobody else.

        A state must not come back twice. Write it after :meth:`answer` and before the reply leaves, over the one
        before, and answer a request from the last one only. A hospital that goes back to an older state (a backup, a
        copy in a second process) answers a step again, and no code here can tell: two masked updates from one state
        give their difference away, two lists of survivors both secrets of a hospital, and with them its update.
        """
        round_ = self._round and _hexadecimal(vars(self._round))
        kept = {"last_session": self.last_session, "round": round_}
        if self._answered:
            kept["answered"] = self._answered
        return json.dumps(kept).encode()

    def restore(self, content: bytes) -> Client:
        """Go on from what :meth:`save` kept. Returns itself.

        Raises
        ------
        ProtocolError
            The state isn't later than what this client has done since: going back would answer a round again.
        """
        kept = json.loads(content)
        if kept["last_session"] < self.last_session + bool(kept["round"]):
            raise ProtocolError(
                f"{self.name} has taken part in round {self.last_session}, and what was kept is of round "
                f"{kept['last_session']}: it doesn't go back. Restore into a new Client, once"
            )
        self.last_session = kept["last_session"]
        self._answered.update(kept.get("answered", {}))
        if kept["round"]:
            secrets = {k: bytes.fromhex(kept["round"][k]) for k in ("mask_key", "share_key", "own_seed")}
            self._round = _Round(**kept["round"] | secrets)
        return self


def _confirmation(survivors: Iterable[str], advertised: Mapping[str, list[str]]) -> dict:
    """What is signed before secrets are shared out. The round's fresh keys are in it, so that no other round's will do,
    and that all know the same ones."""
    # Digests, for each hospital gets what all the others signed.
    lists = {"survivors": sorted(survivors), "keys": sorted(advertised.items())}
    return {what: hashlib.sha256(json.dumps(content).encode()).hexdigest() for what, content in lists.items()}


def _hexadecimal(content: dict) -> dict:
    return {key: value.hex() if isinstance(value, bytes) else value for key, value in content.items()}


def _relayed(text: str) -> Reply:
    return Reply.joined(text.encode(), None)


def _advertised(replies: list[str], agreement: Agreement, session: int) -> dict[str, list[str]]:
    """Keys by hospital, from relayed and signed messages.

    Raises
    ------
    ProtocolError
        A forged or doubled message, keys that come twice, fewer hospitals than the threshold.
    """
    keys: dict[str, list[str]] = {}
    for text in replies:
        reply = _relayed(text).check(agreement, session, "advertise")
        if reply.sender in keys:
            raise ProtocolError(f"{reply.sender}'s keys come twice")
        keys[reply.sender] = _public_keys(reply)
    if len({key for pair in keys.values() for key in pair}) < 2 * len(keys):
        raise ProtocolError("two hospitals advertise one key")
    if len(keys) < agreement.threshold:
        raise ProtocolError(f"{len(keys)} hospitals advertise keys, fewer than the threshold of {agreement.threshold}")
    return keys


def _public_keys(reply: Reply) -> list[str]:
    keys = reply.body.get("keys")
    if not (isinstance(keys, list) and len(keys) == 2 and all(_is_hex(key, 32) for key in keys)):
        raise ProtocolError(f"{reply.sender} advertises keys that can't be read")
    return keys


# --- the server -------------------------------------------------------------------------------------------------------


# What a reply's body holds: no more and no less.
_BODIES = {"advertise": {"keys"}, "share": {"shares", "commitment"}, "mask": {"question", "unopened"},
           "confirm": {"survivors", "keys"}, "unmask": {"keys", "seeds"}}  # fmt: skip


class Server:
    """The server's side of one round. It holds no secret and, until the end, only a masked sum.

    Parameters
    ----------
    session
        Number of the round: above that of every round before.

    Attributes
    ----------
    step : what it waits for; None once the sum is there
    total : int32 [L], the exact sum of what the survivors quantised; None before
    survivors : whose updates are in it
    """

    def __init__(self, agreement: Agreement, session: int):
        self.agreement, self.session = agreement, session
        self.step: str | None = STEPS[0]
        self.total: np.ndarray | None = None
        self.survivors: tuple[str, ...] = ()
        self._replies: dict[str, dict[str, Reply]] = {step: {} for step in STEPS}
        self._sum: np.ndarray | None = None
        self._public: set[str] = set()  # keys that came

    def requests(self) -> dict[str, bytes]:
        """What to ask each hospital that is still in the round."""
        step, session = self.step, self.session
        if step == "advertise":
            return dict.fromkeys(self.agreement.names, _request(step, session))
        if step == "share":
            relayed = [reply.split()[0].decode() for reply in self._replies["advertise"].values()]
            return dict.fromkeys(self._replies["advertise"], _request(step, session, advertised=relayed))
        if step == "mask":
            sent: dict[str, dict[str, str]] = {name: {} for name in self._replies["share"]}
            for sender, reply in self._replies["share"].items():
                for name, sealed in reply.body["shares"].items():
                    if name in sent:
                        sent[name][sender] = sealed
            return {name: _request(step, session, shares=shares) for name, shares in sent.items()}
        names = list(self.survivors)
        if step == "confirm":
            return dict.fromkeys(names, _request(step, session, survivors=names))
        relayed = [reply.split()[0].decode() for reply in self._replies["confirm"].values()]
        return dict.fromkeys(self._replies["confirm"], _request(step, session, confirmed=relayed))

    def receive(self, reply: Reply) -> None:
        """Take a hospital's reply.

        Raises
        ------
        ProtocolError
            It is forged, late, from an unknown hospital or one that was not asked, came before, or has another form.
            The round goes on as if it had not come.
        """
        step = self.step
        if step is None:
            raise ProtocolError(f"a message of {reply.sender} after the end of round {self.session}: it came late")
        if reply.sender in self._replies[step]:
            raise ProtocolError(f"{reply.sender} sent its {step} twice: the first one counts")
        if reply.step == step:  # else it came late, which says more
            self._check_vector(reply)
        reply.check(self.agreement, self.session, step)
        if step != STEPS[0] and reply.sender not in self._asked():
            raise ProtocolError(f"{reply.sender} answers, but wasn't asked: it missed a step before")
        if reply.body.keys() != _BODIES[step]:
            raise ProtocolError(f"{reply.sender}'s {step} holds {sorted(reply.body)}, not {sorted(_BODIES[step])}")
        getattr(self, f"_take_{step}")(reply)
        self._replies[step][reply.sender] = Reply(
            reply.sender, reply.session, reply.step, reply.body, reply.signature, None
        )

    def _asked(self) -> Iterable[str]:
        return self._replies[STEPS[STEPS.index(self.step) - 1]]

    def _take_advertise(self, reply: Reply) -> None:
        mine = set(_public_keys(reply))
        if len(mine) < 2 or mine & self._public:
            raise ProtocolError(f"{reply.sender} advertises a key that another one has")
        for key in mine:  # all the others would end the round for a bad one
            try:
                _derive(X25519PrivateKey.generate(), bytes.fromhex(key), "trial")
            except ProtocolError as error:
                raise ProtocolError(f"{reply.sender} advertises {error}") from error
        self._public |= mine

    def _take_share(self, reply: Reply) -> None:
        shares, others = reply.body.get("shares"), self._neighbours[reply.sender]
        if not isinstance(shares, dict) or shares.keys() != set(others):
            raise ProtocolError(f"{reply.sender} sent shares for others than its neighbours")
        for sealed in shares.values():
            _decode(sealed, _SEALED, f"{reply.sender}'s share")
        if not _is_hex(reply.body["commitment"], 32):
            raise ProtocolError(f"{reply.sender}'s commitment can't be read")

    def _check_vector(self, reply: Reply) -> None:
        if self.step != "mask":
            if reply.vector is not None:
                raise ProtocolError(f"{reply.sender} sent a vector in {self.step}")
            return
        vector, length = reply.vector, self.agreement.length
        if not isinstance(vector, np.ndarray) or vector.dtype != np.uint32 or vector.shape != (length,):
            raise ProtocolError(f"{reply.sender} sent no uint32 vector of {length} entries")

    def _take_mask(self, reply: Reply) -> None:
        sender, unopened, came = reply.sender, reply.body["unopened"], self._replies["mask"]
        first = next(iter(came.values()), reply)
        if reply.body["question"] != first.body["question"]:
            raise ProtocolError(
                f"{sender} answers for another round, or other weights, than {first.sender}, who came first: it is "
                "left out"
            )
        if not isinstance(unopened, list) or not set(unopened) <= set(self._neighbours[sender]):
            raise ProtocolError(f"{sender} names shares that it wasn't sent")
        # They have no mask together, so one sum can't hold both. Who sealed the share goes, if it hasn't come yet and
        # enough of the others have its shares: its masks with them are to be taken off.
        for other in unopened:
            without = {sender} | {name for name, masked in came.items() if other in masked.body["unopened"]}
            holders = set(self._neighbours[other]) & self._replies["share"].keys() - without
            if other in came or len(holders) < self.agreement.share_threshold:
                raise ProtocolError(
                    f"{other} sent {sender} a share that doesn't open, and the sum needs {other}: {sender} is left "
                    f"out. If that comes again, leave out {other}"
                )
        if after := [other for other, masked in came.items() if sender in masked.body["unopened"]]:
            raise ProtocolError(f"{sender} sent {after[0]} a share that doesn't open: {sender} is left out")
        if self._sum is None:
            self._sum = reply.vector.copy()
        else:
            self._sum += reply.vector

    def _take_confirm(self, reply: Reply) -> None:
        if reply.body != self._confirmation:
            raise ProtocolError(f"{reply.sender} confirms other survivors, or other keys")

    def _take_unmask(self, reply: Reply) -> None:
        held = {reply.sender, *self._neighbours[reply.sender]} & self._replies["share"].keys()
        held -= set(self._unopened(reply.sender))
        wanted = {"seeds": held & set(self.survivors), "keys": held - set(self.survivors)}
        for kind, names in wanted.items():
            shares = reply.body[kind]
            # For each hospital the one share that is asked for: both together would unmask it.
            if not isinstance(shares, dict) or shares.keys() != names:
                raise ProtocolError(f"{reply.sender} sent shares for others than was asked")
            if not all(_is_hex(share, shamir.SHARE_BYTES) for share in shares.values()):
                raise ProtocolError(f"{reply.sender}'s shares can't be read")

    def _unopened(self, name: str) -> list[str]:
        return self._replies["mask"][name].body["unopened"]

    @property
    def _keys(self) -> dict[str, list[str]]:
        return {name: reply.body["keys"] for name, reply in self._replies["advertise"].items()}

    @cached_property
    def _confirmation(self) -> dict:
        return _confirmation(self.survivors, self._keys)

    @cached_property
    def _neighbours(self) -> dict[str, tuple[str, ...]]:
        return self.agreement.neighbours(self._keys)

    def close(self) -> None:
        """End a step, with those who have answered, and go on to the next; after the last one ``total`` is there.

        Raises
        ------
        TooFewSurvivors
            Fewer than the threshold answered. The round is over, and its sum stays masked.
        ProtocolError
            Shares that don't fit what they are shares of: somebody lied, and there is no sum.
        """
        answered = self._replies[self.step]
        if len(answered) < self.agreement.threshold:
            gone = sorted(set(self.agreement.names) - set(answered))
            step, asked = self.step, any(reply.body["question"] for reply in self._replies["mask"].values())
            signed = f" (without DP: {', '.join(self.survivors)}, and no others)" if asked and self.survivors else ""
            self._end()
            raise TooFewSurvivors(
                f"round {self.session} ended at {step}: {len(answered)} hospitals answered, fewer than the threshold "
                f"of {self.agreement.threshold} (missing: {', '.join(gone)}). There is no sum, and what was charged to "
                f"ledgers stays charged. Ask again once they are back{signed}"
            )
        if self.step == "mask":
            self.survivors = tuple(sorted(answered))
        elif self.step == "unmask":
            try:
                self._unmask()
            finally:
                self._end()
            return
        self.step = STEPS[STEPS.index(self.step) + 1]

    def _end(self) -> None:
        """Keep nothing that a masked sum, or somebody's transcript, could be unmasked with."""
        self.step = self._sum = None
        self._replies = {step: {} for step in STEPS}

    def _secret(self, kind: str, name: str) -> bytes:
        point, replies = self.agreement.point, self._replies["unmask"]
        holders = replies.keys() & {name, *self._neighbours[name]}
        held = {point[holder]: replies[holder].body[kind] for holder in holders}
        shares = {at: bytes.fromhex(secrets[name]) for at, secrets in held.items() if name in secrets}
        try:
            return shamir.combine(shares, self.agreement.share_threshold)
        except ValueError as error:
            if len(shares) < self.agreement.share_threshold:
                raise TooFewSurvivors(
                    f"round {self.session} ended: too few of {name}'s neighbours are left ({error})"
                ) from error
            raise ProtocolError(f"the shares of {name}'s secret don't fit together: there is no sum") from error

    def _unmask(self) -> None:
        seeds = []
        for name in self.survivors:
            seed = self._secret("seeds", name)
            if hashlib.sha256(seed).hexdigest() != self._replies["share"][name].body["commitment"]:
                raise ProtocolError(f"the shares of {name}'s own mask don't give what it committed to: there is no sum")
            seeds.append((seed, -1))
        for gone in sorted(set(self._replies["share"]) - set(self.survivors)):
            others = [other for other in self._neighbours[gone] if other in self.survivors]
            staying = [other for other in others if gone not in self._unopened(other)]
            if not staying:
                continue
            secret = X25519PrivateKey.from_private_bytes(self._secret("keys", gone))
            if secret.public_key().public_bytes_raw().hex() != self._replies["advertise"][gone].body["keys"][0]:
                raise ProtocolError(f"the shares of {gone}'s key don't give its key: there is no sum")
            for other in staying:
                public = bytes.fromhex(self._replies["advertise"][other].body["keys"][0])
                question = self._replies["mask"][other].body["question"]
                seed = _mask_seed(self.agreement, self.session, gone, other, secret, public, question)
                seeds.append((seed, -_sign(other, gone)))
        add_masks(self._sum, seeds)
        self.total, self._sum = centred(self._sum), None

    @property
    def mean(self) -> np.ndarray:
        """float32 [L]: the survivors' mean, weighted by declared sizes."""
        return self.agreement.fixed_point.mean(self.total, self.agreement.weight(*self.survivors))


Exchange = Callable[[str, Mapping[str, bytes]], Iterable[Reply]]


def run(server: Server, exchange: Exchange) -> list[str]:
    """Take a round to its end.

    Parameters
    ----------
    exchange
        The transport: called with the step and a request for each hospital; gives the replies that came in time.

    Returns
    -------
    why replies were refused, a line each; those hospitals count as gone

    Raises
    ------
    TooFewSurvivors, ProtocolError
        See :meth:`Server.close`.
    """
    refused = []
    while server.step is not None:
        for reply in exchange(server.step, server.requests()):
            try:
                server.receive(reply)
            except ProtocolError as error:
                refused.append(str(error))
        server.close()
    return refused
