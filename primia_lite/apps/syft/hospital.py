"""A hospital on PySyft: its datasite, and what its people have approved."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from syft_job.job import JobInfo
from syft_job.job_storage import JobRef
from syft_job.models import JobStatus
from syft_rds import SyftRDSClient

from primia_lite.apps.hospital_rounds import HospitalRounds
from primia_lite.apps.syft.approval import (
    Approval,
    NotApproved,
    Review,
    asks_for_packages,
    changes,
    difference,
    digest,
    round_of,
    study_name,
    study_problems,
    verdict,
)
from primia_lite.apps.syft.permissions import Permissions
from primia_lite.apps.syft.process import run_job
from primia_lite.apps.syft.runner import HospitalRunner, is_round, quiet, read_job
from primia_lite.config import UserError, printable
from primia_lite.data.films import Films
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.study import REQUEST, STUDY, Files, Study, write_films
from primia_lite.runtime import write_atomic


class Datasite:
    """A hospital's datasite.

    Parameters
    ----------
    client : its syft-rds client, in the role of a data owner
    hospital : its films, declared sizes and lasting ledger
    folder : the hospital's own: identity, approvals, the protocol's state, what jobs printed. Outside what syft syncs
    timeout_s, memory_gib : of a job (:func:`~primia_lite.apps.syft.process.run_job`)

    Attributes
    ----------
    approvals, seconds : by digest, and of each job's process by job
    journal : what happened, for the hospital's eyes; also in ``journal.txt``
    """

    def __init__(
        self, client: SyftRDSClient, hospital: Hospital, folder: Path, *, timeout_s: float = 600.0,
        memory_gib: float | None = None,
    ):  # fmt: skip
        if Path(folder).resolve().is_relative_to(Path(client.syftbox_folder).resolve()):
            raise UserError(f"{folder} lies where syft syncs: keys and logs would leave, choose another folder")
        self.client, self.hospital, self.folder = client, hospital, Path(folder)
        self.timeout_s, self.memory_gib = timeout_s, memory_gib
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        self._rounds = HospitalRounds(self.name, self._own_identity(), self.folder / "round.json")
        self.trusted = {self.name: self.public_key}
        self.approvals = {key: Approval.from_dict(value) for key, value in self._kept("approvals", {}).items()}
        self._names: list[str] = self._kept("names", [])  # of rounds' jobs; each comes once
        self.journal: list[str] = []
        self.seconds: dict[str, float] = {}
        client.job_runner = HospitalRunner.for_site(self)
        client.sync_engine.datasite_owner_syncer.perm_context.service = Permissions(client.email)

    @property
    def name(self) -> str:
        return self.hospital.name

    @property
    def email(self) -> str:
        return self.client.email

    @property
    def public_key(self) -> bytes:
        """Ed25519, 32 bytes: what others pin."""
        return self._rounds.identity.public_key().public_bytes_raw()

    def _own_identity(self) -> Ed25519PrivateKey:
        path = self.folder / "identity.key"
        if not path.exists():
            write_atomic(path, Ed25519PrivateKey.generate().private_bytes_raw(), private=True)
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())

    def _kept(self, name: str, default):
        path = self.folder / f"{name}.json"
        return json.loads(path.read_bytes()) if path.exists() else default

    def _keep(self, name: str, content) -> None:
        write_atomic(self.folder / f"{name}.json", json.dumps(content).encode(), private=True)

    def note(self, line: str) -> None:
        """For the hospital's own journal; a line each, whatever names and errors hold."""
        line = printable(line)
        self.journal.append(line)
        with open(self.folder / "journal.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")

    def trust(self, keys: Mapping[str, bytes]) -> None:
        """Pin other hospitals' public keys, which came on another way than through the researcher."""
        self.trusted |= dict(keys)

    def add_dataset(self, name: str, mock: Films, readers: list[str]) -> None:
        """Make the films a dataset: its mock half goes to ``readers``, its private half stays here."""
        if self.films(name):
            raise UserError(f"hospital {self.name} has a dataset {name!r} already: choose another name")
        draft = self.folder / "dataset"
        paths = {"mock": draft / "mock" / "films.npz", "private": draft / "private" / "films.npz"}
        try:
            for half, films in (("mock", mock), ("private", self.hospital.films)):
                paths[half].parent.mkdir(parents=True)
                write_films(paths[half], films)
            with quiet():
                self.client.create_dataset(
                    name, mock_path=paths["mock"], private_path=paths["private"], users=readers, upload_private=False
                )
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def films(self, dataset: str) -> Path | None:
        """The file of a dataset's private half."""
        try:
            return self.client.dataset_manager.get(dataset, datasite=self.email).private_files[0]
        except (FileNotFoundError, IndexError, ValueError):
            return None

    # --- what a person does -------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Send what is new here, fetch what is new elsewhere."""
        with quiet():
            self.client.sync()

    def fetch(self) -> None:
        """Fetch what researchers sent, without looking for changes here."""
        engine = self.client.sync_engine
        with quiet(), engine.sync_file_lock():
            peers = [peer.email for peer in engine.peer_manager.approved_peers]
            engine.datasite_owner_syncer.sync(peers, recompute_hashes=False)

    def pending(self) -> list[str]:
        """Names of the proposals that wait for a person."""
        with quiet():
            return sorted(j.name for j in self._jobs("pending") if not is_round(j.job_submission_path))

    def _jobs(self, status: str) -> list[JobInfo]:
        return [j for j in self.client.job_client.jobs if j.datasite_owner_email == self.email and j.status == status]

    def _pending_job(self, name: str) -> JobInfo:
        for job in self._jobs("pending"):
            if job.name == name:
                return job
        raise UserError(f"hospital {self.name} has no pending job {name!r}: there are {self.pending() or 'none'}")

    def review(self, name: str) -> Review:
        """A proposal, with what is wrong with it and how it differs from what was approved under its name."""
        with quiet():
            job = self._pending_job(name)
        try:
            files = read_job(job.job_submission_path)
        except UserError as error:
            return Review(name, job.submitted_by, {}, None, (str(error),), "")
        before = [a.files for a in self.approvals.values() if a.study == study_name(files)]
        study, problems = None, [why] if (why := asks_for_packages(files)) else []
        try:
            study = Study.from_bytes(files.get(STUDY, b""))
            problems += study_problems(study, self.hospital, self.trusted, bool(self.films(study.dataset)))
        except UserError as error:
            problems.insert(0, str(error))
        except Exception as error:  # of any kind: the values are somebody else's
            problems.append(printable(f"the study can't be judged ({type(error).__name__}: {error})", 200))
        return Review(
            name, job.submitted_by, files, study, tuple(problems), difference(before[-1] if before else {}, files)
        )

    def approve(
        self, review: Review, *, rounds: int | None = None, reason: str = "", without_noise: bool = False
    ) -> Approval:
        """Say yes to what was reviewed: to these bytes, for so many rounds, and to nothing else.

        ``rounds`` are fewer than the study asks for, or left out; ``without_noise`` says yes to a study without
        differential privacy, too. UserError where the job was changed since, has a problem, or adds no noise.
        """
        with quiet():
            job = self._pending_job(review.job)
        if changed := changes(review.files, read_job(job.job_submission_path)):
            raise NotApproved(
                f"job {review.job!r} was changed since it was reviewed, review it anew: {'; '.join(changed)}"
            )
        if review.problems:
            raise NotApproved(f"hospital {self.name} can't take part in {review.job!r}: {'; '.join(review.problems)}")
        study = review.study
        rounds = study.rounds if rounds is None else rounds
        if not 1 <= rounds <= study.rounds:
            raise UserError(f"rounds is {rounds}: the study asks for {study.rounds}, approve 1 to so many")
        if study.privacy is None and not without_noise:
            raise NotApproved(
                f"study {study.name!r} adds no noise, so that its result may tell of single patients: approve it with "
                "without_noise=True if that is meant, or ask for a study with Privacy"
            )
        approval = Approval(study.name, rounds, 0, dict(review.files), reason)
        self._approve(review.digest, approval)
        with quiet():
            job.approve(reason=reason or None)
        self.note(f"approved {study.name} ({review.digest[:12]}) for {rounds} rounds: {reason or 'no reason given'}")
        return approval

    def refuse(self, review: Review, reason: str) -> None:
        """Say no; the researcher reads the reason."""
        with quiet():
            self._pending_job(review.job).reject(reason)
        self.note(f"refused {review.job}: {reason}")

    def _approve(self, key: str, approval: Approval) -> None:
        self.approvals[key] = approval
        self._keep("approvals", {key: approval.as_dict() for key, approval in self.approvals.items()})

    # --- what the runner does -----------------------------------------------------------------------------------------

    def process(self) -> None:
        """Answer the rounds' jobs that an approval covers, and refuse the others. Nothing is synced."""
        with quiet():
            self.work()

    def work(self) -> None:
        """As :meth:`process`, but syft talks: for a thread, since only all of them together can be silenced."""
        runner = self.client.job_runner
        self.client.job_client.scan_inbox()
        for ref in runner._get_pending_jobs():
            folder = runner.manager.submission_dir(ref)
            if not is_round(folder):
                continue  # a proposal: for a person
            why = self._why_not(ref, folder)
            if why:
                self.note(f"refused {ref.job_name}: {why}")
                runner.decide(ref, JobStatus.REJECTED, why)
            else:
                self._remember(ref)
                runner.decide(ref, JobStatus.APPROVED, "covered by an approved study")
        runner.process_approved_jobs(stream_output=False, timeout=self.timeout_s)

    def _why_not(self, ref: JobRef, folder: Path) -> str:
        """Why a round's job may not run, for its sender too; empty if it may."""
        if ref.job_name in self._names:
            return "a job of this name came before"
        try:
            return verdict(read_job(folder), self.approvals)
        except UserError as error:
            return str(error)
        except Exception as error:  # of any kind: the other jobs go on
            return f"the job can't be read ({type(error).__name__})"

    def _remember(self, ref: JobRef) -> None:
        """Note a job's name, and clear away the rounds before: each sync reads every file."""
        self._names.append(ref.job_name)
        self._keep("names", self._names)
        manager = self.client.job_runner.manager
        for old in list(manager.iter_submission_refs(self.email)):
            over = old.ds_email == ref.ds_email and old.job_name in self._names
            if over and old.job_name.rsplit("-", 1)[0] != ref.job_name.rsplit("-", 1)[0]:  # the name ends in the step
                shutil.rmtree(manager.submission_dir(old))
                shutil.rmtree(manager.review_dir(old))

    def answer(self, job: str, files: Files, timeout_s: float) -> bytes:
        """The protocol's reply to a round's job; in step ``mask`` it runs the job first."""
        if why := verdict(files, self.approvals):  # once more: a file may have changed since
            raise NotApproved(why)
        key, study = digest(files), Study.from_bytes(files[STUDY])
        update = partial(self._update, job, key, study, files, timeout_s)
        return self._rounds.answer(key, study, files[REQUEST], partial(round_of, files), update).to_bytes()

    def _update(self, job: str, key: str, study: Study, files: Files, timeout_s: float) -> np.ndarray:
        """The job's update, after the round is counted and charged."""
        approval = self.approvals[key]
        self._approve(key, replace(approval, used=approval.used + 1))
        if study.privacy:
            self.hospital.charge(f"{study.name}: round {approval.used + 1}", study.training, study.privacy)
        films = self.films(study.dataset)
        if not films:
            raise UserError(f"dataset {study.dataset!r} is gone")
        syft = {
            "SYFTBOX_FOLDER": str(self.client.syftbox_folder),
            "SYFTBOX_EMAIL": self.email,
            "SYFT_IS_IN_JOB": "true",
        }
        started = time.perf_counter()
        try:
            return run_job(
                files, self.folder / "jobs" / job, films, self.name, environment=syft, timeout_s=timeout_s,
                memory_gib=self.memory_gib,
            )  # fmt: skip
        finally:
            self.seconds[job] = time.perf_counter() - started
