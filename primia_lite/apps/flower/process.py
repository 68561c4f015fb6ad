"""Flower's two long-lived processes, each behind a guard: ``python -m primia_lite.apps.flower.process``.

``supernode`` takes no code from the server. Stock Flower runs at a hospital whatever app reaches its control API; here
the app must be, byte for byte, the one file that this module writes, which names the installed package's own
:mod:`~primia_lite.apps.flower.app`. It starts the hospital's own process (:mod:`~primia_lite.apps.flower.worker`), and
again when it has died.

``superlink`` answers requests from other machines only where SuperNodes need it, below ``/v1/fleet``. Stock Flower has
its control API, which asks for no credential and runs what it is sent, on the same port. Whoever works on the server's
machine, or comes through a tunnel or proxy that ends there, counts as local.

Both guards hold on to what isn't Flower's public interface: hence the exact pin of flwr.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from logging import StreamHandler

from primia_lite import __version__
from primia_lite.apps.flower.folder import log

# All of the app. Its code is what each party has installed.
APP = f"""[project]
name = "primia-lite-federation"
version = "{__version__}"
description = "Names the two apps of primia_lite.apps.flower.app, which each party has installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "primia-lite"

[tool.flwr.app.components]
serverapp = "primia_lite.apps.flower.app:server_app"
clientapp = "primia_lite.apps.flower.app:client_app"

[tool.flwr.app.config]
rounds = 1
fresh = false
"""


def app_bundle() -> bytes:
    """The app as Flower sends it: the same bytes wherever this version is installed."""
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files({"pyproject.toml": APP.encode()})[0]


def guard_supernode() -> None:
    """From now on a SuperNode in this process drops messages of other apps."""
    from flwr.supernode import start_client_internal as internal
    from flwr.supernode.start_client_internal import RunNotRunningException

    connect, own = internal._init_connection, app_bundle()

    @contextmanager
    def guarded(*args, **options):
        with connect(*args, **options) as (node, receive, send, get_run, get_fab, *others):

            def checked(fab_hash, run_id):
                fab = get_fab(fab_hash, run_id)
                if fab.content != own:
                    log.warning(
                        "the server sent another app than the one that this hospital has installed: its messages are "
                        "dropped. Is primia_lite %s there too?", __version__,
                    )  # fmt: skip
                    raise RunNotRunningException  # Flower's way to let a message go
                return fab

            yield (node, receive, send, get_run, checked, *others)

    internal._init_connection = guarded


class FleetOnly:
    """ASGI middleware: from other machines nothing but ``/v1/fleet`` is there."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or is_local(scope) or scope["path"].startswith("/v1/fleet/"):
            return await self.app(scope, receive, send)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close", "code": 1008})


def is_local(scope) -> bool:
    """Whether a request comes from this machine: from loopback, or from the very address that it came to."""
    client, server = ((scope.get(side) or ("",))[0] for side in ("client", "server"))
    try:
        return ipaddress.ip_address(client).is_loopback or client == server
    except ValueError:
        return False


def guard_superlink() -> None:
    """From now on a SuperLink in this process is fenced."""
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    extensions.get_middleware = lambda: (Middleware(FleetOnly),)
    # uvicorn would take a client's address from a header, and so believe that it is local.
    os.environ["FORWARDED_ALLOW_IPS"] = ""


def keep_alive(command: Sequence[str], pause_s: float = 1.0, longest_pause_s: float = 60.0) -> None:
    """Run a command, again whenever it ends; later each time that it ends at once. Its standard input is a pipe from
    this process, and closes with it."""
    pause = pause_s
    while True:
        started = time.monotonic()
        try:
            with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
                status = process.wait()
        except OSError as error:  # no memory, no process to spare
            status = error
        pause = pause_s if time.monotonic() - started > longest_pause_s else min(2 * pause, longest_pause_s)
        log.warning("the hospital's process ended with status %s; it is started again in %.0f s", status, pause)
        time.sleep(pause)


def main() -> None:
    which = sys.argv.pop(1)
    log.addHandler(StreamHandler())  # Flower's logger has a handler of its own
    if which == "supernode":
        from flwr.supernode.cli import flower_supernode

        guard_supernode()
        command = [sys.executable, "-m", "primia_lite.apps.flower.worker", sys.argv.pop(1)]
        threading.Thread(target=keep_alive, args=(command,), daemon=True).start()
        flower_supernode()
    else:
        from flwr.superlink.cli import flower_superlink

        guard_superlink()
        flower_superlink()


if __name__ == "__main__":
    main()
