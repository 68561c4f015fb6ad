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
import logging
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from filelock import FileLock

from primia_lite import __version__
from primia_lite.apps.hospital import HospitalRounds, ask_question
from primia_lite.config import UserError, printable
from primia_lite.federation.claims import MOST_REQUEST_BYTES, read_json
from primia_lite.runtime import write_atomic
from primia_lite.secagg import Agreement, Reply

if TYPE_CHECKING:
    from primia_lite.data.films import Films
    from primia_lite.federation.hospital import Hospital
    from primia_lite.federation.study import Study

CONFIG, STUDY, IDENTITY, ROUNDS, LEDGER = "hospital.toml", "study.json", "identity.pem", "rounds.json", "ledger.sqlite"
LOG = "hospital.log"
log = logging.getLogger("primia_lite")


class OtherStudy(UserError):
    """The server goes by other settings than the hospital. The message holds nothing private: the server gets it."""


class Behind(UserError):
    """The server numbers its rounds below one that the hospital has taken part in. The server gets the number, which it
    or its predecessor gave: it goes on above it."""

    def __init__(self, name: str, session: int, last: int):
        super().__init__(
            f"hospital {name} was asked for round {session} after round {last}: it takes part in each once"
        )
        self.session, self.last = session, last


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
    name, identity
        Who it is, and the key that the others have pinned.
    study
        Its own copy of ``study.json``.
    hospital
        Makes the :class:`~primia_lite.federation.hospital.Hospital`, given the study; called in step ``mask`` alone.
    folder
        Where updates are stored until they are masked, and ledgers lie. None keeps nothing, and refuses DP.
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
    def agreement(self) -> Agreement:
        try:
            return Agreement.from_dict(read_json(self._study_text, STUDY)["agreement"])
        except KeyError as error:
            raise UserError(f"hospital {self.name}'s {STUDY} has no agreement: copy it again") from error

    @cached_property
    def study(self) -> Study:
        from primia_lite.federation.study import Study

        return Study.from_bytes(self._study_text)

    @cached_property
    def hospital(self) -> Hospital:
        return self._make(self.study)

    def answer(
        self, study: str, requests: Sequence[bytes], number: int = 0, weights: Mapping[str, np.ndarray] | None = None
    ) -> list[Reply]:
        """Replies to a message's requests: one of a round and one of the next. Those that are refused have none, and
        the hospital's log tells why.

        Parameters
        ----------
        study
            :func:`fingerprint` of the server's study.
        requests
            As :meth:`primia_lite.secagg.SecAggClient.answer` takes them.
        number, weights
            Of a round of training, and the global weights by parameter name: for a request of step ``mask``.

        Raises
        ------
        OtherStudy
            The server goes by another study. No request is answered.
        Behind
            Nor is any, for it asks for a round that was.
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
                    raise (behind := Behind(self.name, session, max(last)))
                replies.append(
                    self.rounds.answer(
                        self.fingerprint, self.agreement, request, lambda: self.compute_update(number, weights),
                        lambda: ask_question(self.fingerprint, self.study, number, weights),
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
        import torch

        from primia_lite.federation.aggregation import flat
        from primia_lite.privacy.rng import SecureGenerator

        study = self.study
        state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
        rng = SecureGenerator()
        if not study.privacy:
            rng = SecureGenerator.from_seed(study.seed).child("round", number, self.name)
        folder = self.folder if study.privacy else None
        update = self.hospital.update(number, state, study.training, study.privacy, rng, folder)
        vector = flat(update.delta, {name: value for name, value in state.items() if name in update.delta}, self.name)
        if folder:  # an update is masked once: what was stored served a kill before this
            (folder / f"update-{self.name}-{number:05d}.pt").unlink(missing_ok=True)
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

    Raises
    ------
    UserError
        A file that is missing or can't be read, or an identity that others can read.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            config = tomllib.loads((folder / CONFIG).read_text("utf-8"))
            name, self._films = config["name"], dict(config["films"])
            identity = read_identity(folder / IDENTITY)
            study = (folder / STUDY).read_bytes()
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is missing: primia-lite deploy makes it, or the study's operator sends it"
            ) from error
        except (tomllib.TOMLDecodeError, KeyError, ValueError) as error:
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
        from primia_lite.federation.hospital import Hospital
        from primia_lite.privacy.ledger import Ledger

        declared, privacy, ledger = self.agreement.sizes[self.name], study.privacy, None
        if privacy:
            plan = (privacy.target_epsilon, privacy.target_delta, privacy.unit, privacy.plan)
            ledger = Ledger(self.folder / LEDGER, *plan)
        what = "declared_patients" if privacy and privacy.unit == "patient" else "declared_size"
        return Hospital(self.name, self._prepared(study), lasting_ledger=ledger, **{what: declared})

    def _prepared(self, study: Study) -> Films:
        """The films as the model takes them, kept from the first round on: a cohort doesn't change in a study."""
        from primia_lite.federation.study import films_from
        from primia_lite.models import prepare

        training = study.training
        settings = json.dumps([__version__, self._films, training.model, training.augmentation], sort_keys=True)
        path = self.folder / f"films-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            films = prepare(training.model, load_films(self._films), augmentation=training.augmentation)
            parts = {
                "inputs": films.inputs.numpy(), "labels": films.labels.numpy(),
                "patient_id": films.patient_id.astype(str), "normalisation": np.array(films.normalisation),
                "model": np.array(films.model),
            }  # fmt: skip
            write_atomic(path, lambda file: np.savez(file, **parts), private=True)
        return films_from(path)


def load_films(options: Mapping[str, object]):
    """Training films as ``[films]`` in ``hospital.toml`` names them."""
    from primia_lite.data import load, partition

    options = dict(options)
    part = options.pop("part", None)
    films = load(options.pop("source"), options.pop("size"), **options)
    if part is not None:
        films = partition(films, part[1])[part[0]]
    return films.subset(films.split == "train")


def read_identity(path: Path) -> Ed25519PrivateKey:
    """A hospital's signing key.

    Raises
    ------
    UserError
        Others than its owner can read the file, or it holds another key.
    """
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others: chmod 600 {path}")
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} holds no Ed25519 key: take the one that primia-lite deploy made")
    return key


class _OneLine(logging.Formatter):
    """A line for each record: the server has a say in what they hold, and could make up others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to(folder: Path, *, rotate: bool = False) -> None:
    """Write what this process has to say to a hospital's log: Flower would throw it away. For the hospital alone.

    One process may rotate the file; the others notice when it has.
    """
    for handler in list(log.handlers):
        if isinstance(handler, WatchedFileHandler | RotatingFileHandler):  # of another hospital, in a simulation
            log.removeHandler(handler)
            handler.close()
    path = folder / LOG
    handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=1) if rotate else WatchedFileHandler(path)
    handler.setFormatter(_OneLine("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
