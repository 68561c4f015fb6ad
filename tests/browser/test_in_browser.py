"""A student's first contact: a notebook in a real JupyterLab; all cells run; each widget moves; the picture changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reader

# A later notebook adds its name here.
NOTEBOOKS = [
    "00_start_here",
    "01_data_preparation",
    "02_federated_dp_training",
    "03_privacy_accounting",
    "04_model_inversion_attacks",
    "05_encrypted_inference",
    "06_secure_aggregation",
    "07_governed_federation",
]
RUN_S = 1800  # a notebook, on a slow and busy machine

pytestmark = pytest.mark.browser


def move_each_widget(page) -> dict[str, str | None]:
    """Name of each control -> the key that changed the picture, or None."""
    return {
        f"{number}: {name}": reader.move(page, selector, control)
        for number, (name, selector, control) in enumerate(reader.controls(page), 1)
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_its_widgets_work(page, lab, folder, name):
    assert (folder / "notebooks" / f"{name}.ipynb").exists(), "there is no such notebook"
    reader.open_notebook(page, lab(f"notebooks/{name}.ipynb"))
    reader.run_all_cells(page, RUN_S)
    moved = move_each_widget(page)
    assert moved, "a notebook has at least one widget"
    assert all(moved.values()), f"these changed nothing: {[name for name, key in moved.items() if key is None]}"


PLOT = """%matplotlib inline
import ipywidgets as widgets
import matplotlib.pyplot as plt

def plot(k=1, shape="line", grid=False):
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, 1, k], "o" if shape == "dots" else "-")
    ax.grid(grid)
    plt.show()

widgets.interact(plot, k=(1, 5), shape=["line", "dots"]);"""
IDLE = "import ipywidgets as widgets\nwidgets.interact(lambda k: print('always the same'), k=(0, 5));"
BREAKS = "import ipywidgets as widgets\nwidgets.interact(lambda k: print(1 / (3 - k)), k=(0, 3, 1));"


def test_a_widget_that_works_is_seen_to_work(page, lab, folder, write_notebook):
    write_notebook(folder / "works.ipynb", "a = 1", PLOT)
    reader.open_notebook(page, lab("works.ipynb"))
    reader.run_all_cells(page, RUN_S)
    moved = move_each_widget(page)
    assert len(moved) == 3 and all(moved.values()), moved


def test_a_widget_that_changes_nothing_is_found(page, lab, folder, write_notebook):
    write_notebook(folder / "idle.ipynb", "a = 1", IDLE)
    reader.open_notebook(page, lab("idle.ipynb"))
    reader.run_all_cells(page, RUN_S)
    ((_, selector, control),) = reader.controls(page)
    assert reader.move(page, selector, control, seconds=1) is None


def test_a_widget_that_breaks_is_found(page, lab, folder, write_notebook):
    write_notebook(folder / "breaks.ipynb", "a = 1", BREAKS)
    reader.open_notebook(page, lab("breaks.ipynb"))
    reader.run_all_cells(page, RUN_S)
    ((_, selector, control),) = reader.controls(page)
    assert reader.move(page, selector, control) == "ArrowRight"  # from 1 to 2
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        reader.move(page, selector, control)


def test_a_failing_cell_is_found(page, lab, folder, write_notebook):
    write_notebook(folder / "fails.ipynb", "a = 1", "a / 0", "print('later')")
    reader.open_notebook(page, lab("fails.ipynb"))
    with pytest.raises(AssertionError, match="cell 3: ZeroDivisionError"):
        reader.run_all_cells(page, RUN_S)
