"""The server's side of a federation over Flower: rounds of secure aggregation whose messages go through its Grid.

Each message costs Flower a poll of up to 3 s and a new process, so a round has three exchanges in place of five: the
keys of the next round are advertised with the confirmation of this one, and shared with its unmasking. Rounds know
nothing of each other (keys, masks and signatures are a round's own), so neither tells more than it did; a hospital that
misses one of these exchanges misses the next round too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from flwr.app import Array, ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from primia_lite import secagg
from primia_lite.apps.flower.folder import HISTORY, SERVER_CONFIG, STUDY, config_of, log
from primia_lite.apps.flower.hospital import FARTHEST_MS, fingerprint, now_ms
from primia_lite.apps.flower.messages import replies, request
from primia_lite.config import UserError, printable
from primia_lite.federation.aggregation import SecAggOver
from primia_lite.federation.hospital import State
from primia_lite.federation.optimizer import Schedule
from primia_lite.federation.rounds import Result, federate_study
from primia_lite.federation.study import Study
from primia_lite.runtime import write_atomic

MODEL = "model.pt"


class FlowerAggregation(SecAggOver):
    """Secure aggregation with hospitals behind Flower's Grid.

    Parameters
    ----------
    study : the server's copy of ``study.json``
    weights : gives the global weights of the round that begins
    rounds : the last round's number: after it nothing is asked ahead
    step_timeout_s, mask_timeout_s : how long replies are waited for, and those of step ``mask``, in which hospitals
        train. Who is late is gone
    start_timeout_s : how long the first round waits for all hospitals to be connected
    poll_s : between two looks for replies
    """

    def __init__(
        self,
        grid: Grid,
        study: bytes,
        weights: Callable[[], State],
        rounds: int,
        *,
        step_timeout_s: float = 60.0,
        mask_timeout_s: float = 600.0,
        start_timeout_s: float = 60.0,
        poll_s: float = 0.2,
    ):
        self.agreement = Study.from_bytes(study).agreement
        self.name = f"secure aggregation over Flower, threshold {self.agreement.threshold}"
        self.fingerprint = fingerprint(study)
        self.refused: list[str] = []
        self._grid, self._weights, self._rounds = grid, weights, rounds
        self._timeout_s = {"mask": mask_timeout_s}
        self._step_timeout_s, self._start_timeout_s, self._poll_s = step_timeout_s, start_timeout_s, poll_s
        self._nodes: dict[str, int] = {}  # by hospital
        self._missing: dict[str, int] = {}  # nodes that owe a reply, by message
        self._session = self._told = 0  # the last number given out; the highest that a hospital has named
        self._next: secagg.SecAggServer | None = None

    def round(self, number, updates, question, *, again: bool = True) -> secagg.SecAggServer:
        server, self._next = self._next or self._begin(), None
        steps = []

        def exchange(step: str, requests: Mapping[str, bytes]) -> Iterator[secagg.Reply]:
            steps.append(step)
            asked = {name: [text] for name, text in requests.items()}
            ahead = self._ahead(step) if number < self._rounds else {}
            for name, text in ahead.items():
                asked.setdefault(name, []).append(text)
            broadcast = step == "advertise" or (step == "confirm" and bool(ahead))
            for message in self._exchange(step, asked, number, broadcast):
                yield from self._sorted(message, server)

        try:
            self.refused += secagg.run_round(server, exchange)
            self._close_next()
        except BaseException as error:
            self._next = None
            # Numbers were too low, as after a clock that was ahead, and hospitals have said so. Nothing was computed.
            early = isinstance(error, secagg.TooFewSurvivors) and steps == ["advertise"]
            if again and early and server.session <= self._told:
                return self.round(number, updates, question, again=False)
            raise
        return server

    # --- the next round, one exchange ahead ---------------------------------------------------------------------------

    def _begin(self) -> secagg.SecAggServer:
        # By the clock, so that a new run's rounds come after the last one's; hospitals answer no earlier number.
        now = max(self._session + 1, self._told + 1, now_ms())
        self._session = now + (now - self._session + 1) % 2  # even after odd: hospitals keep the two apart
        return secagg.SecAggServer(self.agreement, self._session)

    def _ahead(self, step: str) -> dict[str, bytes]:
        if step == "confirm":
            self._next = self._begin()
        elif step == "unmask":
            self._close_next()
        else:
            return {}
        return dict(self._next.requests()) if self._next else {}

    def _close_next(self) -> None:
        try:
            if self._next:
                self._next.close()
        except secagg.TooFewSurvivors:  # the round then begins afresh, when it is due
            self._next = None

    # --- messages -----------------------------------------------------------------------------------------------------

    def _sorted(self, message: Message, server: secagg.SecAggServer) -> Iterator[secagg.Reply]:
        """A message's replies for this round; those for the next one are taken."""
        if message.has_error():
            self._note(f"node {message.metadata.src_node_id}: {message.error.reason}")
            return
        try:
            found = replies(message)
            if not found:
                self._behind(message)
        except Exception as error:  # of any kind: it is a hospital's, and the others' count
            self._note(f"node {message.metadata.src_node_id}: a reply that can't be read ({error})")
            return
        for reply in found:
            if reply.step == "advertise":
                self._learn(reply, message.metadata.src_node_id, server)
            if self._next and reply.session == self._next.session:
                try:
                    self._next.receive(reply)
                except secagg.ProtocolError as error:
                    self._note(str(error))
            else:
                yield reply

    def _learn(self, reply: secagg.Reply, node: int, server: secagg.SecAggServer) -> None:
        """Which node a hospital is, from what it signed."""
        for round_ in (server, self._next):
            try:
                if round_:
                    self._nodes[reply.check(self.agreement, round_.session, "advertise").sender] = node
            except secagg.ProtocolError:
                continue

    def _behind(self, message: Message) -> None:
        last = message.content["reply"]["last"]
        if type(last) is not int or last > now_ms() + FARTHEST_MS // 2:
            raise ValueError(f"it has taken part in round {last}, which lies more than a century ahead")
        self._note(f"node {message.metadata.src_node_id}: it has taken part in round {last}")
        self._told = max(self._told, last)

    def _note(self, why: str) -> None:
        why = printable(why)
        self.refused.append(why)
        log.warning("%s", why)

    def _exchange(self, step: str, asked: Mapping[str, list[bytes]], number: int, broadcast: bool) -> Iterator[Message]:
        """Send, and give the replies as they come, until all have or time is up.

        ``broadcast``: hospitals whose node isn't known (yet, or since it restarted) are asked through all other nodes.
        """
        nodes = self._connected() if broadcast else list(self._nodes.values())
        contents = {self._nodes[name]: texts for name, texts in asked.items() if self._nodes.get(name) in nodes}
        if broadcast and (strangers := [name for name in asked if self._nodes.get(name) not in nodes]):
            known = set(self._nodes.values())
            contents |= {node: asked[strangers[0]][-1:] for node in nodes if node not in known}
        timeout_s, weights = self._timeout_s.get(step, self._step_timeout_s), None
        if step == "mask":
            weights = ArrayRecord({name: Array(value.numpy()) for name, value in self._weights().items()})
        messages = [
            Message(
                request(self.fingerprint, texts, number, weights), node, MessageType.TRAIN,
                ttl=timeout_s, group_id=str(number),
            )
            for node, texts in contents.items()
        ]  # fmt: skip
        behind = set(self._missing.values())
        ids = dict(zip(self._grid.push_messages(messages), contents, strict=False))
        waiting = {key for key, node in ids.items() if node not in behind}
        deadline = time.monotonic() + timeout_s
        self._missing |= ids
        while True:
            for message in list(self._grid.pull_messages(list(self._missing))):
                key = message.metadata.reply_to_message_id
                self._missing.pop(key, None)
                waiting.discard(key)
                if key in ids:
                    yield message
            if not waiting or time.monotonic() >= deadline:
                return
            time.sleep(self._poll_s)

    def _connected(self) -> list[int]:
        nodes = list(self._grid.get_node_ids())
        deadline = time.monotonic() + (0.0 if self._nodes else self._start_timeout_s)
        while len(nodes) < len(self.agreement.names) and time.monotonic() < deadline:
            time.sleep(self._poll_s)
            nodes = list(self._grid.get_node_ids())
        return nodes


def train(
    grid: Grid,
    study: bytes,
    schedule: Schedule,
    in_shape: tuple[int, ...],
    *,
    folder: Path | None = None,
    progress: Callable[[dict], None] | None = None,
    **options,
) -> Result:
    """Train over the Grid: :func:`primia_lite.federation.rounds.federate_study`.

    Parameters
    ----------
    study : the server's copy of ``study.json``
    in_shape : of a film as the model takes it
    folder : where the checkpoint goes; a run found there goes on
    options : those of :class:`FlowerAggregation`
    """
    agreed = Study.from_bytes(study)
    return federate_study(
        agreed, schedule, in_shape,
        lambda server: FlowerAggregation(grid, study, lambda: server.state, schedule.rounds, **options),
        seed=agreed.seed, folder=folder, progress=progress,
    )  # fmt: skip


def train_in_folder(grid: Grid, folder: Path, rounds: int, *, fresh: bool = False) -> None:
    """What the ServerApp does: read ``study.json`` and ``server.toml``, train, and leave ``run/model.pt``.

    What happens is noted in ``run/history.json``: ``rounds``, a record each of those that this run has done;
    ``ended_s``, when each ended, in seconds since training began; ``done``, the rounds in all, or ``error``.

    Parameters
    ----------
    rounds : in all, with those of an earlier run that is found in the folder
    fresh : start anew
    """
    config = config_of(folder / SERVER_CONFIG)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    started = time.monotonic()
    found: dict = {"rounds": [], "ended_s": []}

    def note(record: dict | None = None) -> None:
        if record:
            found["rounds"].append(record)
            found["ended_s"].append(round(time.monotonic() - started, 2))
        write_atomic(run / HISTORY, (json.dumps(found, indent=1) + "\n").encode())

    try:
        with FileLock(run / "run.lock", timeout=0):
            for path in (run / name for name in ("checkpoint.pt", "run.json", MODEL) if fresh):
                path.unlink(missing_ok=True)
            note()
            try:
                result = train(
                    grid, (folder / STUDY).read_bytes(), Schedule(rounds, **config.get("schedule", {})),
                    tuple(config["in_shape"]), folder=run, progress=note, **config.get("timeouts", {}),
                )  # fmt: skip
                write_atomic(run / MODEL, lambda file: torch.save(result.state, file))
                found["done"] = len(result.history)
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
                raise
            finally:
                note()
    except Timeout as error:
        raise UserError(f"another run trains in {run}: wait for it, or stop it") from error
