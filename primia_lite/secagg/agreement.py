"""What hospitals and server settle before the first round, and what a round asks."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from primia_lite.config import UserError
from primia_lite.secagg import graph as graphs
from primia_lite.secagg.fixed_point import FixedPoint
from primia_lite.secagg.graph import default_threshold
from primia_lite.secagg.masks import MAX_WORDS

PROTOCOL = "primia_lite secure aggregation 3"  # signed: who masks otherwise is refused, not summed


class ProtocolError(UserError):
    """A message that the protocol doesn't allow. Whoever gets it acts as if it had not come."""


class TooFewSurvivors(UserError):
    """Fewer hospitals than the threshold: the round ends without a sum, partial or whole."""


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
        :func:`primia_lite.secagg.graph.choose_degree`; where noise is shared always all, for a group of them
        would have too few shares of it
    share_threshold : how many shares give a secret; ``threshold`` where all share with all. With a ``degree``, above
        half of neighbours and oneself: else a server that lies unmasks a hospital alone
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
        _check_identities(self.identities)
        if self.identities.keys() != self.sizes.keys():
            raise UserError(f"identities of {list(self.identities)} but sizes of {list(self.sizes)}")
        sizes = {name: _whole(size, f"{name}'s declared size") for name, size in self.sizes.items()}
        length = _whole(self.length, "length")
        if min(sizes.values()) < 1 or not 1 <= length < MAX_WORDS:
            raise UserError(f"declared sizes must be at least 1, the update's length 1 to {MAX_WORDS - 1}")
        threshold = default_threshold(n) if self.threshold is None else _whole(self.threshold, "threshold")
        if not n / 2 < threshold <= n:
            raise UserError(
                f"threshold is {threshold} of {n} hospitals: it must be above half of them, else a server that lies "
                f"about survivors learns single updates, and at most {n}"
            )
        degree, shares = self._graph(n, threshold)
        FixedPoint(self.clip, n)  # checks the clip
        # Copies, and one type each (the clip's is that of updates): equal agreements have one digest, and none changes.
        vars(self).update(
            identities=dict(self.identities), sizes=sizes, length=length, clip=float(np.float32(self.clip)),
            threshold=threshold, weighted=bool(self.weighted), degree=degree, share_threshold=int(shares),
        )  # fmt: skip

    def _graph(self, n: int, threshold: int) -> tuple[int, int]:
        """How many neighbours each has, and how many of their shares give a secret."""
        if self.degree is None and n > graphs.COMPLETE_UP_TO and self.weighted:
            return graphs.choose_degree(n, threshold=threshold)
        if self.degree is None or _whole(self.degree, "degree") >= n - 1:
            return n - 1, threshold
        degree, shares = int(self.degree), self.share_threshold
        most = min(degree + 1, threshold)
        fits = shares is not None and (degree + 1) / 2 < _whole(shares, "share_threshold") <= most
        if degree % 2 or degree < 2 or not fits:
            raise UserError(
                f"degree is {degree}, share_threshold {shares}: take an even degree, 2 or more, and shares of more "
                f"than half of it and one, up to {most}"
            )
        return degree, shares

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
        """The agreement that :meth:`as_dict` gave; UserError for anything else."""
        try:
            identities = {name: bytes.fromhex(key) for name, key in content["identities"].items()}
            return cls(**content | {"identities": identities})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no agreement on secure aggregation ({error}): take one that was saved") from error

    def neighbours(self, advertised: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
        """Who shares with whom, from the keys that all of them advertised."""
        seed = json.dumps([self.digest, sorted(advertised.items())]).encode()
        return graphs.neighbours(list(advertised), self.degree, seed)


def _check_identities(identities: Mapping[str, bytes]) -> None:
    if odd := [name for name in identities if not (isinstance(name, str) and name and name.isprintable())]:
        raise UserError(f"{odd[0]!r} is no name of a hospital: take printable text")
    keys = set(identities.values())
    if len(keys) < len(identities) or any(not isinstance(key, bytes) or len(key) != 32 for key in keys):
        raise UserError("each hospital needs an Ed25519 public key of its own, 32 bytes")
    if weak := [name for name, key in identities.items() if _is_weak(key)]:
        raise UserError(f"{weak[0]}'s public key is one that anybody could sign for: it has to make another")


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
