"""Runs of training on a federation's processes, or on Flower's simulation."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from primia_lite.apps.flower.deploy import running
from primia_lite.apps.flower.folder import LINK, SERVER, environment, flwr, flwr_json, parts, require_flower
from primia_lite.config import UserError


def submit(folder: Path, settings: Mapping[str, object], app: Path | None = None) -> int:
    """Begin a run. Returns its number.

    Parameters
    ----------
    settings
        The app's: ``rounds`` and ``fresh`` of ours.
    app
        Another Flower app's folder, for benchmarks.
    """
    require_flower()
    if LINK not in running(folder):
        raise UserError(f"no server runs in {folder}: primia-lite deploy start {folder}")
    if app is None:
        from primia_lite.apps.flower.process import APP

        app = folder / SERVER / "app"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(APP, "utf-8")
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    return int(flwr_json(folder, "run", str(app.resolve()), "here", "--run-config", text)["run-id"])


def run_status(folder: Path, run: int) -> tuple[str, str]:
    """Status and details of a run by ``flwr list``: ``flwr run --stream`` reports success whatever happened."""
    rows = flwr_json(folder, "list", "here", "--run-id", str(run), tries=3)["runs"]
    (row,) = [row for row in rows if int(row["run-id"]) == run]
    return row["status"], str(row.get("status-details") or row.get("details") or "")


def _rounds(folder: Path, rounds: int | None) -> int:
    agreed = json.loads((folder / SERVER / "study.json").read_text("utf-8"))["rounds"]
    if rounds is not None and not 1 <= rounds <= agreed:
        raise UserError(f"rounds is {rounds}: the hospitals agreed to 1 to {agreed}")
    return agreed if rounds is None else rounds


def run(folder: Path, rounds: int | None, *, fresh: bool = False, ask_s: float = 15.0, show=print) -> dict:
    """Train, and wait for the end.

    Returns
    -------
    ``server/run/history.json``: ``rounds``, a record each of those that were done now; ``ended_s``, when each ended, in
    seconds since training began; ``done``, the number of rounds in all.

    Parameters
    ----------
    rounds
        In all, with those that an earlier run has done; None takes the study's.

    Raises
    ------
    UserError
        No server runs, or the run failed; the message says why.
    """
    server, _ = parts(folder)
    if not server:
        raise UserError(f"{folder} holds no server: runs begin on the server's machine")
    rounds = _rounds(folder, rounds)
    history = folder / SERVER / "run" / "history.json"
    history.unlink(missing_ok=True)
    number = submit(folder, {"rounds": rounds, "fresh": fresh})
    shown, asked = 0, time.monotonic()
    try:
        while True:
            found = json.loads(history.read_text("utf-8")) if history.exists() else {"rounds": [], "ended_s": []}
            for record, ended_s in list(zip(found["rounds"], found["ended_s"], strict=True))[shown:]:
                shown += 1
                without = f", without {', '.join(record['absent'])}" if "absent" in record else ""
                show(f"round {record['round']} of {rounds} after {ended_s:.1f} s{without}")
            # Asking the server costs a process of seconds.
            if "done" in found or "error" in found or time.monotonic() - asked > ask_s:
                state, details = run_status(folder, number)
                if state.startswith("finished"):
                    break
                asked = time.monotonic()
            time.sleep(0.5)
    except KeyboardInterrupt:
        flwr(folder, "stop", str(number), "here")
        raise
    found = json.loads(history.read_text("utf-8")) if history.exists() else {}
    if state != "finished:completed" or "done" not in found:
        why = found.get("error") or details or f"`flwr log {number} here` may tell"
        raise UserError(f"run {number} failed ({state}). {why}")
    return found


def simulate(folder: Path, rounds: int | None, *, fresh: bool = False) -> dict:
    """As :func:`run`, on Flower's simulation (Ray) in place of processes over TLS: no port is opened.

    Raises
    ------
    UserError
        The folder lacks the server or hospitals, Ray isn't installed, or the run failed.
    """
    require_flower()
    if find_spec("ray") is None:
        raise UserError("Ray isn't installed: pip install 'primia-lite[flower-simulation]'")
    server, hospitals = parts(folder)
    if not (server and hospitals):
        raise UserError(f"{folder} must hold the server and hospitals: primia-lite deploy init")
    os.environ.update(environment(folder) | {"RAY_USAGE_STATS_ENABLED": "0"})
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from primia_lite.apps.flower.app import answer_in
    from primia_lite.apps.flower.server import train_in_folder

    client_app, server_app = ClientApp(), ServerApp()
    folders = [(folder / name).resolve() for name in hospitals]
    home = (folder / SERVER).resolve()
    rounds = _rounds(folder, rounds)

    @client_app.train()
    def _train(message, context):
        return answer_in(folders[context.node_config["partition-id"]], message)

    @server_app.main()
    def _main(grid, context):
        train_in_folder(grid, home, rounds, fresh=fresh)

    history = home / "run" / "history.json"
    history.unlink(missing_ok=True)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server_app, client_app, len(folders), backend_config=resources)
    except RuntimeError as error:
        why = json.loads(history.read_text("utf-8")).get("error", error) if history.exists() else error
        raise UserError(f"the simulation failed: {why}") from error
    return json.loads(history.read_text("utf-8"))
