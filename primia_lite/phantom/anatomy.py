"""Anatomy of the procedural phantom: what differs between patients, between films of a patient, and between classes.

Numbers are drawn here and drawn with in `render`. Nothing here is fitted to any real film.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

F32 = np.float32


class Patient(SimpleNamespace):
    """Anatomy that all films of a patient share (:func:`sample_patient`); lengths are fractions of the film's side."""


@dataclass(frozen=True)
class Pose:
    """What changes from one film of a patient to the next."""

    x: float
    apex: float
    scale: float
    lean: float
    tilt: float
    rotation: float
    inspiration: float
    arm: float


def sample_patient(rng: np.random.Generator, label: int) -> Patient:
    """Draw a patient of class `label` (0 normal, 1 bacterial, 2 viral)."""
    u = rng.random(48).tolist()  # Python floats: a numpy scalar would turn the float32 maps into float64
    z = rng.standard_normal(32).tolist()
    age = u[0]
    disease = _sample_disease(rng, label, u, z)
    hyper, cuffs = disease["hyperinflation"], disease["cuffs"]
    spacing = 0.082 + 0.005 * z[1]
    return Patient(
        label=label,
        age=age,  # 0 (infant) .. 1 (about six years)
        half_width=0.368 + 0.018 * z[2] - 0.01 * age + 0.012 * hyper,  # inner rib cage at its widest
        height=0.555 + 0.05 * (age - 0.5) + 0.03 * z[3],  # lung apex to dome of the diaphragm, at usual inspiration
        wall=0.055 + 0.018 * abs(z[4]),  # soft tissue outside the rib cage
        bulk=1.0 + 0.07 * z[5],  # attenuation of the whole trunk, relative
        rib_spacing=spacing,
        rib_drop=max(0.03, 0.075 + 0.02 * (age - 0.5) + 0.015 * z[6] - 0.02 * hyper),  # of the back, spine to side
        rib_slope=max(0.02, 0.125 + 0.03 * z[20] + 0.02 * (age - 0.5) - 0.015 * hyper),  # fall along the back
        rib_front_drop=max(0.04, 0.11 + 0.03 * z[26]),
        rib_front=0.50 + 0.05 * z[21],  # where the bony front end stops, 0 at the spine, 1 at the side
        rib_width=spacing * (0.255 + 0.025 * z[7]),
        rib_density=1.0 + 0.15 * z[8],
        rib_jitter=0.08 * spacing * rng.standard_normal(14),  # offsets of single ribs
        heart_size=1.0 + 0.10 * z[9] - 0.10 * (age - 0.5) - 0.06 * hyper,
        heart_shift=0.010 * z[10],
        heart_round=u[16],
        knob=u[17],
        thymus=max(0.0, 0.6 - age) * 1.6 * u[11],
        # height of the dome above the costophrenic angle, right and left
        dome_shape=(0.13 + 0.025 * z[11] - 0.05 * hyper, 0.13 + 0.025 * z[12] - 0.05 * hyper),
        dome_offset=0.02 + 0.02 * z[13],  # left dome lower than the right one
        dome_peak=min(max(0.50 + 0.08 * z[22], 0.3), 0.7),  # where the dome is highest, 0 at the spine, 1 at the side
        vessel_gain=float(np.exp(0.25 * z[14])) * (1.0 + 0.25 * cuffs),
        gas=0.35 * z[23],
        clavicle=-0.005 + 0.022 * z[24],
        clavicle_bend=0.018 + 0.010 * z[27],
        clavicle_end=0.78 + 0.06 * z[28],
        clavicle_rise=0.02 + 0.03 * z[25] + (0.03 if u[15] < 0.88 else 0.0),
        # the gas bubble: x, radius, contrast
        stomach=(0.16 + 0.03 * z[15], 0.03 + 0.05 * u[12], 0.8 * u[13] if u[14] < 0.6 else 0.0),
        arms_up=bool(u[15] < 0.88),
        shoulder=(0.05 + 0.02 * z[16], 0.012 * z[17], 0.15 * z[18]),
        head=0.085 + 0.05 * z[19],  # how far the chin reaches into the film (negative: not at all)
        seed=int(rng.integers(2**31)),  # of fields that all films of this patient share (textures, vessels)
        **disease,
        vessels=_grow_vessels(rng),
    )


def _sample_disease(rng: np.random.Generator, label: int, u: list[float], z: list[float]) -> dict[str, Any]:
    """What a class does to a patient, as attributes of :class:`Patient`."""
    severity = 0.3 + 0.7 * u[1] ** 0.7  # 0: hardly to be seen, 1: obvious
    haze = fissure = 0.0
    lesions: list[tuple[float, ...]] = []
    effusion = (0.0, 0.0)  # height of the fluid, right and left
    if label == 1:
        hyper = 0.0
        lesions, fissure = _consolidations(rng, severity)
        if u[2] < 0.25 * severity:
            amount = 0.03 + 0.12 * u[3]
            effusion = (amount, 0.0) if lesions[0][0] < 0 else (0.0, amount)
        haze = (0.04 + 0.20 * u[4]) * severity
        streaks = 0.05 + 0.35 * u[5] * severity
        cuffs = 0.05 + 0.4 * u[6] * severity
    elif label == 2:
        hyper = min(max(0.55 + 0.35 * z[0], 0.0), 1.2) * (0.2 + 0.8 * severity)
        haze = (0.04 + 0.24 * u[4]) * severity
        streaks = 0.10 + 0.85 * severity
        cuffs = 0.1 + 0.9 * u[6] * severity
        if u[2] < 0.22:
            lesions, fissure = _consolidations(rng, 0.2)
            lesions = lesions[:1]
    else:
        hyper = 0.3 * max(0.0, z[0] - 1.0)
        streaks = 0.12 * u[5] + (0.35 * u[6] if u[7] < 0.15 else 0.0)
        cuffs = 0.2 * u[8]
        haze = 0.08 * u[9] if u[10] < 0.2 else 0.0
    return {
        "hyperinflation": hyper, "haze": haze, "lesions": lesions, "fissure": fissure, "effusion": effusion,
        "streaks": streaks, "cuffs": cuffs,
    }  # fmt: skip


def _consolidations(rng: np.random.Generator, severity: float) -> tuple[list[tuple[float, ...]], float]:
    """One to three lobar opacities: (side, across, down, radii, angle, density), and the sign of the fissure."""
    #        side across down  (side -1: patient's right, on the left of the film)
    lobes = ((-1, 0.50, 0.24), (-1, 0.42, 0.62), (-1, 0.55, 0.82), (1, 0.50, 0.28), (1, 0.55, 0.80), (1, 0.52, 0.60))
    count = 1 + int(rng.random() < 0.30) + int(rng.random() < 0.10)
    chosen = rng.choice(len(lobes), size=count, replace=False)
    z = iter(rng.standard_normal(9).tolist())
    w = iter(rng.random(12).tolist())
    lesions = []
    for number, lobe in enumerate(chosen):
        side, across, down = lobes[lobe]
        size = (0.24 + 0.46 * severity * next(w)) * (1.0 if number == 0 else 0.7)
        place = (float(side), across + 0.10 * next(z), down + 0.05 * next(z))
        radii = (size * (0.8 + 0.5 * next(w)), size * (0.6 + 0.4 * next(w)))
        lesions.append((*place, *radii, 0.5 * next(z), (0.30 + 0.70 * severity) * (0.7 + 0.3 * next(w))))
    return lesions, 1.0 if chosen[0] == 0 and rng.random() < 0.6 else 0.0


def sample_pose(rng: np.random.Generator, patient: Patient, base: Pose | None) -> Pose:
    """Draw the position of a film: at first freely, then close to the patient's first film (`base`)."""
    z = rng.standard_normal(8).tolist()
    if base is None:
        return Pose(
            x=0.5 + 0.018 * z[0],
            apex=0.165 + 0.03 * z[1],
            scale=float(np.exp(0.07 * z[2])),
            lean=0.04 * z[3],
            tilt=0.032 * z[3] + 0.02 * z[4],
            rotation=0.07 * z[5],
            # one film in seven is taken in expiration: crowded vessels, high diaphragm
            inspiration=0.02 * z[6] - (0.09 if rng.random() < 0.14 else 0.0),
            arm=0.15 * z[7],
        )
    return replace(
        base,
        x=base.x + 0.010 * z[0],
        apex=base.apex + 0.012 * z[1],
        scale=base.scale * (1.0 + 0.015 * z[2]),
        lean=base.lean + 0.010 * z[3],
        tilt=base.tilt + 0.006 * z[4],
        rotation=base.rotation + 0.025 * z[5],
        inspiration=base.inspiration + 0.015 * z[6],
        arm=base.arm + 0.06 * z[7],
    )


def _grow_vessels(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Two branching trees around the hila as points: side, x, y (lungs span about 1 unit), level, weight."""
    stems, levels, points = 8, 4, 8
    n = 2 * stems
    z = rng.standard_normal((6, n << (levels - 1)), dtype=F32)
    grown = np.exp(0.2 * z[:2])
    share_all = 0.35 + 0.3 * rng.random(n << levels, dtype=F32)
    side = np.repeat(np.array((-1, 1), F32), stems)
    first = np.linspace(-1.45, 1.4, stems, dtype=F32)
    angle = np.concatenate((first, first)) + 0.15 * z[2, :n]
    x = np.zeros(n, F32)
    y = 0.07 * angle
    length = 0.17 * grown[0, :n]
    width = 0.016 * grown[1, -n:]
    t = np.arange(points, dtype=F32) / points
    taper = (1.0 - 0.25 * t) ** 2
    out: list[tuple[np.ndarray, ...]] = []
    for level in range(levels):
        bend = angle[:, None] + (0.35 * z[3, -n:])[:, None] * t
        pace = (length / points)[:, None]
        px = x[:, None] + np.cumsum(np.cos(bend) * pace, axis=1)
        py = y[:, None] + np.cumsum(np.sin(bend) * pace, axis=1)
        weight = (width * width)[:, None] * pace * taper
        out.append((np.repeat(side, points), px.ravel(), py.ravel(), np.full(n * points, level, F32), weight.ravel()))
        if level == levels - 1:
            break
        fork = np.abs(0.42 + 0.15 * z[4, :n])
        share = share_all[n : 2 * n]
        end, x, y = bend[:, -1], px[:, -1], py[:, -1]
        left = fork * share
        angle = np.concatenate((end - left, end - left + fork))
        grow = 0.80 * grown[0, -n:]
        length = np.concatenate((length * grow, length * (1.45 - 0.8 * grow)))
        width = np.concatenate((width * (0.66 + 0.2 * share), width * (0.86 - 0.2 * share)))
        side, x, y = np.concatenate((side, side)), np.concatenate((x, x)), np.concatenate((y, y))
        n *= 2
    return tuple(np.concatenate(column) for column in zip(*out, strict=True))
