"""``primia-lite run``: every notebook, by a profile, with a summary of how each went."""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from primia_lite.apps.notebook import Kernel, Outcome, execute, own_kernel, parameter_names
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
    return 2 if profile == "smoke" and cores() > 1 else 1


@dataclass
class Task:
    """A notebook to run, and its kernel."""

    plan: Plan
    profile: str
    label: str
    folder: Path
    environment: dict[str, str]
    kernel: Kernel = field(default_factory=Kernel)

    @property
    def name(self) -> str:
        return self.plan.path.stem

    def run(self, on_cell: Callable[[int, int], None]) -> Outcome:
        command = f"primia-lite run --profile {self.profile} --data {self.label} --only {self.name}"
        return execute(
            self.plan.path,
            self.folder / self.plan.path.name,
            self.plan.parameters,
            kernel=self.kernel,
            environment=self.environment | {"PRIMIA_LITE_COMMAND": command},
            cell_timeout_s=CELL_TIMEOUT_S.get(self.profile, LONG_CELL_TIMEOUT_S),
            kernel_log=self.folder / "state" / "jupyter" / f"{self.name}.log",
            on_cell=on_cell,
        )


def _run(tasks: list[Task], jobs: int) -> list[Outcome]:
    """The outcomes in the tasks' order, each from a thread. A summary is kept after each, and when Ctrl-C ends the run.
    However this process ends, its kernels see it and end, too."""
    outcomes: dict[int, Outcome] = {}
    progress, events = Progress(sys.stdout, len(tasks)), queue.SimpleQueue()

    def run(number: int, task: Task) -> None:
        events.put((number, (0, 0)))
        events.put((number, task.run(lambda *at: events.put((number, at)))))

    def save() -> list[Outcome]:
        found = [outcomes[number] for number in sorted(outcomes)]
        save_summary(tasks[0].folder, tasks[0].profile, tasks[0].label, found)
        return found

    with own_kernel(warm=len(tasks) > jobs), ThreadPoolExecutor(jobs) as pool:
        try:
            for number, task in enumerate(tasks, 1):
                pool.submit(run, number, task)
            while len(outcomes) < len(tasks):
                try:
                    number, what = events.get(timeout=1)
                except queue.Empty:
                    progress.tick()
                    continue
                if isinstance(what, Outcome):
                    outcomes[number] = what
                    progress.end(number, what)
                    save()
                else:
                    progress.cell(number, tasks[number - 1].name, *what)
        except KeyboardInterrupt:
            for number, running in progress.running.items():
                took = time.perf_counter() - running.started
                outcomes[number] = Outcome(running.name, "interrupted", took, 0.0, running.n_cells)
            save()
            raise
        finally:
            for task in tasks:
                task.kernel.stop()
            pool.shutdown(cancel_futures=True)
    return save()


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
