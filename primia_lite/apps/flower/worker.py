"""A hospital's own process, which stays: it has torch imported and films loaded.

Flower starts a new process for each message. Were that one to import torch and load films, each round would take
seconds longer. So the SuperNode's process (:mod:`~primia_lite.apps.flower.process`) starts this one, and Flower's only
passes messages on: over a Unix socket in a folder that none but the owner may enter, in Flower's own bytes, no pickles.
It ends with the SuperNode. While there is none, as when it has just been killed, Flower's process answers by itself:
all that counts is in the hospital's folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import RecordDict

# Not public: how Flower itself writes a message's content.
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from primia_lite.apps.flower.folder import CONFIG, IDENTITY, STUDY, log, log_to
from primia_lite.apps.flower.messages import refusal
from primia_lite.runtime import write_atomic

if TYPE_CHECKING:
    from primia_lite.apps.flower.hospital import FlowerHospital

SOCKET = "worker"  # in the hospital's folder: where the socket is


def connect(folder: Path) -> Connection | None:
    """To the hospital's own process; None where there is none."""
    try:
        address = (folder / SOCKET).read_text("utf-8")
        place = Path(address).parent.stat()
        # What a killed one left names a folder that, once gone, anybody may make anew.
        if place.st_uid != os.getuid() or place.st_mode & 0o077:
            return None
        return Client(address, "AF_UNIX")
    except (OSError, ValueError):
        return None


def relay(connection: Connection, content: RecordDict) -> RecordDict:
    """What the hospital's own process replies; the connection is closed. EOFError where it ends meanwhile."""
    with connection:
        _send(connection, content)
        return _receive(connection)


def _send(connection: Connection, content: RecordDict) -> None:
    connection.send_bytes(recorddict_to_proto(content).SerializeToString())


def _receive(connection: Connection) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(connection.recv_bytes()))


class Held:
    """A hospital that keeps its films in memory, as long as its folder is as it was when they were read."""

    def __init__(self, folder: Path, make: Callable[[Path], FlowerHospital]):
        self._folder, self._make = folder, make
        self._hospital, self._read = None, None

    def reply(self, content: RecordDict) -> RecordDict:
        """As :meth:`primia_lite.apps.flower.hospital.FlowerHospital.reply`; also where the folder can't be read."""
        try:
            # A study that the hospital has joined since then counts, and films that it has deleted.
            now = [(self._folder / name).stat().st_ctime_ns for name in (CONFIG, STUDY, IDENTITY)]
            before = self._films()
            if self._read != (now, before):
                self._hospital, self._read = self._make(self._folder), None
        except Exception as error:
            log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
            return refusal()
        reply = self._hospital.reply(content)
        after = self._films()
        # Written meanwhile: it is what the hospital holds. Deleted meanwhile: what it holds is out of date.
        self._read = (now, after) if after == before or not before else None
        return reply

    def _films(self) -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_ctime_ns) for path in self._folder.glob("films-*.npz"))


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
    from primia_lite.apps.flower.hospital import FolderHospital

    held = Held(folder, FolderHospital)
    try:
        with Listener(str(place / "socket"), "AF_UNIX") as listener:
            write_atomic(path, str(place / "socket").encode(), private=True)
            while True:
                with suppress(OSError), listener.accept() as connection:
                    try:
                        _send(connection, held.reply(_receive(connection)))
                    except Exception as error:  # the connection closes, and Flower's process refuses
                        log.warning("this hospital can't answer: %s: %s", type(error).__name__, error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    own = Path(sys.argv[1])
    log_to(own, rotate=True)
    serve(own)
