"""The phantom's films: procedural frontal paediatric chest films.

Each patient has an anatomy (see `anatomy`) and one to four films of it. An attenuation map becomes a film as
it does in a radiograph: exp(-attenuation), scatter, detector blur, quantum noise, then the response curve of the
hospital's scanner, its collimation and its marker. Three classes: normal, bacterial (focal consolidation) and viral
(diffuse interstitial streaks with hyperinflation); they overlap on purpose. No film, and no table fitted to films,
is embedded.

The same seed gives the same bytes, and film i doesn't depend on how many films follow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from primia_lite.config import DataError
from primia_lite.phantom.anatomy import Patient, Pose, sample_patient, sample_pose
from primia_lite.phantom.canvas import Canvas, Textures, make_textures, step
from primia_lite.phantom.render import Maps, attenuate

CLASS_NAMES = ("normal", "bacterial", "viral")
CLASS_FRACTIONS = {"normal": 0.35, "bacterial": 0.40, "viral": 0.25}  # of patients; real set of films: 0.27, 0.47, 0.26
SPLIT_FRACTIONS = {"train": 0.70, "val": 0.10, "test": 0.20}  # of patients
SIZES = (28, 256)
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


class Drawn(NamedTuple):
    """Films as plain arrays, named as :class:`~primia_lite.data.ChestXrays` names them."""

    images: np.ndarray
    labels: np.ndarray
    patient_id: np.ndarray
    site: np.ndarray
    split: np.ndarray
    lung_mask: np.ndarray
    lesion_mask: np.ndarray


def scanner_for(index: int) -> Scanner:
    """Scanner of hospital `index`: three that are written out, then variations of them."""
    base = SCANNERS[index % len(SCANNERS)]
    if index < len(SCANNERS):
        return base
    u = np.random.default_rng([77, index]).random(6)
    return replace(
        base,
        half_response=base.half_response * (0.85 + 0.3 * u[0]),
        gamma=base.gamma * (0.85 + 0.3 * u[1]),
        scatter=base.scatter * (0.7 + 0.6 * u[2]),
        blur=base.blur * (0.7 + 0.8 * u[3]),
        noise=base.noise * (0.7 + 0.8 * u[4]),
        marker_at=(base.marker_at[0], base.marker_at[1] + 0.2 * u[5]),
    )


def draw(
    n_films: int,
    size: int,
    seed: int = 0,
    *,
    sites: Sequence[str] = ("A", "B", "C"),
    class_fractions: Mapping[str, float] | None = None,
    split_fractions: Mapping[str, float] | None = None,
) -> Drawn:
    """Draw `n_films` phantom films of `size` x `size` pixels.

    Parameters
    ----------
    n_films, size, seed
        Number of films; their side in pixels (28 to 256); the seed that fixes every byte.
    sites
        Names of the hospitals, each with a scanner of its own. A patient is seen at one of them.
    class_fractions, split_fractions
        Shares of patients by class name and by split; the defaults are `CLASS_FRACTIONS` and `SPLIT_FRACTIONS`.

    Returns
    -------
    Drawn
        Three classes; splits disjoint by patient and stratified by class.

    Raises
    ------
    DataError
        If the size, the number of films, the sites or the fractions make no sense.
    """
    size, n_films, seed = _check(n_films, size, seed, sites)
    classes = _shares(class_fractions, CLASS_FRACTIONS, "class_fractions")
    splits = _shares(split_fractions, SPLIT_FRACTIONS, "split_fractions")
    canvas = Canvas(max(size, 80))  # small films are drawn at 80 px and averaged down
    shrink = _area_average(canvas.n, size)
    images = np.empty((n_films, size, size), np.uint8)
    lung = np.empty((n_films, size, size), bool)
    lesion = np.empty((n_films, size, size), bool)
    # BLAS on several threads may round differently: on one, the bytes don't depend on the number of cores
    with threadpool_limits(1, user_api="blas"):
        rows = _draw(canvas, shrink, _Roster(seed, classes, splits, len(sites)), (images, lung, lesion))
    labels, ids, site, split = zip(*rows, strict=True)
    return Drawn(
        images, np.array(labels, np.int64), np.array(ids), np.array(sites)[list(site)], np.array(split), lung, lesion
    )


def _draw(
    canvas: Canvas,
    shrink: np.ndarray | None,
    roster: _Roster,
    out: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> list[tuple[int, str, int, str]]:
    """Fill `out` (images, lung masks, lesion masks) patient by patient; a row of label, patient, site, split a film."""
    rows: list[tuple[int, str, int, str]] = []
    n_films = len(out[0])
    while len(rows) < n_films:
        number, label, site, split, rng = roster.next()
        patient = sample_patient(rng, label)
        scanner = scanner_for(site)
        textures = make_textures(canvas, patient)
        base = None
        for _ in range(_films_of(rng)):
            if len(rows) == n_films:
                break
            pose = sample_pose(rng, patient, base)
            base = base or pose
            pose = replace(pose, scale=pose.scale * scanner.zoom)
            for array, value in zip(out, _film(canvas, shrink, patient, textures, pose, scanner, rng), strict=True):
                array[len(rows)] = value
            rows.append((label, f"phantom-{number:05d}", site, split))
    return rows


def _check(n_films: int, size: int, seed: int, sites: Sequence[str]) -> tuple[int, int, int]:
    if not _whole(size) or not SIZES[0] <= size <= SIZES[1]:
        raise DataError(f"phantom: size {size!r} is not possible; choose a whole number of {SIZES[0]} to {SIZES[1]} px")
    if not _whole(n_films) or n_films < 1:
        raise DataError(f"phantom: n_films is {n_films!r}; ask for at least one film")
    if isinstance(sites, str) or len(sites) == 0 or len(set(sites)) != len(sites):
        raise DataError(f"phantom: sites is {sites!r}; give a tuple of different names, such as ('A', 'B', 'C')")
    if not _whole(seed) or seed < 0:
        raise DataError(f"phantom: seed is {seed!r}; give a whole number of 0 or more")
    return int(size), int(n_films), int(seed)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _shares(given: Mapping[str, float] | None, default: Mapping[str, float], name: str) -> dict[str, float]:
    """Fractions in the order of the default, scaled to a sum of 1."""
    given = default if given is None else given
    unknown = sorted(set(given) - set(default))
    if unknown:
        raise DataError(f"phantom: {name} has unknown keys {unknown}; known are {list(default)}")
    values = [float(given.get(key, 0.0)) for key in default]
    if not all(np.isfinite(v) and v >= 0 for v in values) or sum(values) <= 0:
        raise DataError(f"phantom: {name} must be non-negative numbers with a positive sum, not {dict(given)!r}")
    return {key: value / sum(values) for key, value in zip(default, values, strict=True)}


class _Roster:
    """Hands out patients in order. Low-discrepancy sequences keep any first n patients stratified."""

    def __init__(self, seed: int, classes: dict[str, float], splits: dict[str, float], n_sites: int):
        self.seed, self.splits, self.n_sites = seed, list(splits), n_sites
        self.class_edges = np.cumsum(list(classes.values()))
        self.split_edges = np.cumsum(list(splits.values()))
        self.offset = np.random.default_rng([seed, 1]).random(2)
        self.number = 0
        self.seen = [0] * len(classes)

    def next(self) -> tuple[int, int, int, str, np.random.Generator]:
        number = self.number
        self.number += 1
        # the two-dimensional golden sequence: class and site, each stratified and together too
        a = (self.offset[0] + number * 0.7548776662466927) % 1.0
        b = (self.offset[1] + number * 0.5698402909980532) % 1.0
        label = min(int(np.searchsorted(self.class_edges, a, side="right")), len(self.class_edges) - 1)
        # the first patient of each class goes to the first split (train)
        c = (self.seen[label] * 0.6180339887498949) % 1.0
        self.seen[label] += 1
        split = min(int(np.searchsorted(self.split_edges, c, side="right")), len(self.splits) - 1)
        return number, label, int(b * self.n_sites), self.splits[split], np.random.default_rng([self.seed, 2, number])


def _films_of(rng: np.random.Generator) -> int:
    return 1 + int(np.searchsorted((0.55, 0.80, 0.93), rng.random()))


def _film(
    canvas: Canvas,
    shrink: np.ndarray | None,
    patient: Patient,
    textures: Textures,
    pose: Pose,
    scanner: Scanner,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One film (uint8) with its masks, from a patient in a pose."""
    maps = attenuate(canvas, patient, pose, textures)
    z = rng.standard_normal(6).tolist()
    u = rng.random(6).tolist()
    grain_rng = np.random.default_rng(int(rng.integers(2**62)))  # draws as many numbers as there are pixels
    # the photons: primary beam, scatter, detector
    signal = np.exp(-maps.attenuation)
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
    image = np.clip(grey + 0.5, 0, 255).astype(np.uint8)
    return image, *_masks(maps, shrink)


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
        (0, 1, 0, 0),
        (0, 0, 0.40, 0),
        (0.40, 0, 0.58, 0.14),
        (0.58, 0.14, 0.58, 0.36),
        (0.58, 0.36, 0.40, 0.5),
        (0.40, 0.5, 0, 0.5),
        (0.3, 0.5, 0.62, 1),
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
