"""Secure aggregation: the server learns the sum of the hospitals' updates and no single one.

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017), figure 4, with the
neighbours of Bell et al. (CCS 2020) where hospitals are many. A round has five exchanges:

1. ``advertise``: each hospital makes two X25519 keys for this round alone.
2. ``share``: it draws the seed of a mask of its own and splits that seed, and its key for masks, among its neighbours
   (Shamir), each share encrypted for its receiver.
3. ``mask``: it computes its update, in integers modulo 2^32, and adds its own mask and one for each neighbour; the
   latter cancel in the sum.
4. ``confirm``: it signs the list of those whose masked updates arrived.
5. ``unmask``: given signatures of at least the threshold under one list, it hands out shares: for a hospital on the
   list of its own mask's seed, for one that vanished of its key, never both.

All that a hospital sends is signed by its Ed25519 identity, which the others have pinned in the :class:`Agreement`.

What holds: a server that follows the protocol, and up to ``threshold - 1`` hospitals that tell it all they know, learn
the sum of the others' updates and nothing else. So does a server that lies, if fewer than ``2 threshold - n`` hospitals
work with it: two lists of survivors can't both get enough signatures. What doesn't: with two survivors each learns the
other's update, from the sum; a hospital that lies about its update within the clip isn't noticed; nor is anybody kept
from spoiling a round; and what a sum tells of its parts is a matter for DP.

The server's code never holds an unmasked update: masked ones are added up as they come.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

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
from primia_lite.federation.masks import add_masks

STEPS = ("advertise", "share", "mask", "confirm", "unmask")
_PROTOCOL = "primia_lite secure aggregation 1"


class ProtocolError(UserError):
    """A message that the protocol doesn't allow. Whoever gets it acts as if it had not come."""


class TooFewSurvivors(UserError):
    """Fewer hospitals than the threshold: the round ends without a sum, partial or whole."""


# --- what all agree on ------------------------------------------------------------------------------------------------


def default_threshold(hospitals: int) -> int:
    """Two thirds, rounded up: then a third may vanish, and a lying server needs more than a third to work with it."""
    return math.ceil(2 * hospitals / 3)


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
        :func:`primia_lite.federation.neighbours.choose_degree`
    share_threshold : how many shares give a secret; ``threshold`` where all share with all
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
            raise UserError(f"identities of {sorted(self.identities)} but sizes of {sorted(self.sizes)}")
        if min(self.sizes.values()) < 1 or self.length < 1:
            raise UserError("declared sizes and the update's length must be at least 1")
        if len(set(self.identities.values())) < n or any(len(key) != 32 for key in self.identities.values()):
            raise UserError("each hospital needs an Ed25519 public key of its own, 32 bytes")
        threshold = default_threshold(n) if self.threshold is None else self.threshold
        if not n / 2 < threshold <= n:
            raise UserError(
                f"threshold is {threshold} of {n} hospitals: it must be above half of them (else a server that names "
                f"different survivors to different hospitals learns single updates) and at most {n}"
            )
        degree, shares = n - 1, threshold
        if self.degree is not None and self.degree < n - 1:
            degree, shares = self.degree, self.share_threshold
            if degree % 2 or shares is None or not 1 < shares <= degree + 1:
                raise UserError(f"degree {degree} must be even, and needs a share_threshold of 2 to {degree + 1}")
        elif self.degree is None and n > graphs.COMPLETE_UP_TO:
            degree, shares = graphs.choose_degree(n)
        for name, value in (("threshold", threshold), ("degree", degree), ("share_threshold", shares)):
            object.__setattr__(self, name, value)
        FixedPoint(self.clip, n)  # checks the clip

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
        return sum(self.sizes[name] for name in names) / sum(self.sizes.values())

    @cached_property
    def digest(self) -> str:
        """Goes into every signature and every key: parties with different agreements understand nothing."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def keys(self) -> dict[str, Ed25519PublicKey]:
        return {name: Ed25519PublicKey.from_public_bytes(key) for name, key in self.identities.items()}

    def as_dict(self) -> dict:
        """JSON-able; the inverse of :meth:`from_dict`."""
        return {
            "identities": {name: key.hex() for name, key in sorted(self.identities.items())},
            "sizes": dict(sorted(self.sizes.items())), "length": self.length, "clip": self.clip,
            "threshold": self.threshold, "weighted": self.weighted, "degree": self.degree,
            "share_threshold": self.share_threshold,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict) -> Agreement:
        return cls(**content | {"identities": {k: bytes.fromhex(v) for k, v in content["identities"].items()}})

    def neighbours(self, advertised: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """Who shares with whom, from the keys that all of them advertised."""
        seed = json.dumps([self.digest, sorted(advertised.items())]).encode()
        return graphs.neighbours(list(advertised), self.degree, seed)


# --- messages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a hospital sends: a step's content, signed.

    Attributes
    ----------
    sender, session, step : of the message
    body : JSON-able
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
        vector = "" if self.vector is None else hashlib.sha256(memoryview(self.vector).cast("B")).hexdigest()
        content = [_PROTOCOL, agreement.digest, self.session, self.step, self.sender, self.body, vector]
        return json.dumps(content, sort_keys=True).encode()

    def to_bytes(self) -> bytes:
        head, tail = self.split()
        return struct.pack("<I", len(head)) + head + (b"" if tail is None else tail.tobytes())

    def split(self) -> tuple[bytes, np.ndarray | None]:
        """All but the vector, and the vector: for transports that carry arrays as they are."""
        head = [self.sender, self.session, self.step, self.body, self.signature.hex()]
        return json.dumps(head).encode(), self.vector

    @classmethod
    def from_bytes(cls, content: bytes) -> Reply:
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
        """The inverse of :meth:`split`."""
        try:
            sender, session, step, body, signature = json.loads(head)
            if not (isinstance(sender, str) and isinstance(session, int) and isinstance(body, dict)):
                raise TypeError
            return cls(sender, session, step, body, bytes.fromhex(signature), vector)
        except (ValueError, TypeError) as error:
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


def _request(step: str, session: int, **body) -> bytes:
    return json.dumps({"step": step, "session": session, **body}).encode()


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


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


def _mask_seed(agreement: Agreement, session: int, a: str, b: str, secret: X25519PrivateKey, public: bytes) -> bytes:
    return _derive(secret, public, "mask", agreement.digest, session, *sorted((a, b)))


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
    shares: dict[str, str] = field(default_factory=dict)  # by whose secrets they are parts of, both, hexadecimal
    survivors: list[str] = field(default_factory=list)


class Client:
    """The hospital's side.

    Parameters
    ----------
    name, identity
        Who it is; its public key is in the agreement.
    last_session
        Number of the last round that it took part in. It answers later ones only: the server could otherwise have one
        update summed twice, with other hospitals each time, and subtract.

    Raises
    ------
    UserError
        The identity isn't the one that was agreed on.
    """

    def __init__(self, name: str, identity: Ed25519PrivateKey, agreement: Agreement, last_session: int = 0):
        if agreement.identities.get(name) != identity.public_key().public_bytes_raw():
            raise UserError(f"{name}'s identity isn't the one in the agreement")
        self.name, self.agreement, self.last_session = name, agreement, last_session
        self._identity = identity
        self._round: _Round | None = None

    def answer(self, request: bytes, update: Callable[[], np.ndarray]) -> Reply:
        """The reply to a request of the server.

        Parameters
        ----------
        update
            Called in step ``mask`` alone. Returns float32 [L], or int64 [L] where the agreement isn't ``weighted``.

        Raises
        ------
        ProtocolError
            The server asks for what the protocol doesn't allow. The hospital's secrets of the round are gone then.
        UserError
            The update has another shape, values that aren't finite or above the clip. Nothing was sent.
        """
        try:
            content = json.loads(request)
            step, session = content.pop("step"), content.pop("session")
            handle = {
                "advertise": self._advertise, "share": self._share, "mask": self._mask,
                "confirm": self._confirm, "unmask": self._unmask,
            }[step]  # fmt: skip
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ProtocolError(f"{self.name} was asked for something that can't be read") from error
        try:
            self._expect(step, session)
            body, vector = handle(session, update=update, **content) if step == "mask" else handle(session, **content)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a request of another form
            self._round = None
            raise ProtocolError(f"{self.name} was asked for {step} in a way that can't be understood") from error
        except BaseException:
            self._round = None
            raise
        if self._round:
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

    # Each handler returns a body and a vector.

    def _advertise(self, session: int):
        self.last_session = session
        self._round = _Round(session, "", os.urandom(32), os.urandom(32))
        keys = [X25519PrivateKey.from_private_bytes(k) for k in (self._round.mask_key, self._round.share_key)]
        return {"keys": [key.public_key().public_bytes_raw().hex() for key in keys]}, None

    def _share(self, session: int, advertised: list[str]):
        mine, agreement = self._round, self.agreement
        mine.advertised = _advertised(advertised, agreement, session)
        own = [X25519PrivateKey.from_private_bytes(k).public_key().public_bytes_raw().hex()
               for k in (mine.mask_key, mine.share_key)]  # fmt: skip
        if mine.advertised.get(self.name) != own:
            raise ProtocolError(f"{self.name}'s own keys aren't among those that the server gave")
        mine.own_seed = os.urandom(32)
        others = agreement.neighbours(mine.advertised)[self.name]
        points = [agreement.point[name] for name in (*others, self.name)]
        parts = [shamir.split(secret, agreement.share_threshold, points) for secret in (mine.mask_key, mine.own_seed)]
        both = {name: b"".join(part[agreement.point[name]] for part in parts) for name in (*others, self.name)}
        mine.shares[self.name] = both.pop(self.name).hex()
        sealed = {
            other: _encode(self._cipher(self.name, other).encrypt(bytes(12), shares, None))
            for other, shares in both.items()
        }
        return {"shares": sealed, "commitment": hashlib.sha256(mine.own_seed).hexdigest()}, None

    def _cipher(self, sender: str, receiver: str) -> ChaCha20Poly1305:
        """For one message, from one to the other: the key is used once, so the nonce may be 0."""
        mine = self._round
        other = receiver if sender == self.name else sender
        public = bytes.fromhex(mine.advertised[other][1])
        secret = X25519PrivateKey.from_private_bytes(mine.share_key)
        purpose = ("shares", self.agreement.digest, mine.session, sender, receiver)
        return ChaCha20Poly1305(_derive(secret, public, *purpose))

    def _mask(self, session: int, shares: dict[str, str], update: Callable[[], np.ndarray]):
        mine, agreement = self._round, self.agreement
        others = set(agreement.neighbours(mine.advertised)[self.name])
        if not shares.keys() <= others:
            raise ProtocolError(f"{self.name} got shares of hospitals that aren't its neighbours")
        if len(shares) + 1 < agreement.share_threshold:
            raise ProtocolError(
                f"{self.name} got shares of {len(shares)} others: its update would hide among too few "
                f"(needed: {agreement.share_threshold - 1})"
            )
        for other, sealed in sorted(shares.items()):
            try:
                opened = self._cipher(other, self.name).decrypt(
                    bytes(12), _decode(sealed, _SEALED, "a sealed share"), None
                )
            except InvalidTag as error:
                raise ProtocolError(f"{self.name} got a share in {other}'s name that {other} didn't seal") from error
            mine.shares[other] = opened.hex()
        secret = X25519PrivateKey.from_private_bytes(mine.mask_key)
        seeds = [(mine.own_seed, 1)]
        for other in sorted(shares):
            public = bytes.fromhex(mine.advertised[other][0])
            seeds.append((_mask_seed(agreement, session, self.name, other, secret, public), _sign(self.name, other)))
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
        mine.mask_key = mine.own_seed = b""
        return {}, vector

    def _confirm(self, session: int, survivors: list[str]):
        mine, agreement = self._round, self.agreement
        taking_part = set(mine.advertised)
        if len(set(survivors)) < len(survivors) or not {self.name} <= set(survivors) <= taking_part:
            raise ProtocolError(f"{self.name} got a list of survivors that isn't one")
        if len(survivors) < agreement.threshold:
            raise ProtocolError(
                f"{self.name} got {len(survivors)} survivors, fewer than the threshold of {agreement.threshold}"
            )
        others = set(agreement.neighbours(mine.advertised)[self.name])
        if not others & set(survivors) <= mine.shares.keys():
            raise ProtocolError(f"{self.name} got survivors that it shares no mask with")
        mine.survivors = sorted(survivors)
        return {"survivors": mine.survivors}, None

    def _unmask(self, session: int, confirmed: list[str]):
        mine, agreement = self._round, self.agreement
        signers = set()
        for text in confirmed:
            reply = _relayed(text).check(agreement, session, "confirm")
            if reply.body.get("survivors") != mine.survivors:
                raise ProtocolError(
                    f"{reply.sender} signed other survivors than {self.name}: the server told them different things"
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
        self._round = None  # it answers once
        return {"keys": keys, "seeds": seeds}, None

    # A process that ends between two steps keeps its round at the hospital.

    def save(self) -> bytes:
        """The round that it is in, secrets included: for the hospital's own disk and nobody else."""
        return json.dumps(
            {"last_session": self.last_session, "round": self._round and _hexadecimal(vars(self._round))}
        ).encode()

    def restore(self, content: bytes) -> Client:
        """Go on from what :meth:`save` kept. Returns itself."""
        kept = json.loads(content)
        self.last_session = kept["last_session"]
        if kept["round"]:
            secrets = {k: bytes.fromhex(kept["round"][k]) for k in ("mask_key", "share_key", "own_seed")}
            self._round = _Round(**kept["round"] | secrets)
        return self


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
    if not (isinstance(keys, list) and len(keys) == 2 and all(isinstance(k, str) and len(k) == 64 for k in keys)):
        raise ProtocolError(f"{reply.sender} advertises keys that can't be read")
    return keys


# --- the server -------------------------------------------------------------------------------------------------------


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

    def requests(self) -> dict[str, bytes]:
        """What to ask each hospital that is still in the round."""
        step, session = self.step, self.session
        if step == "advertise":
            return dict.fromkeys(self.agreement.names, _request(step, session))
        if step == "share":
            relayed = [reply.split()[0].decode() for reply in self._replies["advertise"].values()]
            return dict.fromkeys(self._replies["advertise"], _request(step, session, advertised=relayed))
        if step == "mask":
            sent = {name: reply.body["shares"] for name, reply in self._replies["share"].items()}
            return {
                name: _request(step, session, shares={o: s[name] for o, s in sent.items() if name in s})
                for name in sent
            }
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
        if step != "mask" and reply.vector is not None:
            raise ProtocolError(f"{reply.sender} sent a vector in {step}")
        reply.check(self.agreement, self.session, step)
        if step != STEPS[0] and reply.sender not in self._asked():
            raise ProtocolError(f"{reply.sender} answers, but wasn't asked: it missed a step before")
        getattr(self, f"_take_{step}")(reply)
        self._replies[step][reply.sender] = Reply(
            reply.sender, reply.session, reply.step, reply.body, reply.signature, None
        )

    def _asked(self) -> Iterable[str]:
        return self._replies[STEPS[STEPS.index(self.step) - 1]]

    def _take_advertise(self, reply: Reply) -> None:
        mine = set(_public_keys(reply))
        others = {key for other in self._replies["advertise"].values() for key in other.body["keys"]}
        if len(mine) < 2 or mine & others:
            raise ProtocolError(f"{reply.sender} advertises a key that another one has")

    def _take_share(self, reply: Reply) -> None:
        shares, others = reply.body.get("shares"), self._neighbours[reply.sender]
        if not isinstance(shares, dict) or shares.keys() != set(others):
            raise ProtocolError(f"{reply.sender} sent shares for others than its neighbours")
        for sealed in shares.values():
            _decode(sealed, _SEALED, f"{reply.sender}'s share")

    def _take_mask(self, reply: Reply) -> None:
        vector = reply.vector
        if vector is None or vector.dtype != np.uint32 or vector.shape != (self.agreement.length,):
            raise ProtocolError(f"{reply.sender} sent no uint32 vector of {self.agreement.length} entries")
        if self._sum is None:
            self._sum = np.zeros(self.agreement.length, np.uint32)
        self._sum += vector

    def _take_confirm(self, reply: Reply) -> None:
        if reply.body.get("survivors") != sorted(self.survivors):
            raise ProtocolError(f"{reply.sender} confirms other survivors")

    def _take_unmask(self, reply: Reply) -> None:
        for kind in ("keys", "seeds"):
            shares = reply.body.get(kind)
            wrong = not isinstance(shares, dict) or any(
                not isinstance(share, str) or len(share) != 2 * shamir.SHARE_BYTES for share in shares.values()
            )
            if wrong:
                raise ProtocolError(f"{reply.sender}'s shares can't be read")

    @cached_property
    def _neighbours(self) -> dict[str, tuple[str, ...]]:
        keys = {name: reply.body["keys"] for name, reply in self._replies["advertise"].items()}
        return self.agreement.neighbours(keys)

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
            step, self.step, self._sum = self.step, None, None
            raise TooFewSurvivors(
                f"round {self.session} ended at {step}: {len(answered)} hospitals answered, fewer than the threshold "
                f"of {self.agreement.threshold} (missing: {', '.join(gone)}). There is no sum, and what was charged to "
                "ledgers stays charged. Ask again once they are back"
            )
        if self.step == "mask":
            self.survivors = tuple(sorted(answered))
        elif self.step == "unmask":
            self._unmask()
            self.step = None
            return
        self.step = STEPS[STEPS.index(self.step) + 1]

    def _secret(self, kind: str, name: str) -> bytes:
        point = self.agreement.point
        shares = {
            point[reply.sender]: bytes.fromhex(reply.body[kind][name])
            for reply in self._replies["unmask"].values()
            if name in reply.body[kind]
        }
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
            if hashlib.sha256(seed).hexdigest() != self._replies["share"][name].body.get("commitment"):
                raise ProtocolError(f"the shares of {name}'s own mask don't give what it committed to: there is no sum")
            seeds.append((seed, -1))
        for gone in sorted(set(self._replies["share"]) - set(self.survivors)):
            staying = [other for other in self._neighbours[gone] if other in self.survivors]
            if not staying:
                continue
            secret = X25519PrivateKey.from_private_bytes(self._secret("keys", gone))
            if secret.public_key().public_bytes_raw().hex() != self._replies["advertise"][gone].body["keys"][0]:
                raise ProtocolError(f"the shares of {gone}'s key don't give its key: there is no sum")
            for other in staying:
                public = bytes.fromhex(self._replies["advertise"][other].body["keys"][0])
                seed = _mask_seed(self.agreement, self.session, gone, other, secret, public)
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
