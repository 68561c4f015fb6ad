"""A hospital's own process, which stays: it has torch imported, films loaded and the round's secrets at hand.

Flower starts a new process for each message. Were that one to import torch and load films, each round would take seconds
longer. So the process beside the SuperNode (see :mod:`~primia_lite.federation.flower_process`) starts this one, which
answers as :class:`~primia_lite.federation.flower_hospital.SiteInFolder`, and Flower's only passes messages on: over a
Unix socket in a folder that none but the owner may enter, no pickles. It ends with the SuperNode. Where there is none,
as on Windows, Flower's process answers by itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import numpy as np

from primia_lite.federation.flower_hospital import OtherStudy, SiteInFolder
from primia_lite.federation.secagg import Reply

SOCKET = "worker"  # in the hospital's folder: where the socket is
log = logging.getLogger("primia_lite")


class Relay:
    """Has the hospital's own process answer; to be used like a :class:`~primia_lite.federation.flower_hospital.Site`."""

    def __init__(self, connection: Connection, name: str):
        self._connection, self.name = connection, name

    @classmethod
    def to(cls, folder: Path) -> Relay | None:
        """None where there is no such process."""
        try:
            return cls(Client((folder / SOCKET).read_text(), "AF_UNIX"), folder.name)
        except (OSError, ValueError):
            return None

    def answer(
        self, study: str, requests: Sequence[bytes], number: int = 0, weights: Mapping[str, np.ndarray] | None = None
    ) -> list[Reply]:
        """See :meth:`primia_lite.federation.flower_hospital.Site.answer`."""
        arrays = weights and {name: np.ascontiguousarray(value) for name, value in weights.items()}
        head = {
            "study": study, "round": number, "requests": len(requests),
            "weights": arrays and [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
        }  # fmt: skip
        _send(self._connection, [json.dumps(head).encode(), *requests, *(a.tobytes() for a in (arrays or {}).values())])
        first, *parts = _receive(self._connection)
        found = json.loads(first)
        if "other" in found:
            raise OtherStudy(found["other"])
        if "error" in found:
            raise RuntimeError("the hospital's process refused")
        return [Reply.from_bytes(part) for part in parts]


def _send(connection: Connection, parts: Iterable[bytes]) -> None:
    parts = list(parts)
    connection.send_bytes(len(parts).to_bytes(4, "little"))
    for part in parts:
        connection.send_bytes(part)


def _receive(connection: Connection) -> list[bytes]:
    return [connection.recv_bytes() for _ in range(int.from_bytes(connection.recv_bytes(4), "little"))]


def _answer(site: SiteInFolder, parts: list[bytes]) -> list[bytes]:
    head = json.loads(parts[0])
    requests, buffers = parts[1 : 1 + head["requests"]], parts[1 + head["requests"] :]
    weights = None
    if head["weights"] is not None:
        weights = {
            name: np.frombuffer(buffer, dtype).reshape(shape)
            for (name, dtype, shape), buffer in zip(head["weights"], buffers, strict=True)
        }
    try:
        replies = site.answer(head["study"], requests, head["round"], weights)
    except OtherStudy as error:
        log.warning("%s", error)
        return [json.dumps({"other": str(error)}).encode()]
    except Exception as error:  # nothing of it may reach the server
        log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
        return [json.dumps({"error": True}).encode()]
    return [b"{}", *(reply.to_bytes() for reply in replies)]


def serve(folder: Path) -> None:
    """Answer until the process that started this one ends, which closes our standard input."""
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), _leave(place)), daemon=True).start()
    place = Path(tempfile.mkdtemp(prefix="primia-lite-"))  # mode 700; a socket's path must be short
    with Listener(str(place / "socket"), "AF_UNIX") as listener:
        path = folder / SOCKET
        path.write_text(str(place / "socket"))
        site = SiteInFolder(folder)
        try:
            _ = site.hospital  # before the first round waits for it
        except Exception as error:
            log.warning("this hospital's films can't be loaded: %s", error)
        while True:
            try:
                with listener.accept() as connection:
                    _send(connection, _answer(site, _receive(connection)))
            except (EOFError, OSError) as error:
                log.warning("a message was lost on its way: %s", error)


def _leave(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    from primia_lite.federation.flower_hospital import log_to

    own = Path(sys.argv[1])
    log_to(own)
    serve(own)
