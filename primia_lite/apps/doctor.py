"""``primia-lite doctor``: is this machine ready, and where are the films? Reads metadata, imports nothing heavy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

from primia_lite.config import (
    UserError,
    cache_dir,
    check_writable,
    data_root,
    figures_dir,
    repo_root,
    results_dir,
    runs_dir,
    set_variable,
)
from primia_lite.runtime import cores

MIN_MEMORY_GIB, MIN_DISK_GIB = 4, 2
SET_UP = "run `make setup` (or the README's lines for a machine without make)"


@dataclass(frozen=True)
class Check:
    """One line of the table. ``fix`` says what to do about a ``BROKEN`` line, or how to get what a ``note`` lacks."""

    name: str
    state: str  # "ok", "note" (works without) or "BROKEN"
    value: str
    fix: str = ""


def doctor(stream: TextIO | None = None) -> int:
    """Print the table. Returns 0, or 1 if something is broken."""
    stream = stream or sys.stdout
    checks = list(examine())
    width = max(len(c.name) for c in checks)
    for check in checks:
        print(f"{check.name:<{width}}  {check.state:<6}  {check.value}", file=stream)
        if check.fix:
            print(f"{'':<{width}}          -> {check.fix}", file=stream)
    broken = [c.name for c in checks if c.state == "BROKEN"]
    print(f"\n{'broken: ' + ', '.join(broken) if broken else 'ready'}", file=stream)
    return 1 if broken else 0


def examine() -> Iterator[Check]:
    """Every check, in the order of the table. What breaks a check is broken: the table is printed all the same."""
    checks = {
        "Python": lambda: [check_python(sys.version_info[:3])],
        "packages": lambda: [_packages(repo_root() / "requirements.lock")],
        "cores": lambda: [Check("cores", "ok", f"{cores()}, {platform.machine()}, {platform.system()}")],
        "memory": lambda: [check_memory()],
        "disk": lambda: [check_disk(runs_dir())],
        "folders": _folders,
        "kernel": lambda: [_kernel()],
        "chromium": lambda: [_browser()],
        "films": lambda: [_data_folder()],
        "data sources": _sources,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            yield Check(name, "BROKEN", f"{type(error).__name__}: {error}", SET_UP)


def check_python(version: tuple[int, ...]) -> Check:
    name = f"{'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 11):
        return Check("Python", "BROKEN", name, "install Python 3.11 or newer, then make PYTHON=/path/to/it setup")
    return Check("Python", "ok", name)


def pinned(lock: Path) -> dict[str, str]:
    """Name -> version of the packages that ``requirements.lock`` pins for this platform and Python."""
    from packaging.requirements import Requirement

    pins = {}
    for line in lock.read_text("utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name] = next(iter(requirement.specifier)).version
    return pins


def _packages(lock: Path) -> Check:
    """Installed against pinned; a local part such as torch's ``+cpu`` doesn't count."""
    try:
        pins = pinned(lock)
    except OSError:
        return Check("packages", "note", f"no lock file at {lock}: nothing to compare with")
    wrong = []
    for name, version in pins.items():
        try:
            installed = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != version:
            wrong.append(f"{name} {installed} (pinned {version})")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        return Check("packages", "BROKEN", f"{', '.join(wrong[:6])}{more}", SET_UP)
    return Check("packages", "ok", f"{len(pins)} as pinned, torch {metadata.version('torch')}")


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    value = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"
    if memory.available / 2**30 < MIN_MEMORY_GIB:
        return Check("memory", "note", value, f"close other programs: a notebook may take {MIN_MEMORY_GIB} GiB")
    return Check("memory", "ok", value)


def check_disk(folder: Path) -> Check:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    if free < MIN_DISK_GIB:
        return Check("disk", "BROKEN", f"{free:.1f} GiB free", f"free {MIN_DISK_GIB} GiB (`make clean` deletes runs)")
    return Check("disk", "ok", f"{free:.1f} GiB free")


def _folders() -> Iterator[Check]:
    """Those that are written: without a cache all works, but takes longer."""
    for name, folder in (("runs", runs_dir), ("figures", figures_dir), ("results", results_dir), ("cache", cache_dir)):
        if name in ("figures", "results") and not os.environ.get(f"PRIMIA_LITE_{name.upper()}"):
            continue  # they lie in runs
        try:
            check_writable(folder())
            yield Check(name, "ok", str(folder()))
        except UserError as error:
            value, fix = str(error).rsplit(". ", 1)
            yield Check(name, "note" if name == "cache" else "BROKEN", value, fix)
    try:
        yield Check("temporary", "ok", tempfile.gettempdir())
    except OSError as error:
        yield Check("temporary", "BROKEN", str(error.strerror), set_variable("TMPDIR"))


def _kernel() -> Check:
    """The kernel that ``jupyter lab`` starts for our notebooks must be this environment's."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Check("kernel", "BROKEN", "Jupyter has no kernel python3", fix)
    command = spec.argv[0]
    # jupyter_client replaces a bare python by the interpreter that runs Jupyter.
    bare = command in {"python", "python3", f"python{sys.version_info[0]}.{sys.version_info[1]}"}
    if not bare and Path(command).absolute() != Path(sys.executable).absolute():
        return Check("kernel", "BROKEN", f"python3 at {spec.resource_dir} starts {command}", fix)
    return Check("kernel", "ok", f"python3 at {spec.resource_dir}")


def find_chromium() -> str | None:
    """``CHROMIUM``, or a chromium or Chrome on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _browser() -> Check:
    found = find_chromium()
    if found:
        return Check("chromium", "ok", found)
    fix = "only `make test-browser` needs it: apt install chromium, or CHROMIUM=/path/to/chrome"
    return Check("chromium", "note", "absent", fix)


def _data_folder() -> Check:
    folder = data_root()
    if os.environ.get("PRIMIA_LITE_DATA") and not folder.is_dir():
        return Check("films", "BROKEN", f"PRIMIA_LITE_DATA names {folder}, which isn't a folder", "correct or unset it")
    return Check("films", "ok", f"looked for in {folder} (PRIMIA_LITE_DATA)")


def _sources() -> Iterator[Check]:
    """One line for each data source. A source that is absent breaks nothing."""
    from primia_lite.data import sources

    for row in sources():
        if row["found"]:
            files = f", {row['n_files']:,} files" if row["n_files"] else ""
            yield Check(f"  {row['name']}", "ok", f"{row['where'] or 'built in'}{files}")
        else:
            yield Check(f"  {row['name']}", "note", "absent", row["how_to_get"])
