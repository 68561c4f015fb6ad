"""A hospital's part in rounds of secure aggregation, whatever carries the messages: PySyft or Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite.config import UserError
from primia_lite.federation.study import Study
from primia_lite.federation.untrusted import MOST_REQUEST_BYTES, read_json
from primia_lite.runtime import write_atomic
from primia_lite.secagg import Agreement, Question, Reply, SecAggClient

Asked = Callable[[], tuple[object, Mapping[str, np.ndarray] | str | None]]


class HospitalRounds:
    """Answers requests, and keeps what a round needs between them: a process may end after each.

    Even and odd rounds are kept apart, each by a client that takes part in later rounds only: the next round may begin
    before this one has ended. Another study's rounds go on counting where the last one's stopped.

    Parameters
    ----------
    name, identity : who it is, and the key that the others have pinned
    path : a file for the hospital alone: it holds secrets. None keeps them in memory
    """

    def __init__(self, name: str, identity: Ed25519PrivateKey, path: Path | None = None):
        self.name, self.identity = name, identity
        self._path, self._memory = path, b""

    @property
    def kept(self) -> dict:
        """``study``, and for even and odd rounds what :meth:`primia_lite.secagg.SecAggClient.save` says.

        UserError for a file of another version: started without it, the hospital would answer rounds that were.
        """
        content = self._path.read_bytes() if self._path and self._path.exists() else self._memory
        found = json.loads(content or b'{"study": "", "clients": [{"last_session": 0}, {"last_session": 0}]}')
        if not isinstance(found, dict) or found.keys() != {"study", "clients"}:
            raise UserError(f"{self._path} is of another version of primia_lite: agree on a new study with new keys")
        return found

    def last_sessions(self) -> tuple[int, int]:
        """The numbers of the last even and the last odd round that it has taken part in."""
        even, odd = self.kept["clients"]
        return even["last_session"], odd["last_session"]

    def answer(
        self, key: str, study: Study, request: bytes, asked: Asked, compute_update: Callable[[], np.ndarray]
    ) -> Reply:
        """The reply to a request, once what is to be remembered is kept. UserError for whatever is wrong.

        Parameters
        ----------
        key : names the study for ever: a hash
        asked : gives the round's number in the study, and the global weights or their digest
        compute_update : charges the ledger first; both are called in step ``mask`` alone
        """
        head = read_json(request, "the request", MOST_REQUEST_BYTES)
        question = _question(key, study, *asked()) if head["step"] == "mask" else None
        clients = self._clients(key, study.agreement)
        try:
            return clients[head["session"] % 2].answer(request, compute_update, question)
        finally:
            # Before the reply leaves: a state that comes back after a crash would answer twice.
            content = {"study": key, "clients": [json.loads(client.save()) for client in clients]}
            self._memory = json.dumps(content).encode()
            if self._path:
                write_atomic(self._path, self._memory, private=True)

    def _clients(self, key: str, agreement: Agreement) -> list[SecAggClient]:
        kept, answered = self.kept, {}
        for client in kept["clients"]:
            answered |= client.get("answered", {})
        same = kept["study"] == key
        last = 0 if same else max(self.last_sessions())
        clients = [SecAggClient(self.name, self.identity, agreement, last, answered) for _ in range(2)]
        for client, state in zip(clients, kept["clients"] if same else (), strict=False):
            client.restore(json.dumps(state).encode())
        return clients


def _question(key: str, study: Study, number: object, weights: Mapping[str, np.ndarray] | str | None):
    """What a round asks, where no noise protects the answer; UserError where the study has no such round."""
    if weights is None or type(number) is not int or not 1 <= number <= study.rounds:
        raise UserError(f"the server asks for round {number!r} of {study.rounds}, or sends no weights")
    if study.privacy:
        return None
    name = f"{key}:{number}"
    return Question(name, weights) if isinstance(weights, str) else Question.of(name, weights)
