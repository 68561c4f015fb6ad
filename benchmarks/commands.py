"""How long the README's two commands take from a fresh clone, and how much memory and disk they need.

The last commit is cloned into an empty folder, with an empty package cache: set-up, `make run`, a second set-up (what
each later call adds), `make test`. Once each, so on a busy machine repeat it. Real films are used by the tests where
PRIMIA_LITE_DATA names them. Takes half an hour and 2 GB of a temporary folder (TMPDIR).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from primia_lite import runtime
from primia_lite.apps.bench import Options
from primia_lite.config import repo_root


def make(target: str, folder: Path, cache: Path) -> float:
    """Seconds that `make <target>` takes; ends this benchmark if it fails."""
    own = ("PRIMIA_LITE_RESULTS", "PRIMIA_LITE_CACHE", "PRIMIA_LITE_RUNS", "PRIMIA_LITE_FIGURES", "OMP_NUM_THREADS",
           "PROFILE", "DATA", "ONLY", "OUT", "TESTS", "MAKEFLAGS")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in own}
    if environment.get("PRIMIA_LITE_DATA"):
        environment["PRIMIA_LITE_DATA"] = str(Path(environment["PRIMIA_LITE_DATA"]).resolve())
    started = time.perf_counter()
    print(f"== make {target}", flush=True)
    done = subprocess.run(["make", target], cwd=folder, env=environment | {"PIP_CACHE_DIR": str(cache)})
    if done.returncode:
        sys.exit(f"make {target} failed: see above")
    return time.perf_counter() - started


def disk_bytes(folder: Path) -> int:
    seen = {}  # a file with several links counts once
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512 if hasattr(status, "st_blocks") else 0
    return sum(seen.values())


def main() -> None:
    Options("commands", __doc__).read()
    folder = Path(tempfile.mkdtemp(prefix="primia-lite-"))
    clone, cache = folder / "clone", folder / "pip"
    try:
        subprocess.run(["git", "clone", "--quiet", str(repo_root()), str(clone)], check=True)
        setup_s = make("setup", clone, cache)
        disk = disk_bytes(clone) + disk_bytes(cache)
        again_s = make("setup", clone, cache)
        run_s = make("run", clone, cache)
        summary = json.loads((clone / "runs" / "smoke-phantom" / "summary.json").read_text("utf-8"))["notebooks"]
        test_s = make("test", clone, cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    def once(value: float, unit: str) -> dict:
        return {"median": round(value, 2), "min": round(value, 2), "max": round(value, 2), "n": 1, "unit": unit}

    found = {
        "setup_s": once(setup_s, "s, package cache empty"),
        "setup_disk_gib": once(disk / 2**30, "GiB, packages and their cache"),
        "second_setup_s": once(again_s, "s"),
        "run_s": once(run_s, "s, make run after set-up, nothing cached"),
        "run_peak_memory_mib": once(max(row["peak_memory_mib"] for row in summary), "MiB, of the hungriest notebook"),
        "test_s": once(test_s, "s, make test"),
    }
    for row in summary:
        found[f"notebook_{row['notebook'][:2]}_s"] = once(row["seconds"], f"s, {row['notebook']}")
    origin = runtime.origin(
        data_source="phantom", data_fingerprint="drawn from the seeds", seeds=[0],
        command="primia-lite bench commands",
        commit=subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=repo_root(), capture_output=True, text=True
        ).stdout.strip(),
        real_films_tested=bool(os.environ.get("PRIMIA_LITE_DATA")),
    )  # fmt: skip
    path = runtime.write_results("commands", origin, found)
    for name, entry in found.items():
        print(f"{name:<22} {entry['median']:9.1f}  {entry['unit']}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
