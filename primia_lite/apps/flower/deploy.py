"""Flower's processes over TLS: started, looked at, ended.

A folder holds the server's part (``server/``), some hospitals' (``A/``, ...), or both, as
:mod:`~primia_lite.apps.flower.setup` made them. :func:`start` runs what is there, so one command serves a trial
on one machine and each of many machines.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from primia_lite.apps.flower.folder import (
    LINK,
    SERVER,
    START_S,
    config_of,
    environment,
    flwr,
    flwr_json,
    local_address,
    parts,
    require_flower,
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


def _launch(folder: Path, name: str, arguments: Sequence[str]) -> psutil.Process:
    run = folder / ".run"
    run.mkdir(mode=0o700, exist_ok=True)
    with (run / f"{name}.log").open("ab") as output:
        started = subprocess.Popen(
            process_command(arguments), cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process = psutil.Process(started.pid)
    (run / f"{name}.pid").write_text(f"{started.pid} {process.create_time()}", "utf-8")
    return process


def process_command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "primia_lite.apps.flower.process", *arguments]


def _require_port(host: str, port: int, what: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{what} can't listen at {host}:{port} ({error.strerror}): end what does, or choose another port "
                "(`port` in server/server.toml or hospital.toml)"
            ) from error


def log_tail(folder: Path, name: str, lines: int = 12) -> str:
    path = folder / ".run" / f"{name}.log"
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else ""


def _wait(process: psutil.Process, folder: Path, name: str, ready) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise UserError(f"{name} ended at once. The end of {folder}/.run/{name}.log:\n{log_tail(folder, name)}")
        if time.monotonic() > deadline:
            raise UserError(f"{name} isn't there after {START_S:.0f} s: see {folder}/.run/{name}.log")
        time.sleep(0.2)


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def start(folder: Path) -> list[str]:
    """Start what the folder holds, and is not running. Returns the names of what was started.

    Raises
    ------
    UserError
        Everything runs already, a port is taken, a hospital hasn't joined a study, or a process ends at once.
    """
    require_flower()
    server, hospitals = parts(folder)
    alive = running(folder)
    wanted = [*([LINK] if server else []), *hospitals]
    missing = [name for name in wanted if name not in alive]
    if not missing:
        raise UserError(f"{folder} runs already ({', '.join(wanted)}): `primia-lite deploy stop {folder}` ends it")
    for name in hospitals:
        if not (folder / name / "study.json").exists():
            raise UserError(f"hospital {name} hasn't joined a study: primia-lite deploy join {folder / name} ...")
    if LINK in missing:
        _start_superlink(folder)
    elif server:
        _register(folder)
    base = config_of(folder / SERVER / "server.toml")["port"] if server else 9200
    for number, name in enumerate(hospitals, 1):
        if name in missing:
            _start_supernode(folder, name, base + number)
    return missing


def _start_superlink(folder: Path) -> None:
    home = folder / SERVER
    config = config_of(home / "server.toml")
    host, port = config["host"], config["port"]
    _require_port(host, port, "the server")
    (folder / ".flwr").mkdir(mode=0o700, exist_ok=True)
    (folder / ".flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{local_address(host)}:{port}"\n'
        f"root-certificates = {json.dumps(str((home / 'ca.crt').resolve()))}\n",
        "utf-8",
    )
    process = _launch(folder, LINK, [
        "superlink", "--ssl-certfile", f"{SERVER}/server.crt", "--ssl-keyfile", f"{SERVER}/server.key",
        "--ssl-ca-certfile", f"{SERVER}/ca.crt", "--host", host, "--port", str(port), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ])  # fmt: skip
    _wait(process, folder, LINK, lambda: _listens(local_address(host), port))
    _register(folder)


def _register(folder: Path) -> None:
    """Make the hospitals' SuperNode keys known to the SuperLink, which forgets them when it ends."""
    for key in sorted((folder / SERVER / "hospitals").glob("*.pub")):
        done = flwr(folder, "supernode", "register", str(key.resolve()), "here")
        if done.returncode and "already" not in done.stdout + done.stderr:
            raise UserError(f"hospital {key.stem}'s key can't be registered: {(done.stderr or done.stdout).strip()}")


def _start_supernode(folder: Path, name: str, port: int) -> None:
    config = config_of(folder / name / "hospital.toml")
    port = config.get("port", port)
    _require_port("127.0.0.1", port, f"hospital {name}'s local port")
    place = json.dumps(str((folder / name).resolve()))
    process = _launch(folder, name, [
        "supernode", str((folder / name).resolve()), "--superlink", config["superlink"], "--root-certificates",
        f"{name}/ca.crt", "--auth-supernode-private-key", f"{name}/supernode", "--host", "127.0.0.1",
        "--port", str(port), "--node-config", f"folder={place}",
    ])  # fmt: skip
    _wait(process, folder, name, lambda: _listens("127.0.0.1", port))


def stop(folder: Path) -> list[str]:
    """End our processes of the folder and what they started. Returns the names of those that ran."""
    alive = running(folder)
    for name in sorted(alive, key=lambda name: name == LINK):  # hospitals first
        end(alive[name])
        (folder / ".run" / f"{name}.pid").unlink(missing_ok=True)
    return sorted(alive)


def end(process: psutil.Process, sign: int = signal.SIGTERM) -> None:
    """End a process and its children: politely, or at once by SIGKILL."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.send_signal(sign)
        except psutil.NoSuchProcess:
            continue
    for one in psutil.wait_procs(family, timeout=_STOP_S)[1]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


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
