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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primia_lite.config import UserError, elsewhere

POLL_S = 0.5
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


def parameter_names(path: Path) -> set[str]:
    """The variables of the notebook's ``parameters`` cell.

    Raises
    ------
    UserError
        The file can't be read as a notebook.
    """
    import papermill

    try:
        return set(papermill.inspect_notebook(str(path)))
    except Exception as error:
        raise UserError(f"{path} can't be read as a notebook: {error}") from error


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    *,
    cell_timeout_s: int,
    kernel_log: Path,
    on_cell: Callable[[int, int], None] = lambda cell, n_cells: None,
) -> Outcome:
    """Run ``source`` in its own folder and write the executed copy to ``target``, also when a cell fails.

    A cell that takes longer than ``cell_timeout_s`` fails. ``kernel_log`` gets what the kernel prints; ``on_cell`` is
    called with the number of the cell that starts, from 1, and the number of cells. Ctrl-C stops the kernel first.
    """
    import nbformat
    import papermill
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    papermill_engines.register("primia-lite", _engine())
    n_cells = len(nbformat.read(source, as_version=4).cells)
    running: dict[str, Any] = {"cell": None, "text": ""}

    def cell_started(index: int, cell: Any) -> None:
        if "injected-parameters" in cell.metadata.get("tags", []):
            running["injected"] = True
            return
        running.update(cell=index + 1 - running.get("injected", False), text=cell.source)
        on_cell(running["cell"], n_cells)

    started, status, cell, text, message = time.perf_counter(), "ok", None, "", None
    memory = PeakMemory()
    try:
        kernel_log.parent.mkdir(parents=True, exist_ok=True)
        with own_kernel() as kernel_name, memory:
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=parameters,
                engine_name="primia-lite",
                kernel_name=kernel_name,
                cwd=str(source.parent),
                progress_bar=False,
                start_timeout=WAIT_S,
                execution_timeout=cell_timeout_s,
                on_cell=cell_started,
                kernel_log=kernel_log,
            )
    except PapermillExecutionError as error:
        # A notebook stops at its first failing cell, so the last one started is the one to name.
        status, cell, text, message = "failed", running["cell"], running["text"], f"{error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a timeout, a full disk: the next notebook may still run
        status, cell, text = "failed", running["cell"], running["text"]
        message = _explain(error, cell_timeout_s, kernel_log)
    seconds = time.perf_counter() - started
    return Outcome(source.stem, status, seconds, memory.peak_mib, n_cells, cell, first_line(text) or None, message)


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
            cls, nb_man, kernel_name, on_cell, kernel_log, start_timeout, execution_timeout, **unused
        ):
            start = nb_man.cell_start

            def cell_start(cell, cell_index=None, **options):
                on_cell(cell_index, cell)
                start(cell, cell_index, **options)

            nb_man.cell_start = cell_start
            client = PapermillNotebookClient(
                nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=execution_timeout,
                iopub_timeout=WAIT_S, on_notebook_start=lambda notebook: look_again(client.kc),
            )  # fmt: skip
            with open(kernel_log, "ab") as log:
                return client.execute(stderr=log)

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
def own_kernel() -> Iterator[str]:
    """Describe a kernel that is this very interpreter and put it first, whatever kernels and settings a user has. It
    needs no home folder.

    Yields
    ------
    its name, ``python3``
    """
    with tempfile.TemporaryDirectory(prefix="primia-lite-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        spec = place / "kernels" / "python3"
        spec.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        warm = {"kernel_provisioner": {"provisioner_name": "primia-lite-warm"}}
        content = {"argv": command, "display_name": "Python 3", "language": "python", "metadata": warm}
        (spec / "kernel.json").write_text(json.dumps(content), "utf-8")
        path = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        runtime, ipython = str(place / "runtime"), str(place / "ipython")
        with variables({"JUPYTER_PATH": path, "JUPYTER_RUNTIME_DIR": runtime, "IPYTHONDIR": ipython}):
            yield "python3"


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment, while the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class PeakMemory:
    """Memory of all child processes together, polled; ``peak_mib`` is the largest sum seen.

    Pages that processes share are divided among them (proportional set size) where the system says so: a warm kernel
    shares most of what it imports with its server.
    """

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(POLL_S):
            total = 0
            for child in me.children(recursive=True):
                try:
                    memory = child.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:  # it ended between the two calls
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
