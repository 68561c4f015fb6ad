"""Where a service computes: a keeper of models and sessions, in this process or in one of its own.

In one of its own it may be killed: SEAL is C++ that gets strangers' bytes, and holds the interpreter's lock. A worker
that dies or hangs costs its sessions, not the service; and while it waits, it makes masks for the next films.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections import OrderedDict

from primia_lite.config import UserError
from primia_lite.encrypted.card import ModelCard
from primia_lite.encrypted.ckks import Server, Session

# Of each session, made in idle time; for the sessions that were used last.
_MASKS, _SESSIONS = 2, 16
_START_S = 120.0


class WorkerDied(Exception):
    """A worker ended, or was stopped because it took too long; its sessions are gone."""


class SessionGone(Exception):
    """Of this token there is no session: it was closed, or its worker died."""


class Keeper:
    """Models and clients' sessions, by token."""

    def __init__(self, cards: dict[str, ModelCard]):
        self.servers = {
            name: Server(card.network(), tuple(card.in_shape), keep_costs=False, flooded=card.flooded)
            for name, card in cards.items()
        }
        self.sessions: OrderedDict[str, Session] = OrderedDict()

    def open(self, name: str, token: str, public: bytes) -> None:
        self.sessions[token] = self.servers[name].open(public)

    def diagnose(self, token: str, uploads: list[bytes]) -> list[bytes]:
        if token not in self.sessions:
            raise SessionGone(token)
        self.sessions.move_to_end(token)
        return self.sessions[token].diagnose(uploads)

    def close(self, token: str) -> None:
        self.sessions.pop(token, None)

    def prepare(self) -> bool:
        """Make the masks of one film for a session that was used lately; False if all have theirs."""
        for session, _ in zip(reversed(self.sessions.values()), range(_SESSIONS), strict=False):
            if session.prepared < _MASKS:
                session.prepare()
                return True
        return False


class Here:
    """A keeper in this process, behind the interface of :class:`Worker`; it can't be stopped."""

    pid = None

    def __init__(self, cards: dict[str, ModelCard]):
        self.keeper = Keeper(cards)

    def call(self, what: str, *arguments):
        return getattr(self.keeper, what)(*arguments)

    def kill(self, pid: None, why: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Worker:
    """A keeper in a process of its own. One call at a time: the caller sees to that.

    Raises
    ------
    UserError
        It doesn't start.
    """

    def __init__(self, cards: dict[str, ModelCard]):
        self._cards, self._stopped, self._busy, self._why = pickle.dumps(cards), False, False, ""
        self._start()

    def _start(self) -> None:
        # A fresh process on every system: a fork would copy this one's threads and locks.
        context = multiprocessing.get_context("spawn")
        line, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._cards), daemon=True)
        process.start()
        theirs.close()
        self._line, self._process = line, process
        try:
            ready = self._line.poll(_START_S) and self._line.recv()
        except (OSError, EOFError):
            ready = False
        if not ready or self._stopped:
            self._end()
            raise UserError("the service's worker process didn't start: see what it printed above")

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, what: str, *arguments):
        """A method of :class:`Keeper`, there.

        Raises
        ------
        WorkerDied
            It ended, by itself or by :meth:`kill`; after a new process was started, where that was possible.
        """
        if self._stopped:
            raise WorkerDied("the service stops")
        self._why, self._busy = "", True
        try:
            self._line.send((what, arguments))
            fine, result = self._line.recv()
        except (OSError, EOFError) as error:
            self._replace()
            raise WorkerDied(self._why or "the worker process ended") from error
        finally:
            self._busy = False
        if fine:
            return result
        raise result

    def kill(self, pid: int, why: str) -> None:
        """End the process ``pid``, if it is at work and no other took its place; a call that writes, waits or reads
        ends with it."""
        if self._busy and self._process.pid == pid:
            self._why = why
            self._process.kill()

    def _replace(self) -> None:
        self._end()
        if not self._stopped:
            with contextlib.suppress(UserError, OSError):  # the next call finds it dead, and tries again
                self._start()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._line.close()

    def stop(self) -> None:
        """For good; a call that is under way raises WorkerDied."""
        self._stopped = True
        self._process.kill()
        self._process.join()


def _work(line, cards: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service is told, and stops its workers
    keeper = Keeper(pickle.loads(cards))
    line.send(True)
    idle = True
    while True:
        while idle and not line.poll():
            try:
                idle = keeper.prepare()
            except Exception:  # a film then gets its masks when it comes, and its client hears of the fault
                idle = False
        try:
            what, arguments = line.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(keeper, what)(*arguments)
        except Exception as error:  # for the one who asked, and nobody else
            answer = False, error
        line.send(answer)
        idle = True
