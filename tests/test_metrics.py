"""Scores against scikit-learn and scikit-image, intervals that resample patients, and who a film is of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn import metrics as sk

from primia_lite import metrics
from primia_lite.config import UserError
from primia_lite.data import phantom


def classifier(n=300, classes=3, seed=0, skill=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes)) + skill * np.eye(classes)[labels]
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(1, keepdims=True), labels


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_scikit_learns(classes, n):
    probabilities, labels = classifier(n, classes)
    called = probabilities.argmax(1)
    got = metrics.scores(probabilities, labels)
    assert got == {
        "auroc": pytest.approx(sk.roc_auc_score(labels != 0, 1 - probabilities[:, 0])),
        "accuracy": pytest.approx(sk.accuracy_score(labels, called)),
        "mcc": pytest.approx(sk.matthews_corrcoef(labels, called)),
        "loss": pytest.approx(sk.log_loss(labels, probabilities)),
    }
    for decimals in (1, 2):  # many ties, and some
        tied = probabilities.round(decimals)
        assert metrics.auroc(tied, labels) == pytest.approx(sk.roc_auc_score(labels != 0, 1 - tied[:, 0]))
        assert metrics.mcc(tied, labels) == pytest.approx(sk.matthews_corrcoef(labels, tied.argmax(1)))
        matrix = sk.confusion_matrix(labels, tied.argmax(1), labels=range(classes))
        assert (metrics.confusion(tied, labels) == matrix).all()


def test_scores_where_there_is_nothing_to_tell_apart():
    probabilities, labels = classifier(n=20)
    for only in (np.zeros_like(labels), np.ones_like(labels)):
        assert np.isnan(metrics.auroc(probabilities, only))
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc(probabilities * np.nan, labels)
    always = np.tile([1.0, 0.0, 0.0], (20, 1))
    assert metrics.mcc(always, labels) == 0.0
    assert np.isfinite(metrics.scores(always, labels)["loss"])


def test_best_threshold_maximises_sensitivity_plus_specificity():
    probabilities, labels = classifier(n=200)
    best = metrics.best_threshold(probabilities, labels)

    def reached(threshold):
        both = metrics.sensitivity, metrics.specificity
        return sum(score(probabilities, labels, threshold=threshold) for score in both)

    score = metrics.pneumonia_score(probabilities)
    assert np.isfinite(best) and best in score
    assert reached(best) == pytest.approx(max(reached(t) for t in np.unique(score)))


def test_sensitivity_and_specificity_by_hand():
    scores = np.array([0.1, 0.5, 0.6, 0.4, 0.9])
    probabilities = np.stack([1 - scores, scores / 2, scores / 2], 1)
    labels = np.array([0, 0, 1, 2, 2])
    for threshold, sensitivity, specificity in ((0.5, 2 / 3, 0.5), (0.0, 1.0, 0.0)):
        assert metrics.sensitivity(probabilities, labels, threshold=threshold) == pytest.approx(sensitivity)
        assert metrics.specificity(probabilities, labels, threshold=threshold) == specificity
    assert metrics.specificity(probabilities, labels) == 0.5


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


@pytest.mark.parametrize("name", ["auroc", "accuracy", "mcc", "sensitivity", "specificity"])
def test_a_film_with_a_weight_counts_as_often(name):
    score = getattr(metrics, name)
    probabilities, labels = classifier(n=90)
    probabilities = probabilities.round(1)  # with ties
    weights = np.random.default_rng(5).integers(4, size=(6, 90))
    repeated = [score(probabilities[i], labels[i]) for i in (np.repeat(np.arange(90), w) for w in weights)]
    assert score(probabilities, labels, weights=weights) == pytest.approx(repeated)
    if name == "auroc":
        weights = np.random.default_rng(6).random((6, 90))
        theirs = [sk.roc_auc_score(labels > 0, 1 - probabilities[:, 0], sample_weight=w) for w in weights]
        assert score(probabilities, labels, weights) == pytest.approx(theirs)


def mean_of(values, labels, weights):
    """A score for tests: the mean of numbers that stand in for probabilities."""
    return weights @ values / weights.sum(-1)


def interval(values, patient, **options):
    return metrics.bootstrap(mean_of, [values], np.zeros(len(values), dtype=int), patient, **options)


def test_the_interval_covers_what_other_runs_and_other_patients_would_give():
    # Each run has luck of its own, shared by all patients: an interval over patients alone would miss it.
    rng = np.random.default_rng(3)
    trials, covered, by_patients = 200, 0, 0
    labels, patient = np.zeros(100, dtype=int), np.arange(100)
    for trial in range(trials):
        of_patients = rng.normal(3.0, 1.0, 100)
        runs = [of_patients + rng.normal(0.0, 0.3) + rng.normal(0.0, 0.2, 100) for _ in range(10)]
        low, high = metrics.bootstrap(mean_of, runs, labels, patient, draws=200, seed=trial, level=0.9)
        covered += low <= 3.0 <= high
        low, high = interval(np.mean(runs, axis=0), patient, draws=200, seed=trial, level=0.9)
        by_patients += low <= 3.0 <= high
    assert 0.82 < covered / trials < 0.96
    assert by_patients < covered - 10


def test_a_difference_whose_sign_hangs_on_the_run_has_zero_inside():
    labels, patient = np.zeros(400, dtype=int), np.arange(400)
    base = np.random.default_rng(4).normal(size=400)
    runs, others = [base - 0.02, base + 0.004, base - 0.001], [base, base, base]
    low, high = metrics.bootstrap(mean_of, runs, labels, patient, others)
    assert low < 0 < high  # by patients alone: -0.0057 for certain
    assert low == pytest.approx(-0.02) and high == pytest.approx(0.004)


def test_runs_are_paired_by_their_place():
    labels, patient = np.zeros(50, dtype=int), np.repeat(np.arange(25), 2)
    runs = [np.full(50, luck) for luck in (1.0, 5.0, 9.0)]
    others = [run - 0.5 for run in runs]
    assert metrics.bootstrap(mean_of, runs, labels, patient, others, draws=100) == (0.5, 0.5)
    low, high = metrics.bootstrap(mean_of, runs, labels, patient, others[::-1], draws=100)
    assert high - low > 5
    with pytest.raises(UserError, match="paired"):
        metrics.bootstrap(mean_of, runs, labels, patient, others[:2])


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
    low, high = interval(values, patient, draws=2000)
    low_1, high_1 = interval(per_patient, np.arange(80), draws=2000)
    by_film = interval(values, np.arange(400), draws=2000)
    assert high - low == pytest.approx(high_1 - low_1, rel=0.08)
    assert high - low > 1.9 * (by_film[1] - by_film[0])
    standard_error = per_patient.std() / np.sqrt(80)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_every_draw_takes_all_films_of_as_many_patients():
    patient = np.array(["b", "a", "c", "a", "b", "a"])
    seen = []

    def score(values, labels, weights):
        seen.append(weights)
        return weights.sum(1)

    metrics.bootstrap(score, [np.zeros(6)] * 3, np.zeros(6, dtype=int), patient, draws=100)
    assert all(np.array_equal(seen[0], other) for other in seen)  # the same patients for every run
    assert seen[0].shape == (100, 6) and len(np.unique(seen[0], axis=0)) > 5
    for name in "abc":
        of_patient = seen[0][:, patient == name]
        assert (of_patient == of_patient[:, :1]).all()
    assert (seen[0][:, [0, 1, 2]].sum(1) == 3).all()  # one film of each patient: three patients in all


def test_an_interval_repeats_by_seed_and_leaves_out_draws_without_a_value():
    probabilities, _ = classifier(n=12)
    labels = np.array([1] + [0] * 11)  # a third of the draws has no pneumonia: no AUROC
    first, second, other = (
        metrics.bootstrap(metrics.auroc, [probabilities], labels, np.arange(12), draws=100, seed=s) for s in (3, 3, 4)
    )
    assert first == second != other
    assert 0 <= first[0] <= first[1] <= 1


def test_too_few_draws_are_refused():
    with pytest.raises(UserError, match="draws"):
        interval(np.zeros(5), np.arange(5), draws=20)


def test_sensitivity_at_a_specificity_is_a_point_of_the_roc_curve():
    scores = np.array([0.1, 0.2, 0.5, 0.8, 0.3, 0.6, 0.9, 0.9])
    probabilities = np.stack([1 - scores, scores], 1)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    for specificity, sensitivity in ((1.0, 0.5), (0.75, 0.75), (0.6, 0.75), (0.5, 1.0), (0.0, 1.0)):
        assert metrics.sensitivity_at(probabilities, labels, specificity) == sensitivity


# --- films that an attacker reconstructs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films():
    return phantom.generate(60, 64, seed=8).images / 255.0


@pytest.fixture(scope="module")
def gallery(films):
    """The first 20 films, beside the mean of the others."""
    return metrics.Gallery(films[:20], films[20:].mean(0))


def noisy(film, sigma, seed=0):
    return np.clip(film + sigma * np.random.default_rng(seed).normal(size=film.shape), 0, 1)


@pytest.mark.parametrize("sigma", [0.003, 0.1, 0.5])
def test_psnr_is_scikit_images(films, sigma):
    image = noisy(films[0], sigma)
    assert metrics.psnr(image, films[0]) == pytest.approx(peak_signal_noise_ratio(films[0], image, data_range=1.0))
    assert metrics.psnr(image[None, None], films[0]) == metrics.psnr(films[0], image)


def test_psnr_at_its_ends(films):
    assert metrics.psnr(films[0], films[0]) == pytest.approx(200)
    assert metrics.psnr(np.zeros((4, 4)), np.ones((4, 4))) == pytest.approx(0)
    assert metrics.psnr(np.full((4, 4), 0.6), np.full((4, 4), 0.5)) == pytest.approx(20)
    assert np.isnan(metrics.psnr(np.full((4, 4), np.nan), np.ones((4, 4))))


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_ssim_is_scikit_images_and_the_papers(films, sigma):
    image, truth = noisy(films[0], sigma), films[0]
    got = metrics.ssim(image[None], truth)
    assert got == pytest.approx(structural_similarity(truth, image, data_range=1.0))
    # Wang et al. 2004, equation 13, in windows of 7 x 7.
    mean_x, mean_y = uniform_filter(image, 7), uniform_filter(truth, 7)
    unbiased = 49 / 48
    var_x = unbiased * (uniform_filter(image**2, 7) - mean_x**2)
    var_y = unbiased * (uniform_filter(truth**2, 7) - mean_y**2)
    both = unbiased * (uniform_filter(image * truth, 7) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    each = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert got == pytest.approx(each[3:-3, 3:-3].mean(), abs=1e-6)
    assert metrics.ssim(truth, truth) == pytest.approx(1)


def test_films_of_two_sizes_arent_compared(films, gallery):
    for score in (metrics.psnr, metrics.ssim):
        with pytest.raises(UserError, match="size"):
            score(films[0], films[0, :, :-1])
    with pytest.raises(UserError, match="size"):
        metrics.Gallery(films, films[0, :, :-1])
    with pytest.raises(UserError, match="reconstructions"):
        gallery.match(films[:2], [0, 1, 2])
    with pytest.raises(UserError, match="reconstructions"):
        gallery.score(films[:2], [0])


def test_pncc_is_the_correlation_of_least_squares_residuals(films, gallery):
    images = np.stack([noisy(films[k], 0.1, k) for k in range(3)])
    shared = np.stack([np.ones(64 * 64), films[20:].mean(0).ravel()], 1)

    def residual(x):
        return x - shared @ np.linalg.lstsq(shared, x, rcond=None)[0]

    want = [
        [np.corrcoef(residual(image.ravel()), residual(film.ravel()))[0, 1] for film in films[:20]] for image in images
    ]
    got = gallery.pncc(images[:, None])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got).max() <= 1 and got.shape == (3, 20)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_what_all_children_share_identifies_nobody(films, gallery, kind):
    mean = films[20:].mean(0)
    for image in (mean, np.zeros_like(mean), np.full_like(mean, 0.3), 0.5 * mean + 0.2, np.full_like(mean, np.nan)):
        ranks = [gallery.rank(image.astype(kind), i) for i in range(20)]
        assert ranks == [20] * 20
        assert not gallery.pncc(image.astype(kind)[None]).any()
    (row,) = gallery.score(mean.astype(kind)[None], [3])
    assert row["identified"] == 0 and row["psnr_gain"] == pytest.approx(0, abs=1e-4)
    assert row["pncc"] == 0 and row["ssim_gain"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("contrast", "brightness", "shared"), [(0.5, 0.3, 0.0), (0.1, 0.2, 0.6), (0.01, 0.5, 0.3)])
def test_brightness_contrast_and_the_mean_film_count_for_nothing(films, gallery, contrast, brightness, shared):
    for i in range(20):
        image = (contrast * films[i] + brightness + shared * films[20:].mean(0)).astype(np.float32)
        assert gallery.rank(image, i) == 1
        assert gallery.pncc(image[None])[0, i] == pytest.approx(1, abs=1e-3)
        assert gallery.rank(-image, i) == 20  # a negative isn't the film


def test_noise_lowers_ssim_below_the_mean_films_and_still_identifies(films, gallery):
    images = np.stack([noisy(film, 0.1, k) for k, film in enumerate(films[:20])])
    rows = gallery.score(images, range(20))
    assert all(row["identified"] == 1 for row in rows)
    assert np.mean([row["ssim_gain"] for row in rows]) < 0
    slight = gallery.score(np.stack([noisy(film, 0.03, k) for k, film in enumerate(films[:20])]), range(20))
    assert all(row["identified"] == 1 and row["ssim"] < 0.95 for row in slight)


def test_a_stranger_and_noise_are_placed_by_chance(films, gallery):
    rng = np.random.default_rng(0)
    images = np.concatenate([films[20:], rng.random((40, 64, 64))])
    first = np.mean([gallery.rank(image, k % 20) == 1 for k, image in enumerate(images)])
    assert first < 0.2


def test_twins_count_as_one(films):
    twins = metrics.Gallery(np.concatenate([films[:5], films[:5]]), films[20:].mean(0))
    assert [twins.rank(films[i], i) for i in range(5)] == [1] * 5
    assert [twins.rank(films[i], 5 + i) for i in range(5)] == [1] * 5
    assert min(twins.rank(films[0], k) for k in (1, 2, 3, 4)) == 3  # both of the twins are before them


def test_a_film_of_the_mean_films_kind_is_never_the_best(films):
    mean = films[20:].mean(0)
    with_mean = metrics.Gallery(np.concatenate([films[:3], 0.5 * mean[None] + 0.1]), mean)
    assert not with_mean.pncc(films[:3])[:, 3].any() and with_mean.rank(films[0], 3) > 1


def test_a_permuted_batch_is_put_right(films, gallery):
    index = [4, 9, 2, 13]
    images = np.stack([noisy(films[i], 0.2, i) for i in index])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0]):
        shuffled = images[order][:, None]
        matched = gallery.match(shuffled, index)
        assert np.array_equal(matched[:, 0], images)
        assert gallery.score(shuffled, index) == gallery.score(images, index)
