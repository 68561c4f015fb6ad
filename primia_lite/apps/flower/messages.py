"""What Flower's messages hold: written and read at both ends.

To a hospital goes ``request`` (``study``, its fingerprint; ``requests``, bytes; ``round``) and in step ``mask``
``weights``. Back comes ``reply`` (``heads``, bytes) and then ``masked``, a plain uint32 array. Where the round's number
was answered before, ``reply`` has ``last``, the highest number that the hospital has answered.
"""

from __future__ import annotations

import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from primia_lite.apps.flower.hospital import Behind, FlowerHospital, OtherStudy
from primia_lite.secagg import ProtocolError, Reply

_REFUSED = 100  # code of an error reply; Flower's own are below
log = logging.getLogger("primia_lite")


def request(study: str, requests: list[bytes], number: int, weights: ArrayRecord | None) -> RecordDict:
    """What goes to a hospital."""
    content = RecordDict({"request": ConfigRecord({"study": study, "requests": requests, "round": number})})
    if weights is not None:
        content["weights"] = weights
    return content


def answer(hospital: FlowerHospital, content: RecordDict) -> RecordDict:
    """What a hospital replies. It never raises: Flower would send the error's text, which may tell of films."""
    try:
        asked, weights = content["request"], content.get("weights")
        found = hospital.answer(
            asked["study"], asked["requests"], asked["round"],
            weights and {name: array.numpy() for name, array in weights.items()},
        )  # fmt: skip
    except OtherStudy as error:
        log.warning("%s", error)
        return refusal(str(error))
    except Behind as error:
        return RecordDict({"reply": ConfigRecord({"heads": [], "last": error.last})})
    except Exception as error:
        log.warning("hospital %s can't answer: %s: %s", hospital.name, type(error).__name__, error)
        return refusal()
    if not found:
        return refusal()
    content = RecordDict({"reply": ConfigRecord({"heads": [reply.split()[0] for reply in found]})})
    for reply in found:
        if reply.vector is not None:
            content["masked"] = ArrayRecord({"vector": Array(reply.vector)})
    return content


def refusal(why: str = "refused: the hospital's log tells why") -> RecordDict:
    return RecordDict({"refused": ConfigRecord({"why": why})})


def reply_to(message: Message, content: RecordDict) -> Message:
    """A hospital's reply, with what :func:`answer` or :func:`refusal` says."""
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
