"""The product's step with a bug in it, for audits to find: each looks private, and keeps the ledger's ε.

Each is a function with the arguments of :func:`~primia_lite.federation.hospital.local_update`. Never train with one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch

from primia_lite.federation.hospital import Update, local_update
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator


def half_the_noise(state, films, training, privacy, rng, *, declared_size) -> Update:
    """σ is half of what the ledger counts."""
    halved = replace(privacy, noise_multiplier=privacy.noise_multiplier / 2)
    return local_update(state, films, training, halved, rng, declared_size=declared_size)


def clips_films(state, films, training, privacy, rng, *, declared_size) -> Update:
    """Each film is clipped, and a patient's films add up: a patient with two films moves the sum by up to 2C."""
    return local_update(state, films, training, replace(privacy, unit="film"), rng, declared_size=declared_size)


def divides_by_batch(state, films, training, privacy, rng, *, declared_size) -> Update:
    """The sum is divided by the patients that were drawn, not by their public expected number."""
    drawn = np.flatnonzero(rng.child("drawn").bernoulli(len(films.units(privacy.unit)), training.sample_rate))
    batch = films.subset(np.isin(films.units(privacy.unit).of_film.numpy(), drawn))
    whole = training.changed(sample_rate=1.0)
    return local_update(state, batch, whole, privacy, rng, declared_size=max(1, len(drawn)))


def keeps_batches(state, films, training, privacy, rng, *, declared_size) -> Update:
    """Patients are dealt into batches once, by a fixed shuffle, and each round takes the next batch: a patient takes part
    in every so many rounds for certain, where the ledger counts chances."""
    n_batches = round(1 / training.sample_rate)
    number = keeps_batches.round = (keeps_batches.round + 1) % n_batches
    names = films.patient_id if privacy.unit == "patient" else np.arange(len(films))
    batch = films.subset(np.array([_batch_of(str(name), n_batches) == number for name in names]))
    size = max(1, round(declared_size * training.sample_rate))
    return local_update(state, batch, training.changed(sample_rate=1.0), privacy, rng, declared_size=size)


keeps_batches.round = 0


@lru_cache(maxsize=100_000)
def _batch_of(name: str, n_batches: int) -> int:
    return SecureGenerator.from_seed(7).child(name).seed() % n_batches


def repeats_noise(state, films, training, privacy, rng, *, declared_size) -> Update:
    """Each step adds the same noise, from a seed that somebody forgot in the code."""
    return local_update(state, films, training, _as(_Repeated, privacy), rng, declared_size=declared_size)


def adds_floats(state, films, training, privacy, rng, *, declared_size) -> Update:
    """Noise is drawn and added in float32, whose low bits tell what it was added to (Mironov 2012)."""
    return local_update(state, films, training, _as(_Floats, privacy), rng, declared_size=declared_size)


@dataclass(frozen=True)
class _Repeated(Privacy):
    def add_noise(self, total, rng):
        return super().add_noise(total, SecureGenerator.from_seed(7))


@dataclass(frozen=True)
class _Floats(Privacy):
    def add_noise(self, total, rng):
        normal, scale = torch.Generator().manual_seed(rng.seed()), self.noise_multiplier * self.max_grad_norm
        return {name: t.float() + scale * torch.randn(t.shape, generator=normal) for name, t in total.items()}


def _as(kind: type[Privacy], privacy: Privacy) -> Privacy:
    return kind(**{f.name: getattr(privacy, f.name) for f in fields(privacy)})


SUSPECTS = {
    f.__name__: f for f in (half_the_noise, clips_films, divides_by_batch, keeps_batches, repeats_noise, adds_floats)
}
