"""Shared by all tests: one thread each, no trace of the user's own settings, nothing written into the checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before numpy or torch is imported: two workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = os.environ.get("MPLBACKEND") or "Agg"
# jsonschema, which nbformat imports, compiles a grammar of addresses for 3 s where this is installed.
sys.modules.setdefault("rfc3987_syntax", None)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """Caches, runs, figures and results go to a folder that lasts as long as the tests."""
    folder = tmp_path_factory.mktemp("primia_lite")
    patch = pytest.MonkeyPatch()
    for name in ("CACHE", "RUNS", "FIGURES", "RESULTS"):
        patch.setenv(f"PRIMIA_LITE_{name}", str(folder / name.lower()))
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setenv("PRIMIA_LITE_HEADLESS", "1")
    for name in ("NO_PROXY", "no_proxy"):  # the tests' own clients and servers are all on this machine
        patch.setenv(name, "localhost,127.0.0.1,::1")
    yield
    patch.undo()


@pytest.fixture
def write_notebook() -> Callable[..., Path]:
    """Write a notebook of code cells; the first is its ``parameters`` cell."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    def write(path: Path, parameters: str, *cells: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[new_markdown_cell("# A title"), first, *map(new_code_cell, cells)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, path)
        return path

    return write
