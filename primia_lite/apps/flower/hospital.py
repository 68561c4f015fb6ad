"""A hospital behind Flower: its folder, and how it answers the server's messages.

A process may end between two messages, so what a round needs is kept between messages, in the hospital's own folder
and readable by its owner alone: Flower's ``Context.state`` would lie in the SuperNode's memory, pass through its local
port, and be gone when it restarts, and with it the number of the last round, which keeps an update from being summed
twice. Nothing that the server sends decides how films are used: training, privacy and the agreement on secure
aggregation are those of the hospital's own ``study.json``, and a server that goes by another is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from filelock import FileLock

from primia_lite import __version__
from primia_lite.apps.flower.folder import CONFIG, IDENTITY, LEDGER, ROUNDS, STUDY, config_of, log
from primia_lite.apps.hospital_rounds import HospitalRounds
from primia_lite.config import UserError
from primia_lite.data import ChestXrays, load, partition
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import flat
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.study import Study, films_from, write_films
from primia_lite.federation.untrusted import MOST_REQUEST_BYTES, read_json
from primia_lite.models import prepare
from primia_lite.privacy.ledger import Ledger
from primia_lite.runtime import write_atomic
from primia_lite.secagg import Agreement, Reply

if TYPE_CHECKING:
    from flwr.app import RecordDict


class OtherStudy(UserError):
    """The server goes by other settings than the hospital. The message holds nothing private: the server gets it."""


class Behind(UserError):
    """The server numbers its rounds below one that the hospital has taken part in. The server gets that one, which it
    or its predecessor gave: it goes on above it."""

    def __init__(self, last: int):
        super().__init__(f"it has taken part in round {last}, and takes part in each once")
        self.last = last


# A round's number is the time in ms when it began, or the next after the last one's where a clock was set back. A
# hospital takes none that lies further ahead, and a server believes half of that: so neither a hospital that lies about
# its last number nor a clock that was wrong leaves a federation without numbers.
FARTHEST_MS = 200 * 365 * 24 * 3600 * 1000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def fingerprint(study: bytes) -> str:
    """What hospital and server compare: hexadecimal SHA-256 of ``study.json``."""
    return hashlib.sha256(study).hexdigest()


class FlowerHospital:
    """What a hospital does with messages.

    Parameters
    ----------
    name, identity : who it is, and the key that the others have pinned
    study : its own copy of ``study.json``
    hospital : makes the :class:`~primia_lite.federation.hospital.Hospital`, given the study; called in step ``mask``
        alone
    folder : where updates are stored until they are masked, and ledgers lie. None keeps nothing, and refuses DP
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        study: bytes,
        hospital: Callable[[Study], Hospital],
        folder: Path | None = None,
    ):
        self.name, self.folder = name, folder
        self.fingerprint = fingerprint(study)
        self.rounds = HospitalRounds(name, identity)
        self._study_text, self._make = study, hospital

    @cached_property
    def study(self) -> Study:
        return Study.from_bytes(self._study_text)

    @property
    def agreement(self) -> Agreement:
        return self.study.agreement

    @cached_property
    def hospital(self) -> Hospital:
        return self._make(self.study)

    def reply(self, content: RecordDict) -> RecordDict:
        """What goes back. It never raises: Flower would send the error's text, which may tell of films."""
        from primia_lite.apps.flower import messages  # Flower itself is needed from here on

        try:
            asked, weights = content["request"], content.get("weights")
            weights = weights and {name: array.numpy() for name, array in weights.items()}
            found = self.answer(asked["study"], asked["requests"], asked["round"], weights)
            return messages.answered(found) if found else messages.refusal()
        except OtherStudy as error:
            log.warning("%s", error)
            return messages.refusal(str(error))
        except Behind as error:
            return messages.behind(error.last)
        except Exception as error:
            log.warning("hospital %s can't answer: %s: %s", self.name, type(error).__name__, error)
            return messages.refusal()

    def answer(
        self, study: str, requests: Sequence[bytes], number: int = 0, weights: Mapping[str, np.ndarray] | None = None
    ) -> list[Reply]:
        """Replies to a message's requests: one of a round and one of the next. Those that are refused have none, and
        the hospital's log tells why; OtherStudy or Behind where none is answered for that reason.

        Parameters
        ----------
        study : :func:`fingerprint` of the server's study
        requests : as :meth:`primia_lite.secagg.SecAggClient.answer` takes them
        number, weights : of a round of training, and the global weights by parameter name: for step ``mask``
        """
        if study != self.fingerprint:
            raise OtherStudy(
                f"hospital {self.name} agreed to study {self.fingerprint[:16]}, the server runs {str(study)[:16]}: all "
                f"need the same {STUDY}"
            )
        replies, behind = [], None
        last = self.rounds.last_sessions()
        for request in requests:
            try:
                head = read_json(request, "the request", MOST_REQUEST_BYTES)
                session = head["session"]
                if session > now_ms() + FARTHEST_MS:
                    raise UserError(f"round {session} lies more than 200 years ahead of this machine's clock")
                if head["step"] == "advertise" and session <= last[session % 2]:
                    raise (behind := Behind(max(last)))
                replies.append(
                    self.rounds.answer(
                        self.fingerprint, self.study, request, lambda: (number, weights),
                        lambda: self.compute_update(number, weights),
                    )
                )  # fmt: skip
                log.info("round %d: answered %s (session %d)", number, replies[-1].step, session)
            except Exception as error:  # the others mustn't learn why: it may tell of films
                log.warning("hospital %s refuses a request: %s: %s", self.name, type(error).__name__, error)
        if behind and not replies:
            raise behind
        return replies

    def compute_update(self, number: int, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """A round's update as one vector; with DP the ledger is charged first."""
        study, folder = self.study, self.folder if self.study.privacy else None
        state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        rng = study.rng(number, self.name)
        update = self.hospital.update(number, state, study.training, study.privacy, rng, folder)
        vector = flat(update.delta, {name: value for name, value in state.items() if name in update.delta}, self.name)
        if folder:  # an update is masked once: what was stored served a kill before this
            self.hospital.forget_update(folder, number)
        return vector


class FolderHospital(FlowerHospital):
    """A hospital's :class:`FlowerHospital` as its folder describes it; what a round needs lies there too.

    ``hospital.toml`` says who it is and where its films are::

        name = "A"
        [films]
        source = "dicom"       # any option of primia_lite.data.load
        root = "/where/they/lie"
        size = 224

    The prepared films are kept in the folder from the first round on; delete ``films-*.npz`` and the next round reads
    them again.
    ``part = [0, 3]`` under ``[films]`` takes the first of three parts of the source, for trials on one machine.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            config = config_of(folder / CONFIG)
            name, self._films = config["name"], dict(config["films"])
            identity = read_identity(folder / IDENTITY)
            study = (folder / STUDY).read_bytes()
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: primia-lite deploy makes it, or the study's operator sends it"
            ) from error
        except (KeyError, ValueError) as error:
            raise UserError(f"{folder / CONFIG} can't be read ({error}): it needs name and [films]") from error
        super().__init__(name, identity, study, self._hospital, folder)
        self.rounds = HospitalRounds(name, identity, folder / ROUNDS)

    def answer(self, *args, **options) -> list[Reply]:
        # Two processes that answered at once would both go by what was kept before.
        with FileLock(self.folder / "lock"):
            for left in self.folder.glob(f".{ROUNDS}.*"):  # by a process that was killed while it wrote: secrets
                left.unlink()
            return super().answer(*args, **options)

    def _hospital(self, study: Study) -> Hospital:
        declared, privacy, ledger = self.agreement.sizes[self.name], study.privacy, None
        if privacy:
            plan = (privacy.target_epsilon, privacy.target_delta, privacy.unit, privacy.plan)
            ledger = Ledger(self.folder / LEDGER, *plan)
        what = "declared_patients" if privacy and privacy.unit == "patient" else "declared_size"
        return Hospital(self.name, self._prepared(study), lasting_ledger=ledger, **{what: declared})

    def _prepared(self, study: Study) -> Films:
        """The films as the model takes them, kept from the first round on: a cohort doesn't change in a study."""
        training = study.training
        settings = json.dumps([__version__, self._films, training.model, training.augmentation], sort_keys=True)
        path = self.folder / f"films-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            films = prepare(training.model, load_films(self._films), augmentation=training.augmentation)
            write_atomic(path, lambda file: write_films(file, films, compressed=False), private=True)
        return films_from(path)


def load_films(options: Mapping[str, object]) -> ChestXrays:
    """Training films as ``[films]`` in ``hospital.toml`` names them."""
    options = dict(options)
    part = options.pop("part", None)
    films = load(options.pop("source"), options.pop("size"), **options)
    if part is not None:
        films = partition(films, part[1])[part[0]]
    return films.subset(films.split == "train")


def read_identity(path: Path) -> Ed25519PrivateKey:
    """A hospital's signing key; UserError where others than its owner can read the file, or it holds another key."""
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others: chmod 600 {path}")
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} holds no Ed25519 key: take the one that primia-lite deploy made")
    return key
