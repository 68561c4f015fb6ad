"""A hospital's part in rounds of secure aggregation, whatever carries the messages: PySyft or Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from primia_lite.config import UserError
from primia_lite.federation.claims import MOST_REQUEST_BYTES, read_json
from primia_lite.runtime import write_atomic
from primia_lite.secagg import Agreement, Question, Reply, SecAggClient

if TYPE_CHECKING:
    from primia_lite.federation.study import Study


class HospitalRounds:
    """Answers requests, and keeps what a round needs between them: a process may end after each.

    Even and odd rounds are kept apart, each by a client that takes part in later rounds only: the next round may begin
    before this one has ended. Another study's rounds go on counting where the last one's stopped.

    Parameters
    ----------
    name, identity
        Who it is, and the key that the others have pinned.
    path
        A file for the hospital alone: it holds secrets. None keeps them in memory.
    """

    def __init__(self, name: str, identity: Ed25519PrivateKey, path: Path | None = None):
        self.name, self.identity = name, identity
        self._path, self._memory = path, b""

    @property
    def kept(self) -> dict:
        """``study``, and for even and odd rounds what :meth:`primia_lite.secagg.SecAggClient.save` says.

        Raises
        ------
        UserError
            The file is of another version: started without it, the hospital would answer rounds that were.
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
        self,
        key: str,
        agreement: Agreement,
        request: bytes,
        compute_update: Callable[[], np.ndarray],
        question: Callable[[], Question | None],
    ) -> Reply:
        """The reply to a request, once what is to be remembered is kept.

        Parameters
        ----------
        key
            Names the study for ever: a hash.
        compute_update, question
            See :meth:`primia_lite.secagg.SecAggClient.answer`; called in step ``mask`` alone. What computes an update
            charges the ledger first.

        Raises
        ------
        UserError
            Whatever is wrong, here or in what is called.
        """
        head = read_json(request, "the request", MOST_REQUEST_BYTES)
        asked = question() if head["step"] == "mask" else None
        clients = self._clients(key, agreement)
        try:
            return clients[head["session"] % 2].answer(request, compute_update, asked)
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
        if kept["study"] == key:
            states, last = [json.dumps(client).encode() for client in kept["clients"]], 0
        else:
            states, last = [], max(self.last_sessions())
        clients = [SecAggClient(self.name, self.identity, agreement, last, answered) for _ in range(2)]
        for client, state in zip(clients, states, strict=False):
            client.restore(state)
        return clients


def ask_question(
    key: str, study: Study, number: object, weights: Mapping[str, np.ndarray] | str | None
) -> Question | None:
    """What a round asks, where no noise protects the answer.

    Parameters
    ----------
    key
        Names the study for ever: a hash.
    weights
        The global ones, or their digest.

    Raises
    ------
    UserError
        The study has no such round.
    """
    if weights is None or type(number) is not int or not 1 <= number <= study.rounds:
        raise UserError(f"the server asks for round {number!r} of {study.rounds}, or sends no weights")
    if study.privacy:
        return None
    name = f"{key}:{number}"
    return Question(name, weights) if isinstance(weights, str) else Question.of(name, weights)
