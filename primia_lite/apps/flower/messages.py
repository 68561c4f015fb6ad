"""What Flower's messages hold: written and read at both ends.

To a hospital goes ``request`` (``study``, its fingerprint; ``requests``, bytes; ``round``) and in step ``mask``
``weights``. Back comes ``reply`` (``heads``, bytes) and then ``masked``, a plain uint32 array. Where the round's number
was answered before, ``reply`` has ``last``, the highest number that the hospital has answered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from primia_lite.secagg import ProtocolError, Reply

_REFUSED = 100  # code of an error reply; Flower's own are below


def request(study: str, requests: list[bytes], number: int, weights: ArrayRecord | None) -> RecordDict:
    """What goes to a hospital."""
    content = RecordDict({"request": ConfigRecord({"study": study, "requests": requests, "round": number})})
    if weights is not None:
        content["weights"] = weights
    return content


def answered(found: Sequence[Reply]) -> RecordDict:
    """What a hospital replies to requests of which it answers some."""
    content = RecordDict({"reply": ConfigRecord({"heads": [reply.split()[0] for reply in found]})})
    for reply in found:
        if reply.vector is not None:
            content["masked"] = ArrayRecord({"vector": Array(reply.vector)})
    return content


def behind(last: int) -> RecordDict:
    """What a hospital replies that has taken part in a later round: its number."""
    return RecordDict({"reply": ConfigRecord({"heads": [], "last": last})})


def refusal(why: str = "refused: the hospital's log tells why") -> RecordDict:
    return RecordDict({"refused": ConfigRecord({"why": why})})


def reply_to(message: Message, content: RecordDict) -> Message:
    """A hospital's reply, with one of the contents above."""
    if "refused" in content:
        return Message(Error(_REFUSED, content["refused"]["why"]), reply_to=message)
    return Message(content, reply_to=message)


def replies(message: Message) -> list[Reply]:
    """What the server reads in a hospital's message. One that can't be read raises an error of any kind."""
    heads = message.content["reply"]["heads"]
    if len(heads) > 2:
        raise ProtocolError(f"a message with {len(heads)} replies")
    masked = message.content.get("masked")
    vector = None if masked is None else np.asarray(masked["vector"].numpy())
    return [Reply.joined(head, vector if len(heads) == 1 else None) for head in heads]
