"""Rounds of federated training: in one process, or wherever an aggregator reaches the hospitals."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from primia_lite import runtime
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation import checkpoints
from primia_lite.federation.aggregation import Aggregator, ComputeUpdate, SecureAggregation, WeightedMean
from primia_lite.federation.hospital import Hospital, State, network
from primia_lite.federation.optimizer import Schedule, ServerOptimizer, shared_step
from primia_lite.federation.progress import shown
from primia_lite.federation.study import Study
from primia_lite.metrics import scores
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.secagg import Question
from primia_lite.training import Training, check_options, predict


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes
    ----------
    state : weights of the final model
    history : one record a round: ``round``, validation scores, and ``absent`` where hospitals had vanished
    epsilon : ε by hospital (empty without DP), of everything in its ledger
    seeded : a fixed seed made noise and sampling: "seeded: not private"
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
        model = network(self.training, self.in_shape)
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
    """Train one model over several hospitals; over one it is local training (over :func:`pool`, of all films).

    Parameters
    ----------
    seed : of the initial weights, and of shuffling and augmentation where DP is off
    noise_seed : fixes Poisson sampling and DP noise, for teaching and tests; None: from the operating system
    folder : of checkpoint, stored updates and ledgers; a run found there goes on. Required with DP
    fresh : start anew: the run in ``folder`` is deleted, its ledgers too. For simulations
    validation : scored after each round. Outside ε: the training's DP doesn't protect validation films
    aggregator : how updates are summed. Left out: securely, so that the server sees no single one
    progress : None, a function of each round's record, or the title of the bar, curve and lines that are shown

    Raises
    ------
    UserError
        Also BudgetError (a hospital's ε is spent), TrainingError (values that aren't finite) and TooFewSurvivors
        (hospitals vanished); what was reached is in the folder.
    """
    folder = Path(folder) if folder else None
    if privacy and folder is None:
        raise UserError("with DP each hospital keeps a ledger: give federate() a folder")
    if not aggregator:
        threshold = privacy.shared.threshold if privacy and privacy.shared else None
        aggregator = SecureAggregation(threshold) if len(hospitals) > 1 else WeightedMean()
    in_shape = _check(hospitals, training, privacy, aggregator)
    rng = SecureGenerator.for_seed(noise_seed) if privacy else SecureGenerator.from_seed(seed)
    server = ServerOptimizer.start(training, schedule, in_shape, seed)

    def compute_updates(number: int) -> dict[str, ComputeUpdate]:
        draws = {h.name: rng.child("round", number, h.name) for h in hospitals}
        given = number, server.state, training, privacy
        return {h.name: partial(h.update, *given, draws[h.name], folder) for h in hospitals}

    with checkpoints.locked(folder) if folder else nullcontext():
        settings = {"seed": seed, "noise_seed": noise_seed, "aggregator": aggregator.name}
        study = _take_up(server, hospitals, privacy, settings, folder, fresh)
        sizes = {h.name: h.declared(privacy) for h in hospitals}
        options = {"privacy": privacy, "folder": folder, "validation": validation, "study": study}
        with shown(progress, schedule.rounds, server.history) as show:
            for record in _rounds(server, aggregator, sizes, compute_updates, **options):
                for h in hospitals if folder else ():
                    h.forget_update(folder, record["round"])
                show(record)
        spent = {h.name: h.ledger(folder, privacy).epsilon() for h in hospitals} if privacy else {}
    seeded = bool(privacy) and rng.seeded
    return Result(server.final(), server.history, spent, seeded, training, in_shape, tuple(hospitals))


def _check(
    hospitals: Sequence[Hospital], training: Training, privacy: Privacy | None, aggregator: Aggregator
) -> tuple[int, ...]:
    """The shape of a film, if hospitals, training and privacy go together."""
    names = [h.name for h in hospitals]
    if not hospitals or len(set(names)) < len(names):
        raise UserError(f"hospitals must have names of their own, got {names or 'none'}")
    check_options(training, privacy)
    first = hospitals[0].films
    if any(h.films.inputs.shape[2:] != first.inputs.shape[2:] for h in hospitals):
        raise UserError("the hospitals' films differ in size: load them all with one size")
    for h in hospitals:
        if h.films.model not in ("", training.model):
            raise UserError(
                f"hospital {h.name}'s films were prepared for {h.films.model}, but {training.model} is to be trained: "
                f"prepare them by prepare({training.model!r}, films)"
            )
        if h.films.normalisation != first.normalisation:
            raise UserError(f"hospital {h.name}'s films were normalised unlike those of {hospitals[0].name}")
        if privacy and privacy.target_delta >= 1 / h.declared(privacy):
            warnings.warn(
                f"target_delta is {privacy.target_delta:g}, but hospital {h.name} declares {h.declared(privacy)} "
                f"{privacy.unit}s: a delta of 1 / their number or more lets a mechanism publish one of them whole. "
                "Take a smaller one",
                stacklevel=3,
            )
    if privacy and privacy.shared:
        privacy.shared.check([h.declared(privacy) for h in hospitals], aggregator.min_revealed(len(hospitals)))
    return tuple(first.inputs.shape[2:])


def _take_up(server: ServerOptimizer, hospitals, privacy, settings: dict, folder: Path | None, fresh: bool) -> str:
    """Go on with a folder's run, or start one there; what names the run."""
    recipe = {"training": server.training.as_dict(), "schedule": asdict(server.schedule)}
    recipe |= {"privacy": privacy and privacy.as_dict(), **settings}
    key_of = partial(checkpoints.fingerprint, hospitals, list(recipe.values()))
    if not folder:
        return key_of()
    if fresh:
        checkpoints.forget(folder)
        for h in hospitals:
            h.forget_ledgers(folder)
    key = checkpoints.resume(server, folder, key_of, recipe | _public(hospitals, server))
    if privacy:
        checkpoints.check_ledgers(hospitals, server.training, privacy, server.history, folder)
        left = server.schedule.rounds - server.round
        for h in hospitals if left else ():
            release = privacy.release(server.training.sample_rate, left * server.training.steps_per_round)
            if not h.ledger(folder, privacy).affords(release):
                warnings.warn(
                    f"hospital {h.name}'s ledger can't afford all {left} rounds: the run will stop early. Plan it with "
                    "Privacy.for_budget, or take more noise or fewer rounds",
                    stacklevel=3,
                )
    return key


def _public(hospitals, server: ServerOptimizer) -> dict:
    declared = {h.name: {"patients": h.declared_patients, "films": h.declared_size} for h in hospitals}
    came_from = runtime.origin(data_source="", data_fingerprint="", seeds=[], command="")
    kept = {name: came_from[name] for name in ("versions", "machine", "time")}
    return {"declared": declared, "in_shape": server.in_shape, **kept}


def federate_study(
    study: Study,
    schedule: Schedule,
    in_shape: tuple[int, ...],
    aggregator: Callable[[ServerOptimizer], Aggregator],
    *,
    seed: int = 0,
    folder: Path | None = None,
    validation: Films | None = None,
    progress: Callable[[dict], None] | str | None = "rounds",
) -> Result:
    """:func:`federate` over hospitals elsewhere, which have agreed to a study and compute their updates themselves.

    They keep ``epsilon`` to themselves: the result is without it, and without hospitals.

    Parameters
    ----------
    in_shape : of a film as the model takes it
    aggregator : what reaches the hospitals, given the server, whose ``state`` a round starts from
    folder : where the checkpoint goes; a run found there goes on, maybe for more rounds
    """
    if schedule.rounds > study.rounds:
        raise UserError(f"rounds is {schedule.rounds}, but study {study.name!r} is of {study.rounds}")
    server = ServerOptimizer.start(study.training, schedule, in_shape, seed)
    if folder:
        plan = asdict(schedule)
        if not schedule.average_last:  # more rounds may be added to a run, but not to what was averaged
            del plan["rounds"]
        key = hashlib.sha256(study.to_bytes() + json.dumps(plan).encode()).hexdigest()[:16]
        checkpoints.resume(server, folder, lambda salt: key)
    sizes, options = study.agreement.sizes, {"privacy": study.privacy, "folder": folder, "validation": validation}
    with shown(progress, schedule.rounds, server.history) as show:
        for record in _rounds(server, aggregator(server), sizes, lambda number: dict.fromkeys(sizes), **options):
            show(record)
    return Result(server.final(), server.history, {}, False, study.training, in_shape, ())


def _rounds(
    server: ServerOptimizer,
    aggregator: Aggregator,
    sizes: Mapping[str, int],
    compute_updates: Callable[[int], Mapping[str, ComputeUpdate | None]],
    *,
    privacy: Privacy | None,
    folder: Path | None,
    validation: Films | None,
    study: str = "",
) -> Iterator[dict]:
    """The server's rounds, wherever the hospitals are: ask, take the mean, step, score, save, give the record.

    Parameters
    ----------
    sizes : declared size by hospital
    compute_updates : called with a round's number: what has each hospital compute its update, or None elsewhere
    study : names what the rounds are of: hospitals in this process answer a round of it once
    """
    template = server.parameters()
    shared = bool(privacy and privacy.shared)
    for number in range(server.round + 1, server.schedule.rounds + 1):
        question = None if privacy else Question.of(f"{study}:{number}", server.state)
        found = aggregator.aggregate(
            compute_updates(number), sizes, template, number, integer_sum=shared, question=question
        )
        change = found.value
        if shared:
            declared = sum(sizes[name] for name in found.survivors)
            change = shared_step(change, server.state, server.training, privacy, declared)
        server.step(change)
        record = {"round": number}
        if absent := sorted(sizes.keys() - set(found.survivors)):
            record["absent"] = absent
        if validation is not None:
            record |= scores(predict(server.model(), validation), validation.labels.numpy())
        server.history.append(record)
        if folder:
            checkpoints.save(server, folder)
        yield record


def planned_epsilon(training: Training, schedule: Schedule, privacy: Privacy) -> float:
    """ε of the whole run at each hospital, before a step is taken."""
    return privacy.epsilon(training.sample_rate, training.steps_per_round * schedule.rounds)


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
