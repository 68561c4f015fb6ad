"""Flower's processes over TLS: started, looked at, ended; and runs of training, on them or on Flower's simulation.

A folder holds the server's part (``server/``), some hospitals' (``A/``, ...), or both. :func:`start` runs what is
there, so one command serves a trial on one machine and each of many machines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

from primia_lite.apps.flower.folder import (
    CONFIG,
    HISTORY,
    LINK,
    SERVER,
    START_S,
    STUDY,
    config_of,
    environment,
    flwr,
    flwr_json,
    history_of,
    local_address,
    parts,
    require_flower,
    server_config,
    unreached,
)
from primia_lite.config import UserError

_STOP_S = 10.0


def running(folder: Path) -> dict[str, psutil.Process]:
    """Our processes that live, by name; what a pid file names is ours only if its start time is the one written."""
    found = {}
    for path in sorted((folder / ".run").glob("*.pid")):
        try:
            pid, started = path.read_text("utf-8").split()
            process = psutil.Process(int(pid))
            alive = abs(process.create_time() - float(started)) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (ValueError, psutil.Error):
            alive = False
        if alive:
            found[path.stem] = process
        else:
            path.unlink(missing_ok=True)
    return found


def process_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "primia_lite.apps.flower.process", *arguments]


def _launch(folder: Path, name: str, arguments: Sequence[str], host: str, port: int) -> None:
    """Start one of Flower's processes, and wait until it listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{name} can't listen at {host}:{port} ({error.strerror}): end what does, or choose another port "
                "(`port` in server/server.toml or hospital.toml)"
            ) from error
    run = folder / ".run"
    run.mkdir(mode=0o700, exist_ok=True)
    output = run / f"{name}.log"
    with output.open("ab") as file:
        started = subprocess.Popen(
            process_command([*arguments, "--host", host, "--port", str(port)]), cwd=folder, env=environment(folder),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process = psutil.Process(started.pid)
    (run / f"{name}.pid").write_text(f"{started.pid} {process.create_time()}", "utf-8")
    deadline = time.monotonic() + START_S
    while not _listens(local_address(host), port):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            tail = "\n".join(output.read_text("utf-8", "replace").splitlines()[-12:])
            raise UserError(f"{name} ended at once. The end of {output}:\n{tail}")
        if time.monotonic() > deadline:
            raise UserError(f"{name} isn't there after {START_S:.0f} s: see {output}")
        time.sleep(0.2)


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def start(folder: Path) -> list[str]:
    """Start what the folder holds, and is not running. Returns the names of what was started."""
    require_flower()
    server, hospitals = parts(folder)
    alive = running(folder)
    wanted = [*([LINK] if server else []), *hospitals]
    missing = [name for name in wanted if name not in alive]
    if not missing:
        raise UserError(f"{folder} runs already ({', '.join(wanted)}): `primia-lite deploy stop {folder}` ends it")
    for name in hospitals:
        if not (folder / name / STUDY).exists():
            raise UserError(f"hospital {name} hasn't joined a study: primia-lite deploy join {folder / name} ...")
    if server:
        if LINK in missing:
            _start_superlink(folder)
        _register(folder)
    base = server_config(folder)["port"] if server else 9200
    for number, name in enumerate(hospitals, 1):
        if name in missing:
            _start_supernode(folder, name, base + number)
    return missing


def _start_superlink(folder: Path) -> None:
    home, config = folder / SERVER, server_config(folder)
    host, port = config["host"], config["port"]
    (folder / ".flwr").mkdir(mode=0o700, exist_ok=True)
    (folder / ".flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{local_address(host)}:{port}"\n'
        f"root-certificates = {json.dumps(str((home / 'ca.crt').resolve()))}\n",
        "utf-8",
    )
    _launch(folder, LINK, [
        "superlink", "--ssl-certfile", f"{SERVER}/server.crt", "--ssl-keyfile", f"{SERVER}/server.key",
        "--ssl-ca-certfile", f"{SERVER}/ca.crt", "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ], host, port)  # fmt: skip


def _register(folder: Path) -> None:
    """Make the hospitals' SuperNode keys known to the SuperLink, which forgets them when it ends."""
    for key in sorted((folder / SERVER / "hospitals").glob("*.pub")):
        done = flwr(folder, "supernode", "register", str(key.resolve()), "here")
        if done.returncode and "already" not in done.stdout + done.stderr:
            raise UserError(f"hospital {key.stem}'s key can't be registered: {(done.stderr or done.stdout).strip()}")


def _start_supernode(folder: Path, name: str, port: int) -> None:
    config, place = config_of(folder / name / CONFIG), str((folder / name).resolve())
    _launch(folder, name, [
        "supernode", place, "--superlink", config["superlink"], "--root-certificates", f"{name}/ca.crt",
        "--auth-supernode-private-key", f"{name}/supernode", "--node-config", f"folder={json.dumps(place)}",
    ], "127.0.0.1", config.get("port", port))  # fmt: skip


def stop(folder: Path) -> list[str]:
    """End our processes of the folder and what they started. Returns the names of those that ran."""
    alive = running(folder)
    for name in sorted(alive, key=lambda name: name == LINK):  # hospitals first
        end(alive[name])
        (folder / ".run" / f"{name}.pid").unlink(missing_ok=True)
    return sorted(alive)


def end(process: psutil.Process, sign: int = signal.SIGTERM) -> None:
    """End a process and its children: politely, or at once by SIGKILL."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(sign)
    for one in psutil.wait_procs(family, timeout=_STOP_S)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def status(folder: Path) -> str:
    """A line for each part of the folder, and for each run that the server knows."""
    server, hospitals = parts(folder)
    alive = running(folder)
    lines = [
        f"{name}: {f'runs, process {alive[name].pid}' if name in alive else 'stopped'}"
        for name in [*([LINK] if server else []), *hospitals]
    ]
    if LINK in alive:
        nodes = flwr_json(folder, "supernode", "list", "here").get("nodes", [])
        online = sum(node.get("status") == "online" for node in nodes)
        lines.append(f"{online} of {len(nodes)} hospitals are connected")
        lines += [f"run {run['run-id']}: {run['status']}" for run in flwr_json(folder, "list", "here").get("runs", [])]
    lines += unreached(folder, [name for name in hospitals if name in alive])
    return "\n".join(lines)


# --- runs -------------------------------------------------------------------------------------------------------------


def submit(folder: Path, settings: Mapping[str, object], app: Path | None = None) -> int:
    """Begin a run. Returns its number.

    Parameters
    ----------
    settings : the app's: ``rounds`` and ``fresh`` of ours
    app : another Flower app's folder, for benchmarks
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


def _begin(folder: Path, rounds: int | None) -> int:
    """How many rounds there are to be, once what an earlier run has noted is gone."""
    agreed = json.loads((folder / SERVER / STUDY).read_text("utf-8"))["rounds"]
    if rounds is not None and not 1 <= rounds <= agreed:
        raise UserError(f"rounds is {rounds}: the hospitals agreed to 1 to {agreed}")
    (folder / SERVER / "run" / HISTORY).unlink(missing_ok=True)
    return agreed if rounds is None else rounds


def run(folder: Path, rounds: int | None, *, fresh: bool = False, ask_s: float = 15.0, show=print) -> dict:
    """Train, wait for the end, and give what :func:`~primia_lite.apps.flower.server.train_in_folder` has noted.

    ``rounds`` are in all, with those that an earlier run has done; None takes the study's. UserError where no server
    runs, or the run failed: the message says why.
    """
    server, _ = parts(folder)
    if not server:
        raise UserError(f"{folder} holds no server: runs begin on the server's machine")
    rounds = _begin(folder, rounds)
    number = submit(folder, {"rounds": rounds, "fresh": fresh})
    shown, asked = 0, time.monotonic()
    try:
        while True:
            found = history_of(folder)
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
    found = history_of(folder)
    if state != "finished:completed" or "done" not in found:
        why = found.get("error") or details or f"`flwr log {number} here` may tell"
        raise UserError(f"run {number} failed ({state}). {why}")
    return found


def simulate(folder: Path, rounds: int | None, *, fresh: bool = False) -> dict:
    """As :func:`run`, on Flower's simulation (Ray) in place of processes over TLS: no port is opened."""
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
    rounds = _begin(folder, rounds)

    @client_app.train()
    def _train(message, context):
        return answer_in(folders[context.node_config["partition-id"]], message)

    @server_app.main()
    def _main(grid, context):
        train_in_folder(grid, home, rounds, fresh=fresh)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server_app, client_app, len(folders), backend_config=resources)
    except RuntimeError as error:
        raise UserError(f"the simulation failed: {history_of(folder).get('error', error)}") from error
    return history_of(folder)
