"""Controls redraw their figure, and what the figure says is right. (In a browser: tests/browser/.)"""

from __future__ import annotations

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest

from primia_lite import widgets
from primia_lite.data import phantom


@pytest.fixture(scope="module")
def films():
    return phantom.generate(8, 32, seed=61)


@pytest.fixture(autouse=True)
def _close():
    plt.close("all")  # what another file's tests have left open in this process
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    figures = []
    monkeypatch.setattr(widgets, "display", figures.append)
    return figures


def test_controls_start_at_the_functions_defaults(shown):
    box = widgets.explore(lambda noise=1.7, taken=0: plt.figure(), noise=(0.1, 3.0, 0.1), taken=(0, 4))
    assert [control.value for control in box.children[:-1]] == [1.7, 0]


def test_a_control_that_is_moved_redraws(shown):
    calls = []

    def draw(width, name):
        calls.append((width, name))
        return plt.figure()

    box = widgets.explore(draw, width=(1, 9, 2), name=["a", "b"])
    assert isinstance(box, ipywidgets.VBox)
    assert calls == [(5, "a")]
    slider, menu = box.children[:-1]
    slider.value = 7
    menu.value = "b"
    assert calls == [(5, "a"), (7, "a"), (7, "b")]
    assert len(shown) == 3 and not plt.get_fignums()


def test_sliders_wait_until_they_are_let_go(shown):
    fraction = ipywidgets.FloatSlider(0.5, min=0, max=1)
    box = widgets.explore(lambda **_: plt.figure(), number=(0, 4, 1), fraction=fraction, masks=True)
    sliders = [control for control in box.children[:-1] if hasattr(control, "continuous_update")]
    assert len(sliders) == 2 and not any(slider.continuous_update for slider in sliders)
    assert box.children[1] is fraction


@pytest.mark.parametrize(("threshold", "missed", "alarms"), [(0.5, 1, 1), (0.0, 0, 2), (0.95, 3, 0)])
def test_plot_threshold_counts(threshold, missed, alarms):
    scores = np.array([0.1, 0.6, 0.7, 0.4, 0.9])
    labels = np.array([0, 0, 1, 2, 2])
    probabilities = np.stack([1 - scores, scores / 2, scores / 2], 1)
    axis = widgets.plot_threshold(probabilities, labels, threshold).axes[0]
    title = (
        f"sensitivity {1 - missed / 3:.3f}, specificity {1 - alarms / 2:.3f}: {missed} missed, {alarms} false alarms"
    )
    assert axis.get_title() == title
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("pneumonia score", "test films")
    assert axis.lines[0].get_xdata() == [threshold, threshold]
    heights = [sum(bar.get_height() for bar in container) for container in axis.containers]
    assert heights == [2, 3]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["normal", "pneumonia"]


def test_plot_film_shows_film_masks_and_probabilities(films):
    index = int(np.flatnonzero(films.lesion_mask.any((1, 2)))[0])
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 8)
    figure = widgets.plot_film(films, index, probabilities)
    film, bars = figure.axes
    assert np.array_equal(film.images[0].get_array(), films.images[index])
    assert len(film.collections) == 2
    assert film.get_title() == f"film {index}: {films.class_names[films.labels[index]]}"
    assert [bar.get_width() for bar in bars.containers[0]] == pytest.approx(probabilities[index].tolist())
    assert bars.get_xlabel() == "probability (green: the true class)"
    assert "phantom" in " ".join(text.get_text() for text in figure.findobj(plt.Text))
