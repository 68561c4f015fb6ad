"""Rounds of federated training in one process, with checkpoints that survive a kill at any moment.

With fixed seeds a killed run ends in the same weights, bit for bit. Without them, an update that a hospital stored is
sent again as it was, and one that wasn't stored is computed with fresh noise and charged anew. The state of a generator
is never written.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from primia_lite import models
from primia_lite.config import UserError, elsewhere
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import Aggregator, ComputeUpdate, SecureAggregation, WeightedMean
from primia_lite.federation.hospital import Hospital, State
from primia_lite.federation.progress import RoundProgress
from primia_lite.federation.shared_noise import shared_step
from primia_lite.metrics import scores
from primia_lite.privacy.accounting import epsilon
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import charged_for
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.runtime import seed_for, write_atomic
from primia_lite.secagg import Question
from primia_lite.training import Training, check_options, predict


@dataclass(frozen=True)
class Schedule:
    """What the server does.

    Attributes
    ----------
    rounds : number of synchronisations
    server_learning_rate : scales the mean update; 1 is FedAvg
    server_momentum : of the server's step (FedAvgM, Hsu et al. 2019); post-processing, so it costs no ε
    average_last : the final model is the mean of the global models after the last so many rounds; 0 takes the last one
    """

    rounds: int
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    average_last: int = 0

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}: at least one is needed")
        if not 0 <= self.average_last <= self.rounds:
            raise UserError(f"average_last is {self.average_last}: it must lie between 0 and rounds ({self.rounds})")
        if not 0 <= self.server_momentum < 1:
            raise UserError(f"server_momentum is {self.server_momentum}: it must be in [0, 1)")


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes
    ----------
    state : weights of the final model
    history : one record a round: ``round``, validation scores, and ``absent`` where hospitals had vanished
    epsilon : ε by hospital (empty without DP), of everything in its ledger
    seeded : true where a fixed seed made noise and sampling: "seeded: not private"
    training, in_shape : what :meth:`model` needs
    hospitals : those that took part
    """

    state: State
    history: list[dict]
    epsilon: dict[str, float]
    seeded: bool
    training: Training
    in_shape: tuple[int, ...]
    hospitals: tuple[Hospital, ...]

    @property
    def epsilon_max(self) -> float:
        """The worst hospital's ε: what holds for each patient (or film) who is at one hospital only."""
        return max(self.epsilon.values(), default=float("inf"))

    @property
    def label(self) -> str:
        return "seeded: not private" if self.seeded and self.epsilon else ""

    def model(self) -> torch.nn.Module:
        model = models.build(self.training.model, self.training.n_classes, self.in_shape, **self.training.model_options)
        model.load_state_dict(self.state)
        return model.eval()

    def predict(self, films: Films) -> np.ndarray:
        """Class probabilities, float64 [N, K]."""
        return predict(self.model(), films)


def federate(
    hospitals: Sequence[Hospital],
    training: Training,
    schedule: Schedule,
    privacy: Privacy | None = None,
    *,
    seed: int = 0,
    noise_seed: int | None = None,
    folder: str | Path | None = None,
    fresh: bool = False,
    validation: Films | None = None,
    aggregator: Aggregator | None = None,
    progress: Callable[[dict], None] | str | None = "rounds",
) -> Result:
    """Train one model over several hospitals.

    One hospital is local training, and one hospital that holds all films (:func:`pool`) is training without federation.

    Parameters
    ----------
    seed
        Of the initial weights, and of shuffling and augmentation where DP is off.
    noise_seed
        Fixes Poisson sampling and DP noise: for teaching and tests only. None draws them from the operating system.
    folder
        Where checkpoint, stored updates and ledgers lie; a run found there goes on where it was. Required with DP.
    fresh
        Start anew: the run in ``folder`` is deleted, its ledgers too. For simulations.
    validation
        Scored after each round. Outside ε: validation films aren't protected by the training's DP.
    aggregator
        How updates are summed. Left out: securely, so that the server sees no single one (one hospital: in the clear).
    progress
        None, a function of each round's record, or the title of the bar, curve and lines that are shown.

    Raises
    ------
    UserError
        Contradictory options, a folder that holds another run or that another process uses, a ledger that lacks
        charges.
    BudgetError
        A hospital's ε is spent. What was reached is in the folder.
    TrainingError
        A loss or an update that isn't finite, naming hospital and round.
    TooFewSurvivors
        Hospitals vanished (an aggregator may simulate that), and what is left is below the threshold.
    """
    names = [h.name for h in hospitals]
    if not hospitals or len(set(names)) < len(names):
        raise UserError(f"hospitals must have names of their own, got {names or 'none'}")
    if privacy and folder is None:
        raise UserError("with DP each hospital keeps a ledger: give federate() a folder")
    folder = Path(folder) if folder else None
    _check(hospitals, training, privacy)
    if folder is None:
        return _run(hospitals, training, schedule, privacy, seed, noise_seed, None, validation, aggregator, progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "run.lock", timeout=0):  # the system lets go of it when a process is killed
            if fresh:
                _forget(folder)
                for h in hospitals:
                    h.forget_ledgers(folder)
            return _run(
                hospitals, training, schedule, privacy, seed, noise_seed, folder, validation, aggregator, progress
            )
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait for it, or choose another folder") from error
    except OSError as error:
        raise UserError(
            f"can't work in {folder}: {error.strerror or error}. Free space, or {elsewhere(folder)}"
        ) from error


def _check(hospitals: Sequence[Hospital], training: Training, privacy: Privacy | None) -> None:
    check_options(training, privacy)
    for h in hospitals:
        if h.films.model not in ("", training.model):
            raise UserError(
                f"hospital {h.name}'s films were prepared for {h.films.model}, but {training.model} is to be trained: "
                f"prepare them by prepare({training.model!r}, films)"
            )
        if h.films.normalisation != hospitals[0].films.normalisation:
            raise UserError(f"hospital {h.name}'s films were normalised unlike those of {hospitals[0].name}")
        if privacy and privacy.target_delta >= 1 / h.declared(privacy):
            warnings.warn(
                f"target_delta is {privacy.target_delta:g}, but hospital {h.name} declares {h.declared(privacy)} "
                f"{privacy.unit}s: a delta of 1 / their number or more lets a mechanism publish one of them whole. "
                "Take a smaller one",
                stacklevel=4,
            )


# Of a run, in the order of deletion: what names the run goes last, so that a kill in between leaves it to be deleted.
_FILES = (
    "checkpoint.pt",
    "update-*.pt",
    "ledger-*.sqlite*",
    ".checkpoint.pt.*",
    ".update-*",
    ".ledger-*",
    ".run.json.*",
    "run.json",
)


def _forget(folder: Path) -> None:
    """Delete a run, and only a run, from its folder; a ledger that can't be read is kept, and stops it."""
    for path in folder.glob("ledger-*.sqlite"):
        others = [what for what in charged_for(path) if not what.startswith("round ")]
        if others:
            raise UserError(
                f"{path} is charged for more than this run ({others[0]}): fresh=True would forget that. Leave it out, "
                "or choose another folder"
            )
    for pattern in _FILES:
        for path in sorted(folder.glob(pattern)):
            path.unlink()


def _run(hospitals, training, schedule, privacy, seed, noise_seed, folder, validation, aggregator, progress) -> Result:
    in_shape = tuple(hospitals[0].films.inputs.shape[2:])
    if any(tuple(h.films.inputs.shape[2:]) != in_shape for h in hospitals):
        raise UserError("the hospitals' films differ in size: load them all with one size")
    shared = privacy.shared if privacy else None
    if aggregator is None:
        threshold = shared.threshold if shared else None
        aggregator = SecureAggregation(threshold) if len(hospitals) > 1 else WeightedMean()
    sizes = {h.name: h.declared(privacy) for h in hospitals}
    if shared:
        shared.check(sizes.values(), aggregator.min_revealed(len(hospitals)))
    rng = SecureGenerator.for_seed(noise_seed) if privacy else SecureGenerator.from_seed(seed)

    server = ServerOptimizer.start(training, schedule, in_shape, seed)
    salt = _salt(folder) if folder else ""
    key = _fingerprint(salt, hospitals, training, schedule, privacy, seed, noise_seed, aggregator.name)
    if folder:
        server.resume(folder, salt, key)
        _check_ledgers(hospitals, training, privacy, server.history, folder)
    left = (schedule.rounds - server.round) * training.steps_per_round
    for h in hospitals if privacy and left else ():
        if not h.ledger(folder, privacy).affords(privacy.release(training.sample_rate, left)):
            warnings.warn(
                f"hospital {h.name}'s ledger can't afford all {schedule.rounds - server.round} rounds: the run will "
                "stop early. Plan it with Privacy.for_budget, or take more noise or fewer rounds",
                stacklevel=3,
            )
    show = RoundProgress(progress, schedule.rounds, server.history) if isinstance(progress, str) else progress

    def compute_updates(number: int) -> dict[str, ComputeUpdate]:
        return {
            h.name: partial(
                h.update, number, server.state, training, privacy, rng.child("round", number, h.name), folder
            )
            for h in hospitals
        }

    rounds = run_rounds(
        server, aggregator, compute_updates, sizes, training, in_shape, privacy=privacy, folder=folder, validation=validation,
        study=key,
    )  # fmt: skip
    for record in rounds:
        if folder:
            for h in hospitals:
                (folder / f"update-{h.name}-{record['round']:05d}.pt").unlink(missing_ok=True)
        if show:
            show(record)
    if isinstance(show, RoundProgress):
        show.close()
    spent = {h.name: h.ledger(folder, privacy).epsilon() for h in hospitals} if privacy else {}
    return Result(
        server.final(), server.history, spent, bool(privacy) and rng.seeded, training, in_shape, tuple(hospitals)
    )


def run_rounds(
    server: ServerOptimizer,
    aggregator: Aggregator,
    compute_updates: Callable[[int], Mapping[str, ComputeUpdate]],
    sizes: Mapping[str, int],
    training: Training,
    in_shape: tuple[int, ...],
    *,
    privacy: Privacy | None = None,
    folder: Path | None = None,
    validation: Films | None = None,
    study: str = "",
) -> Iterator[dict]:
    """The server's rounds, wherever the hospitals are: ask, take the mean, step, score, save.

    Parameters
    ----------
    ask
        Called with a round's number: how each hospital is asked for its update, by name.
    sizes
        Declared size by hospital.
    privacy
        Needed where noise is shared: the server's step then starts from a sum.
    folder
        Where the checkpoint goes.
    study
        Names what the rounds are of: hospitals in this process answer a round of it once.

    Yields
    ------
    each round's record, once it is saved (see :class:`Result`)
    """
    template = server.parameters(training, in_shape)
    shared = bool(privacy and privacy.shared)
    for number in range(server.round + 1, server.schedule.rounds + 1):
        question = None if privacy else Question.of(f"{study}:{number}", server.state)
        found = aggregator.aggregate(
            compute_updates(number), sizes, template, number, integer_sum=shared, question=question
        )
        change = found.value
        if shared:
            declared = sum(sizes[name] for name in found.survivors)
            change = shared_step(change, server.state, training, privacy, declared)
        server.step(change)
        record = {"round": number}
        if absent := sorted(sizes.keys() - set(found.survivors)):
            record["absent"] = absent
        if validation is not None:
            probabilities = predict(server.model(training, in_shape), validation)
            record |= scores(probabilities, validation.labels.numpy())
        server.history.append(record)
        if folder:
            server.save(folder)
        yield record


def planned_epsilon(training: Training, schedule: Schedule, privacy: Privacy) -> float:
    """ε of the whole run at each hospital, before a step is taken."""
    release = privacy.release(training.sample_rate, training.steps_per_round * schedule.rounds)
    return epsilon(release, privacy.target_delta)


def pool(hospitals: Sequence[Hospital], name: str = "pooled") -> Hospital:
    """All films in one place: what federated training does without."""
    first = hospitals[0].films
    if any((h.films.normalisation, h.films.model) != (first.normalisation, first.model) for h in hospitals):
        raise UserError("the hospitals' films were prepared in different ways: prepare them all in one")
    films = replace(
        first,
        inputs=torch.cat([h.films.inputs for h in hospitals]),
        labels=torch.cat([h.films.labels for h in hospitals]),
        patient_id=np.concatenate([h.films.patient_id for h in hospitals]),
    )
    return Hospital(name, films)


class ServerOptimizer:
    """Global weights, momentum, running mean and history: all that a checkpoint holds."""

    def __init__(self, schedule: Schedule, state: State):
        self.schedule = schedule
        self.state = state
        self.velocity = {name: torch.zeros_like(value) for name, value in state.items()}
        self.sum = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
        self.round = 0
        self.history: list[dict] = []

    @classmethod
    def start(cls, training: Training, schedule: Schedule, in_shape: tuple[int, ...], seed: int) -> ServerOptimizer:
        model = models.build(
            training.model, training.n_classes, in_shape, seed=seed_for(seed, "weights"), **training.model_options
        )
        return cls(schedule, {name: value.clone() for name, value in model.state_dict().items()})

    def step(self, delta: State) -> None:
        self.round += 1
        averaging = self.round > self.schedule.rounds - self.schedule.average_last
        for name, change in delta.items():
            self.velocity[name] = self.schedule.server_momentum * self.velocity[name] + change
            self.state[name] = self.state[name] + self.schedule.server_learning_rate * self.velocity[name]
        if averaging:
            for name, value in self.state.items():
                self.sum[name] += value.double()

    def final(self) -> State:
        if not self.schedule.average_last:
            return self.state
        return {name: (value / self.schedule.average_last).float() for name, value in self.sum.items()}

    def parameters(self, training: Training, in_shape: tuple[int, ...]) -> State:
        """What hospitals change: constants of norms are no part of it."""
        model = models.build(training.model, training.n_classes, in_shape, **training.model_options)
        return {name: self.state[name] for name, _ in model.named_parameters()}

    def model(self, training: Training, in_shape: tuple[int, ...]) -> torch.nn.Module:
        model = models.build(training.model, training.n_classes, in_shape, **training.model_options)
        model.load_state_dict(self.final() if self.round == self.schedule.rounds else self.state)
        return model

    _SAVED = ("state", "velocity", "sum", "round", "history")

    def save(self, folder: Path) -> None:
        content = {name: getattr(self, name) for name in self._SAVED}
        write_atomic(folder / "checkpoint.pt", lambda file: torch.save(content, file))

    def resume(self, folder: Path, salt: str, key: str) -> None:
        # The key is written before the first update is stored: a folder never holds updates of an unknown run.
        if not (folder / "run.json").exists():
            if (folder / "checkpoint.pt").exists():
                raise UserError(
                    f"{folder} has a checkpoint but no run.json that says of which run: start anew, fresh=True"
                )
            write_atomic(folder / "run.json", json.dumps({"salt": salt, "key": key}).encode())
        if json.loads((folder / "run.json").read_text("utf-8"))["key"] != key:
            raise UserError(
                f"{folder} holds a run with other films, hospitals, training or privacy: choose another folder, go "
                "back to the old settings, or start anew with fresh=True or `primia-lite run --fresh` "
                "(which delete it, ledgers included)"
            )
        if (folder / "checkpoint.pt").exists():
            content = torch.load(folder / "checkpoint.pt", weights_only=True)
            for name in self._SAVED:
                setattr(self, name, content[name])


def _salt(folder: Path) -> str:
    """Of the run's key: without it, a hash of private films would confirm a guess at them."""
    try:
        return json.loads((folder / "run.json").read_text("utf-8")).get("salt", "")
    except FileNotFoundError:
        return os.urandom(16).hex()


def _check_ledgers(hospitals, training, privacy, history: list[dict], folder: Path) -> None:
    """A run goes on only with the ledgers that it has charged so far."""
    if not privacy:
        return
    for h in hospitals:
        mechanism = (privacy.noise_multiplier, training.sample_rate)
        charged = sum(
            r.steps for r in h.ledger(folder, privacy).charges() if (r.noise_multiplier, r.sample_rate) == mechanism
        )
        took_part = sum(h.name not in record.get("absent", ()) for record in history)
        if charged < took_part * training.steps_per_round:
            raise UserError(
                f"hospital {h.name}'s ledger in {folder} has {charged} steps, but {took_part} rounds are done: "
                "it was deleted or replaced. Restore it from a backup, or start anew with fresh=True"
            )


def _fingerprint(salt, hospitals, training, schedule, privacy, seed, noise_seed, aggregator) -> str:
    digest = hashlib.sha256(salt.encode())
    for h in hospitals:
        digest.update(f"{h.name} {h.declared_size} {h.declared_patients}".encode())
        digest.update("\0".join(map(str, h.films.patient_id)).encode())
        digest.update(np.ascontiguousarray(h.films.inputs.numpy()).data)
        digest.update(h.films.labels.numpy().tobytes())
    settings = [training.as_dict(), asdict(schedule), privacy and privacy.as_dict(), seed, noise_seed, aggregator]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]
