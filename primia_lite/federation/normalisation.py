"""Pixel mean and standard deviation of all hospitals' films, shared under DP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from primia_lite.config import UserError
from primia_lite.data import ChestXrays
from primia_lite.federation.hospital import declare_size, ledger_of, own_noise
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger, charged_for
from primia_lite.privacy.noise import local_noise
from primia_lite.privacy.rng import SecureGenerator


def mean_and_std_under_dp(
    hospitals: list[tuple[str, ChestXrays]],
    noise_multiplier: float,
    folder: Path,
    privacy: Privacy,
    rng: SecureGenerator,
    *,
    fresh: bool = False,
    lasting_ledgers: Mapping[str, Ledger] | None = None,
    declared: Mapping[str, int] | None = None,
) -> tuple[float, float]:
    """PriMIA's normalisation: mean and std of pixels in [0, 1], for ``prepare(normalisation=...)``.

    Each unit (``Privacy.unit``) adds (mean pixel, mean squared pixel) of its films, both in [0, 1], and an empty one
    nothing: it changes a hospital's sum by at most √2 in L2 norm. Charged to the hospital's ledger before it is
    computed, as one release with sample rate 1. Training in the same ``folder`` adds to that ledger: leave room for
    both by ``Privacy.for_budget(..., also=(Release(noise_multiplier, 1.0, 1),))``.

    Parameters
    ----------
    hospitals : names and training films
    privacy : the budget that is charged; its own noise multiplier belongs to the training
    fresh : start new ledgers: for simulations, before a run begins in the folder
    lasting_ledgers : by name, of hospitals that keep one whatever the run; charged in place of the folder's
    declared : by name, of hospitals that declare a number of units of their own, see
        :func:`~primia_lite.federation.hospital.declare_size`
    """
    if wrong := {name: number for name, number in (declared or {}).items() if number < 1}:
        raise UserError(f"declared is {wrong}: numbers of units are at least 1")
    if fresh and (folder / "run.json").exists():
        raise UserError(f"{folder} holds a run, whose ledger can't be deleted: choose another folder")
    sums, count = np.zeros(2), 0
    for name, films in hospitals:
        if fresh and not (lasting_ledgers or {}).get(name):
            _forget(folder / f"ledger-{name}.sqlite")
        ledger = ledger_of(name, folder, privacy, (lasting_ledgers or {}).get(name), seeded=rng.seeded)
        ledger.charge("normalisation", Release(noise_multiplier, 1.0, 1), repeatable=rng.seeded)
        moments = _moments(films, privacy.unit)
        noise = own_noise(rng.child("normalisation", name))
        total = {"moments": torch.from_numpy(moments.sum(0))}
        sums += local_noise(total, noise_multiplier, math.sqrt(2.0), noise)["moments"].numpy()
        count += (declared or {}).get(name, declare_size(len(moments)))
    mean, square = sums / count
    mean = float(np.clip(mean, 0.05, 0.95))
    return mean, float(np.sqrt(np.clip(square - mean**2, 0.01, 0.25)))


def _moments(films: ChestXrays, unit: str) -> np.ndarray:
    """float64 [N, 2]: mean pixel and mean squared pixel of each unit."""
    pixels = films.images.reshape(len(films), -1) / 255.0
    moments = np.stack([pixels.mean(1), (pixels**2).mean(1)], 1)
    if unit == "patient":
        patient = np.unique(films.patient_id, return_inverse=True)[1]
        moments = np.stack([np.bincount(patient, m) for m in moments.T], 1) / np.bincount(patient)[:, None]
    return moments


def _forget(ledger: Path) -> None:
    if ledger.exists():
        if others := [what for what in charged_for(ledger) if not what.startswith("normalisation")]:
            raise UserError(f"{ledger} is charged for {others[0]}: fresh=True would forget that; choose another folder")
        ledger.unlink()
