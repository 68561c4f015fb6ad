"""A run's folder: checkpoint, key and lock, so that a run survives a kill at any moment.

With fixed seeds a killed run ends in the same weights, bit for bit. Without them, an update that a hospital stored is
sent again as it was, and one that wasn't stored is computed with fresh noise and charged anew. The state of a generator
is never written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from primia_lite.config import UserError, elsewhere
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.optimizer import ServerOptimizer
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import charged_for
from primia_lite.runtime import write_atomic
from primia_lite.training import Training

# Of a run, in the order of deletion: what names the run goes last, so that a kill in between leaves it to be deleted.
_FILES = (
    "checkpoint.pt", "update-*.pt", "ledger-*.sqlite*", ".checkpoint.pt.*", ".update-*", ".ledger-*", ".run.json.*",
    "run.json",
)  # fmt: skip


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if need be, for this process alone; UserError where another has it or nothing is written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "run.lock", timeout=0):  # the system lets go of it when a process is killed
            yield
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait for it, or choose another folder") from error
    except OSError as error:
        raise UserError(
            f"can't work in {folder}: {error.strerror or error}. Free space, or {elsewhere(folder)}"
        ) from error


def forget(folder: Path) -> None:
    """Delete a run, and only a run, from its folder; a ledger that can't be read is kept, and stops it."""
    for path in folder.glob("ledger-*.sqlite"):
        if others := [what for what in charged_for(path) if not what.startswith("round ")]:
            raise UserError(
                f"{path} is charged for more than this run ({others[0]}): fresh=True would forget that. Leave it out, "
                "or choose another folder"
            )
    for pattern in _FILES:
        for path in sorted(folder.glob(pattern)):
            path.unlink()


def save(server: ServerOptimizer, folder: Path) -> None:
    write_atomic(folder / "checkpoint.pt", lambda file: torch.save(server.state_dict(), file))


def resume(server: ServerOptimizer, folder: Path, key_of: Callable[[str], str], about: dict | None = None) -> str:
    """Take up the run of a folder, or begin one there; UserError for a folder that holds another run.

    ``about`` is what is public of the run, kept for its privacy card. Gives the run's key, made by ``key_of`` from a
    salt: without it, a hash of private films would confirm a guess at them.
    """
    checkpoint, named = folder / "checkpoint.pt", folder / "run.json"
    # The key is written before the first update is stored: a folder never holds updates of an unknown run.
    if not named.exists():
        if checkpoint.exists():
            raise UserError(f"{folder} has a checkpoint but no run.json that says of which run: start anew, fresh=True")
        salt = os.urandom(16).hex()
        write_atomic(named, json.dumps({"salt": salt, "key": key_of(salt), "about": about}).encode())
    run = json.loads(named.read_text("utf-8"))
    if run["key"] != (key := key_of(run.get("salt", ""))):
        raise UserError(
            f"{folder} holds a run with other films, hospitals, training or privacy: choose another folder, go back to "
            "the old settings, or start anew with fresh=True or `primia-lite run --fresh` (which delete it, ledgers "
            "included)"
        )
    if checkpoint.exists():
        server.load_state_dict(torch.load(checkpoint, weights_only=True))
    return key


def about(folder: Path) -> dict:
    """What is public of a folder's run; UserError where there is none."""
    named = Path(folder) / "run.json"
    if not named.exists():
        raise UserError(f"{folder} holds no run: name a folder that was given to federate(), where run.json lies")
    found = json.loads(named.read_text("utf-8")).get("about")
    if not found:
        raise UserError(f"the run in {folder} is older than privacy cards, or of another kind: run it anew")
    return found


def fingerprint(hospitals: Iterable[Hospital], settings: list, salt: str = "") -> str:
    """What a run is of; ``settings`` as JSON takes them."""
    digest = hashlib.sha256(salt.encode())
    for h in hospitals:
        digest.update(f"{h.name} {h.declared_size} {h.declared_patients}".encode())
        digest.update("\0".join(map(str, h.films.patient_id)).encode())
        digest.update(np.ascontiguousarray(h.films.inputs.numpy()).data)
        digest.update(h.films.labels.numpy().tobytes())
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]


def check_ledgers(
    hospitals: Sequence[Hospital], training: Training, privacy: Privacy, history: list[dict], folder: Path
) -> None:
    """Raise UserError unless the ledgers hold all that the run has charged so far."""
    mechanism = (privacy.noise_multiplier, training.sample_rate)
    for h in hospitals:
        charges = h.ledger(folder, privacy).charges()
        charged = sum(r.steps for r in charges if (r.noise_multiplier, r.sample_rate) == mechanism)
        took_part = sum(h.name not in record.get("absent", ()) for record in history)
        if charged < took_part * training.steps_per_round:
            raise UserError(
                f"hospital {h.name}'s ledger in {folder} has {charged} steps, but {took_part} rounds are done: "
                "it was deleted or replaced. Restore it from a backup, or start anew with fresh=True"
            )
