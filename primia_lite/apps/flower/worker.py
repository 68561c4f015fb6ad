"""A hospital's own process, which stays: it has torch imported and films loaded.

Flower starts a new process for each message. Were that one to import torch and load films, each round would take
seconds longer. So the SuperNode's process (:mod:`~primia_lite.apps.flower.process`) starts this one, which
answers as :class:`~primia_lite.apps.flower.hospital.SiteInFolder`, and Flower's only passes messages on: over a
Unix socket in a folder that none but the owner may enter, no pickles. It ends with the SuperNode. While there is none,
as when it has just been killed, Flower's process answers by itself: all that counts is in the hospital's folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import numpy as np

from primia_lite.apps.flower.hospital import CONFIG, IDENTITY, STUDY, Behind, OtherStudy, SiteInFolder, log_to
from primia_lite.runtime import write_atomic
from primia_lite.secagg import Reply

SOCKET = "worker"  # in the hospital's folder: where the socket is
log = logging.getLogger("primia_lite")


class Relay:
    """Has the hospital's own process answer; used like a :class:`~primia_lite.apps.flower.hospital.Site`."""

    def __init__(self, connection: Connection, name: str):
        self._connection, self.name = connection, name

    @classmethod
    def to(cls, folder: Path) -> Relay | None:
        """None where there is no such process."""
        try:
            address = (folder / SOCKET).read_text("utf-8")
            place = Path(address).parent.stat()
            # What a killed one left names a folder that, once gone, anybody may make anew.
            if place.st_uid != os.getuid() or place.st_mode & 0o077:
                return None
            return cls(Client(address, "AF_UNIX"), folder.name)
        except (OSError, ValueError):
            return None

    def answer(
        self, study: str, requests: Sequence[bytes], number: int = 0, weights: Mapping[str, np.ndarray] | None = None
    ) -> list[Reply]:
        """See :meth:`primia_lite.apps.flower.hospital.Site.answer`."""
        arrays = weights and {name: np.asarray(value) for name, value in weights.items()}
        head = {
            "study": study, "round": number, "requests": len(requests),
            "weights": arrays and [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
        }  # fmt: skip
        _send(self._connection, [json.dumps(head).encode(), *requests, *(a.tobytes() for a in (arrays or {}).values())])
        first, *parts = _receive(self._connection)
        found = json.loads(first)
        if "other" in found:
            raise OtherStudy(found["other"])
        if "behind" in found:
            raise Behind(self.name, *found["behind"])
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
    except OtherStudy as error:  # Flower's process writes it to the log
        return [json.dumps({"other": str(error)}).encode()]
    except Behind as error:
        return [json.dumps({"behind": [error.session, error.last]}).encode()]
    except Exception as error:  # nothing of it may reach the server
        log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
        return [json.dumps({"error": True}).encode()]
    return [b"{}", *(reply.to_bytes() for reply in replies)]


def _films(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_ctime_ns) for path in folder.glob("films-*.npz"))


class Held:
    """A hospital that keeps its films in memory, as long as its folder is as it was when they were read."""

    def __init__(self, folder: Path):
        self._folder, self._site, self._read = folder, None, None

    def answer(self, parts: list[bytes]) -> list[bytes]:
        """The parts of a message, as :class:`Relay` sends them, to those of its reply.

        Raises
        ------
        UserError
            The folder can't be read.
        """
        # A study that the hospital has joined since then counts, and films that it has deleted.
        now = [(self._folder / name).stat().st_ctime_ns for name in (CONFIG, STUDY, IDENTITY)]
        before = _films(self._folder)
        if self._read != (now, before):
            self._site, self._read = SiteInFolder(self._folder), None
        reply = _answer(self._site, parts)
        after = _films(self._folder)
        # Written meanwhile: it is what the site holds. Deleted meanwhile: what it holds is out of date.
        self._read = (now, after) if after == before or not before else None
        return reply


def serve(folder: Path) -> None:
    """Answer until the process that started this one ends, which closes our standard input."""
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    place = Path(tempfile.mkdtemp(prefix="primia-lite-"))  # mode 700; a socket's path must be short

    def leave(*_) -> None:
        with suppress(OSError):
            if Path(path.read_text("utf-8")).parent == place:  # and not that of one that was started since
                path.unlink()
        shutil.rmtree(place, ignore_errors=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), leave()), daemon=True).start()
    # Seconds that no message is to wait for; films are loaded when they are first asked for, which may take minutes.
    from primia_lite.federation import hospital, study  # noqa: F401

    held = Held(folder)
    try:
        with Listener(str(place / "socket"), "AF_UNIX") as listener:
            write_atomic(path, str(place / "socket").encode(), private=True)
            while True:
                with suppress(OSError), listener.accept() as connection:
                    try:
                        _send(connection, held.answer(_receive(connection)))
                    except Exception as error:  # the connection closes, and Flower's process refuses
                        log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    own = Path(sys.argv[1])
    log_to(own, rotate=True)
    serve(own)
