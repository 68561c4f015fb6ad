"""Splits and hospital partitions that never part a patient's films."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from primia_lite.config import DataError
from primia_lite.data.types import SPLITS, ChestXrays


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _patients(labels: np.ndarray, patient_id: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each film's patient [N], each patient's number of films [P], and class [P]: the commonest of its labels."""
    names, of_film, n_films = np.unique(patient_id, return_inverse=True, return_counts=True)
    votes = np.zeros((len(names), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(votes, (of_film, labels), 1)
    # Of equally common labels the last one wins: a child with a normal and a pneumonia film counts as ill.
    return of_film, n_films, votes.shape[1] - 1 - votes[:, ::-1].argmax(axis=1)


def _deal(n_films: np.ndarray, shares: np.ndarray, rng: np.random.Generator, *, fill: bool) -> np.ndarray:
    """Part of each patient [P], so that the parts hold ``shares`` of the films, to within a patient at each border.

    ``fill``: with enough patients no part of a positive share stays empty.
    """
    # Own code because scikit-learn's StratifiedGroupKFold makes equal parts only, and train_test_split on patients
    # counts patients, not films: here one child may have 30.
    order = rng.permutation(len(n_films))
    count = n_films[order]
    middle = (np.cumsum(count) - count / 2) / count.sum()
    borders = np.cumsum(shares / shares.sum())[:-1]
    part = np.empty(len(n_films), dtype=np.int64)
    part[order] = np.searchsorted(borders, middle, side="right")
    if fill and len(n_films) >= np.sum(shares > 0):
        for empty in np.flatnonzero(shares > 0):
            if not np.any(part == empty):
                largest = np.bincount(part, minlength=len(shares)).argmax()
                part[rng.choice(np.flatnonzero(part == largest))] = empty
    return part


def split_by_patient(
    labels: np.ndarray,
    patient_id: np.ndarray,
    fractions: Mapping[str, float] | Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    *,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Split films into train, val and test: no patient in two, and each class in the same proportions.

    Parameters
    ----------
    labels : int [N]
    patient_id : str [N]
    fractions : ``{"train": 0.8, "test": 0.2}`` or (train, val, test); of the films, to within a patient; sum 1
    class_names : for messages; default the labels

    Returns
    -------
    str array [N]
    """
    labels, patient_id = np.asarray(labels), np.asarray(patient_id, dtype=str)
    if not isinstance(fractions, Mapping):
        fractions = dict(zip(SPLITS, fractions, strict=False)) if len(fractions) == len(SPLITS) else {}
    fractions = {name: fraction for name, fraction in fractions.items() if fraction != 0}
    shares = np.array(list(fractions.values()), dtype=float)
    if not set(fractions) <= set(SPLITS) or not np.all(shares > 0) or not np.isclose(shares.sum(), 1):
        raise DataError(f"fractions {fractions} must be positive, add up to 1 and name {', '.join(SPLITS)}")
    if len(labels) != len(patient_id) or not len(labels):
        raise DataError(f"got {len(labels)} labels and {len(patient_id)} patient ids: give one of each per film")
    of_film, n_films, of_class = _patients(labels, patient_id)
    part = np.empty(len(n_films), dtype=np.int64)
    for label in np.unique(of_class):
        these = of_class == label
        if these.sum() < len(shares):
            name = class_names[label] if class_names else label
            raise DataError(
                f"class {name} has {these.sum()} patients, too few for {', '.join(fractions)}: add patients or make "
                "fewer splits"
            )
        part[these] = _deal(n_films[these], shares, _rng(seed, f"split{label}"), fill=True)
    return np.array(list(fractions), dtype=str)[part[of_film]]


def resplit(films: ChestXrays, seed: int) -> ChestXrays:
    """The same films in parts that are cut anew from all of them, by patient: as large as before, alike in classes."""
    fractions = {name: np.mean(films.split == name) for name in SPLITS}
    split = split_by_patient(films.labels, films.patient_id, fractions, seed, class_names=films.class_names)
    return replace(films, split=split)


def choose_films(labels: np.ndarray, patient_id: np.ndarray, split: np.ndarray, n_films: int, seed: int) -> np.ndarray:
    """Sorted indices of about ``n_films`` films: whole patients, at least one for each class of each split."""
    if n_films >= len(labels):
        return np.arange(len(labels))
    chosen = []
    share = n_films / len(labels)
    for name in np.unique(split):
        films = np.flatnonzero(split == name)
        of_film, count, of_class = _patients(labels[films], patient_id[films])
        for label in np.unique(of_class):
            these = np.flatnonzero(of_class == label)
            part = _deal(count[these], np.array([share, 1 - share]), _rng(seed, f"choose{name}{label}"), fill=True)
            if not np.any(part == 0):
                part[0] = 0  # the only patient of a class is kept
            chosen.append(films[np.isin(of_film, these[part == 0])])
    return np.sort(np.concatenate(chosen))


def partition(
    films: ChestXrays, n_hospitals: int | None, scheme: str = "iid", alpha: float = 1.0, seed: int = 0
) -> list[ChestXrays]:
    """Each hospital's films, as :func:`assign_hospitals` deals them."""
    hospital = assign_hospitals(films, n_hospitals, scheme, alpha, seed)
    return [films.subset(hospital == k) for k in range(hospital.max() + 1)]


def assign_hospitals(
    films: ChestXrays, n_hospitals: int | None, scheme: str = "iid", alpha: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Deal films to hospitals; every film to exactly one, and a patient's films all to the same one.

    Each split is dealt by itself, in the same proportions, so a hospital gets its own train, val and test films.

    Parameters
    ----------
    n_hospitals : with ``by_site``, None means one per site
    scheme
        ``iid``: equal parts, equal class shares. ``dirichlet``: for each class the hospitals' shares are drawn from
        Dirichlet(``alpha``) (Hsu et al. 2019): smaller ``alpha``, more skew. ``by_site``: the source's sites; fewer
        hospitals than sites share them out, largest first; a patient seen at two sites goes whole to the one with more
        of the films.

    Returns
    -------
    int [N], the hospital of each film, from 0

    Raises
    ------
    DataError
        A hospital would have no film or only one class (of its training films, where there are any).
    """
    if scheme not in ("iid", "dirichlet", "by_site"):
        raise DataError(f"unknown partition scheme {scheme!r}: use iid, dirichlet or by_site")
    if scheme == "by_site" and n_hospitals is None:
        n_hospitals = len(films.sites)
    if not isinstance(n_hospitals, (int, np.integer)) or n_hospitals < 1:
        raise DataError(f"n_hospitals={n_hospitals!r}: give a positive whole number")
    if not len(films):
        raise DataError("there are no films to deal to hospitals: load more films")
    if scheme == "by_site":
        hospital = _by_site(films, n_hospitals)
    else:
        if scheme == "dirichlet" and not alpha > 0:
            raise DataError(f"alpha={alpha}: the Dirichlet concentration must be positive, such as 0.5")
        hospital = _by_class(films, n_hospitals, alpha if scheme == "dirichlet" else None, seed)
    for k in range(n_hospitals):
        _check_hospital(k, films.subset(hospital == k), scheme, n_hospitals, alpha, seed)
    return hospital


def _by_class(films: ChestXrays, n_hospitals: int, alpha: float | None, seed: int) -> np.ndarray:
    hospital = np.empty(len(films), dtype=np.int64)
    shares = {
        label: np.full(n_hospitals, 1 / n_hospitals)
        if alpha is None
        else _rng(seed, f"dirichlet{label}").dirichlet(np.full(n_hospitals, alpha))
        for label in range(len(films.class_names))
    }
    for name in np.unique(films.split):
        these = np.flatnonzero(films.split == name)
        of_film, n_films, of_class = _patients(films.labels[these], films.patient_id[these])
        of_patient = np.empty(len(n_films), dtype=np.int64)
        for label in np.unique(of_class):
            patients = of_class == label
            rng = _rng(seed, f"hospital{name}{label}")
            of_patient[patients] = _deal(n_films[patients], shares[label], rng, fill=alpha is None)
        hospital[these] = of_patient[of_film]
    return hospital


def _by_site(films: ChestXrays, n_hospitals: int) -> np.ndarray:
    sites, of_film_site = np.unique(films.site, return_inverse=True)
    if len(sites) < n_hospitals:
        raise DataError(
            f"{n_hospitals} hospitals by site, but the films come from {len(sites)} ({', '.join(sites)}): ask for "
            f"n_hospitals={len(sites)} or fewer, or use scheme='iid' or 'dirichlet'"
        )
    patients, of_film = np.unique(films.patient_id, return_inverse=True)
    seen = np.zeros((len(patients), len(sites)), dtype=np.int64)
    np.add.at(seen, (of_film, of_film_site), 1)
    site_of_patient = seen.argmax(axis=1)
    films_of_site = np.bincount(site_of_patient[of_film], minlength=len(sites))
    hospital_of_site = np.arange(len(sites))
    if len(sites) > n_hospitals:
        load = np.zeros(n_hospitals)
        for site in np.argsort(-films_of_site, kind="stable"):
            hospital_of_site[site] = load.argmin()
            load[load.argmin()] += films_of_site[site]
    return hospital_of_site[site_of_patient[of_film]]


def _check_hospital(k: int, part: ChestXrays, scheme: str, n_hospitals: int, alpha: float, seed: int) -> None:
    training = part.labels[part.split == "train"] if np.any(part.split == "train") else part.labels
    present = np.unique(training)
    if len(present) > 1:
        return
    lack = f"only films of class {part.class_names[present[0]]!r}" if len(present) else "no film"
    change = f"take fewer hospitals than {n_hospitals}, or load more films"
    if scheme == "dirichlet":
        change = f"take a larger alpha than {alpha}, another seed than {seed}, or fewer hospitals than {n_hospitals}"
    if scheme == "by_site":
        change = f"take fewer hospitals than {n_hospitals} (sites are then pooled), or scheme='iid'"
    raise DataError(f"hospital {k + 1} of {n_hospitals} (scheme {scheme!r}) has {lack}: {change}")
