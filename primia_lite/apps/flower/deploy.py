"""Flower's processes over TLS: started, looked at, ended; and runs on them.

A folder holds the server's part (``server/``), some hospitals' (``A/``, ...), or both, as
:mod:`~primia_lite.apps.flower.setup` made them. :func:`start` runs what is there, so one command serves a trial
on one machine and each of many machines.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil

from primia_lite.config import UserError, repo_root

SERVER = "server"
LINK = "superlink"  # the name of the server's process; a hospital's is the hospital's
_START_S = 600.0  # of a process that lives: only one that hangs meets it
_STOP_S = 10.0


def require_flower() -> None:
    if os.name != "posix":
        raise UserError("rounds over Flower need Linux or macOS: file modes protect keys, and Windows has none")
    if find_spec("flwr") is None:
        raise UserError(
            "Flower isn't installed: `make flower` sets it up in a checkout (then use .venv-flower/bin/primia-lite), "
            "`pip install 'primia-lite[flower]'` elsewhere"
        )


# --- what is in a folder ----------------------------------------------------------------------------------------------


def parts(folder: Path) -> tuple[bool, list[str]]:
    """Whether the server's part is there, and the hospitals that are.

    Raises
    ------
    UserError
        Neither.
    """
    server = (folder / SERVER / "server.toml").exists()
    hospitals = sorted(path.parent.name for path in folder.glob("*/hospital.toml"))
    if not (server or hospitals):
        raise UserError(f"{folder} holds no federation: make one by `primia-lite deploy init {folder}`")
    return server, hospitals


def _config(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} can't be read: {error}") from error


def environment(folder: Path) -> dict[str, str]:
    """For Flower's processes: no telemetry, nothing installed, all files below the folder, our Python's commands."""
    return {
        **os.environ,
        "FLWR_HOME": str((folder / ".flwr").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds until a message's process is started; 1 if left out
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # For the process that runs the app: it starts in another folder.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(repo_root()), os.environ.get("PYTHONPATH")])),
        "PRIMIA_LITE_SERVER": str((folder / SERVER).resolve()),
        **past_proxies(_own_hosts(folder)),
    }


def past_proxies(hosts: Iterable[str]) -> dict[str, str]:
    """Variables by which no proxy gets what is sent to some hosts; what they hold stays."""
    lower, upper, grpc = (os.environ.get(name) for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"))
    before = {"no_proxy": lower or upper or "", "NO_PROXY": upper or lower or ""}
    if grpc:  # where it is set, gRPC looks at no other
        before["no_grpc_proxy"] = grpc
    parts = {name: [part.strip() for part in value.split(",") if part.strip()] for name, value in before.items()}
    return {name: ",".join(dict.fromkeys([*kept, *hosts])) for name, kept in parts.items()}


def _own_hosts(folder: Path) -> list[str]:
    """Names and addresses of this machine at which the folder's processes meet."""
    hosts = ["localhost", "127.0.0.1", "::1"]
    if (folder / SERVER / "server.toml").exists():
        hosts.append(_local(_config(folder / SERVER / "server.toml")["host"]))
    for path in folder.glob("*/hospital.toml"):
        host = _host_of(_config(path).get("superlink", ""))
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                hosts.append(host)
    return list(dict.fromkeys(hosts))


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def proxy_variable(host: str, variables: Mapping[str, str]) -> str | None:
    """The variable whose proxy gets what is sent to a host over TLS; None where none does."""
    passed = urllib.request.proxy_bypass_environment(host, {"no": variables.get("no_proxy", "")})
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    return None if passed else next((name for name in names if variables.get(name)), None)


def unreached(folder: Path, hospitals: Iterable[str], timeout_s: float = 5.0) -> list[str]:
    """A sentence for each of the folder's hospitals that can't reach its server; it goes on trying."""
    import httpx

    lines, variables = [], environment(folder)
    for name in hospitals:
        superlink = _config(folder / name / "hospital.toml").get("superlink", "")
        proxy = proxy_variable(host := _host_of(superlink), variables)
        try:
            trusted = ssl.create_default_context(cafile=str(folder / name / "ca.crt"))
            way = variables[proxy] if proxy else None
            with httpx.Client(proxy=way, trust_env=False, verify=trusted, timeout=timeout_s) as client:
                client.get(f"https://{superlink}/v1/fleet")  # whatever is answered: it is there
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            through = (
                f". {proxy} is set, so that it goes through that proxy: if {host} is reached without one, add it to "
                "no_proxy and start anew" if proxy else ""
            )  # fmt: skip
            why = str(error) or type(error).__name__
            lines.append(f"hospital {name} can't reach the server at {superlink} ({why}), and goes on trying{through}")
    return lines


# --- processes --------------------------------------------------------------------------------------------------------


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
            _command(arguments), cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process = psutil.Process(started.pid)
    (run / f"{name}.pid").write_text(f"{started.pid} {process.create_time()}", "utf-8")
    return process


def _command(arguments: Sequence[str]) -> list[str]:
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
    deadline = time.monotonic() + _START_S
    while not ready():
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise UserError(f"{name} ended at once. The end of {folder}/.run/{name}.log:\n{log_tail(folder, name)}")
        if time.monotonic() > deadline:
            raise UserError(f"{name} isn't there after {_START_S:.0f} s: see {folder}/.run/{name}.log")
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
    base = _config(folder / SERVER / "server.toml")["port"] if server else 9200
    for number, name in enumerate(hospitals, 1):
        if name in missing:
            _start_supernode(folder, name, base + number)
    return missing


def _start_superlink(folder: Path) -> None:
    home = folder / SERVER
    config = _config(home / "server.toml")
    host, port = config["host"], config["port"]
    _require_port(host, port, "the server")
    (folder / ".flwr").mkdir(mode=0o700, exist_ok=True)
    (folder / ".flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{_local(host)}:{port}"\n'
        f"root-certificates = {json.dumps(str((home / 'ca.crt').resolve()))}\n",
        "utf-8",
    )
    process = _launch(folder, LINK, [
        "superlink", "--ssl-certfile", f"{SERVER}/server.crt", "--ssl-keyfile", f"{SERVER}/server.key",
        "--ssl-ca-certfile", f"{SERVER}/ca.crt", "--host", host, "--port", str(port), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ])  # fmt: skip
    _wait(process, folder, LINK, lambda: _listens(_local(host), port))
    _register(folder)


def _local(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _register(folder: Path) -> None:
    """Make the hospitals' SuperNode keys known to the SuperLink, which forgets them when it ends."""
    for key in sorted((folder / SERVER / "hospitals").glob("*.pub")):
        done = flwr(folder, "supernode", "register", str(key.resolve()), "here")
        if done.returncode and "already" not in done.stdout + done.stderr:
            raise UserError(f"hospital {key.stem}'s key can't be registered: {(done.stderr or done.stdout).strip()}")


def _start_supernode(folder: Path, name: str, port: int) -> None:
    config = _config(folder / name / "hospital.toml")
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
        nodes = _json(folder, "supernode", "list", "here").get("nodes", [])
        online = sum(node.get("status") == "online" for node in nodes)
        lines.append(f"{online} of {len(nodes)} hospitals are connected")
        lines += [f"run {run['run-id']}: {run['status']}" for run in _json(folder, "list", "here").get("runs", [])]
    lines += unreached(folder, [name for name in hospitals if name in alive])
    return "\n".join(lines)


# --- runs -------------------------------------------------------------------------------------------------------------


def flwr(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, errors="replace",
        timeout=_START_S,
    )  # fmt: skip


def _json(folder: Path, *arguments: str, tries: int = 1) -> dict:
    done = flwr(folder, *arguments, "--format", "json")
    try:
        content = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        if tries > 1:
            return _json(folder, *arguments, tries=tries - 1)
        what = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise UserError(f"the server doesn't answer `flwr {' '.join(arguments)}`: {what}") from error
    if content.get("success") is False:
        raise UserError(f"flwr {' '.join(arguments)}: {content.get('error-message', content)}")
    return content


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
    return int(_json(folder, "run", str(app.resolve()), "here", "--run-config", text)["run-id"])


def run_status(folder: Path, run: int) -> tuple[str, str]:
    """Status and details of a run by ``flwr list``: ``flwr run --stream`` reports success whatever happened."""
    rows = _json(folder, "list", "here", "--run-id", str(run), tries=3)["runs"]
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

    from primia_lite.apps.flower import app as flower_app
    from primia_lite.apps.flower import server as flower_server

    client_app, server_app = ClientApp(), ServerApp()
    folders = [(folder / name).resolve() for name in hospitals]
    home = (folder / SERVER).resolve()
    rounds = _rounds(folder, rounds)

    @client_app.train()
    def _train(message, context):
        return flower_app.answer_in(folders[context.node_config["partition-id"]], message)

    @server_app.main()
    def _main(grid, context):
        flower_server.train_in_folder(grid, home, rounds, fresh=fresh)

    history = home / "run" / "history.json"
    history.unlink(missing_ok=True)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server_app, client_app, len(folders), backend_config=resources)
    except RuntimeError as error:
        why = json.loads(history.read_text("utf-8")).get("error", error) if history.exists() else error
        raise UserError(f"the simulation failed: {why}") from error
    return json.loads(history.read_text("utf-8"))
