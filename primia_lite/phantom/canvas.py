"""A grid of pixels, and the smooth things that can be drawn on it: fields, blurs, points, steps, bones, textures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from primia_lite.phantom.anatomy import Patient

F32 = np.float32


class Canvas:
    """A square grid of n x n pixel centres, with what is needed to draw smooth things on it."""

    def __init__(self, n: int):
        self.n = n
        self.px = 1.0 / n
        axis = ((np.arange(n) + 0.5) / n).astype(F32)
        self.x = axis[None, :]
        self.y = axis[:, None]
        self._spline = {g: _spline_matrix(n, g) for g in (9, 17, 33, 65, 129)}
        self._blur: dict[float, np.ndarray] = {}

    def noise(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth Gaussian noise with `cells` knots across the film, sd about 1 (the same field at any n)."""
        a = self._spline[cells]
        return a @ rng.standard_normal((cells, cells), dtype=F32) @ a.T

    def blur(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian blur with a standard deviation in fractions of the film; the border is repeated."""
        matrix = self._blur.get(sigma)
        if matrix is None:
            i = np.arange(self.n)
            s = max(sigma * self.n, 0.30)
            pad = int(4 * s) + 1
            wide = np.exp(-0.5 * ((np.arange(-pad, self.n + pad)[None, :] - i[:, None]) / s) ** 2)
            wide /= wide.sum(axis=1, keepdims=True)
            matrix = wide[:, pad:-pad].copy()
            matrix[:, 0] += wide[:, :pad].sum(axis=1)
            matrix[:, -1] += wide[:, -pad:].sum(axis=1)
            matrix = self._blur[sigma] = matrix.astype(F32)
        return matrix @ image @ matrix.T

    def glare(self, image: np.ndarray) -> np.ndarray:
        """Very wide blur (about an eighth of the film), for scattered light."""
        a = self._spline[9] / self._spline[9].sum(axis=1, keepdims=True)
        down = a / a.sum(axis=0, keepdims=True)
        return a @ (down.T @ image @ down) @ a.T

    def splat(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Add points to the grid bilinearly; the result is a density (weight per unit area)."""
        n = self.n
        fx = np.minimum(np.maximum(x * n - 0.5, 0.0), n - 1.001)
        fy = np.minimum(np.maximum(y * n - 0.5, 0.0), n - 1.001)
        weight = weight * (n * n) * ((fx > 0) & (fy > 0) & (fx < n - 1.001) & (fy < n - 1.001))  # none from outside
        ix, iy = fx.astype(np.intp), fy.astype(np.intp)
        fx, fy = fx - ix, fy - iy
        at = iy * n + ix
        low, high = weight * (1 - fy), weight * fy
        index = np.concatenate((at, at + 1, at + n, at + n + 1))
        value = np.concatenate((low * (1 - fx), low * fx, high * (1 - fx), high * fx))
        return np.bincount(index, value, minlength=n * n).reshape(n, n).astype(F32)


def _spline_matrix(n: int, cells: int) -> np.ndarray:
    """Cubic B-spline interpolation from `cells` knots to n pixel centres, scaled to keep unit variance."""
    at = (np.arange(n) + 0.5) / n * (cells - 1)
    d = np.abs(at[:, None] - np.arange(cells)[None, :])
    b = np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0.0))
    return (b / np.sqrt((b**2).sum(axis=1, keepdims=True))).astype(F32)


def step(z: np.ndarray) -> np.ndarray:
    """Smooth step from 0 (z <= -1) to 1 (z >= 1)."""
    t = np.minimum(np.maximum(z, -1.0), 1.0)
    return 0.5 + t * (0.75 - 0.25 * t * t)


def unit(z: np.ndarray) -> np.ndarray:
    """z limited to 0..1 (np.clip takes three times as long on small arrays)."""
    return np.minimum(np.maximum(z, 0.0), 1.0)


_BONE = np.linspace(-2.0, 2.0, 513)
_BONE_PROFILE = (
    0.84 * (0.5 - 0.5 * np.cos(np.pi * np.clip((1.34 - np.abs(_BONE)) / 0.60, 0, 1)))
    + 0.20 * np.exp(-(((_BONE - 0.75) / 0.32) ** 2))
    + 0.10 * np.exp(-(((_BONE + 0.75) / 0.32) ** 2))
).astype(F32)
_BONE_PROFILE[[0, -1]] = 0.0


def bone(z: np.ndarray) -> np.ndarray:
    """Cross-section of a tubular bone: brighter cortex at |z| = 0.8 (more below), nothing beyond about 1.3."""
    return _BONE_PROFILE.take((z * 128.0 + 256.5).astype(np.int32), mode="clip")


def capsule(dx: np.ndarray, dy: np.ndarray, direction: tuple[float, float], length: float = 1.5):
    """Squared distance from a segment that starts at the origin of (dx, dy), and the position along it."""
    ux, uy = direction
    along = np.minimum(np.maximum(dx * ux + dy * uy, 0.0), length)
    return dx * dx + dy * dy - along * (2.0 * (dx * ux + dy * uy) - along), along


@dataclass(frozen=True)
class Textures:
    """Random fields and points that all films of a patient share."""

    clouds: np.ndarray  # [n, n], coarse, sd about 1
    fine: np.ndarray  # [n, n], fine, sd about 1
    streaks: tuple[np.ndarray, ...]  # side, x, y, weight of points in lung coordinates


def make_textures(canvas: Canvas, patient: Patient) -> Textures:
    """Draw the textures of a patient on a canvas."""
    rng = np.random.default_rng(patient.seed)
    z = rng.standard_normal((3, 460), dtype=F32)
    u = rng.random((3, 460), dtype=F32)
    clouds = 0.60 * canvas.noise(rng, 9) + 0.40 * canvas.noise(rng, 17) + 0.30 * canvas.noise(rng, 33)
    fine = canvas.noise(rng, 65)
    if canvas.n >= 160:  # grain that smaller films can't show
        fine += canvas.noise(rng, 129)
    # short streaks that run outwards from the hila: many in interstitial disease, a few faint ones in everyone
    many = int(460 * min(1.0, patient.streaks))
    count = max(many, 200)
    z, u = z[:, :count], u[:, :count]
    strong = np.arange(count) < many
    strength = np.where(strong, F32(0.75 + 0.7 * patient.streaks), F32(0.30))
    radius = 0.04 + 0.75 * u[1]
    theta = 1.15 * z[0]
    heading = theta + 0.75 * z[1]
    t = np.linspace(-0.5, 0.5, 5, dtype=F32)[:, None] * (0.06 + 0.06 * np.abs(z[2]))
    x = radius * np.cos(theta) + t * np.cos(heading)
    y = radius * np.sin(theta) + t * np.sin(heading)
    side = np.broadcast_to(np.where(u[0] < 0.5, F32(-1), F32(1)), x.shape)
    weight = np.broadcast_to(3.6e-5 * (0.3 + u[2]) * strength * (0.95 - 0.6 * radius), x.shape)
    return Textures(clouds, fine, (side.ravel(), x.ravel(), y.ravel(), weight.ravel()))
