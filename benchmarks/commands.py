"""How long the README's two commands and CI take from a fresh clone, and how much memory and disk they need.

The last commit is cloned into an empty folder, with an empty package cache: set-up, notebook 00 up to its first
picture, `make run`, a second set-up (what each later call adds), `make test`, and then, without `.venv`, all that CI
runs. Once each, so on a busy machine repeat it. Real films are used by the tests where PRIMIA_LITE_DATA names them.
Takes three quarters of an hour (`--no-ci`: a quarter) and 2 GB of a temporary folder (TMPDIR).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _cost import cost

from primia_lite import runtime
from primia_lite.apps.bench import Options
from primia_lite.config import repo_root

OWN = ("PRIMIA_LITE_RESULTS", "PRIMIA_LITE_CACHE", "PRIMIA_LITE_RUNS", "PRIMIA_LITE_FIGURES", "OMP_NUM_THREADS",
       "PROFILE", "DATA", "ONLY", "OUT", "TESTS", "MAKEFLAGS", "PYTHONPATH")  # fmt: skip
STEP = re.compile(r"^== make ([a-z-]+): ok, (\d+) s, (\d+) CPU s", re.MULTILINE)


def once(value: float, unit: str) -> dict:
    return {"median": round(value, 2), "min": round(value, 2), "max": round(value, 2), "n": 1, "unit": unit}


class Clone:
    """A fresh clone of the last commit; ``found`` is what its commands took."""

    def __init__(self, folder: Path) -> None:
        self.path, self.packages, self.found = folder / "clone", folder / "pip", {}
        self.environment = {name: value for name, value in os.environ.items() if name not in OWN}
        self.environment["PIP_CACHE_DIR"] = str(self.packages)
        if self.environment.get("PRIMIA_LITE_DATA"):
            self.environment["PRIMIA_LITE_DATA"] = str(Path(self.environment["PRIMIA_LITE_DATA"]).resolve())
        subprocess.run(["git", "clone", "--quiet", str(repo_root()), str(self.path)], check=True)

    def run(self, name: str, command: list[str], unit: str) -> None:
        """Keep how long ``command`` takes; ends this benchmark if it fails."""
        print(f"== {' '.join(command)}", flush=True)
        status, seconds, spent = cost(command, cwd=self.path, env=self.environment)
        if status:
            sys.exit(f"{' '.join(command)} failed: see above")
        self.found[f"{name}_s"] = once(seconds, f"s, {unit}")
        self.found[f"{name}_cpu_s"] = once(spent, f"CPU s, {unit}")

    def ci(self) -> None:
        """All of ``.ci/run``, from a clone without an environment, and what its parts took."""
        subprocess.run(["make", "clean"], cwd=self.path, check=True)
        log = self.path.parent / "ci.log"
        self.run("ci", ["bash", "-c", f"set -o pipefail; .ci/run 2>&1 | tee {log}"], "all of .ci/run")
        for target, seconds, spent in STEP.findall(log.read_text("utf-8")):
            name = target.replace("-", "_")
            if f"{name}_s" not in self.found:
                self.found[f"{name}_s"] = once(float(seconds), f"s, make {target}, as a part of .ci/run")
                self.found[f"{name}_cpu_s"] = once(float(spent), f"CPU s, make {target}, as a part of .ci/run")


def disk_bytes(folder: Path) -> int:
    seen = {}  # a file with several links counts once
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512 if hasattr(status, "st_blocks") else 0
    return sum(seen.values())


def main() -> None:
    options = Options("commands", __doc__)
    options.add_argument("--no-ci", action="store_true", help="leave out all that CI runs beyond the two commands")
    with_ci = not options.read().no_ci
    folder = Path(tempfile.mkdtemp(prefix="primia-lite-"))
    try:
        clone = Clone(folder)
        clone.run("setup", ["make", "setup"], "package cache empty")
        disk = disk_bytes(clone.path) + disk_bytes(clone.packages)
        clone.found["setup_disk_gib"] = once(disk / 2**30, "GiB, packages and their cache")
        clone.run("second_setup", ["make", "setup"], "what each later call adds")
        python = clone.path / ".venv" / "bin" / "python"
        first = [str(python), "benchmarks/_first_picture.py"]
        seconds = subprocess.run(first, cwd=clone.path, env=clone.environment, check=True, stdout=subprocess.PIPE)
        clone.found["first_picture_s"] = once(float(seconds.stdout), "s, 00's first picture, kernel's start included")
        clone.run("run", ["make", "run"], "make run after set-up, no films or features cached")
        summary = json.loads((clone.path / "runs" / "smoke-phantom" / "summary.json").read_text("utf-8"))["notebooks"]
        peak = max(row["peak_memory_mib"] for row in summary)
        clone.found["run_peak_memory_mib"] = once(peak, "MiB, of the hungriest notebook")
        clone.run("test", ["make", "test"], "make test")
        for row in summary:
            name = f"notebook_{row['notebook'][:2]}"
            clone.found[f"{name}_s"] = once(row["seconds"], f"s, {row['notebook']}")
            clone.found[f"{name}_cpu_s"] = once(row["cpu_seconds"], f"CPU s, {row['notebook']}")
        save(clone.found)
        if with_ci:
            clone.ci()
            save(clone.found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(found: dict) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo_root(), capture_output=True, text=True)
    origin = runtime.origin(
        data_source="phantom", data_fingerprint="drawn from the seeds", seeds=[0], commit=commit.stdout.strip(),
        command="primia-lite bench commands", real_films_tested=bool(os.environ.get("PRIMIA_LITE_DATA")),
    )  # fmt: skip
    path = runtime.write_results("commands", origin, found)
    for name, entry in found.items():
        print(f"{name:<22} {entry['median']:9.1f}  {entry['unit']}")
    print(f"written to {path.name}", flush=True)


if __name__ == "__main__":
    main()
