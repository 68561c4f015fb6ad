"""What ``primia-lite run`` says of its notebooks: lines while they run, and a summary in files and on the terminal."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from primia_lite.apps.notebook import Outcome
from primia_lite.runtime import write_atomic

CLEAR = "\r\x1b[K"  # back to the start of a terminal's line, and empty it


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

    def cell(self, number: int, name: str, cell: int, n_cells: int) -> None:
        """A notebook is at a cell; at 0, before the first, it is announced."""
        if number not in self.running:
            self.running[number] = Running(name, time.perf_counter())
            if not self.live:
                self._write(f"{self._head(number, name)} ...")
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
    rule = [f":{'-' * widths[0]}", f"{'-' * widths[1]}:", f"{'-' * widths[2]}:", f":{'-' * widths[3]}"]
    lines = [
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<>><", widths, strict=True)) + " |"
        for row in rows
    ]
    failed = [f"{o.notebook}: {blame(o)}" for o in outcomes if o.status == "failed"]
    return "\n".join(
        [lines[0], f"|{rule[0]}-|-{rule[1]}|-{rule[2]}|{rule[3]}-|", *lines[1:], *(["", *failed] if failed else [])]
    )


def save_summary(folder: Path, profile: str, source: str, outcomes: list[Outcome]) -> None:
    """Write ``summary.json`` and ``summary.md``, after each notebook so that a killed run leaves them too."""
    content = {"profile": profile, "source": source, "notebooks": [asdict(o) for o in outcomes]}
    write_atomic(folder / "summary.json", (json.dumps(content, indent=2) + "\n").encode())
    write_atomic(folder / "summary.md", (summary_table(outcomes) + "\n").encode(errors="backslashreplace"))
