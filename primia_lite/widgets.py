"""Sliders and menus over functions that a notebook has already called once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from primia_lite import metrics
from primia_lite.data import ChestXrays
from primia_lite.plotting import OKABE_ITO, draw_film, source_note


def explore(draw: Callable[..., plt.Figure], **controls) -> ipywidgets.VBox:
    """Controls over a function that draws a figure; the figure follows when a control is let go.

    Parameters
    ----------
    draw
        Called with one keyword argument per control; its defaults are where the controls start.
    controls
        Widgets, or what ``ipywidgets.interactive`` makes widgets of: ``(low, high, step)``, a list, a bool.
    """

    @wraps(draw)
    def show(**values):
        figure = draw(**values)
        display(figure)
        plt.close(figure)

    box = ipywidgets.interactive(show, **controls)
    for control in box.children[:-1]:
        control.style.description_width = "initial"
        control.layout.width = "420px"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
    return box


def plot_threshold(probabilities: np.ndarray, labels: np.ndarray, threshold: float, note: str = "") -> plt.Figure:
    """What calling pneumonia from a score of ``threshold`` on does: scores by class, and the four counts."""
    score = metrics.pneumonia_score(probabilities)
    found, spared = (f(probabilities, labels, threshold=threshold) for f in (metrics.sensitivity, metrics.specificity))
    figure, axis = plt.subplots(figsize=(7.5, 3.0))
    bins = np.linspace(0, 1, 26)
    for positive, name, colour, hatch in ((False, "normal", OKABE_ITO[0], ""), (True, "pneumonia", OKABE_ITO[1], "//")):
        axis.hist(
            score[(labels > 0) == positive], bins, alpha=0.6, color=colour, label=name, hatch=hatch, edgecolor="white"
        )
    axis.axvline(threshold, color="black", linewidth=1.5)
    missed = int(((score < threshold) & (labels > 0)).sum())
    alarms = int(((score >= threshold) & (labels == 0)).sum())
    axis.set(
        xlabel="pneumonia score", ylabel="test films", xlim=(0, 1),
        title=f"sensitivity {found:.3f}, specificity {spared:.3f}: {missed} missed, {alarms} false alarms",
    )  # fmt: skip
    axis.legend(loc="upper center")
    if note:
        figure.suptitle(note, fontsize=10, color="0.35")
    return figure


def plot_film(films: ChestXrays, index: int, probabilities: np.ndarray) -> plt.Figure:
    """One film large, with its masks, beside the model's probabilities for it."""
    figure, (axis, bar) = plt.subplots(1, 2, figsize=(6.8, 3.3))
    draw_film(axis, films, index, masks=True)
    axis.set_title(f"film {index}: {films.class_names[films.labels[index]]}")
    colours = [OKABE_ITO[2] if k == films.labels[index] else "0.7" for k in range(len(films.class_names))]
    bar.barh(films.class_names, probabilities[index], color=colours)
    bar.invert_yaxis()
    bar.set(xlim=(0, 1), xlabel="probability (green: the true class)")
    figure.suptitle(source_note(films), fontsize=10, color="0.35")
    return figure
