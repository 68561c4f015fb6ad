"""The phantom: reproducible, the same anatomy at every size, patients that differ, classes and sites that differ."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from threadpoolctl import threadpool_limits

from primia_lite.config import DataError
from primia_lite.data import phantom
from primia_lite.data.types import ChestXrays
from primia_lite.phantom import CLASS_FRACTIONS

N = 200


@pytest.fixture(scope="module")
def films() -> ChestXrays:
    return phantom.generate(N, 64, seed=3)


def _flat(images: np.ndarray) -> np.ndarray:
    """Films as rows of zero mean and unit length, so that a product is a correlation."""
    x = images.reshape(len(images), -1).astype(float)
    x -= x.mean(axis=1, keepdims=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_shapes_and_labels(films):
    assert len(films) == N and films.size == 64
    assert films.images.dtype == np.uint8 and films.labels.dtype == np.int64
    assert films.class_names == ("normal", "bacterial", "viral")
    assert films.source == "phantom"
    assert set(films.site) == {"A", "B", "C"}
    assert films.patient_id[0] == "phantom-00000"
    for name, share in CLASS_FRACTIONS.items():
        assert np.mean(films.labels == films.class_names.index(name)) == pytest.approx(share, abs=0.08)


def test_same_seed_same_bytes_however_many_films_follow(films):
    again = phantom.generate(50, 64, seed=3)
    for name in ("images", "labels", "patient_id", "site", "split", "lung_mask", "lesion_mask"):
        assert np.array_equal(getattr(films, name)[:50], getattr(again, name)), name


def test_bytes_do_not_depend_on_the_number_of_threads():
    with threadpool_limits(1):
        one = phantom.generate(8, 256, seed=2)
    with threadpool_limits(2):
        two = phantom.generate(8, 256, seed=2)
    assert np.array_equal(one.images, two.images)


def test_other_seeds_make_other_films(films):
    other = phantom.generate(20, 64, seed=4)
    assert np.abs(other.images.astype(int) - films.images[:20]).mean() > 10
    negative = phantom.generate(2, 32, seed=2**40)
    assert len(negative) == 2


@pytest.mark.parametrize("size", [28, 100, 224])
def test_any_size(size):
    films = phantom.generate(3, size, seed=1)
    assert films.images.shape == films.lung_mask.shape == films.lesion_mask.shape == (3, size, size)
    assert films.images.std(axis=(1, 2)).min() > 20


@pytest.mark.parametrize("size", [28, 256])
def test_anatomy_is_the_same_at_every_size(films, size):
    other = phantom.generate(12, size, seed=3)
    resized = np.stack(
        [ndimage.zoom(f.astype(float), 64 / size, order=1, grid_mode=True, mode="nearest") for f in other.images]
    )
    assert np.sum(_flat(resized) * _flat(films.images[:12]), axis=1).min() > 0.9
    assert np.array_equal(other.labels, films.labels[:12])


def test_128_px_reduced_is_the_64_px_film(films):
    large = phantom.generate(20, 128, seed=3)
    reduced = large.images.reshape(20, 64, 2, 64, 2).mean(axis=(2, 4))
    assert np.sum(_flat(reduced) * _flat(films.images[:20]), axis=1).min() > 0.97
    assert np.mean(large.lung_mask[:, ::2, ::2] == films.lung_mask[:20]) > 0.97


def test_films_of_a_patient_resemble_each_other(films):
    _, count = np.unique(films.patient_id, return_counts=True)
    assert set(count) == {1, 2, 3, 4}
    x = _flat(films.images)
    similar = x @ x.T
    same = films.patient_id[:, None] == films.patient_id[None, :]
    same_class = films.labels[:, None] == films.labels[None, :]
    np.fill_diagonal(similar, np.nan)
    within = np.nanmean(similar[same])
    across = np.nanmean(similar[~same & same_class])
    assert within > across + 0.04
    assert len(np.unique(films.images.reshape(N, -1), axis=0)) == N, "two films are identical"


def test_a_patient_has_one_class_site_and_split(films):
    for patient in np.unique(films.patient_id):
        rows = films.patient_id == patient
        for column in (films.labels, films.site, films.split):
            assert len(np.unique(column[rows])) == 1


def test_masks(films):
    area = films.lung_mask.mean(axis=(1, 2))
    assert area.min() > 0.08 and area.max() < 0.5
    assert not films.lesion_mask[films.labels == 0].any()
    bacterial = films.lesion_mask[films.labels == 1].any(axis=(1, 2))
    viral = films.lesion_mask[films.labels == 2].any(axis=(1, 2))
    assert bacterial.all() and viral.all()
    wide = ndimage.binary_dilation(films.lung_mask, np.ones((1, 3, 3), bool))
    assert not (films.lesion_mask & ~wide).any()


def test_lungs_are_dark_and_consolidations_are_bright(films):
    inside = np.array([film[mask].mean() for film, mask in zip(films.images, films.lung_mask, strict=True)])
    beside = np.array([film[20:50, 28:36].mean() for film in films.images])
    assert np.mean(inside < beside) > 0.95
    rows = films.labels == 1
    brighter = [
        film[lesion].mean() - film[lung & ~lesion].mean()
        for film, lung, lesion in zip(films.images[rows], films.lung_mask[rows], films.lesion_mask[rows], strict=True)
        if lesion.sum() > 20 and (lung & ~lesion).sum() > 20
    ]
    assert np.mean(brighter) > 10


def test_viral_films_are_hyperinflated(films):
    area = films.lung_mask.sum(axis=(1, 2))
    # the lowest row of lung in the columns where the domes are highest
    dome = np.array([np.flatnonzero(mask[:, 18:46].any(axis=1)).max() for mask in films.lung_mask])
    normal, viral = films.labels == 0, films.labels == 2
    assert area[viral].mean() > 1.03 * area[normal].mean()
    assert dome[viral].mean() > dome[normal].mean()


def test_sites_differ(films):
    normal = films.labels == 0
    mean = {s: films.images[normal & (films.site == s)].mean() for s in "ABC"}
    contrast = {s: films.images[normal & (films.site == s)].std(axis=(1, 2)).mean() for s in "ABC"}
    assert np.ptp(list(contrast.values())) > 5
    assert np.ptp(list(mean.values())) > 3


def test_splits_are_stratified_and_disjoint():
    films = phantom.generate(300, 28, seed=5, split_fractions={"train": 0.6, "val": 0.2, "test": 0.2})
    by_patient = {p: (s, k) for p, s, k in zip(films.patient_id, films.split, films.labels, strict=True)}
    splits = np.array([s for s, _ in by_patient.values()])
    labels = np.array([k for _, k in by_patient.values()])
    for label in range(3):
        for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
            assert np.mean(splits[labels == label] == name) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 27}, "size"),
        ({"size": 257}, "size"),
        ({"size": 64.5}, "size"),
        ({"n_films": 0}, "n_films"),
        ({"split_fractions": {"train": -1.0, "test": 2.0}}, "split_fractions"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(DataError, match=words):
        phantom.generate(**({"n_films": 2, "size": 32} | arguments))
