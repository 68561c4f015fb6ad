"""A federation's folder: what it holds, and how Flower's processes and commands see it and reach the server."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from primia_lite.config import UserError, repo_root

SERVER = "server"
LINK = "superlink"  # the name of the server's process; a hospital's is the hospital's
START_S = 600.0  # of a process that lives: only one that hangs meets it


def require_flower() -> None:
    if os.name != "posix":
        raise UserError("rounds over Flower need Linux or macOS: file modes protect keys, and Windows has none")
    if find_spec("flwr") is None:
        raise UserError(
            "Flower isn't installed: `make flower` sets it up in a checkout (then use .venv-flower/bin/primia-lite), "
            "`pip install 'primia-lite[flower]'` elsewhere"
        )


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


def config_of(path: Path) -> dict:
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
        hosts.append(local_address(config_of(folder / SERVER / "server.toml")["host"]))
    for path in folder.glob("*/hospital.toml"):
        host = _host_of(config_of(path).get("superlink", ""))
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
        superlink = config_of(folder / name / "hospital.toml").get("superlink", "")
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


def local_address(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


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
