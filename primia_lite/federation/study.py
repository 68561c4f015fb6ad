"""What a researcher proposes and hospitals approve: a study, and the files of its jobs.

A job is a few text files: ``run.sh``, ``code/main.py`` and ``code/study.json`` are the same in every round, and an
approval is for exactly these bytes; ``code/request.json`` and ``code/round.json`` are a round's own. Nothing here needs
syft: a job imports this module, and its process should be there soon.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from zipfile import BadZipFile

import numpy as np
import torch

from primia_lite.config import UserError, printable
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import flat
from primia_lite.federation.hospital import State, Update
from primia_lite.federation.untrusted import check_unpacked, read_json
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.privacy.shared import SharedNoise
from primia_lite.secagg import Agreement
from primia_lite.secagg.graph import withstands
from primia_lite.training import Training

CODE, STUDY, REQUEST, ROUND = "code/main.py", "code/study.json", "code/request.json", "code/round.json"
RUN = "run.sh"
# The only one that hospitals take: no environment of the researcher's making, no package, no network.
RUN_SH = """#!/bin/bash
set -euo pipefail
cd code
exec "${HOSPITAL_PYTHON:?}" main.py
"""
FILMS_VARIABLE, NAME_VARIABLE = "PRIMIA_LITE_FILMS", "PRIMIA_LITE_HOSPITAL"
OUTPUT = "code/outputs/update.npy"
MOST_ROUND_BYTES = 2**29  # of round.json: networks of 100 million numbers

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Study:
    """What a federation is: its hospitals, and what each computes. A hospital relies on what is checked here.

    Attributes
    ----------
    name : of the study, and of the job that proposes it
    dataset : the hospitals' name for their films
    training, privacy : of each round; privacy None adds no noise, which a hospital must allow expressly
    rounds : how many are asked for
    agreement : on secure aggregation: hospitals, their keys and declared sizes, the update's length, clip, threshold
    seed : of shuffling, where there is no DP; noise and sampling under DP come from the operating system
    """

    name: str
    dataset: str
    training: Training
    privacy: Privacy | None
    rounds: int
    agreement: Agreement
    seed: int = 0

    def __post_init__(self):
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise UserError(f"a study's name is {self.name!r}: take letters, digits, - and _")
        if not (type(self.rounds) is int and self.rounds >= 1):
            raise UserError(f"rounds is {self.rounds}: at least one is needed")
        agreement, everyone = self.agreement, len(self.agreement.names)
        if agreement.weighted == self.integer_sum:
            raise UserError("shared noise goes with an agreement that isn't weighted, and nothing else does")
        if self.integer_sum:
            self.privacy.shared.check(agreement.sizes.values(), agreement.threshold)
            self.privacy.quantizer.check_parameters(agreement.length)
        graph = (everyone, agreement.degree, agreement.share_threshold, agreement.threshold)
        if agreement.degree < everyone - 1 and (self.integer_sum or not withstands(*graph)):
            risk = "group has too little of the shared noise" if self.integer_sum else "server that lies may unmask it"
            raise UserError(
                f"each hospital shares masks with {agreement.degree} of {everyone - 1} others only (degree), and a "
                f"{risk}: leave degree and share_threshold out"
            )

    @property
    def integer_sum(self) -> bool:
        """Whether updates are whole numbers to be summed: noise is shared among the hospitals."""
        return bool(self.privacy and self.privacy.shared)

    def rng(self, number: int, hospital: str) -> SecureGenerator:
        """A round's draws: from the operating system under DP; else what an in-process run of the same seed draws."""
        if self.privacy:
            return SecureGenerator()
        return SecureGenerator.from_seed(self.seed).child("round", number, hospital)

    def as_dict(self) -> dict:
        """JSON-able; :meth:`from_bytes` undoes it."""
        parts = {"training": self.training, "privacy": self.privacy, "agreement": self.agreement}
        return vars(self) | {name: part and part.as_dict() for name, part in parts.items()}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Study:
        """The inverse of :meth:`to_bytes`; UserError for what is no study, or one that contradicts itself."""
        c = read_json(content, "study.json")
        try:
            training, privacy = training_from(c["training"]), privacy_from(c["privacy"])
            agreement = Agreement.from_dict(c["agreement"])
            return cls(**c | {"training": training, "privacy": privacy, "agreement": agreement})
        except UserError:
            raise
        except Exception as error:  # of any kind: the values are somebody else's
            words = printable(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"study.json can't be read ({words})") from error

    def files(self, code: bytes | None = None) -> dict[str, bytes]:
        """The job that proposes this study; ``code`` in place of :mod:`~primia_lite.federation.job_main`."""
        return {RUN: RUN_SH.encode(), CODE: code or job_code(), STUDY: self.to_bytes()}


def describe(study: Study) -> str:
    """All that decides a study's privacy, in words, for a person at a hospital to read before it takes part."""
    agreement, privacy, names = study.agreement, study.privacy, study.agreement.names
    n, t, per_round = len(names), agreement.threshold, study.training.steps_per_round
    lines = [f"{study.rounds} rounds of {study.training.model}, {per_round} local steps each"]
    if privacy:
        steps = max(study.rounds * per_round, sum(release.steps for release in privacy.plan))
        unit = "patient with all their films" if privacy.unit == "patient" else "film"
        lines.append(
            f"differential privacy: epsilon {privacy.target_epsilon:g}, delta {privacy.promised_delta(steps):.3g} in "
            f"all, for each {unit}, over {steps} steps; noise multiplier {privacy.noise_multiplier:.3g}, what one "
            f"{privacy.unit} adds is clipped to {privacy.max_grad_norm:g}"
        )
    else:
        lines.append(
            "NO differential privacy: the sums of updates tell of single films. A hospital answers each round once, "
            "and again only\n  together with the same hospitals; but a server that lies may give the same weights out "
            "in several rounds, with other\n  hospitals each time, and subtract: so it gets single updates"
        )
    liars = 2 * t - n - 1  # may work with a server that lies
    if study.integer_sum:
        enough, told = privacy.shared.threshold, privacy.shared.colluding
        left = privacy.noise_multiplier * ((enough - told - 1) / (enough - told)) ** 0.5
        lines += [
            f"the noise is SHARED by {n} hospitals ({', '.join(names)}): each adds 1/{enough - told} of the variance, "
            f"so that t = {enough} of them\n  make the whole even if c = {told} tell the server theirs",
            f"if more than c = {told} hospitals do, epsilon is larger than promised: with {told + 1} the noise "
            f"multiplier in a sum of {enough} is {left:.3g};\n  and if more than {liars} hospitals work with a server "
            "that lies, it may get sums with less noise",
        ]
    elif privacy:
        lines.append("each hospital adds ALL of the noise by itself: the promise holds whatever the others do")
    lines.append(
        f"sums of at least {t} of {n} hospitals are revealed, and nothing else: to a server that follows the protocol "
        f"with up to {t - 1} hospitals\n  that work with it, or that lies with up to {liars}"
    )
    if agreement.degree < n - 1:
        lines.append(
            f"each hospital shares masks with {agreement.degree} others, {agreement.share_threshold} of which can give "
            f"its secret away: this holds while\n  at most {math.ceil(n / 10)} hospitals work with the server; one "
            "that lies may get sums of groups"
        )
    else:
        lines.append(f"each hospital shares masks with all {n - 1} others")
    lines += [f"  {name}, declares {agreement.sizes[name]}, key {agreement.identities[name].hex()}" for name in names]
    return "\n".join(lines)


def job_code() -> bytes:
    """The text of :mod:`primia_lite.federation.job_main`."""
    return Path(__file__).with_name("job_main.py").read_bytes()


def training_from(content: dict) -> Training:
    """A training as ``as_dict`` gave it, by way of JSON."""
    weights = content["class_weights"]
    weights = tuple(weights) if isinstance(weights, list) else weights
    return Training(**content | {"augmentation": tuple(content["augmentation"]), "class_weights": weights})


def privacy_from(content: dict | None) -> Privacy | None:
    """A privacy as ``as_dict`` gave it, by way of JSON."""
    if content is None:
        return None
    shared, planned = content.get("shared"), content["planned"]
    return Privacy(**content | {
        "also": tuple(Release(**release) for release in content["also"]), "planned": planned and tuple(planned),
        "shared": SharedNoise(**shared) if shared else None,
    })  # fmt: skip


# --- films and weights as files ---------------------------------------------------------------------------------------


def write_films(file: str | Path | IO[bytes], films: Films, *, compressed: bool = True) -> None:
    """A hospital's films as an npz."""
    (np.savez_compressed if compressed else np.savez)(
        file, inputs=films.inputs.numpy(), labels=films.labels.numpy(), patient_id=films.patient_id.astype(str),
        normalisation=np.array(films.normalisation), model=np.array(films.model),
    )  # fmt: skip


def films_from(path: str | Path) -> Films:
    """The inverse of :func:`write_films`; UserError if the file holds none: mock films are a stranger's."""
    check_unpacked(path, what := f"{Path(path).name} with films")
    try:
        with np.load(path, allow_pickle=False) as z:
            return Films(
                torch.from_numpy(z["inputs"]), torch.from_numpy(z["labels"]), z["patient_id"],
                tuple(float(v) for v in z["normalisation"]), str(z["model"]),
            )  # fmt: skip
    except (ValueError, TypeError, KeyError, BadZipFile, EOFError) as error:
        raise UserError(f"{what} can't be read ({type(error).__name__}: {error})") from error


def round_file(number: int, state: State) -> bytes:
    """``round.json``: the round's number and the global weights, as text: syft carries no other files in a job."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value.numpy() for name, value in state.items()})
    return json.dumps({"round": number, "weights": base64.b64encode(buffer.getvalue()).decode()}).encode()


# --- inside a job -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What a job finds in its folder.

    Attributes
    ----------
    hospital : where this runs
    weights : the global ones
    films : the dataset's private half at a hospital, the mock half at the researcher's
    """

    study: Study
    hospital: str
    number: int
    weights: State
    films: Films

    @classmethod
    def here(cls) -> Round:
        study = Study.from_bytes(Path("study.json").read_bytes())
        content = read_json(Path("round.json").read_bytes(), "round.json", MOST_ROUND_BYTES)
        packed = io.BytesIO(base64.b64decode(content["weights"]))
        check_unpacked(packed, "round.json's weights")
        with np.load(packed, allow_pickle=False) as z:
            weights = {name: torch.from_numpy(z[name]) for name in z.files}
        films = films_from(os.environ[FILMS_VARIABLE])
        return cls(study, os.environ[NAME_VARIABLE], content["round"], weights, films)

    @property
    def declared_size(self) -> int:
        return self.study.agreement.sizes[self.hospital]

    @property
    def rng(self) -> SecureGenerator:
        return self.study.rng(self.number, self.hospital)

    def save(self, update: Update) -> None:
        """Leave the update to the hospital's runner, and to nobody else."""
        like = {name: value for name, value in self.weights.items() if name in update.delta}
        np.save("outputs/update.npy", flat(update.delta, like, self.hospital))
