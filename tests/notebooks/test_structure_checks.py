"""The checks of test_structure.py see what they are for: a good notebook passes, each defect is found by its check."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

sys.path.insert(0, str(Path(__file__).parent))
import test_structure as checks

OPENING = "[next: 01_b](01_b.ipynb)\n\n# A title\n\nFigure 1 of the paper."
TEXT = """## Objectives, prerequisites
## Threat model
**Asset** films. **Adversary** curious. **Sees** updates. **Guarantee** epsilon. **Out of scope** theft.
## Limits
## Takeaways
## Exercises
## References"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def good():
    picture = new_output("display_data", {"image/png": PIXEL})
    cells = [
        new_markdown_cell(OPENING),
        new_code_cell(
            'n_films = 60  # films\nrates = [0.1, -1.0]\nsource: str = "phantom"', metadata={"tags": ["parameters"]}
        ),
        new_code_cell("plot()", outputs=[picture], execution_count=1),
        new_markdown_cell(TEXT),
    ]
    for number, cell in enumerate(cells):
        cell.id = str(number)
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


@pytest.fixture
def save(tmp_path, monkeypatch):
    def write(notebook) -> Path:
        path = tmp_path / "notebooks" / "00_a.ipynb"
        (path.parent / "solutions").mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        nbformat.write(notebook, path.parent / "solutions" / "00_a.ipynb")
        monkeypatch.setattr(checks, "NOTEBOOKS", [path, path.with_name("01_b.ipynb")])
        return path

    return write


def run(name: str, path: Path) -> None:
    if name == "test_has_part":
        for part in checks.HEADINGS:
            checks.test_has_part(path, part)
    else:
        getattr(checks, name)(path)


NAMES = [name for name in vars(checks) if name.startswith("test_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_good_notebook_passes(save, name):
    path = save(good())
    run(name, path.parent / "solutions" / path.name if name == "test_solutions_belong_to_a_notebook" else path)


def derived(nb):
    nb.cells[1].source += "\nsteps = n_films * 2"


def untagged(nb):
    nb.cells[1].metadata = {}


def no_title(nb):
    nb.cells[0].source = "[next](01_b.ipynb)"


def no_navigation(nb):
    nb.cells[0].source = "# A title"


def no_exercises(nb):
    nb.cells[3].source = TEXT.replace("## Exercises\n", "")


def no_guarantee(nb):
    nb.cells[3].source = TEXT.replace("Guarantee", "")


def large(nb):
    nb.cells[2].outputs[0].data["image/png"] = "A" * 400_000


def machine_path(nb):
    nb.cells[2].outputs.append(new_output("stream", text="saved /home/anna/x.png"))


def error(nb):
    nb.cells[2].outputs.append(new_output("error", ename="ValueError", evalue="x", traceback=[]))


def no_picture(nb):
    nb.cells[2].outputs = [new_output("stream", text="done")]


def no_outputs(nb):
    nb.cells[2].outputs = []


def papermill_metadata(nb):
    nb.metadata.papermill = {"duration": 3.0}


def other_kernel(nb):
    nb.metadata.kernelspec.name = "my-env"


def expects_exception(nb):
    nb.cells[2].metadata["tags"] = ["raises-exception"]


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        (derived, "test_parameters_are_literals"),
        (untagged, "test_parameters_are_literals"),
        (no_title, "test_opens_with_navigation_and_title"),
        (no_navigation, "test_opens_with_navigation_and_title"),
        (no_exercises, "test_has_part"),
        (no_guarantee, "test_threat_model_says_who_sees_what"),
        (large, "test_is_small"),
        (machine_path, "test_names_no_path_of_one_machine"),
        (error, "test_no_error_among_the_outputs"),
        (no_picture, "test_outputs_are_committed_with_pictures"),
        (no_outputs, "test_outputs_are_committed_with_pictures"),
        (papermill_metadata, "test_is_cleaned"),
        (other_kernel, "test_is_a_valid_notebook_with_kernel_python3"),
        (expects_exception, "test_does_not_expect_exceptions_by_tag"),
    ],
)
def test_a_defect_is_found(save, defect, name):
    notebook = good()
    defect(notebook)
    with pytest.raises((AssertionError, ValueError)):
        run(name, save(notebook))
