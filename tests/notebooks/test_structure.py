"""Every notebook has the parts that a reader relies on. Whether it runs is nbval's and papermill's business."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
STUDIES = sorted((ROOT / "notebooks" / "studies").glob("*.ipynb"))
MAX_KB = 300
MACHINE_PATH = re.compile(r"(?:/home|/Users|/root|/work|/tmp|/var/folders|[A-Z]:\\Users)[/\\][\w.-]+")
# What a reader looks for, and how its heading may be worded.
HEADINGS = {
    "objectives": r"objectives|you will learn|learning goals",
    "prerequisites": r"prerequisites",
    "threat model": r"threat model",
    "limits": r"limits|limitations|deviat",
    "takeaways": r"takeaways|take-aways",
    "exercises": r"exercises",
    "references": r"references",
}
CLEANING = ["--keep-output", "--keep-count", "--extra-keys", "metadata.papermill cell.metadata.papermill"]

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_with_solutions = pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS, *STUDIES], ids=lambda p: p.stem)
each_with_studies = pytest.mark.parametrize("path", [*NOTEBOOKS, *STUDIES], ids=lambda p: p.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def markdown(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def outputs(path: Path):
    return [output for cell in code_cells(path) for output in cell.outputs]


@each_with_solutions
def test_is_a_valid_notebook_with_kernel_python3(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@each_with_studies
def test_parameters_are_literals(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "exactly one cell has papermill's tag 'parameters'"
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        assert len(targets) == 1 and isinstance(targets[0], ast.Name), ast.unparse(statement)
        ast.literal_eval(statement.value)  # raises for anything derived


def test_every_profile_names_notebooks_and_studies_that_exist():
    from primia_lite.apps.runner import plan

    for profile in sorted((ROOT / "configs").glob("*.yaml")):
        assert {p.path.stem for p in plan(profile.stem)} >= {path.stem for path in NOTEBOOKS}


@each_with_studies
def test_profiles_give_only_parameters_that_exist(path):
    import yaml

    from primia_lite.apps.notebook import parameter_names

    for profile in sorted((ROOT / "configs").glob("*.yaml")):
        settings = (yaml.safe_load(profile.read_text()) or {}).get(path.stem) or {}
        assert set(settings) <= parameter_names(path), profile.name


@each
def test_opens_with_navigation_and_title(path):
    notebook = read(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.search(r"^# \S", first.source, re.MULTILINE), (
        "the first cell has the title"
    )
    others = [p.name for p in NOTEBOOKS if p != path]
    assert not others or any(name in first.source for name in others), "links to the notebook before or after"


@each
@pytest.mark.parametrize("part", HEADINGS)
def test_has_part(path, part):
    text = markdown(path)
    heading = rf"^(?:#+ |\*\*).*(?:{HEADINGS[part]})"
    assert re.search(heading, text, re.MULTILINE | re.IGNORECASE), f"no heading for {part}: {HEADINGS[part]}"


@each
def test_threat_model_says_who_sees_what(path):
    text = markdown(path).lower()
    section = text[text.index("threat model") :]
    missing = [w for w in ("asset", "adversary", "sees", "guarantee", "out of scope") if w not in section]
    assert not missing, missing


@each_with_solutions
def test_is_small(path):
    assert path.stat().st_size <= MAX_KB * 1000, (
        f"{path.stat().st_size / 1000:.0f} kB: lower the dpi, JPEG for film grids"
    )


@each_with_solutions
def test_names_no_path_of_one_machine(path):
    found = MACHINE_PATH.findall(path.read_text("utf-8"))
    assert not found, found[:3]


@each_with_solutions
def test_no_error_among_the_outputs(path):
    errors = [f"{o.ename}: {o.evalue}" for o in outputs(path) if o.output_type == "error"]
    assert not errors, errors


@each
def test_outputs_are_committed_with_pictures(path):
    assert outputs(path), "run it with the smoke profile and commit its outputs"
    kinds = {kind for o in outputs(path) for kind in o.get("data", {})}
    assert kinds & {"image/png", "image/jpeg"}, f"no picture among the outputs: {sorted(kinds)}"


@functools.cache
def not_clean() -> list[str]:
    """The notebooks that nbstripout would change. One process for all: it takes seconds to start."""
    paths = [str(path) for path in (*NOTEBOOKS, *SOLUTIONS, *STUDIES)]
    done = subprocess.run(
        [sys.executable, "-m", "nbstripout", *CLEANING, "--verify", *paths], capture_output=True, text=True
    )
    found = re.findall(r"would have stripped (.+)", done.stdout)
    assert done.returncode == bool(found), done.stderr
    return found


@each_with_solutions
def test_is_cleaned(path):
    """``make refresh`` and the pre-commit hook leave nothing that changes from run to run."""
    assert str(path) not in not_clean(), f"clean it: nbstripout {shlex.join(CLEANING)} {path.name}"


@each
def test_has_its_solutions(path):
    assert list((path.parent / "solutions").glob(f"{path.stem}*.ipynb"))


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_belong_to_a_notebook(path):
    assert any(path.stem.startswith(p.stem) for p in path.parent.parent.glob("*.ipynb"))


@each
def test_does_not_expect_exceptions_by_tag(path):
    """papermill fails on ``raises-exception``: expected errors are caught and printed."""
    assert not [c for c in code_cells(path) if "raises-exception" in c.metadata.get("tags", [])]


def test_profiles_name_only_notebooks_that_exist():
    import yaml

    for profile in sorted((ROOT / "configs").glob("*.yaml")):
        assert set(yaml.safe_load(profile.read_text()) or {}) <= {p.stem for p in [*NOTEBOOKS, *STUDIES]}, profile.name
