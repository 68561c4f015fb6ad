"""What a hospital's yes is for, and what it isn't: to the bytes that somebody read, for so many rounds."""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from primia_lite.config import UserError, printable
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.study import MOST_ROUND_BYTES, REQUEST, ROUND, RUN, RUN_SH, STUDY, Files, Study, describe
from primia_lite.federation.untrusted import MOST_REQUEST_BYTES, read_json
from primia_lite.training import check_options

# What asks for packages, by name.
DEPENDENCY_FILES = ("pyproject.toml", "requirements.txt", "setup.py", "setup.cfg", "uv.lock", "environment.yml")
_MOST_LINES = 10_000  # that are compared: the time grows with their square


class NotApproved(UserError):
    """A job that isn't covered by an approval."""


def digest(files: Files) -> str:
    """SHA-256 of what an approval is for: every file of a job but the round's own two."""
    listed = {path: hashlib.sha256(text).hexdigest() for path, text in files.items() if path not in (REQUEST, ROUND)}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def round_of(files: Files) -> tuple[object, str]:
    """The number of a round's job, and what tells its weights from others."""
    try:
        number = read_json(files[ROUND], ROUND, MOST_ROUND_BYTES)["round"]
    except (KeyError, UserError) as error:
        raise UserError("the job holds no round that can be read") from error
    return number, hashlib.sha256(files[ROUND]).hexdigest()


def asks_for_packages(files: Files) -> str:
    """What in a job would install something, or start it in another way than agreed; empty where nothing does."""
    if found := [path for path in files if Path(path).name in DEPENDENCY_FILES]:
        return f"{found[0]} asks for packages: hospitals run jobs in an environment of their own"
    if files.get(RUN) != RUN_SH.encode():
        return f"{RUN} isn't the agreed one: hospitals start main.py with their own Python, and install nothing"
    return ""


def changes(before: Files, after: Files) -> list[str]:
    """What differs between two jobs' fixed files, a line each; of settings, which."""
    lines = []
    for path in sorted((before.keys() | after.keys()) - {REQUEST, ROUND}):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        try:
            if path == STUDY and old and new:
                lines += _settings(read_json(old, STUDY), read_json(new, STUDY))
                continue
        except UserError:
            pass
        lines.append(f"{path} is {'gone' if new is None else 'new' if old is None else 'another'}")
    return lines


def _settings(old: object, new: object, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = sorted(old.keys() | new.keys())
        return [line for k in parts for line in _settings(old.get(k), new.get(k), f"{name}.{k}".lstrip("."))]
    if old == new:
        return []
    if old is None or new is None:
        return [f"{name} is {'left out' if new is None else 'new'}"]
    return [f"{name} is {printable(json.dumps(new), 200)}, not {printable(json.dumps(old), 200)}"]


def difference(before: Files, after: Files) -> str:
    """A unified diff of two jobs' fixed files, for the person who reviews; empty where they are the same.

    What isn't printable is escaped: it could hide from a reader what is run.
    """
    lines = []
    for path in sorted((before.keys() | after.keys()) - {REQUEST, ROUND}):
        old, new = (files.get(path, b"").decode(errors="backslashreplace").splitlines() for files in (before, after))
        if max(len(old), len(new)) > _MOST_LINES:
            lines.append(f"{path} has {len(new)} lines, too many to compare with {len(old)}")
            continue
        lines += difflib.unified_diff(old, new, f"approved/{path}", f"submitted/{path}", lineterm="")
    return "\n".join(printable(line, None) for line in lines)


@dataclass(frozen=True)
class Approval:
    """A person's yes, to a job as it was read: for so many rounds, of which ``used`` have begun."""

    study: str
    rounds: int
    used: int
    files: Files = field(repr=False)
    reason: str = ""

    def as_dict(self) -> dict:
        return vars(self) | {"files": {path: base64.b64encode(text).decode() for path, text in self.files.items()}}

    @classmethod
    def from_dict(cls, content: dict) -> Approval:
        files = {path: base64.b64decode(text) for path, text in content["files"].items()}
        return cls(**content | {"files": files})


def verdict(files: Files, approvals: Mapping[str, Approval]) -> str:
    """Why a round's job may not run; empty if it may. ``approvals`` are the hospital's, by :func:`digest`."""
    if why := asks_for_packages(files):
        return why
    approval = approvals.get(digest(files))
    if approval is None:
        name = study_name(files)
        same = [a for a in approvals.values() if a.study == name]
        if not same:
            return f"study {name!r} wasn't approved: propose it, and wait for a person's yes"
        return "this isn't what was approved: " + "; ".join(changes(same[-1].files, files))
    try:
        step = read_json(files[REQUEST], "the request", MOST_REQUEST_BYTES)["step"]
    except (KeyError, UserError):
        return "the job holds no request that can be read"
    # A round begins with its mask: the other steps of the last one are still to come.
    if approval.used >= approval.rounds and step in ("advertise", "share", "mask"):
        return f"{approval.rounds} rounds were approved, and {approval.used} have been taken: propose another study"
    return ""


def study_name(files: Files) -> str:
    try:
        return str(read_json(files[STUDY], STUDY)["name"])
    except (KeyError, UserError):
        return "(without a name)"


def study_problems(study: Study, hospital: Hospital, trusted: Mapping[str, bytes], has_dataset: bool) -> list[str]:
    """Why a hospital can't take part in a study; ``trusted`` are the keys that it has pinned, its own among them."""
    found, agreement, privacy = [], study.agreement, study.privacy
    if not has_dataset:
        found.append(f"there is no dataset {study.dataset!r} here")
    if agreement.identities.get(hospital.name) != trusted[hospital.name]:
        found.append(f"the agreement has another key for {hospital.name}")
    for other in sorted(agreement.identities.keys() - {hospital.name}):
        if trusted.get(other) != agreement.identities[other]:
            found.append(f"the agreement's key of {other} isn't the one that was pinned")
    if (size := agreement.sizes.get(hospital.name)) != (declared := hospital.declared(privacy)):
        found.append(f"the declared size is {declared}, not {size}")
    try:
        check_options(study.training, privacy)
    except UserError as error:
        found.append(str(error))
    ledger = hospital.lasting_ledger
    if privacy and not ledger:
        found.append("there is no lasting ledger to charge")
    elif privacy and ledger.unit != privacy.unit:
        found.append(f"the ledger counts by {ledger.unit}, the study by {privacy.unit}")
    elif privacy:
        steps = study.training.steps_per_round * study.rounds
        if not ledger.affords(privacy.release(study.training.sample_rate, steps)):
            found.append(f"the ledger can't afford {study.rounds} rounds of this")
    return found


@dataclass(frozen=True)
class Review:
    """What a person at the hospital has before them; an approval is for ``files``, the job's bytes as they are now.

    Attributes
    ----------
    study : None where the settings can't be read
    problems : why the hospital can't take part, whatever the person says
    difference : unified diff to what was approved under this name before
    """

    job: str
    submitted_by: str
    files: Files = field(repr=False)
    study: Study | None
    problems: tuple[str, ...]
    difference: str = field(repr=False)

    @property
    def digest(self) -> str:
        return digest(self.files)

    @property
    def words(self) -> str:
        """The study in words, and what is wrong with it: read this first."""
        problems = [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*problems, *([describe(self.study)] if self.study else [])])
