"""Imports point one way, as docs of the package's layers say, also those inside functions; texts have an encoding."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# A module or package may import from its own layer and from those before it.
LAYERS = (
    {"__init__", "config", "runtime"},
    {"phantom"},
    {"data", "models", "metrics", "plotting"},
    {"training", "privacy"},
    {"secagg", "federation", "encrypted", "smpc", "attacks"},
    {"session", "widgets", "exercises"},
    {"apps", "__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(source: str, module: str) -> set[str]:
    """The parts of primia_lite that a module's text imports, wherever in the text, by ``import_module`` too.

    Parameters
    ----------
    module : dotted name below primia_lite, such as ``data.split``; ``data.__init__`` for a package
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x: relative to the module's package
                package = ["primia_lite", *module.split(".")[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value  # import_module("primia_lite.data.phantom")
            names = [text] if text.startswith("primia_lite.") and text.replace(".", "").isidentifier() else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "primia_lite" and len(parts) > 1:
                found.add(parts[1])
    return found


def graph(package: Path) -> dict[str, set[str]]:
    """Part of the package -> the other parts that it imports."""
    edges: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        part = module.split(".")[0]
        known = {name for name in imports(path.read_text("utf-8"), module) if name in RANK or (package / name).exists()
                 or (package / f"{name}.py").exists()}  # fmt: skip
        edges.setdefault(part, set()).update(known - {part})
    return edges


def violations(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{part} imports {other}, which comes after it"
        for part, others in sorted(edges.items())
        for other in sorted(others)
        if RANK[other] > RANK[part]
    ]


@pytest.fixture(scope="module")
def edges(root) -> dict[str, set[str]]:
    return graph(root / "primia_lite")


def test_every_module_has_its_layer(edges):
    assert set(edges) <= set(RANK), "add it to LAYERS"


def test_imports_point_one_way(edges):
    assert violations(edges) == []


def test_no_import_cycle_between_parts(edges):
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")


# --- text files name their encoding -----------------------------------------------------------------------------------


def without_encoding(source: str) -> list[str]:
    """Calls that would read or write a text as this machine's language settings say."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name in ("read_text", "write_text") and "utf-8" not in texts:
            found.append(ast.unparse(node))
        modes = [text for text in texts if text and set(text) <= set("rwaxb+t")]
        # A method without a mode may be another's, as in session.open(keys).
        if name == "open" and (modes or isinstance(node.func, ast.Name)) and "b" not in "".join(modes):
            found.append(ast.unparse(node))
    return found


def test_every_text_file_names_its_encoding(root):
    paths = [*(root / "primia_lite").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    assert {path.name: found for path in paths if (found := without_encoding(path.read_text("utf-8")))} == {}


# --- the aggregator's code holds no films and no unmasked update ------------------------------------------------------

SECURE = {"agreement", "client", "fixed_point", "graph", "keys", "masks", "messages", "server", "shares"}


def modules(source: str) -> set[str]:
    """All modules that a module's text imports by their whole names, wherever in the text."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "whole names only"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_secure_aggregation_knows_neither_films_nor_models_nor_training(root):
    allowed = ("primia_lite.config.UserError", "primia_lite.secagg", *(f"primia_lite.secagg.{name}" for name in SECURE))
    for name in SECURE:
        for module in modules((root / f"primia_lite/secagg/{name}.py").read_text("utf-8")):
            assert not module.startswith("primia_lite") or module.startswith(allowed), (name, module)
            assert module.split(".")[0] not in ("torch", "importlib"), (name, module)


def test_secure_aggregation_loads_without_films_models_or_torch():
    code = (
        "import sys; from primia_lite.secagg import SecAggClient, SecAggServer; "
        "print(sorted(m for m in sys.modules if m == 'torch' or m.startswith('primia_lite.')))"
    )
    loaded = ast.literal_eval(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.decode()
    )
    assert set(loaded) == {
        "primia_lite.config",
        "primia_lite.secagg",
        *(f"primia_lite.secagg.{m}" for m in SECURE),
    }
