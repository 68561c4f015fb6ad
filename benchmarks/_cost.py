"""Runs a command and says what it took: ``python3 benchmarks/_cost.py NAME COMMAND...``.

NAME is a figure of results/bench/commands.json, without ``_cpu_s``: the line ends with a warning where the command took
more than 1.5 times as many CPU seconds as are committed there. Machines differ, so that it is no failure.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMITTED = Path(__file__).parent.parent / "results" / "bench" / "commands.json"
PR_SET_CHILD_SUBREAPER = 36
ORPHANS_S = 20  # they get to end; one that goes on isn't counted


def cost(command: list[str], **options) -> tuple[int, float, float]:
    """Exit status, seconds, and CPU seconds of all its processes, also of those that it leaves behind."""
    if sys.platform == "linux":  # orphans become this process's children, and are waited for
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before, started = os.times(), time.perf_counter()
    status = _ended(subprocess.Popen(command, **options))
    seconds = time.perf_counter() - started
    last = time.monotonic() + ORPHANS_S
    with suppress(ChildProcessError):
        while time.monotonic() < last:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return status, seconds, spent


def _ended(process: subprocess.Popen) -> int:
    """The exit status. Orphans are waited for as they end: somebody may watch for that."""
    if sys.platform != "linux":
        return process.wait()
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode


def main() -> int:
    name, *command = sys.argv[1:]
    print(f"== {' '.join(command)}", flush=True)
    status, seconds, spent = cost(command)
    line = f"== {' '.join(command)}: {'FAILED' if status else 'ok'}, {seconds:.0f} s, {spent:.0f} CPU s"
    figures = json.loads(COMMITTED.read_text("utf-8"))["metrics"] if COMMITTED.exists() else {}
    usual = figures.get(f"{name}_cpu_s", {}).get("median")
    if usual and spent > 1.5 * usual:
        line += f" (WARNING: {spent / usual:.1f} times the {usual:.0f} CPU s in results/bench/commands.json)"
    print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
