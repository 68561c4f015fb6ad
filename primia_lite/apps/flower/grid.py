"""Both of Flower's apps in one process, without Ray, SuperLink or ports: for tests, benchmarks and notebooks.

The messages are Flower's, with all that they hold; they don't go through its serialisation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# Not public: `Message` asks it whose run this is.
from flwr.supercore.task_identity import TaskIdentity

from primia_lite import secagg
from primia_lite.apps.flower import app as flower_app
from primia_lite.apps.flower import server as flower_server
from primia_lite.apps.flower.hospital import Site
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import length
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Result, Schedule, ServerOptimizer
from primia_lite.federation.study import Study
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training


class InlineGrid(Grid):
    """A Grid whose nodes are in this process.

    Parameters
    ----------
    apps
        A ClientApp for each node.
    lost
        Called with node and message: whether it gets lost, as if the node had vanished.
    """

    def __init__(self, apps: Sequence[ClientApp], lost: Callable[[int, Message], bool] | None = None):
        self.contexts = {i: Context(1, i, {}, RecordDict(), {}) for i in range(1, len(apps) + 1)}
        self._apps, self._lost = dict(zip(self.contexts, apps, strict=True)), lost
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        return SimpleNamespace(run_id=1)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            key = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = key
            ids.append(key)
            if not (self._lost and self._lost(node, message)):
                # A hospital can't change what the server or another one holds.
                message.content = copy.deepcopy(message.content)
                self._replies[key] = self._apps[node](message, self.contexts[node])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def app_of(site: Site) -> ClientApp:
    """A ClientApp that answers as one hospital."""
    app = ClientApp()
    app.train()(lambda message, context: flower_app.respond(site, message))
    return app


def run_inline(
    hospitals: Sequence[Hospital],
    training: Training,
    schedule: Schedule,
    privacy: Privacy | None = None,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    threshold: int | None = None,
    clip: float = 32.0,
    validation: Films | None = None,
    progress: Callable[[dict], None] | None = None,
    lost: Callable[[int, Message], bool] | None = None,
    **options,
) -> Result:
    """:func:`primia_lite.federation.rounds.federate` through Flower's apps and messages, in this process.

    Parameters
    ----------
    folder
        Where ledgers and updates that aren't masked yet lie: required with DP.
    threshold, clip
        Of secure aggregation (see :class:`primia_lite.federation.aggregation.SecureAggregation`).
    progress
        Called with each round's record.
    lost
        See :class:`InlineGrid`.
    options
        Those of :class:`~primia_lite.apps.flower.server.FlowerAggregation`.

    Raises
    ------
    UserError
        As federate does.
    TooFewSurvivors
        Hospitals refused or vanished, and what is left is below the threshold.
    """
    if privacy and folder is None:
        raise UserError("with DP each hospital keeps a ledger: give run_inline() a folder")
    folder = Path(folder) if folder else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    in_shape = tuple(hospitals[0].films.inputs.shape[2:])
    like = ServerOptimizer.start(training, schedule, in_shape, seed).parameters()
    identities = {h.name: Ed25519PrivateKey.generate() for h in hospitals}
    agreement = secagg.Agreement(
        {name: key.public_key().public_bytes_raw() for name, key in identities.items()},
        {h.name: h.declared(privacy) for h in hospitals},
        length(like), clip, threshold, weighted=not (privacy and privacy.shared),
    )  # fmt: skip
    study = Study("inline", "films", training, privacy, schedule.rounds, agreement, seed).to_bytes()
    sites = [Site(h.name, identities[h.name], study, lambda _, h=h: h, folder) for h in hospitals]
    # Nobody comes later than at once.
    waits = dict.fromkeys(("step_timeout_s", "mask_timeout_s", "start_timeout_s"), 0.0)
    server = flower_server.train(
        InlineGrid([app_of(site) for site in sites], lost), study, schedule, in_shape,
        validation=validation, show=progress, **waits | options,
    )  # fmt: skip
    spent = {h.name: h.ledger(folder, privacy).epsilon() for h in hospitals} if privacy else {}
    return Result(server.final(), server.history, spent, False, training, in_shape, tuple(hospitals))
