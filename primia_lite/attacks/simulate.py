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
    in_shape = films.inputs.shape[2:]
    return models.build(training.model, training.n_classes, in_shape, seed=seed, **training.model_options).state_dict()


def clipping_alone(max_grad_norm: float = 1.0) -> Privacy:
    """Clipping with noise too small to matter: it protects nobody, and its ε is beyond counting."""
    return Privacy(NO_NOISE, max_grad_norm, 1e30, unit="film")


def _declared(hospitals: list[Films], privacy: Privacy | None, threat: ThreatModel) -> int | None:
    """The public number of units of each hospital, where a private step is divided by it."""
    sizes, units = {len(own) for own in hospitals}, {0}
    if privacy:
        exact = {len(own.units(privacy.unit)) for own in hospitals}
        units = exact if threat.knows_batch_size else {declare_size(n) for n in exact}
    if len(sizes) > 1 or len(units) > 1:
        raise UserError(
            "hospitals of unlike numbers of films or units: their sum has no one denominator, give each as many"
        )
    return units.pop() if privacy else None


def simulate_view(
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
    films : one hospital's, or of each hospital whose updates are summed (secure aggregation would show just that sum)
    state : global weights, or those of each round (``threat.sees == "rounds"``)
    privacy
        A private step's denominator is public. Where the threat model grants the number of films, hospitals declare
        their true number of units, the most exact case for the attacker; else they round it to tens, as the product's
        do, so that it doesn't give the number away.
    seed : draws sampling and noise, for teaching and tests; None draws them from the operating system
    """
    threat = threat or ThreatModel()
    hospitals = [films] if isinstance(films, Films) else list(films)
    beyond = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "class_weights": None, "augmentation": ()}
    if changed := [name for name, plain in beyond.items() if getattr(training, name) != plain]:
        raise UserError(f"the attacks explain plain steps of SGD on cross-entropy: leave out {', '.join(changed)}")
    declared, first = _declared(hospitals, privacy, threat), hospitals[0]
    states, updates = [state] if isinstance(state, dict) else list(state), []
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
    bound = privacy.max_grad_norm if privacy else 0.0
    return AttackerView(
        threat, network, tuple({k: v.clone() for k, v in s.items()} for s in states), tuple(updates),
        training.learning_rate, training.steps_per_round, in_shape, first.normalisation,
        n_films=max(1, round(len(first) * training.sample_rate)),
        labels=torch.cat([own.labels for own in hospitals]).clone() if training.sample_rate == 1 else None,
        hospitals=len(hospitals), max_grad_norm=bound,
        noise_std=privacy.noise_multiplier * bound if privacy else 0.0,
        denominator=training.sample_rate * declared if privacy else 0.0,
    )  # fmt: skip
