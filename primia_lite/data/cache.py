"""Kept in files what is costly to make: the first process that wants it makes it, the others wait for that one.

Own code because joblib's Memory doesn't wait, and unpickles, so that who can write its folder runs code. Here a file is
an ``.npz``, whose checksums tell a damaged one.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from primia_lite.runtime import write_cache

Arrays = dict[str, np.ndarray]
WAIT_S = 1800  # for a process that hangs; the lock of one that died is free at once
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # or not there, or cut short


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the only process that makes what a file keeps. Where no file can be locked, work may be done twice."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=WAIT_S)
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cached(path: Path, make: Callable[[], Arrays], enough: Callable[[Arrays], bool] = lambda found: True) -> Arrays:
    """The arrays in a file; if they aren't there, or not ``enough``, those that ``make`` gives, which are then kept."""

    def stored() -> Arrays | None:
        with suppress(*_DAMAGED), np.load(path, allow_pickle=False) as file:
            found = dict(file)
            return found if enough(found) else None

    if (found := stored()) is not None:
        return found
    with _alone(path):
        if (found := stored()) is None:
            found = make()
            write_cache(path, lambda file: np.savez(file, **found))
        return found


def cached_rows(folder: Path, keys: Sequence[str], make: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """A row for each key, [N, D], out of a folder that all who make such rows share; ``make(places)`` gives those of
    the keys that are in no file of it."""
    found = _rows(folder, keys)
    if any(key not in found for key in keys):
        with _alone(folder / "rows"):
            found = _rows(folder, keys)
            missing = {key: place for place, key in enumerate(keys) if key not in found}
            if missing:
                made = make(list(missing.values()))
                found.update(zip(missing, made, strict=True))
                name = hashlib.sha256("".join(missing).encode()).hexdigest()[:20]
                write_cache(folder / f"{name}.npz", lambda file: np.savez(file, keys=list(missing), rows=made))
    return np.stack([found[key] for key in keys])


def _rows(folder: Path, keys: Sequence[str]) -> Arrays:
    wanted, found = set(keys), {}
    for path in folder.glob("*.npz"):
        with suppress(*_DAMAGED), np.load(path, allow_pickle=False) as file:
            here = {key: place for place, key in enumerate(file["keys"].tolist()) if key in wanted - found.keys()}
            if here:
                found.update(zip(here, file["rows"][list(here.values())], strict=True))
    return found
