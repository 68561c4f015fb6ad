"""The phantom's films: procedural frontal paediatric chest films.

Each patient has an anatomy (see `anatomy`) and one to four films of it. An attenuation map becomes a film as
it does in a radiograph: exp(-attenuation), scatter, detector blur, quantum noise, then the response curve of the
hospital's scanner, its collimation and its marker. Three classes: normal, bacterial (focal consolidation) and viral
(diffuse interstitial streaks with hyperinflation); they overlap on purpose. No film, and no table fitted to films,
is embedded.

The same seed gives the same bytes, and film i doesn't depend on how many films follow it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from primia_lite.config import DataError
from primia_lite.phantom.anatomy import sample_patient, sample_pose
from primia_lite.phantom.canvas import Canvas, make_textures, step
from primia_lite.phantom.render import Maps, attenuate

CLASS_NAMES = ("normal", "bacterial", "viral")
CLASS_FRACTIONS = {"normal": 0.35, "bacterial": 0.40, "viral": 0.25}  # of patients; real set of films: 0.27, 0.47, 0.26
SPLIT_FRACTIONS = {"train": 0.70, "val": 0.10, "test": 0.20}  # of patients
SITES = ("A", "B", "C")  # hospitals, each with a scanner of its own; a patient is seen at one of them
F32 = np.float32


@dataclass(frozen=True)
class Scanner:
    """What a hospital's X-ray room does to a film. Lengths are fractions of the film's side."""

    half_response: float  # attenuation that is displayed at half of the brightness range
    gamma: float
    white: float  # brightest grey level
    black: float
    scatter: float  # share of scattered light
    blur: float
    noise: float  # relative sd of the detected signal behind air, in a square of 1/256
    exposure_spread: float
    marker: str
    marker_at: tuple[float, float]
    marker_size: float
    border: float  # probability that collimation shows as a dark frame
    zoom: float  # magnification: distance between tube, child and detector


SCANNERS = (
    Scanner(1.42, 2.10, 244, 0, 0.030, 0.0026, 0.010, 0.08, "R", (0.03, 0.28), 0.036, 0.05, 1.00),
    Scanner(1.28, 1.90, 232, 6, 0.050, 0.0038, 0.016, 0.12, "R", (0.05, 0.09), 0.046, 0.10, 1.05),
    Scanner(1.54, 2.45, 250, 0, 0.022, 0.0020, 0.012, 0.10, "L", (0.93, 0.12), 0.040, 0.25, 0.96),
)


def draw(
    n_films: int, size: int, seed: int = 0, split_fractions: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """Draw phantom films of ``size`` x ``size`` px (28 to 256); ``seed`` fixes every byte.

    ``split_fractions`` are shares of patients by split, default :data:`SPLIT_FRACTIONS`; splits are disjoint by patient
    and stratified by class. The arrays are named as :class:`~primia_lite.data.ChestXrays` names them.
    """
    for name, value, least, most in (("size", size, 28, 256), ("n_films", n_films, 1, 10**9), ("seed", seed, 0, 2**63)):
        if not isinstance(value, (int, np.integer)) or not least <= value <= most:
            raise DataError(f"phantom: {name} is {value!r}; give a whole number of {least} to {most}")
    splits = split_fractions or SPLIT_FRACTIONS
    if not all(share >= 0 for share in splits.values()) or not np.isclose(sum(splits.values()), 1):
        raise DataError(f"phantom: split_fractions {dict(splits)} must be positive and add up to 1")
    canvas = Canvas(max(size, 80))  # small films are drawn at 80 px and averaged down
    shrink = _area_average(canvas.n, size)
    images = np.empty((n_films, size, size), np.uint8)
    lung, lesion = np.empty((2, n_films, size, size), bool)
    rows: list[tuple[int, str, str, str]] = []
    # BLAS on several threads may round differently: on one, the bytes don't depend on the number of cores
    with threadpool_limits(1, user_api="blas"):
        for label, name, site, split, rng in _roster(seed, splits):
            patient = sample_patient(rng, label)
            textures = make_textures(canvas, patient)
            base = None
            for _ in range(1 + int(np.searchsorted((0.55, 0.80, 0.93), rng.random()))):  # one to four films
                pose = sample_pose(rng, patient, base)
                base = base or pose
                at, scanner = len(rows), SCANNERS[site]
                maps = attenuate(canvas, patient, replace(pose, scale=pose.scale * scanner.zoom), textures)
                images[at] = _expose(canvas, shrink, maps.attenuation, scanner, rng)
                lung[at], lesion[at] = _masks(maps, shrink)
                rows.append((label, name, SITES[site], split))
                if len(rows) == n_films:
                    labels, ids, sites, of_split = map(np.array, zip(*rows, strict=True))
                    return {
                        "images": images, "labels": labels, "patient_id": ids, "site": sites, "split": of_split,
                        "lung_mask": lung, "lesion_mask": lesion,
                    }  # fmt: skip


def _roster(seed: int, splits: Mapping[str, float]) -> Iterator[tuple[int, str, int, str, np.random.Generator]]:
    """Patients without end: label, name, site, split, generator. Low-discrepancy sequences keep any first n of them
    stratified."""
    class_edges, split_edges = (np.cumsum(list(shares.values())) for shares in (CLASS_FRACTIONS, splits))
    offset = np.random.default_rng([seed, 1]).random(2)
    seen = [0] * len(CLASS_NAMES)
    for number in itertools.count():
        # the two-dimensional golden sequence: class and site, each stratified and together too
        a = (offset[0] + number * 0.7548776662466927) % 1.0
        b = (offset[1] + number * 0.5698402909980532) % 1.0
        label = min(int(np.searchsorted(class_edges, a, side="right")), len(CLASS_NAMES) - 1)
        # the first patient of each class goes to the first split (train)
        c = (seen[label] * 0.6180339887498949) % 1.0
        seen[label] += 1
        split = list(splits)[min(int(np.searchsorted(split_edges, c, side="right")), len(splits) - 1)]
        rng = np.random.default_rng([seed, 2, number])
        yield label, f"phantom-{number:05d}", int(b * len(SITES)), split, rng


def _expose(
    canvas: Canvas, shrink: np.ndarray | None, attenuation: np.ndarray, scanner: Scanner, rng: np.random.Generator
) -> np.ndarray:
    """The film, uint8 [size, size], that a scanner makes of an attenuation map."""
    z = rng.standard_normal(6).tolist()
    u = rng.random(6).tolist()
    grain_rng = np.random.default_rng(int(rng.integers(2**62)))  # draws as many numbers as there are pixels
    # the photons: primary beam, scatter, detector
    signal = np.exp(-attenuation)
    if scanner.blur * canvas.n > 0.4:
        signal = canvas.blur(signal, scanner.blur)
    glare = canvas.glare(signal)
    signal = signal + (scanner.scatter * float(np.exp(0.3 * z[0]))) * (0.25 + 0.75 * glare)
    signal = _shrink(signal, shrink)
    size = signal.shape[0]
    # fewer photons behind more tissue; a pixel of a small film gathers more of them
    noise = scanner.noise * float(np.exp(0.25 * z[1])) * (size / 256.0)
    grain = grain_rng.standard_normal((size, size), dtype=F32)
    signal = np.maximum(signal + noise * np.sqrt(0.10 * signal) * grain, 1e-4)
    # the film: a sigmoid in the logarithm of the exposure
    density = -np.log(signal)
    lowest = -float(np.log(1.0 + scanner.scatter))
    density = np.maximum(density - lowest, 0.0)
    half = scanner.half_response * float(np.exp(scanner.exposure_spread * z[2]))
    t = (density / half) ** (scanner.gamma * float(np.exp(0.06 * z[3])))
    grey = scanner.black + (scanner.white - scanner.black) * (t / (1.0 + t))
    _burn_in(grey, scanner, z, u)
    return np.clip(grey + 0.5, 0, 255).astype(np.uint8)


def _area_average(n: int, size: int) -> np.ndarray | None:
    """Matrix [size, n] that averages n pixels into `size`; None where there is nothing to do."""
    if n == size:
        return None
    edges = np.arange(size + 1) * (n / size)
    pixel = np.arange(n)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.maximum(overlap, 0.0) * (size / n)).astype(F32)


def _shrink(a: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    return a if matrix is None else matrix @ a @ matrix.T


def _masks(maps: Maps, shrink: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    lung = _shrink(maps.visible_lung.astype(F32), shrink)
    lesion = _shrink(maps.lesion, shrink) * (lung > 0.5)
    threshold = min(0.25, max(0.02, 0.5 * float(lesion.max())))  # a faint lesion is a lesion too
    return lung > 0.5, lesion > threshold


_LETTERS = {  # strokes in a unit box, y down
    "R": (
        *((0, 1, 0, 0), (0, 0, 0.40, 0), (0.40, 0, 0.58, 0.14), (0.58, 0.14, 0.58, 0.36)),
        *((0.58, 0.36, 0.40, 0.5), (0.40, 0.5, 0, 0.5), (0.3, 0.5, 0.62, 1)),
    ),
    "L": ((0, 0, 0, 1), (0, 1, 0.6, 1)),
}


def _burn_in(grey: np.ndarray, scanner: Scanner, z: np.ndarray, u: np.ndarray) -> None:
    """Collimation and side marker, in place."""
    n = grey.shape[0]
    axis = (np.arange(n) + 0.5) / n
    if u[0] < scanner.border:
        edges = [0.06 * (e - 0.5) if e > 0.5 else -1.0 for e in u[1:5]]
        soft = max(0.004, 0.7 / n)
        fade_x = step((axis - edges[0]) / soft) * step((1 - edges[1] - axis) / soft)
        fade_y = step((axis - edges[2]) / soft) * step((1 - edges[3] - axis) / soft)
        grey *= (0.06 + 0.94 * fade_y[:, None] * fade_x[None, :]).astype(F32)
    height = scanner.marker_size
    x0, y0 = scanner.marker_at[0] + 0.01 * z[4], scanner.marker_at[1] + 0.03 * z[5]
    cut_y = slice(max(0, int((y0 - 0.02) * n)), int((y0 + height + 0.02) * n) + 1)
    cut_x = slice(max(0, int((x0 - 0.02) * n)), int((x0 + height + 0.02) * n) + 1)
    px, py = (axis[None, cut_x] - x0) / height, (axis[cut_y, None] - y0) / height
    ax, ay, bx, by = (v[:, None, None] for v in np.array(_LETTERS[scanner.marker], float).T)
    dx, dy = bx - ax, by - ay
    t = np.minimum(np.maximum(((px - ax) * dx + (py - ay) * dy) / (dx * dx + dy * dy), 0), 1)
    away = np.sqrt(((px - ax - t * dx) ** 2 + (py - ay - t * dy) ** 2).min(axis=0)) * height
    pen = np.minimum(np.maximum((0.004 - away) * n + 0.5, 0), 1) * min(1.0, 0.010 * n)
    grey[cut_y, cut_x] += (pen * (245.0 - grey[cut_y, cut_x])).astype(F32)
