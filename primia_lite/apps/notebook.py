"""Run one notebook headlessly with papermill: its parameters, its kernel, its progress, its memory, where it failed."""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from primia_lite.config import UserError, elsewhere

POLL_S = 0.2
WAIT_S = 600  # for a kernel that lives to start, and for messages that it has sent: only one that hangs meets it


@dataclass(frozen=True)
class Outcome:
    """How a notebook ended. ``cell`` counts the notebook's own cells from 1; None where none is to blame."""

    notebook: str
    status: str  # "ok", "failed" or "interrupted"
    seconds: float
    peak_memory_mib: float
    n_cells: int
    cell: int | None = None
    first_line: str | None = None
    error: str | None = None
    cpu_seconds: float = 0.0  # of its kernel


def import_nbformat() -> ModuleType:
    """nbformat, in a tenth of its time: the library that checks its schemas compiles a grammar of internationalised
    addresses when it is imported, for 3 s, and goes without where that isn't installed. Notebooks hold none."""
    hidden = sys.modules.setdefault("rfc3987_syntax", None) is None
    try:
        import nbformat
    finally:
        if hidden:
            del sys.modules["rfc3987_syntax"]
    return nbformat


def parameter_names(path: Path) -> set[str]:
    """The variables of the notebook's ``parameters`` cell.

    Raises
    ------
    UserError
        The file can't be read as a notebook.
    """
    import_nbformat()
    import papermill

    try:
        return set(papermill.inspect_notebook(str(path)))
    except Exception as error:
        raise UserError(f"{path} can't be read as a notebook: {error}") from error


class Stopped(Exception):
    """The run ends: no further cell begins."""


class Kernel:
    """A kernel that runs a notebook: the most memory that it and its children held at a time, and their CPU seconds."""

    def __init__(self) -> None:
        self.peak_mib, self.cpu_s = 0.0, 0.0
        self._process, self._stopped, self._ended = None, False, threading.Event()

    def started(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        threading.Thread(target=self._poll, daemon=True).start()

    def cell_starts(self) -> None:
        if self._stopped:
            raise Stopped

    def stop(self) -> None:
        """From another thread: the notebook ends with its kernel."""
        self._stopped = True
        if self._process is not None:
            with suppress(psutil.Error):
                self._process.kill()

    def ended(self) -> None:
        self._ended.set()

    def _poll(self) -> None:
        while True:
            with suppress(psutil.Error):  # a process ended between the two calls
                held = [self._process, *self._process.children(recursive=True)]
                self.peak_mib = max(self.peak_mib, sum(each.memory_info().rss for each in held) / 2**20)
                self.cpu_s = max(self.cpu_s, sum(sum(each.cpu_times()[:4]) for each in held))
            if self._ended.wait(POLL_S):
                return


def execute(
    source: Path, target: Path, parameters: dict[str, Any], *, kernel: Kernel, environment: dict[str, str],
    cell_timeout_s: int, kernel_log: Path, on_cell: Callable[[int, int], None] = lambda cell, n_cells: None,
) -> Outcome:  # fmt: skip
    """Run ``source`` in its own folder, within :func:`own_kernel`, and write the executed copy to ``target``, also when
    a cell fails. Notebooks may run in several threads.

    A cell that takes longer than ``cell_timeout_s`` fails. ``environment`` is added to what the kernel inherits;
    ``kernel_log`` gets what it prints; ``on_cell`` is called with the number of the cell that starts, from 1, and the
    number of cells.
    """
    nbformat = import_nbformat()
    import papermill
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    papermill_engines.register("primia-lite", _engine())
    running: dict[str, Any] = {"cell": None, "text": "", "n_cells": 0}

    def cell_started(index: int, cell: Any) -> None:
        kernel.cell_starts()
        if "injected-parameters" in cell.metadata.get("tags", []):
            running["injected"] = True
            return
        running.update(cell=index + 1 - running.get("injected", False), text=cell.source)
        on_cell(running["cell"], running["n_cells"])

    started, failed, message = time.perf_counter(), True, None
    try:
        running["n_cells"] = len(nbformat.read(source, as_version=4).cells)
        kernel_log.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            str(source), str(target), parameters, engine_name="primia-lite", kernel_name="python3", progress_bar=False,
            start_timeout=WAIT_S, execution_timeout=cell_timeout_s, on_cell=cell_started, on_kernel=kernel.started,
            kernel_log=kernel_log, kernel_options={"env": os.environ | environment, "cwd": str(source.parent)},
        )  # fmt: skip
        failed = False
    except PapermillExecutionError as error:
        message = f"{error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a timeout, a full disk: the next notebook may still run
        message = _explain(error, cell_timeout_s, kernel_log)
    finally:
        kernel.ended()
    # A notebook stops at its first failing cell, so the last one started is the one to name.
    cell, text = (running["cell"], first_line(running["text"]) or None) if failed else (None, None)
    seconds, status = time.perf_counter() - started, "failed" if failed else "ok"
    return Outcome(source.stem, status, seconds, kernel.peak_mib, running["n_cells"], cell, text, message, kernel.cpu_s)


def first_line(text: str) -> str:
    """The first line that is code: not blank, not a comment, not a magic that hides what follows."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    code = [line for line in lines if not line.startswith(("#", "%%"))]
    return (code or lines or [""])[0][:100]


def _explain(error: Exception, cell_timeout_s: int, kernel_log: Path) -> str:
    name = type(error).__name__
    if name == "CellTimeoutError":
        return f"the cell took longer than {cell_timeout_s} s"
    if name == "DeadKernelError":
        return f"the kernel died: out of memory? (its last words: {kernel_log})"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} can't be written: {error.strerror}. Free space, or {elsewhere(error.filename)}"
    return f"{name}: {error}"


def _engine():
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine as PapermillEngine

    class Engine(PapermillEngine):
        """papermill's own engine, but it says which cell it starts, and keeps the kernel's chatter off the terminal."""

        @classmethod
        def execute_managed_notebook(
            cls, nb_man, kernel_name, on_cell, on_kernel, kernel_log, kernel_options, start_timeout, execution_timeout,
            **unused,
        ):  # fmt: skip
            start = nb_man.cell_start

            def cell_start(cell, cell_index=None, **options):
                on_cell(cell_index, cell)
                start(cell, cell_index, **options)

            def kernel_start(notebook):
                look_again(client.kc)
                on_kernel(client.km.provisioner.pid)

            nb_man.cell_start = cell_start
            client = PapermillNotebookClient(
                nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=execution_timeout,
                iopub_timeout=WAIT_S, on_notebook_start=kernel_start,
            )  # fmt: skip
            with open(kernel_log, "ab") as log:
                return client.execute(stderr=log, **kernel_options)

    return Engine


def look_again(kernel_client, every_s: float = 1.0) -> None:
    """Let a client look for messages every second, however long it waits.

    Waiting in asyncio on a ZeroMQ socket can miss that a message came (its file descriptor tells of changes only), and
    then sleeps until its timeout, here a cell's, though the answer is there: seen in cells with widgets.
    """
    for channel in (kernel_client.shell_channel, kernel_client.iopub_channel):
        channel.get_msg = _in_slices(channel.get_msg, every_s)


def _in_slices(get_msg, every_s: float):
    async def patient(timeout: float | None = None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = every_s if deadline is None else min(every_s, deadline - time.monotonic())
            try:
                return await get_msg(timeout=max(0.0, left))
            except queue.Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise

    return patient


@contextmanager
def own_kernel(warm: bool = False) -> Iterator[None]:
    """Meanwhile, kernel ``python3`` is this very interpreter, whatever kernels and settings a user has. It needs no
    home folder. ``warm``: kernels are forked (:mod:`primia_lite.apps.warm`), which pays from the second one on."""
    with tempfile.TemporaryDirectory(prefix="primia-lite-", ignore_cleanup_errors=True) as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        content = {"argv": command, "display_name": "Python 3", "language": "python"}
        if warm:
            content["metadata"] = {"kernel_provisioner": {"provisioner_name": "primia-lite-warm"}}
        (spec / "kernel.json").write_text(json.dumps(content), "utf-8")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        ours = {
            "JUPYTER_PATH": path,
            "JUPYTER_RUNTIME_DIR": f"{folder}/runtime",
            "IPYTHONDIR": f"{folder}/ipython",
        }
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
