"""A federation's folder: its files, a hospital's log, and how Flower's processes and commands reach the server."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import ssl
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterable
from importlib.util import find_spec
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path

from primia_lite.config import UserError, printable, repo_root

# A hospital's own files; the server's; the study, which both have.
CONFIG, IDENTITY, ROUNDS, LEDGER, LOG = "hospital.toml", "identity.pem", "rounds.json", "ledger.sqlite", "hospital.log"
SERVER, SERVER_CONFIG, HISTORY = "server", "server.toml", "history.json"
STUDY, CA = "study.json", "ca.crt"
LINK = "superlink"  # the name of the server's process; a hospital's is the hospital's
START_S = 600.0  # of a process that lives: only one that hangs meets it
log = logging.getLogger("primia_lite")


def require_flower() -> None:
    if os.name != "posix":
        raise UserError("rounds over Flower need Linux or macOS: file modes protect keys, and Windows has none")
    if find_spec("flwr") is None:
        raise UserError(
            "Flower isn't installed: `make flower` sets it up in a checkout (then use .venv-flower/bin/primia-lite), "
            "`pip install 'primia-lite[flower]'` elsewhere"
        )


def parts(folder: Path) -> tuple[bool, list[str]]:
    """Whether the server's part is there, and the hospitals that are."""
    server = (folder / SERVER / SERVER_CONFIG).exists()
    hospitals = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if not (server or hospitals):
        raise UserError(f"{folder} holds no federation: make one by `primia-lite deploy init {folder}`")
    return server, hospitals


def config_of(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} can't be read: {error}") from error


def server_config(folder: Path) -> dict:
    return config_of(folder / SERVER / SERVER_CONFIG)


def history_of(folder: Path) -> dict:
    """What the server has noted of its run so far (:func:`primia_lite.apps.flower.server.train_in_folder`)."""
    path = folder / SERVER / "run" / HISTORY
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rounds": [], "ended_s": []}


# --- a hospital's log -------------------------------------------------------------------------------------------------


class _OneLine(logging.Formatter):
    """A line for each record: the server has a say in what they hold, and could make up others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to(folder: Path, *, rotate: bool = False) -> None:
    """Write what this process has to say to a hospital's log: Flower would throw it away. For the hospital alone.

    One process may rotate the file; the others notice when it has.
    """
    for handler in list(log.handlers):
        if isinstance(handler, WatchedFileHandler | RotatingFileHandler):  # of another hospital, in a simulation
            log.removeHandler(handler)
            handler.close()
    path = folder / LOG
    handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=1) if rotate else WatchedFileHandler(path)
    handler.setFormatter(_OneLine("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


# --- the server, and proxies on the way to it -------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """For Flower's processes: no telemetry, nothing installed, all files below the folder, our Python's commands; and
    no proxy gets what stays on this machine."""
    hosts = dict.fromkeys(["localhost", "127.0.0.1", "::1", *_own_hosts(folder)])
    lower, upper, grpc = (os.environ.get(name) for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"))
    before = {"no_proxy": lower or upper or "", "NO_PROXY": upper or lower or ""}
    if grpc:  # where it is set, gRPC looks at no other
        before["no_grpc_proxy"] = grpc
    kept = {name: [part.strip() for part in value.split(",") if part.strip()] for name, value in before.items()}
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
        **{name: ",".join(dict.fromkeys([*parts, *hosts])) for name, parts in kept.items()},
    }


def _own_hosts(folder: Path) -> Iterable[str]:
    """Names and addresses of this machine at which the folder's processes meet."""
    if (folder / SERVER / SERVER_CONFIG).exists():
        yield local_address(server_config(folder)["host"])
    for path in folder.glob(f"*/{CONFIG}"):
        host = _host_of(config_of(path).get("superlink", ""))
        if _is_loopback(host):
            yield host


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def local_address(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def unreached(folder: Path, hospitals: Iterable[str], timeout_s: float = 5.0) -> list[str]:
    """A sentence for each of the folder's hospitals that can't reach its server; it goes on trying."""
    import httpx

    lines, variables = [], environment(folder)
    for name in hospitals:
        superlink = config_of(folder / name / CONFIG).get("superlink", "")
        host = _host_of(superlink)
        passed = urllib.request.proxy_bypass_environment(host, {"no": variables.get("no_proxy", "")})
        names = () if passed else ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
        proxy = next((variable for variable in names if variables.get(variable)), None)
        try:
            trusted = ssl.create_default_context(cafile=str(folder / name / CA))
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


def flwr(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, errors="replace",
        timeout=START_S,
    )  # fmt: skip


def flwr_json(folder: Path, *arguments: str, tries: int = 1) -> dict:
    done = flwr(folder, *arguments, "--format", "json")
    try:
        content = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        if tries > 1:
            return flwr_json(folder, *arguments, tries=tries - 1)
        what = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise UserError(f"the server doesn't answer `flwr {' '.join(arguments)}`: {what}") from error
    if content.get("success") is False:
        raise UserError(f"flwr {' '.join(arguments)}: {content.get('error-message', content)}")
    return content
