"""The researcher's side: proposes studies, and takes rounds of secure aggregation to their end.

Every step of :mod:`primia_lite.secagg` is a syft job at each hospital. The job's files carry the request; the
hospital's runner (:mod:`~primia_lite.apps.syft.runner`) answers it, and in step ``mask`` runs the approved code on the
private films, in a process of its own. The researcher is the protocol's server and sees only the sum. A person at a
hospital reviews a study once; rounds with the same code and settings need no second review.

On machines of their own each party makes its client with ``syft_rds``, hospitals run ``fetch``, ``process``, ``sync``
of :class:`~primia_lite.apps.syft.hospital.Datasite` again and again, and the researcher's ``turn`` waits for them.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from syft_job.client import JobClient
from syft_job.job import JobInfo
from syft_rds import SyftRDSClient

from primia_lite import secagg
from primia_lite.apps.syft.approval import DEPENDENCY_FILES
from primia_lite.apps.syft.process import run_job
from primia_lite.apps.syft.runner import REPLY, quiet
from primia_lite.config import UserError, printable
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecAggOver
from primia_lite.federation.hospital import State
from primia_lite.federation.optimizer import Schedule
from primia_lite.federation.rounds import Result, federate_study
from primia_lite.federation.study import CODE, REQUEST, ROUND, RUN, RUN_SH, Files, Study, films_from, round_file
from primia_lite.federation.untrusted import read_file


class AgreedJobClient(JobClient):
    """The researcher's side of the agreement on how jobs start; :meth:`Researcher.submit` lets no packages in."""

    def _generate_python_run_script(self, entrypoint_path, dependencies, has_pyproject, install_source) -> str:
        return RUN_SH


@dataclass(frozen=True)
class Span:
    """Seconds of one party in a step of a round: ``submit``, ``sync``, ``answer`` or ``collect``."""

    round: int
    step: str
    who: str
    what: str
    start_s: float
    end_s: float


class Researcher:
    """Who asks. Holds no film and no key; sees mock data, replies and sums.

    Parameters
    ----------
    client : a syft-rds client, in the role of a data scientist, with the hospitals as peers
    emails : of the hospitals, by name
    turn : called after requests went out: returns when hospitals had time to answer
    folder : for drafts of jobs and trials

    Attributes
    ----------
    refused : why hospitals refused jobs, in their words; a job that failed says no more than that
    spans : where the seconds went
    listen : called with each reply; None does nothing
    """

    def __init__(self, client: SyftRDSClient, emails: Mapping[str, str], turn: Callable[[], None], folder: Path):
        self.client, self.emails, self.turn, self.folder = client, dict(emails), turn, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        client.job_client = AgreedJobClient.from_config(client.job_client.config)
        self.refused: list[str] = []
        self.spans: list[Span] = []
        self.listen: Callable[[secagg.Reply], None] | None = None
        self._at = (0, "")
        # Numbers of sessions go up for ever: hospitals answer none twice.
        manager = client.job_client.manager
        names = [ref.job_name for email in self.emails.values() for ref in manager.iter_submission_refs(email)]
        self.session = max(map(self._number, names), default=0)

    @staticmethod
    def _number(job: str) -> int:
        parts = job.rsplit("-", 2)
        return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() and parts[2] in secagg.STEPS else 0

    def _jobs(self) -> list[JobInfo]:
        with quiet():
            return list(self.client.job_client.jobs)

    def timed(self, who: str, what: str, do: Callable, *arguments):
        """Call something and note its seconds."""
        start = time.perf_counter()
        try:
            return do(*arguments)
        finally:
            self.spans.append(Span(*self._at, who, what, start, time.perf_counter()))

    def sync(self) -> None:
        with quiet():
            self.client.sync()

    # --- a study ------------------------------------------------------------------------------------------------------

    def mock(self, hospital: str, dataset: str) -> Path:
        """The file of a dataset's mock half."""
        try:
            with quiet():
                return self.client.dataset_manager.get(dataset, datasite=self.emails[hospital]).mock_files[0]
        except (FileNotFoundError, IndexError) as error:
            raise UserError(f"hospital {hospital} shares no dataset {dataset!r} with you: sync, or ask it") from error

    def try_out(self, study: Study, hospital: str, weights: State, code: bytes | None = None) -> np.ndarray:
        """A job's update from the mock half, on this machine, as it would run there.

        What it printed, also where it failed, lies in ``trial/`` of the researcher's folder.
        """
        files = {**study.files(code), ROUND: round_file(1, weights)}
        mock = self.mock(hospital, study.dataset)
        return run_job(files, self.folder / "trial", mock, hospital, environment={"SYFT_IS_IN_JOB": "false"})

    def propose(self, study: Study, code: bytes | None = None) -> None:
        """Send a study to its hospitals, for people to review."""
        for hospital in study.agreement.names:
            self.submit(hospital, study.name, study.files(code))

    def submit(self, hospital: str, name: str, files: Files, dependencies: Sequence[str] = ()) -> None:
        """Send one job; UserError if its name was used before, it asks for packages, or the hospital is no peer."""
        if found := [path for path in files if Path(path).name in DEPENDENCY_FILES]:
            dependencies = [*dependencies, *found]
        if dependencies:
            raise UserError(
                f"job {name!r} asks for {dependencies[0]}: hospitals run jobs in an environment of their own. Leave it "
                "out, and use what primia_lite brings"
            )
        email = self.emails[hospital]
        if email not in {peer.email for peer in self.client.peer_manager.syncable_peers}:
            raise UserError(f"hospital {hospital} ({email}) is no peer: add it, and let it approve you")
        with tempfile.TemporaryDirectory(dir=self.folder) as draft, quiet():
            for path, content in files.items():
                if path != RUN:  # syft writes it anew
                    target = Path(draft) / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
            try:
                self.client.submit_python_job(
                    email, f"{draft}/code", job_name=name, entrypoint="main.py", force_submission=True
                )
            except FileExistsError as error:
                raise UserError(
                    f"hospital {hospital} has a job {name!r} already: a name is used once, choose another"
                ) from error

    def status(self, name: str) -> dict[str, str]:
        """How a job stands, by hospital, with the reason where a person gave one. Sync first."""
        jobs = {job.datasite_owner_email: job for job in self._jobs() if job.name == name}

        def words(job: JobInfo) -> str:
            decided = job.status in ("approved", "rejected") and job.review_reason
            return f"{job.status}: {printable(job.review_reason)}" if decided else job.status

        return {h: words(jobs[email]) for h, email in self.emails.items() if email in jobs}

    # --- a round ------------------------------------------------------------------------------------------------------

    def round(self, study: Study, weights: State, number: int) -> secagg.SecAggServer:
        """Take a round to its end; the server that comes back holds the sum and its survivors.

        TooFewSurvivors has what hospitals said.
        """
        self.session += 1
        before = len(self.refused)
        server = secagg.SecAggServer(study.agreement, self.session)
        weights_file = round_file(number, weights)

        def exchange(step: str, requests: Mapping[str, bytes]) -> Iterable[secagg.Reply]:
            return self._ask(study, number, step, requests, weights_file if step == "mask" else None)

        try:
            self.refused += secagg.run_round(server, exchange)
        except secagg.TooFewSurvivors as error:
            said = "; ".join(self.refused[before:])
            raise secagg.TooFewSurvivors(f"{error}. What hospitals said: {said or 'nothing'}") from error
        return server

    def _ask(self, study, number, step, requests, weights_file) -> list[secagg.Reply]:
        self._at = (number, step)
        job = f"{study.name}-{self.session:05d}-{step}"
        fixed = study.files(self.code(study.name))
        for hospital, request in requests.items():
            files = {**fixed, REQUEST: request, **({ROUND: weights_file} if weights_file else {})}
            self.timed("researcher", "submit", self.submit, hospital, job, files)
        self.turn()
        self.timed("researcher", "sync", self.sync)
        return self.timed("researcher", "collect", self._collect, job, study.agreement.length)

    def code(self, study: str) -> bytes | None:
        """The code of the job that proposed a study."""
        manager = self.client.job_client.manager
        for email in self.emails.values():
            for ref in manager.iter_submission_refs(email):
                if ref.job_name == study:
                    return (manager.submission_dir(ref) / CODE).read_bytes()
        return None

    def _collect(self, name: str, entries: int) -> list[secagg.Reply]:
        replies, said, manager = [], {}, self.client.job_client.manager
        most = 8 * entries + 2**24  # base64 of its vector, and a head for thousands of hospitals
        for hospital, email in self.emails.items():
            try:
                ref = manager.find_submission_ref(email, name, self.client.email)
                path = manager.review_dir(ref) / "outputs" / REPLY
                if path.exists():
                    reply = secagg.Reply.from_bytes(base64.b64decode(read_file(path, "its reply", most)))
                    replies.append(reply)
                    continue
                state = manager.read_state(ref)
                why = state.review_reason if state.status == "rejected" else f"no answer (job {state.status.value})"
            except FileNotFoundError:
                continue  # it wasn't asked, or hasn't looked
            except Exception as error:  # of any kind: it is a hospital's, and the others' count
                why = f"a reply that can't be read ({error})"
            said.setdefault(printable(str(why)), []).append(hospital)
        self.refused += [f"{name}: {', '.join(hospitals)}: {why}" for why, hospitals in said.items()]
        for reply in replies if self.listen else ():
            self.listen(reply)
        return replies


class SyftAggregation(SecAggOver):
    """Secure aggregation with hospitals on PySyft; ``weights`` gives the global ones of the round that begins."""

    def __init__(self, researcher: Researcher, study: Study, weights: Callable[[], State]):
        self.researcher, self.study, self.weights = researcher, study, weights
        self.agreement = study.agreement
        self.name = f"secure aggregation over PySyft, threshold {study.agreement.threshold}"

    def round(self, number, updates, question) -> secagg.SecAggServer:
        return self.researcher.round(self.study, self.weights(), number)


def federate_with_syft(
    researcher: Researcher,
    study: Study,
    schedule: Schedule | None = None,
    *,
    seed: int = 0,
    validation: Films | None = None,
    progress: Callable[[dict], None] | str | None = "rounds",
) -> Result:
    """Train a model over a study that hospitals have approved: :func:`primia_lite.federation.rounds.federate_study`.

    Parameters
    ----------
    schedule : what the server does; left out, plain averaging over the study's rounds
    seed : of the initial weights
    """
    mock = films_from(researcher.mock(study.agreement.names[0], study.dataset))
    return federate_study(
        study, schedule or Schedule(study.rounds), tuple(mock.inputs.shape[2:]),
        lambda server: SyftAggregation(researcher, study, lambda: server.state),
        seed=seed, validation=validation, progress=progress,
    )  # fmt: skip
