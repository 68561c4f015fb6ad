"""Canaries: made-up patients, and films with and without them, as :mod:`primia_lite.attacks.auditing` trains on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from primia_lite.data.films import Films
from primia_lite.federation.hospital import State, network
from primia_lite.training import Training

OTHERS, FEATURES = 40, 64  # patients beside the canaries where no films are given, and their features


def films_each(unit: str) -> int:
    """Films of a canary: two where its unit is a patient, so that a step which counts films is found out."""
    return 2 if unit == "patient" else 1


def made_up(training: Training, draw: np.random.Generator) -> Films:
    """Some patients with random features, for a linear head."""
    features = F.normalize(torch.from_numpy(draw.normal(size=(OTHERS, 1, FEATURES))).float(), dim=2)
    labels = torch.from_numpy(draw.integers(training.n_classes, size=OTHERS))
    return Films(features, labels, np.array([f"patient{i}" for i in range(OTHERS)]), model=training.model)


def with_canaries(films: Films, inside: np.ndarray, label: np.ndarray, m: int, unit: str) -> Films:
    """Films with ``m`` more features, and the canaries ``inside``, each one-hot in a feature of its own."""
    n, views, width = films.inputs.shape
    owner = inside.repeat(films_each(unit))
    inputs = torch.zeros(n + len(owner), views, width + m)
    inputs[:n, :, :width] = films.inputs
    inputs[n + torch.arange(len(owner)), :, width + torch.from_numpy(owner)] = 1.0
    labels = torch.cat([films.labels, torch.from_numpy(label[owner])])
    names = np.concatenate([films.patient_id.astype(str), [f"canary {i}" for i in owner]])
    return replace(films, inputs=inputs, labels=labels, patient_id=names)


def worlds(
    training: Training, unit: str, films: Films | None, seed: int | None
) -> tuple[tuple[Films, Films], Films, State]:
    """Films without and with the canary, the canary's films, and the weights to start from.

    Made-up patients all pull against the canary in full batches, which shows whether its absence changes what the
    others weigh; where they are sampled, they pull elsewhere, as their number would hide it. Among real films the
    canary is the first patient, with wrong labels.
    """
    if films is None:
        draw = np.random.default_rng(seed)
        others = made_up(training, draw)
        features = torch.zeros_like(others.inputs)
        features[:, :, 0 if training.sample_rate == 1 else 1] = 1.0
        others = replace(others, inputs=features, labels=torch.zeros_like(others.labels))
        shape = (films_each(unit), *features.shape[1:])
        canary = torch.zeros(shape)
        canary[:, :, 0] = -1.0
        canary = Films(canary, torch.zeros(len(canary), dtype=torch.int64), np.array(["canary"] * len(canary)))
    else:
        first = films.patient_id == films.patient_id[0]
        canary, others = films.subset(first if unit == "patient" else [0]), films.subset(~first)
        canary = replace(canary, labels=(canary.labels + 1) % training.n_classes)
    both = replace(
        others,
        inputs=torch.cat([others.inputs, canary.inputs]),
        labels=torch.cat([others.labels, canary.labels]),
        patient_id=np.concatenate([others.patient_id.astype(str), canary.patient_id.astype(str)]),
    )
    model = network(training, both.inputs.shape[2:], seed or 0)
    return (others, both), canary, {name: value.clone() for name, value in model.state_dict().items()}


def gradient(state: State, canary: Films, training: Training) -> State:
    """Of the canary's mean loss, of length 1, by parameter."""
    model = network(training, canary.inputs.shape[2:])
    model.load_state_dict(state)
    model.eval()
    logits = model(canary.inputs.flatten(0, 1))
    labels = canary.labels.repeat_interleave(canary.inputs.shape[1])
    F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing).backward()
    gradient = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    length = sum(float((value**2).sum()) for value in gradient.values()) ** 0.5
    return {name: value / length for name, value in gradient.items()}
