"""Scores against scikit-learn, and intervals that resample patients."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from primia_lite import metrics
from primia_lite.config import UserError


def classifier(n=300, classes=3, seed=0, skill=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(1, keepdims=True), labels


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_scikit_learns(classes):
    probabilities, labels = classifier(classes=classes)
    called = probabilities.argmax(1)
    got = metrics.scores(probabilities, labels)
    assert got == {
        "auroc": pytest.approx(sk.roc_auc_score(labels != 0, 1 - probabilities[:, 0])),
        "accuracy": pytest.approx(sk.accuracy_score(labels, called)),
        "mcc": pytest.approx(sk.matthews_corrcoef(labels, called)),
        "loss": pytest.approx(sk.log_loss(labels, probabilities)),
    }


def test_auroc_is_the_share_of_pairs_in_order():
    probabilities, labels = classifier(n=80)
    probabilities = probabilities.round(1)  # ties count half
    score = 1 - probabilities[:, 0]
    sick, well = score[labels > 0, None], score[None, labels == 0]
    pairs = (sick > well) + 0.5 * (sick == well)
    assert metrics.auroc(probabilities, labels) == pytest.approx(pairs.mean())


def test_scores_where_there_is_nothing_to_tell_apart():
    probabilities, labels = classifier(n=20)
    for only in (np.zeros_like(labels), np.ones_like(labels)):
        assert np.isnan(metrics.auroc(probabilities, only))
    always = np.tile([1.0, 0.0, 0.0], (20, 1))
    assert metrics.mcc(always, labels) == 0.0
    assert np.isfinite(metrics.scores(always, labels)["loss"])


def test_confusion_counts_true_by_row_and_keeps_empty_classes():
    probabilities = np.eye(3)[[0, 0, 1, 1, 1]]
    labels = np.array([0, 1, 1, 1, 0])
    assert metrics.confusion(probabilities, labels).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_best_threshold_maximises_sensitivity_plus_specificity():
    probabilities, labels = classifier(n=200)
    best = metrics.best_threshold(probabilities, labels)
    reached = sum(metrics.sensitivity_specificity(probabilities, labels, best))
    score = metrics.pneumonia_score(probabilities)
    every = [sum(metrics.sensitivity_specificity(probabilities, labels, t)) for t in np.unique(score)]
    assert np.isfinite(best) and best in score
    assert reached == pytest.approx(max(every))


def test_sensitivity_and_specificity_by_hand():
    scores = np.array([0.1, 0.5, 0.6, 0.4, 0.9])
    probabilities = np.stack([1 - scores, scores / 2, scores / 2], 1)
    labels = np.array([0, 0, 1, 2, 2])
    assert metrics.sensitivity_specificity(probabilities, labels, 0.5) == (pytest.approx(2 / 3), 0.5)
    assert metrics.sensitivity_specificity(probabilities, labels, 0.0) == (1.0, 0.0)


def test_calibration_of_a_calibrated_and_of_an_overconfident_model():
    rng = np.random.default_rng(0)
    score = rng.uniform(size=20000)
    labels = (rng.uniform(size=20000) < score).astype(int)
    honest = np.stack([1 - score, score], 1)
    predicted, observed = metrics.calibration(honest, labels)
    assert len(predicted) == len(observed) == 10 and (np.diff(predicted) > 0).all()
    for number, part in enumerate(np.array_split(np.argsort(score), 10)):
        assert predicted[number] == pytest.approx(score[part].mean(), abs=1e-3)
        assert observed[number] == pytest.approx(labels[part].mean(), abs=5e-3)
    assert metrics.expected_calibration_error(honest, labels) < 0.02
    bold = np.clip(2 * score - 0.5, 0, 1)
    # The mean of |score - bold| over uniform scores is 1/8.
    error = metrics.expected_calibration_error(np.stack([1 - bold, bold], 1), labels)
    assert error == pytest.approx(1 / 8, abs=0.03)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_covers_a_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    trials, covered = 200, 0
    for trial in range(trials):
        values = rng.normal(3.0, 2.0, 60)
        low, high = metrics.bootstrap(
            lambda i, values=values: values[i].mean(), np.arange(60), draws=200, seed=trial, level=0.9
        )
        covered += low <= 3.0 <= high
    assert 0.82 < covered / trials < 0.96


@pytest.mark.parametrize("shuffled", [False, True])
def test_whole_patients_are_resampled(shuffled):
    # Five films of a patient that are all the same say as much as one: the interval must not shrink.
    rng = np.random.default_rng(2)
    per_patient = rng.normal(size=80)
    patient = np.repeat([f"p{i}" for i in range(80)], 5)
    values = np.repeat(per_patient, 5)
    if shuffled:
        order = rng.permutation(400)
        patient, values = patient[order], values[order]
    low, high = metrics.bootstrap(lambda i: values[i].mean(), patient, draws=2000)
    low_1, high_1 = metrics.bootstrap(lambda i: per_patient[i].mean(), np.arange(80), draws=2000)
    by_film = metrics.bootstrap(lambda i: values[i].mean(), np.arange(400), draws=2000)
    assert high - low == pytest.approx(high_1 - low_1, rel=0.08)
    assert high - low > 1.9 * (by_film[1] - by_film[0])
    standard_error = per_patient.std() / np.sqrt(80)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_every_draw_takes_all_films_of_as_many_patients():
    patient = np.array(["b", "a", "c", "a", "b", "a"])
    seen = []

    def statistic(index):
        seen.append(index)
        return 0.0

    metrics.bootstrap(statistic, patient, draws=100)
    sizes = {"a": 3, "b": 2, "c": 1}
    for index in seen:
        drawn = {name: np.sum(patient[index] == name) / size for name, size in sizes.items()}
        assert all(share == int(share) for share in drawn.values()) and sum(drawn.values()) == 3
        assert all(len(set(np.bincount(index, minlength=6)[patient == name])) == 1 for name in sizes)


def test_a_paired_difference_of_a_model_and_itself_is_nothing():
    probabilities, labels = classifier(n=100)
    patient = np.repeat(np.arange(50), 2)

    def difference(i):
        return metrics.accuracy(probabilities[i], labels[i]) - metrics.accuracy(probabilities[i].copy(), labels[i])

    assert metrics.bootstrap(difference, patient, draws=100) == (0.0, 0.0)


def test_an_interval_repeats_by_seed_and_leaves_out_draws_without_a_value():
    probabilities, labels = classifier(n=12)
    labels = np.array([1] + [0] * 11)  # a third of the draws has no pneumonia: no AUROC

    def auroc(i):
        return metrics.auroc(probabilities[i], labels[i])

    first, second = (metrics.bootstrap(auroc, np.arange(12), draws=100, seed=3) for _ in range(2))
    assert first == second != metrics.bootstrap(auroc, np.arange(12), draws=100, seed=4)
    assert 0 <= first[0] <= first[1] <= 1


def test_too_few_draws_are_refused():
    with pytest.raises(UserError, match="draws is 20: an interval needs at least 100"):
        metrics.bootstrap(lambda i: 0.0, np.arange(5), draws=20)
