"""Flower's side of a federation: what runs at each hospital (``client_app``) and at the server (``server_app``).

Flower (flwr 1.41, Message API) only carries messages: :mod:`~primia_lite.apps.flower.messages` says what they hold.
A hospital's process of Flower's ends with each message, so nothing slow is imported here.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from primia_lite.apps.flower.folder import log, log_to
from primia_lite.apps.flower.messages import refusal, reply_to
from primia_lite.apps.flower.worker import connect, relay

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    return answer_in(Path(context.node_config["folder"]), message)


def answer_in(folder: Path, message: Message) -> Message:
    """The reply of the hospital whose folder it is: of its own process, or of this one where there is none."""
    connection = connect(folder)
    log_to(folder, rotate=connection is None)
    try:
        if connection:
            content = relay(connection, message.content)
        else:
            from primia_lite.apps.flower.hospital import FolderHospital

            content = FolderHospital(folder).reply(message.content)
    except Exception as error:
        log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
        content = refusal()
    return reply_to(message, content)


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    from primia_lite.apps.flower.server import train_in_folder

    config = context.run_config
    # The server's folder, in the environment of its SuperLink.
    folder = Path(os.environ["PRIMIA_LITE_SERVER"])
    train_in_folder(grid, folder, int(config["rounds"]), fresh=bool(config["fresh"]))
