"""Flower's server and hospitals in one process, without Ray, SuperLink or ports.

The messages are Flower's, with all that they hold; they don't go through its serialisation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.serverapp import Grid

# Not public: `Message` asks it whose run this is.
from flwr.supercore.task_identity import TaskIdentity

from primia_lite.apps.flower.hospital import FlowerHospital
from primia_lite.apps.flower.messages import reply_to
from primia_lite.apps.flower.server import train
from primia_lite.federation.aggregation import length
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Result, Schedule, ServerOptimizer
from primia_lite.federation.study import Study
from primia_lite.secagg import Agreement
from primia_lite.training import Training

Answer = Callable[[Message], Message]


class InlineGrid(Grid):
    """A Grid whose nodes are in this process, from 1 on.

    Parameters
    ----------
    nodes
        What answers, for each node.
    lost
        Called with node and message: whether it gets lost, as if the node had vanished.
    spoil
        Called with node and reply, which it may change.
    """

    def __init__(self, nodes: Sequence[FlowerHospital | Answer], lost=None, spoil=None):
        self._nodes, self._lost, self._spoil = dict(enumerate(nodes, 1)), lost, spoil
        self.replies: dict[str, Message] = {}
        self._ids = itertools.count(1)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        return SimpleNamespace(run_id=1)

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            number, key = message.metadata.dst_node_id, str(next(self._ids))
            message.metadata.__dict__["_message_id"] = key
            ids.append(key)
            if not (self._lost and self._lost(number, message)):
                # A hospital can't change what the server or another one holds.
                message.content = copy.deepcopy(message.content)
                node = self._nodes[number]
                reply = node(message) if callable(node) else reply_to(message, node.reply(message.content))
                if self._spoil:
                    self._spoil(number, reply)
                self.replies[key] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(key) for key in list(message_ids) if key in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def parties(hospitals: Sequence[Hospital], training, privacy=None, rounds=1, *, folder=None, threshold=None, seed=0):
    """``study.json`` for some hospitals, and each of them behind Flower."""
    in_shape = tuple(hospitals[0].films.inputs.shape[2:])
    like = ServerOptimizer.start(training, Schedule(1), in_shape, seed).parameters()
    identities = {h.name: Ed25519PrivateKey.generate() for h in hospitals}
    agreement = Agreement(
        {name: key.public_key().public_bytes_raw() for name, key in identities.items()},
        {h.name: h.declared(privacy) for h in hospitals},
        length(like), 32.0, threshold, weighted=not (privacy and privacy.shared),
    )  # fmt: skip
    study = Study("inline", "films", training, privacy, rounds, agreement, seed).to_bytes()
    return study, [FlowerHospital(h.name, identities[h.name], study, lambda _, h=h: h, folder) for h in hospitals]


def run_inline(
    hospitals: Sequence[Hospital],
    training: Training,
    schedule: Schedule,
    privacy=None,
    *,
    folder: Path | None = None,
    threshold: int | None = None,
    lost=None,
    spoil=None,
) -> Result:
    """:func:`primia_lite.federation.rounds.federate` by Flower's messages; with DP ledgers lie in ``folder``."""
    in_shape = tuple(hospitals[0].films.inputs.shape[2:])
    study, behind = parties(hospitals, training, privacy, schedule.rounds, folder=folder, threshold=threshold)
    # Nobody comes later than at once.
    waits = dict.fromkeys(("step_timeout_s", "mask_timeout_s", "start_timeout_s"), 0.0)
    result = train(InlineGrid(behind, lost, spoil), study, schedule, in_shape, progress=None, **waits)
    spent = {h.name: h.ledger(folder, privacy).epsilon() for h in hospitals} if privacy else {}
    return replace(result, epsilon=spent, hospitals=tuple(hospitals))
