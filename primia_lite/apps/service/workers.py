"""Where a service computes: a store of models and sessions, in this process or in one of its own.

In one of its own it may be killed: SEAL is C++ that gets strangers' bytes, and holds the interpreter's lock. A worker
that dies or hangs costs its sessions, not the service; and while it waits, it makes masks for the next films. What it
says is bytes of a bounded number and nothing that is unpickled, for a stranger's bytes may have taken it over: so this
isn't a ProcessPoolExecutor, which unpickles, and whose processes can't be ended one by one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import signal
from collections import OrderedDict
from dataclasses import dataclass
from multiprocessing.connection import Connection

from primia_lite.config import UserError, printable
from primia_lite.encrypted.model_card import ModelCard
from primia_lite.encrypted.seal import CiphertextError
from primia_lite.encrypted.server import CkksServer, Session
from primia_lite.encrypted.wire import join, split

# Of each session, made in idle time; for the sessions that were used last.
_MASKS, _SESSIONS = 2, 16
# A worker that ends is seen at once; so only one that hangs waits so long.
_START_S = 600.0
# What comes beside a reply: what kind it is, or a sentence.
_WORDS_BYTES = 4096

_log = logging.getLogger(__name__)


class WorkerDied(Exception):
    """A worker ended, or was stopped because it took too long; its sessions are gone."""


class SessionGone(Exception):
    """There is no session with this token: it was closed, made room, had its films, or its worker died."""


# How a worker's answer begins.
_DONE, _REFUSED, _GONE, _FAULT = b"+", b"-", b"?", b"!"
_RAISED = {_REFUSED: CiphertextError, _GONE: SessionGone, _FAULT: RuntimeError}


@dataclass
class Held:
    """A client's session, the size of its keys, and how many films it had."""

    session: Session
    key_bytes: int
    films: int = 0


class InProcess:
    """Models and clients' sessions by token, the longest unused first; without a process to stop.

    ``bounds``: how many sessions, bytes of their keys (if there are several), and films in each.
    """

    pid = None

    def __init__(self, cards: dict[str, ModelCard], bounds: tuple[float, float, float]):
        self.servers = {
            name: CkksServer(card.network(), tuple(card.in_shape), flooded=card.flooded) for name, card in cards.items()
        }
        self.most_sessions, self.most_bytes, self.most_films = bounds
        self.sessions: OrderedDict[str, Held] = OrderedDict()

    def call(self, what: str, *arguments: str | bytes) -> bytes:
        """``open``, ``diagnose`` or ``close``."""
        return getattr(self, what)(*arguments) or b""

    def open(self, name: str, token: str, public: bytes) -> None:
        self.sessions[token] = Held(self.servers[name].open(public), len(public))
        held = sum(each.key_bytes for each in self.sessions.values())
        while len(self.sessions) > self.most_sessions or (len(self.sessions) > 1 and held > self.most_bytes):
            held -= self.sessions.popitem(last=False)[1].key_bytes

    def diagnose(self, token: str, uploads: bytes) -> bytes:
        """A film's ciphertexts in one body, and the replies in one."""
        if token not in self.sessions or self.sessions[token].films >= self.most_films:
            raise SessionGone(token)
        self.sessions.move_to_end(token)
        self.sessions[token].films += 1
        return join(self.sessions[token].session.diagnose(split(uploads)))

    def close(self, token: str) -> None:
        if self.sessions.pop(token, None) is None:
            raise SessionGone(token)

    def prepare(self) -> bool:
        """Make the masks of one film for a session that was used lately; False if all have theirs."""
        for held, _ in zip(reversed(self.sessions.values()), range(_SESSIONS), strict=False):
            if held.session.prepared < _MASKS:
                held.session.prepare()
                return True
        return False

    def kill(self, pid: None, why: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Worker:
    """An :class:`InProcess` in a process of its own. One call at a time: the caller sees to that. A worker whose reply
    has more than ``most_bytes`` is replaced."""

    def __init__(self, cards: dict[str, ModelCard], bounds: tuple[float, float, float], most_bytes: int):
        self._given = {name: card.to_bytes() for name, card in cards.items()}, bounds
        self._most_bytes = most_bytes + _WORDS_BYTES
        self._stopped, self._busy, self._why = False, False, ""
        self._start()

    def _start(self) -> None:
        # A fresh process on every system: a fork would copy this one's threads and locks.
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *self._given), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._line.poll(_START_S) and self._line.recv_bytes(_WORDS_BYTES) == _DONE
        except (OSError, EOFError):
            ready = False
        if not ready or self._stopped:
            self._end()
            raise UserError("the service's worker process didn't start: see what it printed above")

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, what: str, *arguments: str | bytes) -> bytes:
        """A method of :class:`InProcess`, there; of its arguments only the last may be bytes.

        Raises
        ------
        WorkerDied
            It ended, by itself or by :meth:`kill`, or said what no worker says; a new one was started if possible.
        CiphertextError, SessionGone, RuntimeError
            As there; the last is a fault of ours.
        """
        if self._stopped:
            raise WorkerDied("the service stops")
        self._why, self._busy = "", True
        texts = [each for each in arguments if isinstance(each, str)]
        try:
            self._line.send_bytes(json.dumps([what, texts, len(texts) < len(arguments)]).encode())
            for body in arguments[len(texts) :]:
                self._line.send_bytes(body)
            answer = self._line.recv_bytes(self._most_bytes)
            if (kind := answer[:1]) not in (_DONE, *_RAISED):
                raise OSError("no worker says that")
        except (OSError, EOFError) as error:
            self._end()
            if not self._stopped:
                with contextlib.suppress(UserError, OSError):  # the next call finds it dead, and tries again
                    self._start()
            raise WorkerDied(self._why or "the worker process ended") from error
        finally:
            self._busy = False
        if kind == _DONE:
            return answer[1:]
        raise _RAISED[kind](printable(answer[1:].decode(errors="replace"), 500))

    def kill(self, pid: int, why: str) -> None:
        """End the process ``pid``, and the call under way there, if it is at work and no other took its place."""
        if self._busy and self._process.pid == pid:
            self._why = why
            self._process.kill()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._line.close()

    def stop(self) -> None:
        """For good; a call that is under way raises WorkerDied."""
        self._stopped = True
        self._process.kill()
        self._process.join()


def work(line: Connection, cards: dict[str, bytes], bounds: tuple[float, float, float]) -> None:
    """A worker process: answers calls until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service is told, and stops its workers
    store = InProcess({name: ModelCard.from_bytes(content) for name, content in cards.items()}, bounds)
    line.send_bytes(_DONE)
    idle = True
    while True:
        while idle and not line.poll():
            try:
                idle = store.prepare()
            except Exception:  # a film then gets its masks when it comes, and its client hears of the fault
                idle = False
        try:
            what, arguments, body_follows = json.loads(line.recv_bytes())
            arguments += [line.recv_bytes()] if body_follows else []
        except EOFError:
            return
        try:
            answer = _DONE + store.call(what, *arguments)
        except Exception as error:  # for the one who asked, and nobody else
            kind = _REFUSED if isinstance(error, UserError) else _GONE if isinstance(error, SessionGone) else _FAULT
            if kind == _FAULT:
                _log.exception("%s in a worker", what)
            answer = kind + str(error).encode(errors="replace")[: _WORDS_BYTES // 2]
        line.send_bytes(answer)
        idle = True
