"""``primia-lite run``: every notebook, by a profile, with a summary of how each went."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

from primia_lite.apps.notebook import Outcome, execute, parameter_names, variables
from primia_lite.config import (
    DATA_SOURCES,
    UserError,
    check_writable,
    data_root,
    folder_of,
    load_profile,
    repo_root,
    runs_dir,
    set_variable,
    whole_path,
)
from primia_lite.runtime import cores, write_atomic

SOURCE, SKIP_BAD = "source", "skip_bad"  # the notebooks' parameters that the command line sets
CELL_TIMEOUT_S = {"smoke": 1800}  # for a slow and busy machine; other profiles train for longer
LONG_CELL_TIMEOUT_S = 3 * 3600
CLEAR = "\r\x1b[K"  # back to the start of a terminal's line, and empty it
STOP_S = 20  # for the kernels of an interrupted run to end


@dataclass(frozen=True)
class Plan:
    """One notebook to run. ``publish``: its figures and results go to the committed folders."""

    path: Path
    parameters: dict[str, Any]
    publish: bool


def run_notebooks(
    profile: str = "smoke",
    *,
    source: str | None = None,
    only: str | None = None,
    out: str | Path | None = None,
    skip_bad: bool = False,
    fresh: bool = False,
    notebooks: Path | None = None,
    jobs: int | None = None,
    cell_timeout_s: int | None = None,
    stream: TextIO | None = None,
) -> int:
    """Run notebooks and return 0, or 1 if one failed. A failing notebook doesn't stop the others.

    ``jobs`` is how many run side by side. Default: two in profile ``smoke`` where there are two cores; one in others,
    whose timings are published.

    ``out`` (default ``<profile>-<source>`` in ``runs_dir()``) gets the executed notebooks, ``summary.json`` and
    ``summary.md``, ``figures/``, ``results/`` and ``state/`` (checkpoints; a killed run resumes from them). Two
    exceptions, where no ``out`` is given: profile ``paper`` on real films writes the repository's ``figures/`` and
    ``results/paper/``; and ``PRIMIA_LITE_FIGURES`` and ``PRIMIA_LITE_RESULTS`` count where they are set.

    Raises
    ------
    UserError
        Unknown profile, notebook, data source or parameter, ``jobs`` below 1, or a folder that can't be written.
        Nothing has run then. Or the disk is full, and no summary can be written.
    KeyboardInterrupt
        After the summary of what ran so far has been written.
    """
    stream = stream or sys.stdout
    plans = plan(profile, source=source, only=only, skip_bad=skip_bad, notebooks=notebooks, publish=out is None)
    jobs = min(default_jobs(profile) if jobs is None else jobs, len(plans))
    if jobs < 1:
        raise UserError("--jobs must be at least 1")
    label = source or next((p.parameters[SOURCE] for p in plans if SOURCE in p.parameters), "phantom")
    folder = whole_path(out, "--out") if out else runs_dir() / f"{profile}-{label}"
    timeout = cell_timeout_s or CELL_TIMEOUT_S.get(profile, LONG_CELL_TIMEOUT_S)
    tasks = [
        Task(todo, folder, places(folder, profile if todo.publish else None, out is None), profile, label, timeout,
             _threads(jobs)) for todo in plans
    ]  # fmt: skip
    written = {("PRIMIA_LITE_RUNS", folder), *(place for task in tasks for place in task.places.items())}
    for name, path in sorted(written, reverse=True):
        check_writable(path, "name another folder by --out" if out else set_variable(name))
    folder.mkdir(parents=True, exist_ok=True)
    forget_finished(folder, [p.path.stem for p in plans], everything=fresh)

    at_a_time = f", {jobs} at a time" if jobs > 1 else ""
    print(f"profile {profile}, data {label}, notebooks: {len(plans)}{at_a_time} -> {folder}", file=stream, flush=True)
    outcomes: dict[int, Outcome] = {}
    progress = Progress(stream, len(plans))

    def save() -> None:
        save_summary(folder, profile, label, [outcomes[number] for number in sorted(outcomes)])

    try:
        with closing((_one_by_one if jobs == 1 else _side_by_side)(tasks, progress, jobs)) as ran:
            for number, outcome in ran:
                outcomes[number] = outcome
                progress.end(number, outcome)
                save()
    except KeyboardInterrupt:
        for number, running in progress.running.items():
            took = time.perf_counter() - running.started
            outcomes[number] = Outcome(running.name, "interrupted", took, 0.0, running.n_cells)
        save()
        raise
    found = [outcomes[number] for number in sorted(outcomes)]
    print(f"\n{summary_table(found)}\n\nexecuted notebooks and summary: {folder}", file=stream, flush=True)
    return 0 if all(o.status == "ok" for o in found) else 1


def default_jobs(profile: str) -> int:
    # SIGTERM, by which a run is stopped, kills a process on Windows before it can end its kernel.
    return 2 if profile == "smoke" and cores() > 1 and os.name == "posix" else 1


def _threads(jobs: int) -> int | None:
    """Of each kernel: no more of all together than there are cores. None leaves it to torch."""
    return max(1, cores() // jobs) if jobs > 1 else None


@dataclass(frozen=True)
class Task:
    """A notebook to run, with all that a process of its own must know."""

    plan: Plan
    folder: Path
    places: dict[str, Path]
    profile: str
    label: str
    cell_timeout_s: int
    threads: int | None

    def run(self, on_cell: Callable[[int, int], None]) -> Outcome:
        todo, name = self.plan, self.plan.path.stem
        command = f"primia-lite run --profile {self.profile} --data {self.label} --only {name}"
        with environment(self.places, command, self.threads):
            return execute(
                todo.path,
                self.folder / todo.path.name,
                todo.parameters,
                cell_timeout_s=self.cell_timeout_s,
                kernel_log=self.folder / "state" / "jupyter" / f"{name}.log",
                on_cell=on_cell,
            )


def _one_by_one(tasks: list[Task], progress: Progress, jobs: int) -> Iterator[tuple[int, Outcome]]:
    for number, task in enumerate(tasks, 1):
        progress.start(number, task.plan.path.stem)
        yield number, task.run(lambda cell, n_cells, number=number: progress.cell(number, cell, n_cells))


def _side_by_side(tasks: list[Task], progress: Progress, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come, each from a process of its own."""
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(tasks, 1))
    running: dict[Connection, tuple[int, multiprocessing.Process]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, task = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_apart, args=(task, theirs), daemon=True)
                progress.start(number, task.plan.path.stem)
                with _deaf():  # the new process, too, from its first moment on
                    process.start()
                    running[ours] = number, process
                theirs.close()  # so that the end of the process ends the pipe
            for pipe in wait(list(running), timeout=1):
                number, process = running[pipe]
                try:
                    found = pipe.recv()
                except (EOFError, OSError):  # OSError: in the middle of a message
                    process.join()
                    what = f"its process ended with status {process.exitcode}: out of memory? --jobs 1 needs less"
                    found = Outcome(tasks[number - 1].plan.path.stem, "failed", 0.0, 0.0, 0, error=what)
                if not isinstance(found, Outcome):
                    progress.cell(number, *found)
                    continue
                process.join()
                del running[pipe]
                yield number, found
            progress.tick()
    finally:
        for _, process in running.values():
            process.terminate()
        try:
            for _, process in running.values():
                process.join(STOP_S)
        finally:  # also at a second Ctrl-C
            for _, process in running.values():
                process.kill()


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C is ignored here, and in what is started here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _apart(task: Task, pipe: Connection) -> None:
    """In a process of its own, which only the run's process stops: Ctrl-C reaches both."""

    def stop(*_) -> None:
        raise KeyboardInterrupt

    def end_with_the_run() -> None:
        """However it ends: a later run goes on with this notebook's state, and must be the only one to."""
        wait([multiprocessing.parent_process().sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=end_with_the_run, daemon=True).start()
    try:
        pipe.send(task.run(lambda cell, n_cells: pipe.send((cell, n_cells))))
    except KeyboardInterrupt:
        sys.exit(130)


def plan(
    profile: str,
    *,
    source: str | None = None,
    only: str | None = None,
    skip_bad: bool = False,
    notebooks: Path | None = None,
    publish: bool = True,
) -> list[Plan]:
    """Which notebooks to run, in order, each with its parameters.

    Raises
    ------
    UserError
        Unknown profile, notebook, data source, or a parameter that a notebook doesn't have.
    """
    settings = load_profile(profile)
    if source is not None and source not in DATA_SOURCES:
        raise UserError(f"unknown data source {source!r}: choose one of {', '.join(DATA_SOURCES)}")
    plans = []
    for path in choose(notebooks or repo_root() / "notebooks", only):
        parameters = dict(settings.get(path.stem, {}))
        known = parameter_names(path)
        unknown = sorted(set(parameters) - known)
        if unknown:
            raise UserError(
                f"profile {profile!r} gives {path.name} the parameter {unknown[0]!r}, which its parameters cell "
                f"doesn't have: {', '.join(sorted(known)) or '(none)'}"
            )
        if source is not None and SOURCE in known:
            parameters[SOURCE] = source
        if skip_bad and SKIP_BAD in known:
            parameters[SKIP_BAD] = True
        # No number of procedural films may land among the published ones.
        real = parameters.get(SOURCE, "phantom") != "phantom"
        plans.append(Plan(path, parameters, publish and profile != "smoke" and path.stem in settings and real))
    return plans


def choose(folder: Path, only: str | None) -> list[Path]:
    """The notebooks in ``folder``, or those that ``only`` names by number, start of name or name."""
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise UserError(f"no notebooks in {folder}")
    if only is None:
        return paths
    chosen = set()
    for name in filter(None, (part.strip() for part in only.split(","))):
        stem = name.removesuffix(".ipynb")
        found = [p for p in paths if p.stem == stem or p.stem.startswith(f"{stem}_")]
        if not found:
            raise UserError(f"no notebook {name!r}: there are {', '.join(p.stem for p in paths)}")
        chosen.update(found)
    if not chosen:
        raise UserError("--only names no notebook: give numbers such as 00,02")
    return [p for p in paths if p in chosen]


def forget_finished(folder: Path, stems: list[str], *, everything: bool = False) -> None:
    """Delete the state of notebooks that ended well: they start anew, while those that were killed resume.

    A notebook keeps its state in ``runs_dir() / <its name>``.
    """
    state, summary = folder / "state", folder / "summary.json"
    finished = set(stems) if everything else set()
    try:
        rows = json.loads(summary.read_text("utf-8"))["notebooks"]
        finished |= {row["notebook"] for row in rows if row["status"] == "ok"}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no run before this one
    for stem in finished.intersection(stems):
        shutil.rmtree(state / stem, ignore_errors=True)
    summary.unlink(missing_ok=True)


def places(folder: Path, publish_profile: str | None, by_variables: bool) -> dict[str, Path]:
    """Where a notebook writes, by the variable that tells its kernel."""
    own = folder if publish_profile is None else repo_root()
    figures, results = own / "figures", own / "results" / (publish_profile or "")
    if by_variables:
        figures = folder_of("PRIMIA_LITE_FIGURES", figures)
        results = folder_of("PRIMIA_LITE_RESULTS", results)
    return {"PRIMIA_LITE_RUNS": folder / "state", "PRIMIA_LITE_FIGURES": figures, "PRIMIA_LITE_RESULTS": results}


def environment(places: dict[str, Path], command: str, threads: int | None = None) -> AbstractContextManager[None]:
    """What a notebook's kernel inherits: where it writes, where films are, that nobody is watching."""
    values = {
        **{name: str(path) for name, path in places.items()},
        "PRIMIA_LITE_DATA": str(data_root()),  # absolute: a kernel runs in the notebooks' folder
        "PRIMIA_LITE_HEADLESS": "1",
        "PRIMIA_LITE_COMMAND": command,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a user's Agg would leave cells without pictures
    }
    if threads is not None:
        values["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return variables(values)


@dataclass
class Running:
    """A notebook that runs: at which of its cells."""

    name: str
    started: float
    cell: int = 0
    n_cells: int = 0


class Progress:
    """A line for each notebook's start and end; on a terminal one that counts cells, for all that run."""

    def __init__(self, stream: TextIO, n_notebooks: int) -> None:
        self.stream, self.n_notebooks = stream, n_notebooks
        self.live = stream.isatty()
        self.running: dict[int, Running] = {}

    def start(self, number: int, name: str) -> None:
        self.running[number] = Running(name, time.perf_counter())
        if self.live:
            self.tick()
        else:
            self._write(f"{self._head(number, name)} ...")

    def cell(self, number: int, cell: int, n_cells: int) -> None:
        self.running[number].cell, self.running[number].n_cells = cell, n_cells
        self.tick()

    def tick(self) -> None:
        if not self.live:
            return
        now = time.perf_counter()
        parts = [
            f"{self._head(number, one.name)}  cell {one.cell}/{one.n_cells}  {now - one.started:.0f} s"
            for number, one in self.running.items()
        ]
        self._write(CLEAR + "; ".join(parts)[: shutil.get_terminal_size().columns - 1], end="")

    def end(self, number: int, outcome: Outcome) -> None:
        self.running.pop(number, None)
        took = f"{outcome.seconds:.1f} s, {outcome.peak_memory_mib:,.0f} MiB"
        self._write(f"{CLEAR if self.live else ''}{self._head(number, outcome.notebook)}  {outcome.status}  {took}")
        if outcome.status == "failed":
            self._write(f"    {blame(outcome)}")
        if self.running:
            self.tick()

    def _head(self, number: int, name: str) -> str:
        return f"[{number}/{self.n_notebooks}] {name}"

    def _write(self, text: str, end: str = "\n") -> None:
        self.stream.write(text + end)
        self.stream.flush()


def blame(outcome: Outcome) -> str:
    """Which cell failed, and with what."""
    where = f"cell {outcome.cell} ({outcome.first_line}): " if outcome.cell else ""
    return where + " ".join((outcome.error or "").split())[:500]


def summary_table(outcomes: list[Outcome]) -> str:
    """Markdown: notebook, seconds, peak memory, status."""
    rows = [("notebook", "seconds", "peak memory (MiB)", "status")]
    rows += [(o.notebook, f"{o.seconds:.1f}", f"{o.peak_memory_mib:,.0f}", o.status) for o in outcomes]
    if len(outcomes) > 1:
        total, peak = sum(o.seconds for o in outcomes), max(o.peak_memory_mib for o in outcomes)
        n_ok = sum(o.status == "ok" for o in outcomes)
        rows.append(("all", f"{total:.1f}", f"{peak:,.0f}", f"{n_ok} of {len(outcomes)} ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), row[3].ljust(widths[3])]
        return "| " + " | ".join(cells) + " |"

    rule = f"|:{'-' * widths[0]}-|-{'-' * widths[1]}:|-{'-' * widths[2]}:|:{'-' * widths[3]}-|"
    failed = [f"{o.notebook}: {blame(o)}" for o in outcomes if o.status == "failed"]
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), *(["", *failed] if failed else [])])


def save_summary(folder: Path, profile: str, source: str, outcomes: list[Outcome]) -> None:
    """Write ``summary.json`` and ``summary.md``, after each notebook so that a killed run leaves them too."""
    content = {"profile": profile, "source": source, "notebooks": [asdict(o) for o in outcomes]}
    write_atomic(folder / "summary.json", (json.dumps(content, indent=2) + "\n").encode())
    write_atomic(folder / "summary.md", (summary_table(outcomes) + "\n").encode(errors="backslashreplace"))
