"""A job as a process of its own, in a folder that no sync touches.

It runs with its starter's rights: what keeps it from doing harm is that somebody has read it before. That it can't fill
the machine's memory is for mistakes, and for weights that are more than they seem.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import psutil

import primia_lite
from primia_lite.config import UserError
from primia_lite.federation.study import FILMS_VARIABLE, NAME_VARIABLE, OUTPUT, RUN, Files

# How Python, numpy, torch and C++ say it.
_OUT_OF_MEMORY = ("MemoryError", "Unable to allocate", "can't allocate memory", "Cannot allocate memory", "bad_alloc")


class JobError(UserError):
    """A job that ended without an update. The reason may tell of films: it is for the hospital alone."""


def run_job(
    files: Files,
    folder: Path,
    films: Path,
    hospital: str,
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    memory_gib: float | None = None,
) -> np.ndarray:
    """Run a job on films and take its update.

    Parameters
    ----------
    files : the job, by path; these very bytes are run
    folder : where it works; emptied before. What it printed stays there, in ``stdout.txt`` and ``stderr.txt``
    films : the file that it is to read
    environment : variables besides the few that it gets; none of the caller's own pass through
    memory_gib : what each of its processes may take, where the system limits that (Linux does). Left out, half of the
        machine's

    Returns
    -------
    float32 or int64 [L], as the job left it; JobError where it failed, took too long or needed more memory
    """
    memory_gib = psutil.virtual_memory().total / 2**31 if memory_gib is None else memory_gib
    output = _lay_out(files, folder)
    variables = {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(folder), "OMP_NUM_THREADS": "1",
        "HOSPITAL_PYTHON": sys.executable, "PYTHONPATH": str(Path(primia_lite.__file__).parent.parent),
        FILMS_VARIABLE: str(films), NAME_VARIABLE: hospital, **(environment or {}),
    }  # fmt: skip
    if status := _run(folder, variables, timeout_s, memory_gib):
        words = _end_of(folder / "stderr.txt").strip()
        if any(sign in words for sign in _OUT_OF_MEMORY):
            raise JobError(f"the job needed more than the {memory_gib:.3g} GiB of memory that it may take (memory_gib)")
        last = words.splitlines()[-1] if words else "it said nothing"
        raise JobError(f"the job ended with status {status}: {last}")
    try:
        if output.stat().st_size > memory_gib * 2**30:
            raise ValueError("more than fits into memory")
        return np.load(output, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise JobError(f"the job left no update in outputs/{output.name} ({type(error).__name__})") from error
    finally:
        shutil.rmtree(output.parent, ignore_errors=True)  # a file of films is of no more use


def _lay_out(files: Files, folder: Path) -> Path:
    """Write a job's files; where its update is to be."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        target = (folder / path).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise JobError(f"the job has a file {path} outside its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (folder / OUTPUT).parent.mkdir(exist_ok=True)
    return folder / OUTPUT


def _run(folder: Path, variables: Mapping[str, str], timeout_s: float, memory_gib: float) -> int:
    """The status with which a job that was laid out ends."""
    with open(folder / "stdout.txt", "wb") as out, open(folder / "stderr.txt", "wb") as err:
        # Set by the shell: code between fork and exec isn't safe where threads run.
        limited = f"ulimit -d {int(memory_gib * 2**20)} 2>/dev/null; exec bash {RUN}"
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            ["bash", "-c", limited], cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise JobError(f"the job took longer than {timeout_s:g} s") from error
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_of(path: Path, size: int = 2**14) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read(size).decode(errors="replace")
