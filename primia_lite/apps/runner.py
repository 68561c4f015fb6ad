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
from collections.abc import Callable, Container, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from primia_lite.apps.notebook import Outcome, execute, parameter_names, variables
from primia_lite.apps.summary import Progress, save_summary, summary_table
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
from primia_lite.runtime import cores

SOURCE, SKIP_BAD = "source", "skip_bad"  # the notebooks' parameters that the command line sets
CELL_TIMEOUT_S = {"smoke": 1800}  # for a slow and busy machine; other profiles train for longer
LONG_CELL_TIMEOUT_S = 3 * 3600
WRITTEN = ("PRIMIA_LITE_RUNS", "PRIMIA_LITE_FIGURES", "PRIMIA_LITE_RESULTS")  # by notebooks
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
    plans = plan(profile, source=source, only=only, skip_bad=skip_bad, notebooks=notebooks, publish=out is None)
    jobs = min(default_jobs(profile) if jobs is None else jobs, len(plans))
    if jobs < 1:
        raise UserError("--jobs must be at least 1")
    label = source or next((p.parameters[SOURCE] for p in plans if SOURCE in p.parameters), "phantom")
    folder = whole_path(out, "--out") if out else runs_dir() / f"{profile}-{label}"
    tasks = [
        Task(todo, profile, label, folder, environment(todo, folder, profile, out is None, jobs)) for todo in plans
    ]
    written = {
        ("PRIMIA_LITE_RUNS", str(folder)),
        *((name, task.environment[name]) for task in tasks for name in WRITTEN),
    }
    for name, path in sorted(written, reverse=True):
        check_writable(Path(path), "name another folder by --out" if out else set_variable(name))
    folder.mkdir(parents=True, exist_ok=True)
    forget_finished(folder, [p.path.stem for p in plans], everything=fresh)
    at_a_time = f", {jobs} at a time" if jobs > 1 else ""
    print(f"profile {profile}, data {label}, notebooks: {len(plans)}{at_a_time} -> {folder}", flush=True)
    outcomes = _run(tasks, jobs)
    print(f"\n{summary_table(outcomes)}\n\nexecuted notebooks and summary: {folder}", flush=True)
    return 0 if all(o.status == "ok" for o in outcomes) else 1


def default_jobs(profile: str) -> int:
    # SIGTERM, by which a run is stopped, kills a process on Windows before it can end its kernel.
    return 2 if profile == "smoke" and cores() > 1 and os.name == "posix" else 1


@dataclass(frozen=True)
class Task:
    """A notebook to run, with all that a process of its own must know."""

    plan: Plan
    profile: str
    label: str
    folder: Path
    environment: dict[str, str]

    def run(self, on_cell: Callable[[int, int], None]) -> Outcome:
        todo, name = self.plan, self.plan.path.stem
        command = f"primia-lite run --profile {self.profile} --data {self.label} --only {name}"
        with variables({**self.environment, "PRIMIA_LITE_COMMAND": command}):
            return execute(
                todo.path,
                self.folder / todo.path.name,
                todo.parameters,
                cell_timeout_s=CELL_TIMEOUT_S.get(self.profile, LONG_CELL_TIMEOUT_S),
                kernel_log=self.folder / "state" / "jupyter" / f"{name}.log",
                on_cell=on_cell,
            )


def _run(tasks: list[Task], jobs: int) -> list[Outcome]:
    """The outcomes in the tasks' order. A summary is kept after each, and when Ctrl-C ends the run."""
    outcomes: dict[int, Outcome] = {}
    progress = Progress(sys.stdout, len(tasks))

    def save() -> list[Outcome]:
        found = [outcomes[number] for number in sorted(outcomes)]
        save_summary(tasks[0].folder, tasks[0].profile, tasks[0].label, found)
        return found

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
    return save()


def _one_by_one(tasks: list[Task], progress: Progress, jobs: int) -> Iterator[tuple[int, Outcome]]:
    for number, task in enumerate(tasks, 1):
        progress.start(number, task.plan.path.stem)
        yield number, task.run(lambda cell, n_cells, number=number: progress.cell(number, cell, n_cells))


def _side_by_side(tasks: list[Task], progress: Progress, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come, from ``jobs`` processes: each keeps a warm server of kernels for its next notebook."""
    context = multiprocessing.get_context("spawn")
    waiting = list(enumerate(tasks, 1))
    running: dict[Connection, tuple[int, multiprocessing.Process]] = {}

    def next_for(pipe: Connection, process: multiprocessing.Process) -> None:
        number, task = waiting.pop(0)
        progress.start(number, task.plan.path.stem)
        running[pipe] = number, process
        with suppress(OSError):  # the process has just died: its pipe says so
            pipe.send(task)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe()
                process = context.Process(target=_in_own_process, args=(theirs,))
                with _without_ctrl_c():  # the new process, too, from its first moment on
                    process.start()
                    next_for(ours, process)
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
                del running[pipe]
                if waiting and process.is_alive():
                    next_for(pipe, process)
                else:
                    pipe.close()
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
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C is ignored here, and in what is started here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_own_process(pipe: Connection) -> None:
    """Run the tasks that come, in a process of its own, which only the run's process stops: Ctrl-C reaches both."""

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
        while True:
            pipe.send(pipe.recv().run(lambda cell, n_cells: pipe.send((cell, n_cells))))
    except EOFError:  # no task is left
        return
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
    for path in choose(notebooks or repo_root() / "notebooks", only, settings):
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


def choose(folder: Path, only: str | None, settings: Container[str] = ()) -> list[Path]:
    """The notebooks in ``folder``, or those that ``only`` names by number, start of name or name.

    A study (``folder/studies``) is among them where the profile's ``settings`` name it, or ``only`` by its whole name.
    """
    names = {part.strip() for part in (only or "").split(",")}
    studies = [p for p in folder.glob("studies/*.ipynb") if p.stem in settings or p.stem in names]
    paths = sorted([*folder.glob("*.ipynb"), *studies], key=lambda path: path.stem)
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


def environment(todo: Plan, folder: Path, profile: str, by_variables: bool, jobs: int) -> dict[str, str]:
    """What a notebook's kernel inherits: where it writes, where films are, that nobody is watching."""
    own = repo_root() if todo.publish else folder
    figures, results = own / "figures", own / "results" / (profile if todo.publish else "")
    if by_variables:
        figures = folder_of("PRIMIA_LITE_FIGURES", figures)
        results = folder_of("PRIMIA_LITE_RESULTS", results)
    values = {
        **dict(zip(WRITTEN, map(str, (folder / "state", figures, results)), strict=True)),
        "PRIMIA_LITE_DATA": str(data_root()),  # absolute: a kernel runs in the notebooks' folder
        "PRIMIA_LITE_HEADLESS": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a user's Agg would leave cells without pictures
    }
    if jobs > 1:  # all kernels together take no more threads than there are cores; one alone leaves it to torch
        values["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    return values
