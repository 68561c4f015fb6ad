"""One style for all figures, and the plots that several notebooks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from primia_lite import metrics
from primia_lite.config import figures_dir
from primia_lite.data import ChestXrays
from primia_lite.runtime import write_atomic

# Okabe and Ito (2008): told apart with any colour vision; always with a marker or a line style as well.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def use_style() -> None:
    """Set matplotlib up for screen and print."""
    sns.set_theme(context="notebook", style="ticks", palette=list(OKABE_ITO))
    mpl.rcParams.update(
        {
            "figure.dpi": 64,
            "savefig.dpi": 150,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.titlesize": 12,
            "legend.frameon": False,
            "legend.fontsize": 10,
            "image.cmap": "gray",
            "font.size": 11,
        }
    )


def save_figure(figure: plt.Figure, name: str) -> Path:
    """Write a figure as ``<figures folder>/<name>.png``, 150 dpi."""
    return write_atomic(
        figures_dir() / f"{name}.png", lambda file: figure.savefig(file, format="png", bbox_inches="tight")
    )


def source_note(films: ChestXrays | str) -> str:
    """What the films are, for titles and captions: a phantom can't be mistaken for a patient."""
    source = films if isinstance(films, str) else films.source
    return {
        "phantom": "phantom films (computer-made, no patients)",
        "kermany": "films of Kermany et al., CC BY 4.0, doi:10.17632/rscbjbr9sj.3",
        "pneumoniamnist": "PneumoniaMNIST (from Kermany et al.), CC BY 4.0",
        "dicom": "your DICOM films",
    }[source]


def _caption(figure: plt.Figure, text: str, note: str = "") -> None:
    figure.suptitle("; ".join(part for part in (note, text) if part), fontsize=10, color="0.35")


def draw_film(axis: plt.Axes, films: ChestXrays, index: int, *, masks: bool = False) -> None:
    """A film without ticks; lung (blue) and lesion (orange) outlined where the source has masks."""
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.imshow(films.images[index], vmin=0, vmax=255)
    for mask, colour in ((films.lung_mask, OKABE_ITO[5]), (films.lesion_mask, OKABE_ITO[1])):
        if masks and mask is not None and mask[index].any():
            axis.contour(mask[index], levels=[0.5], colors=[colour], linewidths=1.1)


def film_grid(
    films: ChestXrays, rows: Mapping[str, Sequence[int]], *, masks: bool = False, titles: Mapping[int, str] = {}
) -> plt.Figure:
    """Films in labelled rows (label -> indices); ``masks`` as for :func:`draw_film`; ``titles``: index -> text."""
    columns = max(len(index) for index in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.75 * columns + 0.4, 1.75 * len(rows) + 0.35), squeeze=False
    )
    for row, (label, index) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, i in zip(row, index, strict=False):
            axis.set_axis_on()
            sns.despine(ax=axis, left=True, bottom=True)
            draw_film(axis, films, i, masks=masks)
            axis.set_title(titles.get(int(i), ""), fontsize=9)
        row[0].set_ylabel(label, fontsize=10)
    _caption(figure, source_note(films))
    return figure


def plot_history(histories: Mapping[str, Sequence[Mapping]], rounds: int | None = None, note: str = "") -> plt.Figure:
    """Validation scores by round, one line per run; ``note`` names the films (see :func:`source_note`)."""
    names = {"auroc": "AUROC, normal vs pneumonia", "accuracy": "accuracy, all classes"}
    figure, axes = plt.subplots(1, len(names), figsize=(9.2, 3.0))
    for axis, (key, name) in zip(axes, names.items(), strict=True):
        for number, (label, history) in enumerate(histories.items()):
            x, y = [r["round"] for r in history if key in r], [r[key] for r in history if key in r]
            axis.plot(
                x, y, label=label, color=OKABE_ITO[number % 8], marker=MARKERS[number % 8], markersize=4.5,
                markevery=max(1, len(x) // 12), linewidth=1.6,
            )  # fmt: skip
        axis.set(xlabel="round", ylabel=name)
        if rounds:
            axis.set_xlim(0.5, rounds + 0.5)
    axes[0].legend()
    _caption(figure, "validation films", note)
    return figure


def plot_partition(hospitals: Mapping[str, ChestXrays]) -> plt.Figure:
    """Films by class and patients at each hospital. Simulation only: real counts stay inside."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.0), width_ratios=(2, 1))
    first = next(iter(hospitals.values()))
    bottom = np.zeros(len(hospitals))
    for k, name in enumerate(first.class_names):
        count = np.array([int((films.labels == k).sum()) for films in hospitals.values()])
        hatch = ("", "//", "..")[k % 3]
        left.barh(list(hospitals), count, left=bottom, color=OKABE_ITO[k], label=name, hatch=hatch, edgecolor="white")
        bottom += count
    left.invert_yaxis()
    left.set(xlabel="films", ylabel="hospital")
    left.legend(ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.barh(list(hospitals), [films.n_patients for films in hospitals.values()], color="0.6")
    right.invert_yaxis()
    right.set(xlabel="patients")
    _caption(figure, f"simulation only: a hospital keeps its counts · {source_note(first)}")
    return figure


def plot_roc(
    models: Mapping[str, np.ndarray], labels: np.ndarray, note: str = "",
    readers: Mapping[str, tuple[float, float]] | None = None,
) -> plt.Figure:  # fmt: skip
    """ROC curves, normal versus pneumonia, and calibration of the same models: name -> class probabilities [N, K].
    ``readers``: name -> sensitivity and specificity of a person who read the films, a dot."""
    from sklearn.metrics import roc_curve

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.1))
    for number, (name, probabilities) in enumerate(models.items()):
        x, y, _ = roc_curve(labels > 0, metrics.pneumonia_score(probabilities))
        style = dict(color=OKABE_ITO[number % 8], linestyle=("-", "--", "-.", ":")[number % 4], linewidth=1.8)
        left.plot(x, y, label=f"{name}: {metrics.auroc(probabilities, labels):.3f}", **style)
        predicted, observed = metrics.calibration(probabilities, labels)
        right.plot(predicted, observed, marker=MARKERS[number % 8], markersize=5, label=name, **style)
    for axis in (left, right):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (1, 3)))
        axis.set_aspect("equal")
    for name, (sensitivity, specificity) in (readers or {}).items():
        left.plot(1 - specificity, sensitivity, "*", color=OKABE_ITO[7], markersize=12, label=name)
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (AUROC in the legend)")
    right.set(
        xlabel="mean score of the bin", ylabel="observed share of pneumonia", title="calibration, 10 quantile bins"
    )
    left.legend(loc="lower right")
    _caption(figure, f"test films, n = {len(labels)}", note)
    return figure


def plot_confusions(
    models: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], note: str = ""
) -> plt.Figure:
    """Confusion matrices side by side: counts, shaded by the share of the true class."""
    figure, axes = plt.subplots(1, len(models), figsize=(3.4 * len(models) + 0.5, 3.5), squeeze=False)
    for axis, (name, probabilities) in zip(axes[0], models.items(), strict=True):
        counts = metrics.confusion(probabilities, labels)
        share = counts / counts.sum(1, keepdims=True).clip(1)
        sns.heatmap(
            share, annot=counts, fmt="d", vmin=0, vmax=1, cmap="cividis", cbar=False, square=True, ax=axis,
            xticklabels=class_names, yticklabels=class_names if axis is axes[0][0] else False,
        )  # fmt: skip
        axis.set(title=name, xlabel="called", ylabel="true" if axis is axes[0][0] else "")
    _caption(figure, f"test films, n = {len(labels)}; shade: share of the true class", note)
    return figure


def plot_comparison(
    table: Mapping[str, Mapping[str, Sequence[float]]], reference: Mapping[str, Mapping[str, float]], note: str = ""
) -> plt.Figure:
    """Scores of several ways to train (score -> way -> values by seed): one dot a seed, a bar at the mean, dotted lines
    for published values (score -> label -> value)."""
    figure, axes = plt.subplots(1, len(table), figsize=(4.6 * len(table), 3.6), squeeze=False)
    for axis, (score, ways) in zip(axes[0], table.items(), strict=True):
        for number, values in enumerate(ways.values()):
            colour, marker = OKABE_ITO[number % 8], MARKERS[number % 8]
            axis.scatter(np.full(len(values), number), values, color=colour, marker=marker, s=34, zorder=3)
            axis.hlines(np.mean(values), number - 0.3, number + 0.3, color=colour, linewidth=2)
        for label, value in reference.get(score, {}).items():
            axis.axhline(value, color="0.4", linestyle=":", linewidth=1.2)
            axis.annotate(
                label, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=8.5, color="0.3",
            )  # fmt: skip
        axis.set_xticks(range(len(ways)), list(ways), rotation=25, ha="right", rotation_mode="anchor")
        axis.set(ylabel=score, xlim=(-0.6, len(ways) - 0.4))
        axis.grid(axis="x", visible=False)
    if note:
        _caption(figure, note)
    return figure


def show_films(figure: plt.Figure) -> None:
    """Show a figure full of films in the notebook as JPEG: a fifth of the PNG's size. Closes it."""
    _show(figure, "jpeg", lambda image, file: image.save(file, format="jpeg", quality=80))


def show_plot(figure: plt.Figure) -> None:
    """Show a figure of lines and text in the notebook as a PNG of 64 colours: a third of the size. Closes it."""
    _show(figure, "png", lambda image, file: image.quantize(64).save(file, format="png", optimize=True))


def _show(figure: plt.Figure, form: str, save) -> None:
    from IPython.display import Image, display
    from PIL import Image as Picture

    raw, small = BytesIO(), BytesIO()
    figure.savefig(raw, format="png", dpi=72)
    save(Picture.open(raw).convert("RGB"), small)
    display(Image(small.getvalue(), format=form))
    plt.close(figure)
