"""The hospital's side of an attack: films in, what crosses the wire out. Updates are the product's own
(:func:`~primia_lite.federation.hospital.local_update`, with its clipping and noise)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from primia_lite import models
from primia_lite.attacks.view import NOISELESS, AttackerView, State, ThreatModel
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import declare_size, local_update
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training

# Noise multiplier of "clipping alone": DP-SGD's own path with noise that changes no digit.
NO_NOISE = 1e-3 * NOISELESS


def initial_state(training: Training, films: Films, seed: int = 0) -> State:
    """Random weights of the network that a recipe names."""
    network = models.build(
        training.model, training.n_classes, films.inputs.shape[2:], seed=seed, **training.model_options
    )
    return network.state_dict()


def clipping_alone(max_grad_norm: float = 1.0) -> Privacy:
    """Clipping with noise too small to matter: it protects nobody, and its ε is beyond counting."""
    return Privacy(NO_NOISE, max_grad_norm, 1e30, unit="film")


def _declared(hospitals: list[Films], privacy: Privacy, threat: ThreatModel) -> int:
    """The public number of units of each hospital."""
    units = [len(own.units(privacy.unit)) for own in hospitals]
    if not threat.knows_batch_size:
        units = [declare_size(n) for n in units]
    if len(set(units)) > 1:
        raise UserError(
            f"hospitals that declare {', '.join(map(str, units))} {privacy.unit}s: a sum of their steps has no one "
            "denominator; give each as many"
        )
    return units[0]


def observe(
    films: Films | Sequence[Films],
    training: Training,
    state: State | Sequence[State],
    threat: ThreatModel | None = None,
    privacy: Privacy | None = None,
    *,
    seed: int | None = None,
) -> AttackerView:
    """Let hospitals compute their updates, and return what the attacker sees of them.

    Parameters
    ----------
    films
        One hospital's, or one for each of the hospitals whose updates are summed (the plain sum: secure aggregation
        would show the server just that).
    state
        Global weights, or those of each round (``threat.sees == "rounds"``).
    privacy
        A private step's denominator is public. Where the threat model grants the number of films, hospitals declare
        their true number of units, the most exact case for the attacker; else they round it to tens, as the product's
        do (:func:`~primia_lite.federation.hospital.declare_size`), so that it doesn't give the number away.
    seed
        Of sampling and noise, for teaching and tests; None draws them from the operating system.

    Raises
    ------
    UserError
        A recipe that the attacks have no model of, or hospitals of unequal size.
    """
    threat = threat or ThreatModel()
    hospitals = [films] if isinstance(films, Films) else list(films)
    beyond = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "class_weights": None, "augmentation": ()}
    if changed := [name for name, plain in beyond.items() if getattr(training, name) != plain]:
        raise UserError(f"the attacks explain plain steps of SGD on cross-entropy: leave out {', '.join(changed)}")
    if len({len(own) for own in hospitals}) > 1:
        raise UserError(
            f"hospitals of {', '.join(str(len(own)) for own in hospitals)} films: a sum of their mean gradients weighs "
            "films unequally; give each as many"
        )
    states = [state] if isinstance(state, dict) else list(state)
    first, updates, steps = hospitals[0], [], training.steps_per_round
    declared = _declared(hospitals, privacy, threat) if privacy else None
    for number, weights in enumerate(states):
        total: State = {}
        for place, own in enumerate(hospitals):
            rng = SecureGenerator.for_seed(seed).child(number, place)
            delta = local_update(weights, own, training, privacy, rng, declared_size=declared).delta
            total = {name: total.get(name, 0) + value for name, value in delta.items()}
        updates.append(total)
    in_shape = tuple(first.inputs.shape[2:])
    network = models.build(training.model, training.n_classes, in_shape, **training.model_options)
    network.load_state_dict(states[0])
    return AttackerView(
        threat, network, tuple({k: v.clone() for k, v in s.items()} for s in states), tuple(updates),
        training.learning_rate, steps, in_shape, first.normalisation,
        n_films=max(1, round(len(first) * training.sample_rate)),
        labels=torch.cat([own.labels for own in hospitals]).clone() if training.sample_rate == 1 else None,
        hospitals=len(hospitals),
        max_grad_norm=privacy.max_grad_norm if privacy else 0.0,
        noise_std=privacy.noise_multiplier * privacy.max_grad_norm if privacy else 0.0,
        denominator=training.sample_rate * declared if privacy else 0.0,
    )  # fmt: skip
