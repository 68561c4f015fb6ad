from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_lite.data import CLASSES_3, ChestXrays, DataError, partition, split_by_patient
from primia_lite.data.split import choose_films, resplit

properties = settings(max_examples=60, deadline=None, derandomize=True)


def films_of(n_patients: int, seed: int, max_films: int = 6, n_sites: int = 3, splits: bool = True) -> ChestXrays:
    """Patients of 1 to ``max_films`` films and one class each, at random sites; 1 x 1 px, for speed."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, max_films + 1, n_patients)
    of_film = np.repeat(np.arange(n_patients), count)
    label = rng.permutation(np.arange(n_patients) % 3)[of_film]
    part = (
        np.array(["train", "train", "val", "test"])[np.arange(n_patients) % 4]
        if splits
        else np.full(n_patients, "train")
    )
    shuffled = rng.permutation(len(of_film))
    return ChestXrays(
        images=np.zeros((len(of_film), 1, 1), np.uint8),
        labels=label[shuffled].astype(np.int64),
        class_names=CLASSES_3,
        patient_id=np.array([f"p{i}" for i in of_film[shuffled]]),
        site=np.array([f"S{i}" for i in rng.permutation(np.arange(n_patients) % n_sites)])[of_film[shuffled]],
        split=part[of_film[shuffled]],
    )


def parts_per_patient(patient_id: np.ndarray, part: np.ndarray) -> int:
    return max(len(np.unique(part[patient_id == patient])) for patient in np.unique(patient_id))


@properties
@given(
    n_patients=st.integers(30, 120),
    seed=st.integers(0, 10_000),
    fractions=st.sampled_from(
        [(0.8, 0.1, 0.1), (0.6, 0.2, 0.2), {"train": 0.5, "test": 0.5}, {"train": 0.9, "val": 0.1}]
    ),
)
def test_split_is_patient_disjoint_stratified_and_repeatable(n_patients, seed, fractions):
    films = films_of(n_patients, seed)
    split = split_by_patient(films.labels, films.patient_id, fractions, seed)
    assert parts_per_patient(films.patient_id, split) == 1
    np.testing.assert_array_equal(split, split_by_patient(films.labels, films.patient_id, fractions, seed))
    wanted = fractions if isinstance(fractions, dict) else dict(zip(("train", "val", "test"), fractions, strict=True))
    assert set(split) == set(wanted)
    for label in range(3):
        of_label = split[films.labels == label]
        for name, fraction in wanted.items():
            # Off by at most a patient (6 films) at each border, or by the one that keeps a part from being empty.
            assert abs(np.sum(of_label == name) - fraction * len(of_label)) <= 12
            assert np.any(of_label == name)


@properties
@given(n_patients=st.integers(30, 90), seed=st.integers(0, 10_000))
def test_split_depends_on_the_seed_and_not_on_the_order_of_films(n_patients, seed):
    films = films_of(n_patients, seed)
    split = split_by_patient(films.labels, films.patient_id, (0.6, 0.2, 0.2), seed)
    order = np.random.default_rng(seed).permutation(len(films))
    again = split_by_patient(films.labels[order], films.patient_id[order], (0.6, 0.2, 0.2), seed)
    np.testing.assert_array_equal(again, split[order])
    others = [split_by_patient(films.labels, films.patient_id, (0.6, 0.2, 0.2), seed + i) for i in range(1, 4)]
    assert any(np.any(other != split) for other in others)


def test_a_patient_with_films_of_two_classes_stays_whole():
    labels, patients = np.array([0, 1, 0, 0, 1, 1, 2, 2, 2]), np.array(list("aabcdefgh"))
    split = split_by_patient(labels, patients, {"train": 0.5, "test": 0.5}, 0)
    assert parts_per_patient(patients, split) == 1


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.8, 0.1, 0.2), "add up"),
        ({"train": 1.5, "test": -0.5}, "positive"),
        ({"dev": 1.0}, "dev"),
    ],
)
def test_wrong_fractions_are_named(fractions, message):
    films = films_of(30, 0)
    with pytest.raises(DataError, match=message):
        split_by_patient(films.labels, films.patient_id, fractions, 0)


def test_too_few_patients_of_a_class_are_named():
    with pytest.raises(DataError, match="viral"):
        split_by_patient(np.array([0, 0, 0, 2]), np.array(list("abcd")), (0.5, 0.25, 0.25), 0, class_names=CLASSES_3)
    with pytest.raises(DataError, match="labels"):
        split_by_patient(np.array([0, 0]), np.array(["a"]), (0.5, 0.25, 0.25), 0)


@properties
@given(n_patients=st.integers(40, 100), seed=st.integers(0, 10_000), n_films=st.integers(1, 400))
def test_chosen_films_are_whole_patients_of_every_class_and_split(n_patients, seed, n_films):
    films = films_of(n_patients, seed)
    chosen = choose_films(films.labels, films.patient_id, films.split, n_films, seed)
    mask = np.isin(np.arange(len(films)), chosen)
    assert parts_per_patient(films.patient_id, mask) == 1
    part = films.subset(chosen)
    groups = films.counts()
    assert all(part.counts()[split][name] > 0 for split in groups for name in CLASSES_3 if groups[split][name])
    # Off by at most a patient (6 films) in each of the 9 groups.
    assert abs(len(chosen) - min(n_films, len(films))) <= 9 * 6
    np.testing.assert_array_equal(chosen, choose_films(films.labels, films.patient_id, films.split, n_films, seed))


def assert_is_partition(films: ChestXrays, parts: list[ChestXrays]) -> None:
    key = [f"{p}|{s}|{label}" for p, s, label in zip(films.patient_id, films.site, films.labels, strict=True)]
    dealt = [
        f"{p}|{s}|{label}"
        for part in parts
        for p, s, label in zip(part.patient_id, part.site, part.labels, strict=True)
    ]
    assert sorted(key) == sorted(dealt)
    patients = [patient for part in parts for patient in np.unique(part.patient_id)]
    assert len(patients) == len(set(patients))


@properties
@given(n_patients=st.integers(60, 150), seed=st.integers(0, 10_000), n_hospitals=st.integers(1, 5))
def test_iid_hospitals_have_equal_shares_of_every_class(n_patients, seed, n_hospitals):
    films = films_of(n_patients, seed)
    parts = partition(films, n_hospitals, "iid", seed=seed)
    assert len(parts) == n_hospitals
    assert_is_partition(films, parts)
    for part in parts:
        for label in range(3):
            for split in ("train", "val", "test"):  # off by at most a patient (6 films) at each border
                ours, all_films = (f.labels[f.split == split] for f in (part, films))
                assert abs(np.sum(ours == label) - np.sum(all_films == label) / n_hospitals) <= 12
    again = partition(films, n_hospitals, "iid", seed=seed)
    assert [p.fingerprint() for p in again] == [p.fingerprint() for p in parts]


@properties
@given(
    n_patients=st.integers(60, 150),
    seed=st.integers(0, 10_000),
    alpha=st.floats(0.1, 100),
    n_hospitals=st.integers(1, 4),
)
def test_dirichlet_is_a_partition_or_a_clear_error(n_patients, seed, alpha, n_hospitals):
    films = films_of(n_patients, seed)
    try:
        parts = partition(films, n_hospitals, "dirichlet", alpha=alpha, seed=seed)
    except DataError as error:
        assert "larger alpha" in str(error) and "scheme 'dirichlet'" in str(error) and "hospital " in str(error)
    else:
        assert_is_partition(films, parts)
        assert all(len(np.unique(part.of_split("train").labels)) > 1 for part in parts)
        again = partition(films, n_hospitals, "dirichlet", alpha=alpha, seed=seed)
        assert [p.fingerprint() for p in again] == [p.fingerprint() for p in parts]


@properties
@given(
    n_patients=st.integers(60, 150),
    seed=st.integers(0, 10_000),
    n_sites=st.integers(1, 6),
    n_hospitals=st.integers(1, 6),
)
def test_by_site_keeps_sites_together(n_patients, seed, n_sites, n_hospitals):
    films = films_of(n_patients, seed, n_sites=n_sites)
    if n_hospitals > n_sites:
        with pytest.raises(DataError, match=f"n_hospitals={n_sites} or fewer"):
            partition(films, n_hospitals, "by_site")
        return
    parts = partition(films, n_hospitals, "by_site")
    assert_is_partition(films, parts)
    sites = [site for part in parts for site in part.sites]
    assert sorted(sites) == list(films.sites)
    if n_hospitals == n_sites:
        assert [part.sites for part in parts] == [(site,) for site in films.sites]


def test_alpha_sets_the_skew():
    films = films_of(3000, 0, max_films=1, splits=False)

    def skew(alpha: float) -> float:
        shares = [
            np.bincount(part.labels, minlength=3) / 1000 for part in partition(films, 2, "dirichlet", alpha, seed=3)
        ]
        return float(np.abs(np.array(shares) - 0.5).mean())

    assert skew(1000) < 0.03 < 0.1 < skew(1)


def test_by_site_takes_every_site_by_default_and_keeps_a_travelling_patient_whole():
    films = films_of(60, 2, splits=False)
    assert len(partition(films, None, "by_site")) == 3
    site = films.site.copy()
    traveller = np.flatnonzero(films.patient_id == films.patient_id[np.argmax(films.site == "S0")])
    site[traveller] = "S0"
    site[traveller[: len(traveller) // 2]] = "S1"
    moved = ChestXrays(films.images, films.labels, CLASSES_3, films.patient_id, site, films.split)
    parts = partition(moved, 3, "by_site")
    assert_is_partition(moved, parts)
    assert np.sum(parts[0].patient_id == films.patient_id[traveller[0]]) == len(traveller)


def test_a_hospital_with_one_class_or_no_film_is_named():
    films = films_of(60, 3, splits=False)
    lopsided = films.subset((films.site != "S2") | (films.labels == 0))
    with pytest.raises(DataError, match="hospital 3 of 3.*'normal'"):
        partition(lopsided, 3, "by_site")
    with pytest.raises(DataError, match="larger"):
        partition(films, 8, "dirichlet", alpha=0.01)
    with pytest.raises(DataError, match="film"):
        partition(films, 200, "iid")


def test_validation_films_do_not_hide_a_training_set_of_one_class():
    films = films_of(80, 4)
    one_class = films.subset((films.split != "train") | (films.labels == 1))
    with pytest.raises(DataError, match="bacterial"):
        partition(one_class, 1, "iid")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_hospitals": 3, "scheme": "random"}, "random"),
        ({"n_hospitals": 2.5}, "n_hospitals=2.5"),
        ({"n_hospitals": None}, "n_hospitals=None"),
        ({"n_hospitals": 2, "scheme": "dirichlet", "alpha": 0}, "alpha=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        partition(films_of(30, 0), **arguments)
    with pytest.raises(DataError, match="films"):
        partition(films_of(30, 0).subset([]), 2)


def test_a_resplit_is_as_large_as_the_split_that_came_and_cut_from_all_films():
    films = films_of(400, seed=3)
    first, second = resplit(films, 1), resplit(films, 2)
    for other in (first, second):
        assert parts_per_patient(other.patient_id, other.split) == 1
        assert other.images is films.images  # features computed once serve every split
        for name in ("train", "val", "test"):
            assert abs(np.sum(other.split == name) - np.sum(films.split == name)) <= 18
            for label in range(3):  # the classes' shares are those of all films
                share = np.mean(other.labels[other.split == name] == label)
                assert share == pytest.approx(np.mean(films.labels == label), abs=0.03)
    np.testing.assert_array_equal(resplit(films, 1).split, first.split)
    was_test = films.split == "test"
    assert 0 < np.mean(first.split[was_test] == "test") < 0.5  # drawn from all, the old test films among them
    assert np.mean(first.split == second.split) < 0.8


def test_films_without_a_test_part_are_resplit_without_one():
    films = films_of(60, seed=1, splits=False)
    assert set(resplit(films, 0).split) == {"train"}
