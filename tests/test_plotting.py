"""Figures: what is drawn is what was given, every axis is labelled, and a phantom is called one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from sklearn.metrics import roc_curve

from primia_lite import metrics, plotting
from primia_lite.data import phantom


@pytest.fixture(scope="module")
def films():
    return phantom.generate(24, 32, seed=51)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def probabilities(n=90, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    raw = rng.uniform(size=(n, 3)) + np.eye(3)[labels]
    return raw / raw.sum(1, keepdims=True), labels


def text_of(figure) -> str:
    return " ".join(artist.get_text() for artist in figure.findobj(plt.Text))


def labels_of(axis) -> tuple[str, str]:
    return axis.get_xlabel(), axis.get_ylabel()


# --- films ---


def test_a_phantom_is_called_one_and_nothing_else_is(films):
    assert plotting.source_note(films) == plotting.source_note("phantom")
    for source in ("phantom", "kermany", "pneumoniamnist", "dicom"):
        assert ("phantom" in plotting.source_note(source)) == (source == "phantom")
        assert ("CC BY 4.0" in plotting.source_note(source)) == (source in ("kermany", "pneumoniamnist"))


def test_film_grid_shows_the_films_in_their_rows(films):
    rows = {"first": [3, 5, 7], "second": [2]}
    figure = plotting.film_grid(films, rows, titles={5: "wrong"})
    axes = np.array(figure.axes).reshape(2, 3)
    for row, (label, index) in zip(axes, rows.items(), strict=True):
        assert row[0].get_ylabel() == label
        for axis, i in zip(row, index, strict=False):
            assert np.array_equal(axis.images[0].get_array(), films.images[i])
            assert axis.images[0].get_clim() == (0, 255)
    assert [axis.get_title() for axis in axes[0]] == ["", "wrong", ""]
    assert not axes[1, 1].images and not axes[1, 1].axison
    assert "phantom" in text_of(figure)


def test_film_grid_outlines_masks(films):
    index = int(np.flatnonzero(films.lesion_mask.any((1, 2)))[0])
    without = plotting.film_grid(films, {"a": [index]}).axes[0]
    outlined = plotting.film_grid(films, {"a": [index]}, masks=True).axes[0]
    assert not without.collections and len(outlined.collections) == 2


def test_plot_partition_counts_films_and_patients(films):
    hospitals = {"A": films.subset(np.arange(10)), "B": films.subset(np.arange(10, 24))}
    figure = plotting.plot_partition(hospitals)
    left, right = figure.axes
    for k in range(3):
        want = [int((some.labels == k).sum()) for some in hospitals.values()]
        assert [bar.get_width() for bar in left.containers[k]] == want
    assert [bar.get_x() + bar.get_width() for bar in left.containers[2]] == [10, 14]
    assert [bar.get_width() for bar in right.containers[0]] == [some.n_patients for some in hospitals.values()]
    assert labels_of(left) == ("films", "hospital") and right.get_xlabel() == "patients"
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(films.class_names)
    assert "phantom" in text_of(figure) and "simulation only" in text_of(figure)


# --- scores ---


def test_plot_history_draws_the_rounds_that_have_the_score():
    history = [{"round": r, "auroc": 0.5 + 0.01 * r, "accuracy": 0.4 + 0.02 * r} for r in range(1, 6)]
    sparse = [{"round": 1}, {"round": 2, "auroc": 0.7, "accuracy": 0.6}]
    figure = plotting.plot_history({"one": history, "two": sparse}, rounds=5)
    for axis, key in zip(figure.axes, ("auroc", "accuracy"), strict=True):
        for line, some in zip(axis.lines, (history, sparse[1:]), strict=True):
            assert line.get_xdata().tolist() == [r["round"] for r in some]
            assert line.get_ydata().tolist() == [r[key] for r in some]
        assert axis.get_xlabel() == "round" and axis.get_xlim() == (0.5, 5.5)
        assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == 2
    assert figure.axes[0].get_ylabel() == "AUROC, normal vs pneumonia"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]


def test_plot_roc_draws_scikit_learns_curve_and_the_calibration():
    models = {name: probabilities(seed=0)[0] ** power for power, name in ((1, "a"), (3, "b"))}
    models = {name: p / p.sum(1, keepdims=True) for name, p in models.items()}
    labels = probabilities(seed=0)[1]
    figure = plotting.plot_roc(models, labels)
    left, right = figure.axes
    for line, calibration, (name, p) in zip(left.lines, right.lines, models.items(), strict=False):
        x, y, _ = roc_curve(labels > 0, 1 - p[:, 0])
        assert np.array_equal(line.get_xdata(), x) and np.array_equal(line.get_ydata(), y)
        assert line.get_label() == f"{name}: {metrics.auroc(p, labels):.3f}"
        predicted, observed = metrics.calibration(p, labels)
        assert np.array_equal(calibration.get_xdata(), predicted)
        assert np.array_equal(calibration.get_ydata(), observed)
    assert labels_of(left) == ("1 - specificity", "sensitivity")
    assert labels_of(right) == ("mean score of the bin", "observed share of pneumonia")
    assert "n = 90" in text_of(figure)


def test_plot_roc_draws_a_reader_as_a_dot():
    given, labels = probabilities()
    left, _ = plotting.plot_roc({"a": given}, labels, readers={"one reader": (0.8, 0.7)}).axes
    (dot,) = [line for line in left.lines if line.get_label() == "one reader"]
    assert (dot.get_xdata(), dot.get_ydata()) == (pytest.approx([0.3]), pytest.approx([0.8]))
    assert "one reader" in [text.get_text() for text in left.get_legend().get_texts()]


def test_plot_confusions_prints_counts_and_shades_shares():
    given, labels = probabilities()
    names = ("normal", "bacterial", "viral")
    models = {"one": given, "two": given[:, [1, 0, 2]]}
    figure = plotting.plot_confusions(models, labels, names)
    for axis, (name, p) in zip(figure.axes, models.items(), strict=True):
        counts = metrics.confusion(p, labels)
        assert [int(text.get_text()) for text in axis.texts] == counts.ravel().tolist()
        shares = np.asarray(axis.collections[0].get_array()).reshape(3, 3)
        np.testing.assert_allclose(shares, counts / np.bincount(labels)[:, None])
        assert axis.get_title() == name and axis.get_xlabel() == "called"
        assert [tick.get_text() for tick in axis.get_xticklabels()] == list(names)
    assert figure.axes[0].get_ylabel() == "true"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == list(names)


def test_plot_comparison_has_one_dot_per_seed_and_a_bar_at_the_mean():
    table = {"auroc": {"alone": [0.7, 0.8], "together": [0.9, 0.92, 0.91]}, "mcc": {"alone": [0.3], "together": [0.5]}}
    figure = plotting.plot_comparison(table, {"auroc": {"published": 0.95}})
    for axis, (score, ways) in zip(figure.axes, table.items(), strict=True):
        assert axis.get_ylabel() == score
        assert [tick.get_text() for tick in axis.get_xticklabels()] == list(ways)
        dots, bars = axis.collections[::2], axis.collections[1::2]
        for number, values in enumerate(ways.values()):
            np.testing.assert_allclose(dots[number].get_offsets(), [[number, value] for value in values])
            assert bars[number].get_segments()[0][:, 1] == pytest.approx(np.mean(values))
    first, second = figure.axes
    assert first.lines[0].get_ydata() == [0.95, 0.95] and "published" in text_of(figure)
    assert not second.lines


# --- files and screen ---


def test_save_figure_writes_to_the_figures_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIMIA_LITE_FIGURES", str(tmp_path / "new"))
    figure, axis = plt.subplots(figsize=(2, 1))
    axis.plot([0, 1])
    path = plotting.save_figure(figure, "a_name")
    assert path == tmp_path / "new" / "a_name.png"
    assert imread(path).ndim == 3


def test_use_style_sets_150_dpi_and_grey_films():
    with plt.rc_context():
        plotting.use_style()
        assert plt.rcParams["savefig.dpi"] == 150 and plt.rcParams["image.cmap"] == "gray"
        colours = [to_hex(c["color"]) for c in plt.rcParams["axes.prop_cycle"]]
        assert colours == [colour.lower() for colour in plotting.OKABE_ITO]


def test_figures_are_shown_small_and_closed(films, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    for show, start in ((plotting.show_films, b"\xff\xd8"), (plotting.show_plot, b"\x89PNG")):
        figure = plotting.film_grid(films, {"a": [0, 1]})
        show(figure)
        assert shown.pop().data.startswith(start) and not plt.fignum_exists(figure.number)
