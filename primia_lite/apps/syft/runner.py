"""What runs at a hospital in place of syft's own runner.

syft-job 0.1 runs whatever lies in a job's folder, where the researcher can write and read, and puts what the job prints
there too. The runner here runs exactly the bytes that a person approved, from a copy outside the synced folder; neither
what they print nor what they write beside themselves leaves, and what it releases is the masked update.

This is a workflow for people who decide, not a sandbox: approved code runs with the hospital's rights, and could send
films away by itself. Somebody has to have read it. The researcher also sees that a job failed, and when each one ended.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from syft_job.job_runner import SyftJobRunner
from syft_job.job_storage import JobRef
from syft_job.models import JobStatus

from primia_lite.config import UserError, printable
from primia_lite.federation.study import MOST_ROUND_BYTES, REQUEST, ROUND
from primia_lite.federation.untrusted import MOST_BYTES, MOST_REQUEST_BYTES, read_file

if TYPE_CHECKING:
    from primia_lite.apps.syft.hospital import Datasite

REPLY = "reply.txt"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without syft's own words: they name folders of this machine. For one thread at a time."""
    logger = logging.getLogger("syft")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def is_round(folder: Path) -> bool:
    return (Path(folder) / REQUEST).is_file()


_MOST_FILES = 100
_MOST_BYTES = {ROUND: MOST_ROUND_BYTES, REQUEST: MOST_REQUEST_BYTES}


def read_job(folder: Path) -> dict[str, bytes]:
    """A submission's files by path, but for syft's own (its receipt, permissions); links aren't followed.

    UserError for more than 100, or larger ones than a study of ours needs.
    """
    folder, files, size = Path(folder), {}, 0
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name == "config.yaml" or path.name == "syft.pub.yaml" or path.is_symlink() or not path.is_file():
            continue
        if len(files) == _MOST_FILES:
            raise UserError(f"the job has more than {_MOST_FILES} files")
        files[name] = read_file(path, printable(name, 200), _MOST_BYTES.get(name, MOST_BYTES))
        size += 0 if name in _MOST_BYTES else len(files[name])
        if size > MOST_BYTES:
            raise UserError(f"the job has more than {MOST_BYTES:,} bytes besides the round's own")
    return dict(sorted(files.items()))


class HospitalRunner(SyftJobRunner):
    """syft's runner, with what is described at the top of this module."""

    site: Datasite

    @classmethod
    def for_site(cls, site: Datasite) -> HospitalRunner:
        with quiet():
            runner = cls(site.client.job_client.config)
        runner.site = site
        return runner

    def _get_jobs_in_approved(self) -> list[JobRef]:
        # A proposal is never run: rounds are, under its approval.
        return [ref for ref in super()._get_jobs_in_approved() if is_round(self.manager.submission_dir(ref))]

    def decide(self, ref: JobRef, status: JobStatus, reason: str) -> None:
        """What syft's JobInfo does, which can't be had where the submission's own ``config.yaml`` can't be read."""
        state, now = self.manager.read_state(ref), datetime.now(UTC)
        state.status, state.review_reason = status, printable(reason)
        if status == JobStatus.APPROVED:
            state.approved_by, state.approved_at, state.approval_method = self.site.email, now, "auto"
        else:
            state.rejected_by, state.rejected_at = self.site.email, now
        self.manager.write_state(ref, state)

    def _execute_job(self, ref: JobRef, stream_output: bool = True, timeout: float | None = None) -> bool:
        state = self.manager.read_state(ref)
        state.status = JobStatus.RUNNING
        self.manager.write_state(ref, state)
        try:
            files = read_job(self.manager.submission_dir(ref))
            reply = self.site.answer(ref.job_name, files, timeout or self.site.timeout_s)
            self._release(ref, reply)
        except Exception as error:  # the researcher learns that it failed, and no more
            self.site.note(f"{ref.job_name} failed: {type(error).__name__}: {error}")
            self._set_finalized_job_state(ref, -1)
            return False
        self._set_finalized_job_state(ref, 0)
        self.site.note(f"{ref.job_name}: released {len(reply):,} bytes, masked" if ref.job_name.endswith("-mask") else
                       f"{ref.job_name}: answered")  # fmt: skip
        return True

    def _release(self, ref: JobRef, reply: bytes) -> None:
        """Put one file where the researcher reads; the runner puts nothing else there but the job's state."""
        outputs = self.manager.review_dir(ref) / "outputs"
        outputs.mkdir(parents=True, exist_ok=True)
        (outputs / REPLY).write_bytes(base64.b64encode(reply))
