"""Flower's side of a federation: what runs at each hospital (``client_app``) and at the server (``server_app``).

Flower (flwr 1.41, Message API) only carries messages. What they hold is ours: requests and replies of secure
aggregation (:mod:`primia_lite.secagg`), the global weights, and masked updates as plain uint32 arrays.

A message to a hospital has ``request`` (``study``, its fingerprint; ``requests``, bytes; ``round``) and in step
``mask`` ``weights``; its reply has ``reply`` (``heads``, bytes) and then ``masked``. Where the round's number was
answered before, ``reply`` has ``last``, the highest number that the hospital has answered.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from primia_lite.config import UserError

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise UserError(
        "Flower isn't installed: `make flower` sets it up in a checkout, `pip install 'primia-lite[flower]'` elsewhere"
    ) from error

from primia_lite.apps.flower.hospital import Behind, OtherStudy, Site, SiteInFolder, log_to
from primia_lite.apps.flower.worker import Relay
from primia_lite.secagg import ProtocolError, Reply

SERVER_VARIABLE = "PRIMIA_LITE_SERVER"  # the server's folder, in the environment of its SuperLink
_REFUSED = 100  # code of an error reply; Flower's own are below
log = logging.getLogger("primia_lite")

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    return answer_in(Path(context.node_config["folder"]), message)


def answer_in(folder: Path, message: Message) -> Message:
    """The reply of the hospital whose folder it is."""
    relay = Relay.to(folder)
    log_to(folder, rotate=relay is None)
    try:
        site = relay or SiteInFolder(folder)
    except Exception as error:
        log.warning("this hospital can't answer: %s", error)
        return refusal(message)
    return respond(site, message)


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    from primia_lite.apps.flower.server import train_in_folder

    config = context.run_config
    train_in_folder(grid, Path(os.environ[SERVER_VARIABLE]), int(config["rounds"]), fresh=bool(config["fresh"]))


# --- at a hospital ----------------------------------------------------------------------------------------------------


def respond(site: Site | Relay, message: Message) -> Message:
    """A hospital's reply. It never raises: Flower would send the error's text, which may tell of films."""
    try:
        request = message.content["request"]
        weights = message.content.get("weights")
        replies = site.answer(
            request["study"], request["requests"], request["round"],
            weights and {name: array.numpy() for name, array in weights.items()},
        )  # fmt: skip
    except OtherStudy as error:
        log.warning("%s", error)
        return refusal(message, str(error))
    except Behind as error:
        return Message(RecordDict({"reply": ConfigRecord({"heads": [], "last": error.last})}), reply_to=message)
    except Exception as error:
        log.warning("hospital %s can't answer: %s: %s", site.name, type(error).__name__, error)
        return refusal(message)
    if not replies:
        return refusal(message)
    content = RecordDict({"reply": ConfigRecord({"heads": [reply.split()[0] for reply in replies]})})
    for vector in (reply.vector for reply in replies if reply.vector is not None):
        content["masked"] = ArrayRecord({"vector": Array(vector)})
    return Message(content, reply_to=message)


def refusal(message: Message, why: str = "refused: the hospital's log tells why") -> Message:
    return Message(Error(_REFUSED, why), reply_to=message)


# --- at the server ----------------------------------------------------------------------------------------------------


def request(study: str, requests: list[bytes], number: int, weights: ArrayRecord | None) -> RecordDict:
    """What a message to a hospital holds."""
    content = RecordDict({"request": ConfigRecord({"study": study, "requests": requests, "round": number})})
    if weights is not None:
        content["weights"] = weights
    return content


def replies(message: Message) -> list[Reply]:
    """What a hospital's message holds.

    Raises
    ------
    Exception
        Of any kind: it can't be read.
    """
    heads = message.content["reply"]["heads"]
    if len(heads) > 2:
        raise ProtocolError(f"a message with {len(heads)} replies")
    masked = message.content.get("masked")
    vector = None
    if masked is not None:
        vector = np.asarray(masked["vector"].numpy())
    return [Reply.joined(head, vector if len(heads) == 1 else None) for head in heads]
