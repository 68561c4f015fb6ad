"""Keys that two hospitals agree on, and the seeds of masks that follow from them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from primia_lite.secagg import shares as shamir
from primia_lite.secagg.agreement import PROTOCOL, Agreement, ProtocolError


def derive(secret: X25519PrivateKey, public: bytes, *what: object) -> bytes:
    """32 bytes that the two ends of a key exchange share, for one purpose."""
    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order
        raise ProtocolError("a key that no honest hospital sends") from error
    info = json.dumps([PROTOCOL, *what]).encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)


def mask_seed(
    agreement: Agreement, session: int, a: str, b: str, secret: X25519PrivateKey, public: bytes,
    question: Iterable[str] = (),
) -> bytes:  # fmt: skip
    """Seed of the mask that hospitals ``a`` and ``b`` share in a round: 32 bytes, the same at both ends."""
    return derive(secret, public, "mask", agreement.digest, session, *sorted((a, b)), *question)


def mask_sign(mine: str, other: str) -> int:
    """Sign of the mask that two hospitals share: the other one takes the opposite, so that the masks cancel."""
    return 1 if mine < other else -1


BOTH = 2 * shamir.SHARE_BYTES  # a share of the key for masks, then one of the own mask's seed
SEALED = BOTH + 16
