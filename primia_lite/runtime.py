"""Consoles, seeds, threads, files written whole, and the origin that every result carries."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import IO

from primia_lite.config import UserError, cache_dir, elsewhere, repo_root, results_dir, set_variable

_STARTED = time.time()
os.umask(_UMASK := os.umask(0o022))
_REPORTED_PACKAGES = (
    *("torch", "opacus", "dp-accounting", "numpy", "scikit-learn", "kymatio", "monai", "tenseal", "syft"),
)


def any_console() -> None:
    """Let this process and its children print any text to any console or file: what an encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"


def seed_for(seed: int, *labels: object) -> int:
    """A 63-bit seed for one purpose, so that two purposes never share a random stream."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Let torch use ``n`` threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_notebook() -> bool:
    """Whether a person is watching: a live Jupyter front end, not papermill or nbval."""
    if os.environ.get("PRIMIA_LITE_HEADLESS") or "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


class _Raw(io.FileIO):
    """A file that keeps what the system said: writers such as ``torch.save`` make an error of their own of it."""

    refused: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            raise

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")  # or some writers go past write()


def _write(path: Path, content: bytes | Callable[[IO[bytes]], object], private: bool = False) -> None:
    """:func:`write_atomic`, but the system's own errors."""
    partial = None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        raw = _Raw(descriptor, "w+b")
        try:
            with io.BufferedRandom(raw) as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(descriptor)
        except Exception:
            if raw.refused:
                raise raw.refused from None
            raise
        if not private:
            os.chmod(partial, 0o666 & ~_UMASK)  # temporary files are private; results are as readable as any other file
        os.replace(partial, path)
        partial = None
    finally:
        if partial:
            Path(partial).unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: str | Path, content: bytes | Callable[[IO[bytes]], object], *, private: bool = False) -> Path:
    """Write a file so that a reader sees the old content or the new, never a part, whatever kills the process.

    ``content`` is the bytes, or a function that writes them to an open binary file. ``private`` files are for the
    owner's eyes only (mode 600).

    Raises
    ------
    UserError
        The disk is full or the folder can't be written; an existing file is left as it was.
    """
    path = Path(path)
    try:
        _write(path, content, private)
    except OSError as error:
        raise UserError(
            f"could not write {path.name} in {path.parent}: {error.strerror or error}. Free space or "
            f"{elsewhere(path)}, then start again: what was saved before is intact."
        ) from error
    return path


def write_cache(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Keep in :func:`~primia_lite.config.cache_dir` what can be made again. That it can't be written costs only time:
    a warning says so, once."""
    try:
        _write(path, content)
    except OSError as error:
        warnings.warn(
            f"nothing is kept in the cache {cache_dir()} ({error.strerror or error}): it is made anew each time. Free "
            f"space, or {set_variable('PRIMIA_LITE_CACHE')}",
            stacklevel=2,
        )


def sync_folder(folder: Path) -> None:
    """Make new, renamed and deleted files of a folder outlive a power cut, where the system can."""
    if os.name == "posix":
        with suppress(OSError):  # some network file systems can't: the file itself is written
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def summary(values: Iterable[float], unit: str = "1") -> dict:
    """Mean, sample standard deviation, n and unit, as a metric of a results file."""
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return {"mean": mean, "std": std, "n": len(values), "unit": unit}


def origin(*, data_source: str, data_fingerprint: str, seeds: Iterable[int], command: str, **extra: object) -> dict:
    """Where a result comes from: data, seeds, versions, machine, time, command.

    ``command`` is what gives the result by hand; under ``primia-lite run`` that very command is named instead.
    """
    versions = {"python": platform.python_version()}
    for name in ("primia_lite", *_REPORTED_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "data_source": data_source,
        "data_fingerprint": data_fingerprint,
        "seeds": list(seeds),
        "command": os.environ.get("PRIMIA_LITE_COMMAND", command),
        "versions": versions,
        "machine": f"{platform.machine()} {platform.system()}",
        "cores": cores(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds_since_start": round(time.time() - _STARTED, 1),
        **extra,
    }


def _finite(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return isinstance(value, Real) and math.isfinite(value)


def write_results(name: str, origin: dict, metrics: dict[str, dict]) -> Path:
    """Write ``results/<profile>/<name>.json``. Each metric needs its ``unit``, its ``n`` and finite values."""
    for metric, entry in metrics.items():
        if not {"unit", "n"} <= entry.keys() or not {"mean", "median"} & entry.keys():
            raise UserError(f"metric {metric!r} needs mean or median, n and unit; it has {sorted(entry)}")
        bad = [key for key, value in entry.items() if not isinstance(value, str) and not _finite(value)]
        if bad:
            raise UserError(f"metric {metric!r} is not finite: {bad}")

    def plain(value: object) -> object:
        if hasattr(value, "item"):  # numpy's numbers become Python's
            return value.item()
        raise UserError(f"{value!r} can't be written to a results file: give numbers, texts, lists")

    text = json.dumps({"origin": origin, "metrics": metrics}, indent=1, allow_nan=False, default=plain) + "\n"
    return write_atomic(results_dir() / f"{name}.json", text.encode())


def stored(name: str, profile: str = "paper") -> dict:
    """A committed results file: ``origin`` (where its numbers come from) and ``metrics`` (``mean`` or ``median``, ...).

    A chapter shows by it what real films gave, beside what it has just computed on phantoms.
    """
    path = repo_root() / "results" / profile / f"{name}.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.json"))) or "none"
        raise UserError(f"no stored results {name!r} of profile {profile!r}: there are {there}") from None
