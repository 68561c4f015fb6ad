"""One hospital: its films never leave; updates do.

``local_update`` is what every transport calls. :class:`Hospital` puts the order around it that privacy needs: look for
a stored update, charge the ledger, compute, store, release.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from primia_lite import models
from primia_lite.config import TrainingError, UserError
from primia_lite.data.films import Films
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.runtime import cores, torch_threads, write_atomic
from primia_lite.training import Training, check_options, private_share, train

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What leaves a hospital after a round.

    Attributes
    ----------
    delta : new weights minus the global ones, float32, by parameter name. With shared noise instead the sum of clipped
        gradients in whole numbers plus a share of the noise, int64: secure aggregation alone may see it
    steps : local steps taken
    seeded : whether sampling and noise came from a fixed seed: then nothing is private
    """

    delta: State
    steps: int
    seeded: bool


def local_update(
    global_state: State,
    films: Films,
    training: Training,
    privacy: Privacy | None,
    rng: SecureGenerator,
    *,
    declared_size: int | None = None,
) -> Update:
    """Train on a hospital's films from the global weights. The result depends on the arguments alone; the caller
    charges the ledger first.

    Parameters
    ----------
    global_state : weights by parameter name; not changed
    rng : makes one release: with DP, an unseeded one that was used before is refused, as its noise would come again
    declared_size : the public number of units (:func:`declare_size`): with DP required, and times the sample rate the
        denominator of a step
    """
    model = _checked_model(global_state, films, training, privacy, declared_size)
    if privacy:
        rng.serve_once()
    with torch_threads(1 if models.spec(training.model).extract else cores()):
        if privacy and privacy.shared:
            return Update(private_share(model, films, training, privacy, rng, declared_size), 1, rng.seeded)
        train(model, films, training, privacy, rng, training.sample_rate * (declared_size or len(films)))
    # Parameters only: constants of norms stay as they are.
    delta = {name: value.detach() - global_state[name] for name, value in model.named_parameters()}
    if not all(torch.isfinite(value).all() for value in delta.values()):
        raise TrainingError(
            f"the update has values that aren't finite: lower learning_rate (now {training.learning_rate})"
        )
    return Update(delta, training.steps_per_round, rng.seeded)


def network(training: Training, in_shape: tuple[int, ...], seed: int = 0) -> torch.nn.Module:
    """What a recipe trains, on films of a shape, with initial weights from a seed."""
    return models.build(training.model, training.n_classes, in_shape, seed=seed, **training.model_options)


def _checked_model(global_state: State, films: Films, training: Training, privacy, declared_size) -> torch.nn.Module:
    """The model with the global weights; UserError for what :func:`local_update` refuses about its arguments."""
    if privacy and declared_size is None:
        raise UserError("with DP a step's denominator must be public: give the hospital's declared_size")
    if declared_size is not None and declared_size < 1:
        raise UserError(f"declared_size is {declared_size}: it must be at least 1")
    model = network(training, films.inputs.shape[2:])
    try:
        model.load_state_dict(global_state)
    except RuntimeError as error:
        raise UserError(
            f"the global weights don't fit {training.model} with {training.n_classes} classes on films of shape "
            f"{tuple(films.inputs.shape[2:])}: {str(error).splitlines()[-1].strip()}"
        ) from error
    if privacy and privacy.shared:
        check_options(training, privacy)
        privacy.quantizer.check_parameters(sum(p.numel() for p in model.parameters() if p.requires_grad))
        if declared_size not in privacy.shared.declared:
            raise UserError(
                f"declared_size is {declared_size}, but shared noise was agreed on for hospitals that declare "
                f"{', '.join(map(str, privacy.shared.declared))}: give SharedNoise every hospital's number"
            )
    return model


def declare_size(n: int, to: int = 10) -> int:
    """The number of films or patients that a hospital makes public, rounded to tens.

    DP hides what each unit holds, and takes their number as known (zero-out adjacency). Rounding is modesty, not
    protection: of one cohort in ten a patient more moves the number to the next ten. Whoever minds declares a number of
    their own, once for a cohort; one that is off changes a hospital's weight and steps, and not what is promised.
    """
    return max(to, to * round(n / to))


def ledger_of(
    name: str, folder: Path | None, privacy: Privacy, lasting: Ledger | None = None, *, seeded: bool = False
) -> Ledger:
    """What a hospital charges: its lasting ledger if it has one, which no seeded release may use, else the folder's."""
    if not lasting:
        if folder is None:
            raise UserError("with DP a hospital keeps a ledger: give a folder")
        budget = (privacy.target_epsilon, privacy.target_delta, privacy.unit, privacy.plan)
        return Ledger(folder / f"ledger-{name}.sqlite", *budget)
    if seeded:
        raise UserError(
            f"hospital {name} has a lasting ledger, but the noise comes from a seed and protects nobody: leave "
            "noise_seed out"
        )
    if lasting.unit != privacy.unit:
        raise UserError(f"hospital {name}'s ledger counts by {lasting.unit}, privacy by {privacy.unit}: give one unit")
    return lasting


@dataclass
class Hospital:
    """A data owner.

    Attributes
    ----------
    name : such as ``A``
    films : its training films; nobody else sees them
    declared_size : the public number of its films: its own choice, or 0 for the true one, rounded
        (:func:`declare_size`). Where patients are the unit of DP it is sent nowhere, and is to be kept: a patient's
        films change it
    declared_patients : the public number of its patients, likewise
    lasting_ledger : a ledger for all its releases, whatever the run; None where each run's folder has one of its own,
        which is right for simulations only
    """

    name: str
    films: Films
    declared_size: int = 0
    declared_patients: int = 0
    lasting_ledger: Ledger | None = None
    _ledgers: dict[tuple, Ledger] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if len(self.films) == 0:
            raise UserError(f"hospital {self.name} has no films: give it some, or leave it out")
        if self.films.labels.unique().numel() < 2:
            only = int(self.films.labels[0])
            raise UserError(
                f"hospital {self.name} has films of one class only (label {only}): give it another partition"
            )
        # A step that is refused because a gradient isn't finite can be seen from outside, and ε doesn't cover that: the
        # common cause is kept from ever reaching one.
        if not (finite := torch.isfinite(self.films.inputs).flatten(1).all(1)).all():
            raise UserError(
                f"hospital {self.name}: film {int((~finite).nonzero()[0])} has values that aren't finite: leave it out"
            )
        self.declared_size = self.declared_size or declare_size(len(self.films))
        self.declared_patients = self.declared_patients or declare_size(len(self.films.units("patient")))
        if min(self.declared_size, self.declared_patients) < 1:
            raise UserError(
                f"hospital {self.name}: declared_size is {self.declared_size}, declared_patients "
                f"{self.declared_patients}; both must be at least 1"
            )

    def declared(self, privacy: Privacy | None) -> int:
        """The public number of what is protected, and of what weighs in a federation: films where there is no DP."""
        return self.declared_patients if privacy and privacy.unit == "patient" else self.declared_size

    def ledger(self, folder: Path | None, privacy: Privacy, *, seeded: bool = False) -> Ledger:
        """See :func:`ledger_of`. A folder's stays open: one that vanishes in a run must not come back empty."""
        key = folder, privacy
        if self.lasting_ledger or key not in self._ledgers:
            self._ledgers[key] = ledger_of(self.name, folder, privacy, self.lasting_ledger, seeded=seeded)
        return self._ledgers[key]

    def forget_ledgers(self, folder: Path) -> None:
        """Let go of the ledgers of a run's folder, which was deleted."""
        self._ledgers = {key: ledger for key, ledger in self._ledgers.items() if key[0] != folder}

    def charge(
        self, what: str, training: Training, privacy: Privacy, folder: Path | None = None, *, seeded: bool = False
    ) -> None:
        """Charge a round's release before it is computed: in this process, in PySyft's job or in Flower's."""
        release = privacy.release(training.sample_rate, training.steps_per_round)
        self.ledger(folder, privacy, seeded=seeded).charge(what, release, repeatable=seeded)

    def _stored(self, folder: Path, round_number: int) -> Path:
        return folder / f"update-{self.name}-{round_number:05d}.pt"

    def forget_update(self, folder: Path, round_number: int) -> None:
        """Delete what was stored to be sent again: the round is over."""
        self._stored(folder, round_number).unlink(missing_ok=True)

    def update(
        self,
        round_number: int,
        global_state: State,
        training: Training,
        privacy: Privacy | None,
        rng: SecureGenerator,
        folder: Path | None = None,
    ) -> Update:
        """Take part in a round: resend what was stored, or charge, compute, store and only then release.

        What was stored is sent again only for the same weights, training and privacy: anything else is another release.
        With shared noise nothing is stored, and each call is charged and computed anew: two sums that differ by one
        hospital would give its message away if the others' were the same in both, and its own share of the noise is
        less than its patients were promised.

        Parameters
        ----------
        rng : unseeded, only the start of the round's randomness: each call draws noise of its own
        folder : where update and ledger are kept; None (only without DP) keeps nothing
        """
        # What a seed repeats needs no storing.
        storing = folder and privacy and not privacy.shared and not rng.seeded
        stored = self._stored(folder, round_number) if storing else None
        question = _question(global_state, training, privacy) if stored else b""
        if stored and stored.exists() and (content := stored.read_bytes()).startswith(question):
            return Update(**torch.load(io.BytesIO(content[len(question) :]), weights_only=True))
        check_options(training, privacy)
        if privacy:
            if privacy.shared:  # a contradiction is found before it costs anything
                _checked_model(global_state, self.films, training, privacy, self.declared(privacy))
            run = f"{folder.name}: " if folder and self.lasting_ledger else ""
            self.charge(f"{run}round {round_number}", training, privacy, folder, seeded=rng.seeded)
        declared, noise = self.declared(privacy), own_noise(rng)
        try:
            update = local_update(global_state, self.films, training, privacy, noise, declared_size=declared)
        except TrainingError as error:
            raise TrainingError(f"hospital {self.name}, round {round_number}: {error}") from error
        if stored:
            write_atomic(stored, lambda file: (file.write(question), torch.save(vars(update), file)))
        return update


def own_noise(rng: SecureGenerator) -> SecureGenerator:
    """Noise of its own for each release: two releases with one noise would give their difference away exactly."""
    return rng if rng.seeded else rng.child(os.urandom(16).hex())


def _question(global_state: State, training: Training, privacy: Privacy | None) -> bytes:
    """32 bytes that tell what an update answers to."""
    digest = hashlib.sha256(json.dumps([training.as_dict(), privacy and privacy.as_dict()]).encode())
    for name, value in global_state.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.digest()
