"""Membership inference: was this patient among those that a model was trained on?

*Shadow runs* train the product's way on random halves of a hospital's patients. What a patient's score was where they
took part, and where they didn't, says what a score of the run under attack means: LiRA (Carlini, Chien, Nasr, Song,
Terzis, Tramèr 2022).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats import norm
from tqdm.auto import tqdm

from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import Hospital, State
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.runtime import cores, in_notebook, write_atomic
from primia_lite.training import Training, predict

LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Shadows:
    """Runs on random halves of the patients.

    Attributes
    ----------
    patients : str [U]
    member : bool [R, U], who took part in which run
    scores : by what the attacker sees, float64 [R, U]: higher for members, on average
    """

    patients: np.ndarray
    member: np.ndarray
    scores: Mapping[str, np.ndarray] = field(repr=False)


@dataclass
class WatchedHospital(Hospital):
    """A hospital whose rounds are on record: the weights that it was sent, and its update."""

    rounds: list[tuple[State, State]] = field(default_factory=list, repr=False)

    def update(self, round_number, global_state, *args, **options):
        found = super().update(round_number, global_state, *args, **options)
        self.rounds.append((global_state, found.delta))
        return found


def shadow_runs(
    films: Films,
    training: Training,
    schedule: Schedule,
    privacy: Privacy | None,
    runs: int,
    folder: Path,
    *,
    others: Sequence[Hospital] = (),
    seed: int = 0,
) -> Shadows:
    """Train ``runs`` times by :func:`federate`, each time on half of the hospital's patients, drawn anew.

    Parameters
    ----------
    films : all patients of the hospital under attack, prepared for ``training.model``
    folder : keeps each finished run, so that what was interrupted goes on
    others : further hospitals of the federation, always there
    seed : of who takes part; noise and sampling are the operating system's

    Returns
    -------
    Shadows
        ``scores`` of the *released model* (log odds of the true class, mean over a patient's films), and of linear
        heads also of all *updates of the hospital* and of the *secure sums* (how far they went down the patient's
        gradient).
    """
    if runs < 4:
        raise UserError(f"{runs} shadow runs say nothing: take at least 4, and 16 or more to publish")
    patients, owner = np.unique(films.patient_id, return_inverse=True)
    declared = max(1, len(patients) // 2), max(1, len(films) // 2)  # the same in all runs
    member = np.random.default_rng([seed, 11]).random((runs, len(patients))) < 0.5
    recipe = [training.as_dict(), vars(schedule), privacy and privacy.as_dict(), seed, [h.name for h in others]]
    recipe += [hashlib.sha256(films.inputs.numpy().tobytes() + films.labels.numpy().tobytes()).hexdigest()]
    key = hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:16]

    def one(run: int) -> dict[str, np.ndarray]:
        path = Path(folder) / f"shadow-{key}-{run:03d}.npz"
        if not path.exists():
            there = films.subset(np.flatnonzero(member[run][owner]))
            own = WatchedHospital("audited", there, declared_patients=declared[0], declared_size=declared[1])
            rest = [WatchedHospital(h.name, h.films, h.declared_size, h.declared_patients) for h in others]
            options = {"folder": path.with_suffix(""), "fresh": True} if privacy else {}
            result = federate([own, *rest], training, schedule, privacy, seed=seed, progress=None, **options)
            found = {"released model": _log_odds(predict(result.model(), films), films.labels.numpy())}
            if set(result.state) == {"weight"}:
                found["updates of the hospital"] = _along([own], films, training)
                found["secure sums"] = _along([own, *rest], films, training)
            by_patient = {name: np.bincount(owner, s) / np.bincount(owner) for name, s in found.items()}
            write_atomic(path, lambda file: np.savez(file, **by_patient))
        with np.load(path) as stored:
            return dict(stored)

    with ThreadPoolExecutor(cores()) as pool:
        done = pool.map(one, range(runs))
        rows = list(tqdm(done, total=runs, desc="shadow runs", unit="run", leave=False, disable=not in_notebook()))
    return Shadows(patients, member, {name: np.array([row[name] for row in rows]) for name in rows[0]})


def _log_odds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    p = probabilities[np.arange(len(labels)), labels].clip(1e-9, 1 - 1e-9)
    return np.log(p) - np.log1p(-p)


def _along(hospitals: list[WatchedHospital], films: Films, training: Training) -> np.ndarray:
    """How far the summed updates of each round went down each film's gradient, over all rounds."""
    x = films.inputs.mean(1)
    target = torch.nn.functional.one_hot(films.labels, training.n_classes) * (1 - training.label_smoothing)
    target = target + training.label_smoothing / training.n_classes
    total = torch.zeros(len(films), dtype=torch.float64)
    for rounds in zip(*(h.rounds for h in hospitals), strict=True):
        weight = rounds[0][0]["weight"]
        moved = sum(h.declared_patients * delta["weight"] for h, (_, delta) in zip(hospitals, rounds, strict=True))
        error = (x @ weight.T).softmax(1) - target
        total -= ((x @ moved.T) * error).sum(1).double()
    return total.numpy()


def lira(shadows: Shadows, sees: str = "released model", *, online: bool = True) -> np.ndarray:
    """The likelihood ratio of each run and patient, against what the other runs say of the patient: float64 [R, U].

    Scores are taken for normal, with a mean for each patient and, as runs are few, one deviation for all. Off-line the
    attacker has runs without the patient alone.
    """
    score, member = shadows.scores[sees], shadows.member
    if not np.isfinite(score).all():
        raise UserError(f"scores of the {sees} aren't all finite")
    inside, outside = (_leave_one_out(score, rows) for rows in (member, ~member))
    missing = np.isnan(outside) | (np.isnan(inside) if online else False)
    if missing.all():
        raise UserError("no patient was in and out in the other runs: take more shadow runs")
    spread_in, spread_out = _spread(score, member), _spread(score, ~member)
    ratio = -norm.logsf(score, outside, spread_out)
    if online:
        ratio = norm.logpdf(score, inside, spread_in) - norm.logpdf(score, outside, spread_out)
    return np.where(missing, 0.0, ratio)


def _leave_one_out(score: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean over the other runs that ``rows`` names; nan where there are none."""
    total, count = (score * rows).sum(0) - score * rows, rows.sum(0) - rows
    return np.divide(total, count, out=np.full(score.shape, np.nan), where=count > 0)


def _spread(score: np.ndarray, rows: np.ndarray) -> float:
    means = (score * rows).sum(0) / np.maximum(1, rows.sum(0))
    return float(max(LEAST_DEVIATION, np.sqrt((((score - means) ** 2) * rows).sum() / max(1, rows.sum()))))


def true_positive_rate(member: np.ndarray, score: np.ndarray, false_positive_rate: float) -> float:
    """The share of members above the threshold that so many of the others pass."""
    members, others = score[member], score[~member]
    if not len(members) or not len(others):
        raise UserError("a rate needs members and others: one of them is empty")
    return float((members > np.quantile(others, 1 - false_positive_rate, method="higher")).mean())
