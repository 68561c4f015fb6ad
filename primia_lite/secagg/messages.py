"""Messages of secure aggregation: signed, and read as claims of somebody who may lie."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature

from primia_lite.secagg.agreement import PROTOCOL, Agreement, ProtocolError

STEPS = ("advertise", "share", "mask", "confirm", "unmask")


@dataclass(frozen=True)
class Reply:
    """What a hospital sends in a step: texts, lists of texts, and texts by name, and in step ``mask`` a vector, uint32
    [L]; signed by Ed25519, with the agreement's digest."""

    sender: str
    session: int
    step: str
    body: dict
    signature: bytes = b""
    vector: np.ndarray | None = None

    def signed(self, agreement: Agreement) -> bytes:
        """What the signature is over."""
        vector = "" if self.vector is None else hashlib.sha256(np.ascontiguousarray(self.vector).view("u1")).hexdigest()
        content = [PROTOCOL, agreement.digest, self.session, self.step, self.sender, self.body, vector]
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
        """The inverse of :meth:`to_bytes`; ProtocolError for bytes that are cut short or can't be read."""
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
        """The inverse of :meth:`split`; ProtocolError for a head that can't be read."""
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
        """Itself, if an agreed hospital signed it for this step of this round; else ProtocolError."""
        if self.sender not in agreement.keys:
            raise ProtocolError(f"a message from {self.sender!r}, which isn't one of {', '.join(agreement.names)}")
        if (self.session, self.step) != (session, step):
            raise ProtocolError(
                f"{self.sender} answers {self.step} of round {self.session} in {step} of {session}: late?"
            )
        try:
            agreement.keys[self.sender].verify(self.signature, self.signed(agreement))
        except InvalidSignature as error:
            raise ProtocolError(f"a message in {self.sender}'s name that {self.sender} didn't sign") from error
        return self


def _texts(values: Iterable) -> bool:
    return set(map(type, values)) <= {str}


def request(step: str, session: int, **body) -> bytes:
    """What the server asks of a hospital in a step, as bytes."""
    return json.dumps({"step": step, "session": session, **body}).encode()


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def is_hex(text: object, size: int) -> bool:
    """Whether a text stands for so many bytes, in the one way that we write them."""
    return isinstance(text, str) and len(text) == 2 * size and set(text) <= set("0123456789abcdef")


def decode(text: str, size: int, what: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"{what} can't be read") from error
    if len(content) != size:
        raise ProtocolError(f"{what} has {len(content)} bytes, not {size}")
    return content


def confirmation(survivors: Iterable[str], advertised: Mapping[str, list[str]]) -> dict:
    """What is signed before secrets are shared out. The round's fresh keys are in it, so that no other round's will do,
    and that all know the same ones."""
    # Digests, for each hospital gets what all the others signed.
    lists = {"survivors": sorted(survivors), "keys": sorted(advertised.items())}
    return {what: hashlib.sha256(json.dumps(content).encode()).hexdigest() for what, content in lists.items()}


def relayed(replies: Mapping[str, Reply]) -> list[str]:
    """Replies without a vector, as the server passes them on."""
    return [reply.split()[0].decode() for reply in replies.values()]


def relayed_reply(text: str) -> Reply:
    return Reply.joined(text.encode(), None)


def advertised_keys(replies: list[str], agreement: Agreement, session: int) -> dict[str, list[str]]:
    """Keys by hospital, from relayed and signed messages: all of them different, and of the threshold at least."""
    keys: dict[str, list[str]] = {}
    for text in replies:
        reply = relayed_reply(text).check(agreement, session, "advertise")
        if reply.sender in keys:
            raise ProtocolError(f"{reply.sender}'s keys come twice")
        keys[reply.sender] = public_keys(reply)
    if len({key for pair in keys.values() for key in pair}) < 2 * len(keys):
        raise ProtocolError("two hospitals advertise one key")
    if len(keys) < agreement.threshold:
        raise ProtocolError(f"{len(keys)} hospitals advertise keys, fewer than the threshold of {agreement.threshold}")
    return keys


def public_keys(reply: Reply) -> list[str]:
    keys = reply.body.get("keys")
    if not (isinstance(keys, list) and len(keys) == 2 and all(is_hex(key, 32) for key in keys)):
        raise ProtocolError(f"{reply.sender} advertises keys that can't be read")
    return keys
