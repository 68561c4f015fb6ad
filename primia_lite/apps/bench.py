"""``primia-lite bench``: a benchmark is a script in ``benchmarks/``; its name is the file's, its docstring says what it
measures, and what it finds goes to ``results/bench/<name>.json`` (``write_results``)."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from primia_lite.config import UserError, check_writable, repo_root, results_dir
from primia_lite.runtime import any_console


class Options(argparse.ArgumentParser):
    """What every benchmark reads its arguments with, also one that takes none. ``text`` is its docstring."""

    def __init__(self, name: str, text: str):
        any_console()
        super().__init__(prog=f"primia-lite bench {name}", description=text.splitlines()[0])

    def read(self) -> argparse.Namespace:
        """The arguments; ends the process with status 2 if there is an unknown one, or if what will be measured
        couldn't be written."""
        arguments = self.parse_args()
        try:
            check_writable(results_dir())
        except UserError as error:
            self.error(str(error))
        return arguments


def benchmarks(folder: Path | None = None) -> dict[str, str]:
    """Name -> first line of the script's docstring."""
    folder = folder or repo_root() / "benchmarks"
    scripts = sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))
    return {
        p.stem: ((ast.get_docstring(ast.parse(p.read_text("utf-8"))) or "").splitlines() or [""])[0] for p in scripts
    }


def listing(folder: Path | None = None) -> str:
    known = benchmarks(folder)
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:<{width}}  {what}" for name, what in known.items()) or "no benchmark in benchmarks/"


def run(name: str, arguments: Sequence[str] = (), folder: Path | None = None) -> int:
    """Run ``benchmarks/<name>.py`` with this Python and return its exit status.

    ``PRIMIA_LITE_RESULTS`` is ``results/bench`` unless the caller has set it.
    """
    folder = folder or repo_root() / "benchmarks"
    known = benchmarks(folder)
    if name not in known:
        raise UserError(f"unknown benchmark {name!r}: choose one of {', '.join(known) or '(none yet)'}")
    environment = {"PRIMIA_LITE_RESULTS": str(repo_root() / "results" / "bench"), **os.environ}
    return subprocess.run([sys.executable, str(folder / f"{name}.py"), *arguments], env=environment).returncode
