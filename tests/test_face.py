"""The face: what it offers is there, explained and used; and nobody outside the library needs a private name of it."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ("", ".data", ".phantom", ".models", ".privacy", ".federation", ".secagg", ".encrypted", ".smpc", ".attacks",
            ".apps.service", ".apps.syft")  # fmt: skip


def code_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.sub(r"^\s*[%!].*$", "", "\n".join(code), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def users(root) -> dict[Path, str]:
    """Everything outside tests that may call the library."""
    paths = [*(root / "primia_lite").rglob("*.py"), *(root / "benchmarks").glob("*.py"), *(root / "docs").glob("*.py")]
    return {path: code_of(path) for path in [*paths, *(root / "notebooks").rglob("*.ipynb")]}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_explained_and_has_a_caller(users, package):
    module = import_module("primia_lite" + package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value) or callable(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
        if inspect.ismodule(value) or (isinstance(value, type) and issubclass(value, Exception)):
            continue  # which a user catches
        home = getattr(value, "__module__", None)
        callers = [
            path
            for path, text in users.items()
            if re.search(rf"\b{name}\b", text) and path.name != "__init__.py" and home != module_name(path)
        ]
        assert callers, f"nobody calls {package}.{name}"


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[len(parts) - parts[::-1].index("primia_lite") - 1 :]) if "primia_lite" in parts else ""


def test_importing_the_package_imports_nothing_heavy():
    code = "import primia_lite, sys; print({'numpy', 'torch', 'matplotlib', 'cryptography'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def private(source: str) -> list[str]:
    """Private attributes of something else than ``self``, and private names that are imported from the library."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_|replace$|asdict$|fields$|make$)", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("primia_lite"):
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if re.match("_[^_]", alias.name)]
    return found


# Private names of other packages, which tests look into.
OTHERS = r"\._(transport|transport_for_url|pool|init_connection|get_middleware|base|backward_hooks|BatchNorm|blocks)\b"


@pytest.mark.parametrize("folder", ["notebooks", "benchmarks", "tests"])
def test_no_private_name_of_the_library_is_needed(root, folder):
    paths = [path for path in (root / folder).rglob("*") if path.suffix in (".py", ".ipynb")]
    found = {path.name: [one for one in private(code_of(path)) if not re.search(OTHERS, one)] for path in paths}
    assert {name: names for name, names in found.items() if names} == {}


def test_notebooks_open_with_the_face(root):
    for path in (root / "notebooks").rglob("*.ipynb"):
        imports = [
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(code_of(path)))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        ours = [name for name in imports if name.split(".")[0] == "primia_lite"]
        assert ours[0] == "primia_lite" and len(ours) <= 2, f"{path.name}: the face, and its chapter's subpackage"
