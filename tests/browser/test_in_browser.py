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
    "08_smpc_inference",
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


def test_widgets_that_work_that_change_nothing_and_that_break_are_told_apart(page, lab, folder, write_notebook):
    write_notebook(folder / "widgets.ipynb", "a = 1", PLOT, IDLE, BREAKS)
    reader.open_notebook(page, lab("widgets.ipynb"))
    reader.run_all_cells(page, RUN_S)
    found = reader.controls(page)
    sliders = [(selector, control) for _, selector, control in found if "noUi" in selector]
    others = [(selector, control) for _, selector, control in found if "noUi" not in selector]
    (works, idle, breaks), (choice, tick) = sliders, others
    assert all(reader.move(page, *control) for control in (works, choice, tick))
    assert reader.move(page, *idle, seconds=1) is None
    assert reader.move(page, *breaks) == "ArrowRight"  # from 1 to 2
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        reader.move(page, *breaks)


def test_a_failing_cell_is_found(page, lab, folder, write_notebook):
    write_notebook(folder / "fails.ipynb", "a = 1", "a / 0", "print('later')")
    reader.open_notebook(page, lab("fails.ipynb"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        reader.run_all_cells(page, RUN_S)
