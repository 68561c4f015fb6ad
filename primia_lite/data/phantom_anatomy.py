"""Anatomy of the procedural phantom: patients, poses, and attenuation maps of a child's chest.

Everything is a function of continuous image coordinates (x to the right, y down, both in [0, 1]), so one patient
looks the same at any resolution. The maps are line integrals of attenuation (dimensionless, about 3 through the
abdomen and 1.2 through a lung); `phantom.py` turns them into a film. Nothing here is fitted to any real film.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

F32 = np.float32
TABLE = 2048  # entries per unit length in the look-up tables that are indexed by a coordinate


@dataclass(frozen=True)
class Patient:
    """Anatomy that all films of a patient share. Lengths are fractions of the film's side."""

    label: int  # 0 normal, 1 bacterial, 2 viral
    age: float  # 0 (infant) .. 1 (about six years)
    half_width: float  # inner rib cage at its widest
    height: float  # lung apex to dome of the diaphragm, at the patient's usual inspiration
    wall: float  # soft tissue outside the rib cage
    bulk: float  # attenuation of the whole trunk, relative
    rib_spacing: float
    rib_drop: float  # how far a posterior rib falls from spine to side
    rib_width: float
    rib_density: float
    rib_jitter: np.ndarray  # [14] offsets of single ribs
    heart_size: float
    heart_shift: float
    thymus: float
    dome_shape: tuple[float, float]  # height of the dome above the costophrenic angle, right and left
    dome_offset: float  # left dome lower than the right one
    vessel_gain: float
    stomach: tuple[float, float, float]  # x, radius, contrast of the gas bubble
    arms_up: bool
    shoulder: tuple[float, float, float]
    head: float  # how far the chin reaches into the film (negative: not at all)
    seed: int  # for fields drawn again for every film of this patient (textures, vessels)
    hyperinflation: float = 0.0
    haze: float = 0.0
    lesions: tuple[tuple[float, ...], ...] = ()  # (side, across, down, radius across, radius down, angle, density)
    fissure: float = 0.0
    effusion: tuple[float, float] = (0.0, 0.0)  # height of the fluid, right and left
    streaks: float = 0.0
    cuffs: float = 0.0
    vessels: tuple[np.ndarray, ...] = field(default=(), repr=False)


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


@dataclass
class Maps:
    """Result of `attenuate`: attenuation [n, n], lung depth without heart [n, n], lesion density [n, n]."""

    attenuation: np.ndarray
    lung: np.ndarray
    lesion: np.ndarray
    visible_lung: np.ndarray


def sample_patient(rng: np.random.Generator, label: int) -> Patient:
    """Draw a patient of class `label` (0 normal, 1 bacterial, 2 viral)."""
    u = rng.random(48).tolist()  # Python floats: a numpy scalar would turn the float32 maps into float64
    z = rng.standard_normal(32).tolist()
    age = u[0]
    severity = 0.35 + 0.65 * u[1] ** 0.8
    hyper = haze = fissure = streaks = cuffs = 0.0
    lesions: list[tuple[float, ...]] = []
    effusion = (0.0, 0.0)
    if label == 1:
        lesions, fissure = _consolidations(rng, severity)
        if u[2] < 0.25:
            amount = 0.03 + 0.12 * u[3]
            effusion = (amount, 0.0) if lesions[0][0] < 0 else (0.0, amount)
        haze = 0.10 * u[4]
        streaks = 0.25 * u[5]
        cuffs = 0.3 * u[6]
    elif label == 2:
        hyper = min(max(0.55 + 0.35 * z[0], 0.0), 1.2) * (0.5 + 0.5 * severity)
        haze = 0.05 + 0.20 * u[4] * severity
        streaks = 0.25 + 0.75 * severity
        cuffs = 0.3 + 0.7 * u[6] * severity
        if u[2] < 0.15:
            lesions, fissure = _consolidations(rng, 0.25)
            lesions = lesions[:1]
    else:
        hyper = 0.3 * max(0.0, z[0] - 1.0)
        streaks = 0.12 * u[5] + (0.35 * u[6] if u[7] < 0.15 else 0.0)
        cuffs = 0.25 * u[8]
        haze = 0.08 * u[9] if u[10] < 0.2 else 0.0
    spacing = 0.062 + 0.004 * z[1]
    return Patient(
        label=label,
        age=age,
        half_width=0.355 + 0.022 * z[2] - 0.01 * age + 0.010 * hyper,
        height=0.56 + 0.05 * (age - 0.5) + 0.03 * z[3],
        wall=0.035 + 0.012 * abs(z[4]),
        bulk=1.0 + 0.08 * z[5],
        rib_spacing=spacing,
        rib_drop=max(0.05, 0.115 + 0.03 * (age - 0.5) + 0.018 * z[6] - 0.03 * hyper),
        rib_width=spacing * (0.21 + 0.02 * z[7]),
        rib_density=1.0 + 0.18 * z[8],
        rib_jitter=(0.05 * spacing * rng.standard_normal(14)),
        heart_size=1.0 + 0.07 * z[9] - 0.10 * (age - 0.5) - 0.05 * hyper,
        heart_shift=0.012 * z[10],
        thymus=max(0.0, 0.5 - age) * 2 * u[11],
        dome_shape=(0.115 + 0.02 * z[11] - 0.05 * hyper, 0.115 + 0.02 * z[12] - 0.05 * hyper),
        dome_offset=0.018 + 0.012 * z[13],
        vessel_gain=float(np.exp(0.25 * z[14])) * (1.0 + 0.25 * cuffs),
        stomach=(0.16 + 0.03 * z[15], 0.05 + 0.05 * u[12], 0.9 * u[13] if u[14] < 0.7 else 0.0),
        arms_up=bool(u[15] < 0.65),
        shoulder=(0.075 + 0.02 * z[16], 0.02 * z[17], 0.15 * z[18]),
        head=0.03 + 0.05 * z[19],
        seed=int(rng.integers(2**31)),
        hyperinflation=float(hyper),
        haze=float(haze),
        lesions=tuple(lesions),
        fissure=float(fissure),
        effusion=effusion,
        streaks=float(streaks),
        cuffs=float(cuffs),
        vessels=_grow_vessels(rng),
    )


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
        size = (0.18 + 0.26 * severity * next(w)) * (1.0 if number == 0 else 0.7)
        lesions.append(
            (
                float(side),
                across + 0.10 * next(z),
                down + 0.05 * next(z),
                size * (0.8 + 0.5 * next(w)),
                size * (0.6 + 0.4 * next(w)),
                0.5 * next(z),
                (0.25 + 0.65 * severity) * (0.7 + 0.3 * next(w)),
            )
        )
    return lesions, 1.0 if chosen[0] == 0 and rng.random() < 0.6 else 0.0


def sample_pose(rng: np.random.Generator, patient: Patient, base: Pose | None) -> Pose:
    """Draw the position of a film: at first freely, then close to the patient's first film (`base`)."""
    z = rng.standard_normal(8).tolist()
    if base is None:
        return Pose(
            x=0.5 + 0.018 * z[0],
            apex=0.165 + 0.03 * z[1],
            scale=1.0 + 0.04 * z[2],
            lean=0.025 * z[3],
            tilt=0.02 * z[4],
            rotation=0.06 * z[5],
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
    """Two branching trees as points (side, x, y, level, weight) around the hilum; lungs span about 1 unit."""
    stems = 7
    side = np.repeat((-1.0, 1.0), stems)
    angle = np.tile(np.linspace(-1.45, 1.4, stems), 2) + 0.15 * rng.standard_normal(2 * stems)
    x = np.zeros(2 * stems)
    y = np.tile(np.linspace(-0.08, 0.10, stems), 2)
    length = 0.17 * np.exp(0.2 * rng.standard_normal(2 * stems))
    width = 0.022 * np.exp(0.15 * rng.standard_normal(2 * stems))
    t = np.linspace(0.0, 1.0, 14, endpoint=False)
    out: list[list[np.ndarray]] = [[], [], [], [], []]
    for level in range(5):
        bend = angle[:, None] + (0.35 * rng.standard_normal(angle.size))[:, None] * t
        step = length[:, None] / t.size
        px = x[:, None] + np.cumsum(np.cos(bend), axis=1) * step
        py = y[:, None] + np.cumsum(np.sin(bend), axis=1) * step
        weight = (width[:, None] * (1.0 - 0.25 * t)) ** 2 * step
        for store, value in zip(out, (np.broadcast_to(side[:, None], px.shape), px, py, np.full(px.shape, level), weight)):
            store.append(value.ravel())
        n = angle.size
        fork = np.abs(0.42 + 0.15 * rng.standard_normal(n))
        share = 0.35 + 0.3 * rng.random(n)
        angle = np.concatenate((bend[:, -1] - fork * share, bend[:, -1] + fork * (1 - share)))
        side, x, y = np.tile(side, 2), np.tile(px[:, -1], 2), np.tile(py[:, -1], 2)
        length = np.tile(length, 2) * (0.80 * np.exp(0.2 * rng.standard_normal(2 * n)))
        width = np.tile(width, 2) * np.concatenate((0.66 + 0.2 * share, 0.86 - 0.2 * share))
    return tuple(np.concatenate(store).astype(F32) for store in out)


# ---- small numerical helpers -------------------------------------------------------------------------------------


class Canvas:
    """A square grid of n x n pixel centres, with what is needed to draw smooth things on it."""

    def __init__(self, n: int):
        self.n = n
        self.px = 1.0 / n
        axis = ((np.arange(n) + 0.5) / n).astype(F32)
        self.x = axis[None, :]
        self.y = axis[:, None]
        self._spline = {g: _spline_matrix(n, g) for g in (5, 9, 17, 33, 65)}
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

    def splat(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Add points to the grid bilinearly; the result is a density (weight per unit area)."""
        n = self.n
        fx, fy = x * n - 0.5, y * n - 0.5
        inside = (fx > 0) & (fx < n - 1.001) & (fy > 0) & (fy < n - 1.001)
        fx, fy, weight = fx[inside], fy[inside], weight[inside]
        ix, iy = fx.astype(np.int32), fy.astype(np.int32)
        fx, fy = fx - ix, fy - iy
        at = iy * n + ix
        low, high = weight * (1 - fy), weight * fy
        index = np.concatenate((at, at + 1, at + n, at + n + 1))
        value = np.concatenate((low * (1 - fx), low * fx, high * (1 - fx), high * fx))
        return (np.bincount(index, value, minlength=n * n).reshape(n, n) * (n * n)).astype(F32)


def _spline_matrix(n: int, cells: int) -> np.ndarray:
    """Cubic B-spline interpolation from `cells` knots to n pixel centres, scaled to keep unit variance."""
    at = (np.arange(n) + 0.5) / n * (cells - 1)
    d = np.abs(at[:, None] - np.arange(cells)[None, :])
    b = np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0.0))
    return (b / np.sqrt((b**2).sum(axis=1, keepdims=True))).astype(F32)


def step(z: np.ndarray) -> np.ndarray:
    """Smooth step from 0 (z <= -1) to 1 (z >= 1)."""
    t = np.clip(z * 0.5 + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def chord(q: np.ndarray) -> np.ndarray:
    """Depth of an ellipsoid whose implicit function is q (1 on the outline)."""
    return np.sqrt(np.maximum(1.0 - q, 0.0))


_BONE = np.linspace(0.0, 2.0, 257)
_BONE_PROFILE = (
    0.55 * np.clip((1.12 - _BONE) / 0.24, 0, 1) ** 1.5 + 0.45 * np.exp(-(((_BONE - 0.80) / 0.22) ** 2))
).astype(F32)
_BONE_PROFILE[-1] = 0.0


def bone(z: np.ndarray) -> np.ndarray:
    """Cross-section of a tubular bone: brighter cortex at |z| = 0.8, nothing beyond about 1.3."""
    return _BONE_PROFILE[np.minimum(np.abs(z) * 128.0, 256.0).astype(np.int32)]


def capsule(dx: np.ndarray, dy: np.ndarray, direction: tuple[float, float], length: float) -> np.ndarray:
    """Distance from a segment that starts at the origin of (dx, dy)."""
    ux, uy = direction
    along = np.clip(dx * ux + dy * uy, 0.0, length)
    return np.sqrt((dx - along * ux) ** 2 + (dy - along * uy) ** 2)


# ---- the maps ----------------------------------------------------------------------------------------------------


def attenuate(canvas: Canvas, patient: Patient, pose: Pose, rng: np.random.Generator) -> Maps:
    """Attenuation of a patient in a pose on a canvas.

    `rng` must start from the same state for each film of a patient that should show the same textures.
    """
    p, c = patient, canvas
    x, y, px = c.x, c.y, c.px
    s = pose.scale
    width = p.half_width * s
    apex = pose.apex
    depth = (p.height + pose.inspiration + 0.055 * p.hyperinflation) * s  # apex to the right dome
    shape_r, shape_l = (max(0.03, d - 0.25 * pose.inspiration) * s for d in p.dome_shape)
    dome_r, dome_l = apex + depth, apex + depth + p.dome_offset * s
    floor = max(dome_r + shape_r, dome_l + shape_l)

    # coordinates relative to the spine; a lean moves the spine with height
    sx = x - (pose.x + pose.lean * (y - 0.5) + 0.012 * pose.lean * np.sin(7 * y))
    ax = np.abs(sx)
    right = sx < 0
    yt = y + pose.tilt * sx  # height with the tilt of the shoulders
    v = np.clip((y - apex) / (floor - apex), 0.0, 1.3)  # 0 at the apex, 1 at the costophrenic angle
    rise = (1.0 - np.maximum(1.0 - v, 0.0) ** 3.0) ** 0.62
    cage = width * (0.36 + 0.64 * rise) * (1.0 + 0.05 * (v - 0.6))  # [n, 1]
    side_gain = np.where(right, F32(1.0 - pose.rotation), F32(1.0 + pose.rotation))
    u = ax / (cage * side_gain)
    c2 = np.maximum(1.0 - u * u, 0.0)
    cu = np.sqrt(c2)

    # trunk, shoulders, neck, arms: soft tissue
    trunk_half = width * (1.0 + p.wall / 0.36) * (0.80 + 0.20 * np.clip(v * 2.2, 0, 1)) + 0.02 * np.clip(v - 0.7, 0, 1)
    q = (ax / trunk_half) ** 2
    trunk = chord(q) ** 0.8
    neck = (0.115 + 0.03 * (1 - p.age)) * s
    top = apex - 0.055 * s + p.shoulder[1] + 0.35 * np.maximum(ax - neck, 0.0) ** 1.2  # outline of the trapezius
    cover = np.clip((yt - top) / (0.13 * s), 0.0, 1.0) ** 0.6
    column = chord((ax / (neck * 1.1)) ** 2) * (0.80 - 0.0 * y)
    tissue = p.bulk * np.maximum(2.55 * trunk * cover, 2.0 * column * (y < floor))
    arms, limb_bones = _arms(c, p, pose, sx, yt, width, apex, s)
    tissue = np.maximum(tissue, arms) + 0.25 * np.minimum(tissue, arms)
    if p.head > 0:
        hq = (sx / (0.17 * s)) ** 2 + ((y - (p.head - 0.16)) / 0.17) ** 2
        tissue = tissue + 0.9 * chord(hq) + 0.5 * np.exp(-(((hq - 0.88) / 0.10) ** 2))

    # diaphragm and lungs
    uw = ax / width
    centre = 0.48
    lateral = np.maximum(uw - centre, 0.0) / (1.0 - centre)
    medial = np.maximum(centre - uw, 0.0) / centre
    curve = lateral**2.4 + 0.30 * medial**2
    roof = np.where(right, dome_r + shape_r * curve, dome_l + shape_l * curve) + 0.5 * pose.tilt * sx
    below = y - roof
    soft_d = max(0.006, 0.7 * px)
    air_d = step(below / -soft_d)
    recess = 0.16 * np.exp(np.minimum(-below / 0.045, 0.0))
    inner = width * (0.145 + 0.02 * np.sin(9 * v + 1.0) + 0.10 * p.thymus * np.exp(-(((v - 0.2) / 0.14) ** 2)))
    inner = inner + width * 0.24 * np.exp(-v / 0.035)
    air_m = step((ax - inner) / max(0.012, 0.7 * px))
    tip = np.clip((y - apex) / 0.16, 0.0, 1.0) ** 0.5
    lung_u = u * 1.025
    hull = np.sqrt(np.maximum(1.0 - lung_u * lung_u, 0.0)) ** 0.8 * tip
    lung = hull * air_m * np.maximum(air_d, recess)

    # heart and great vessels
    hs = p.heart_size * s
    hx = sx - p.heart_shift - 0.08 * pose.rotation
    hy = y - (min(dome_l, dome_r) - 0.118 * hs)
    ca, sa = 0.8139, 0.5810  # axis of the heart, 35.5 degrees
    h1 = hx - 0.060 * hs
    a1, b1 = h1 * ca + hy * sa, hy * ca - h1 * sa
    ventricles = (a1 / (0.165 * hs)) ** 2 + (b1 / (0.118 * hs)) ** 2
    atrium = ((hx + 0.042 * hs) / (0.082 * hs)) ** 2 + ((hy + 0.01) / (0.115 * hs)) ** 2
    knob = ((hx - 0.035 * hs) / (0.046 * hs)) ** 2 + ((y - apex - 0.33 * depth) / (0.045 * hs)) ** 2
    trunk_pa = ((hx - 0.045 * hs) / (0.060 * hs)) ** 2 + ((y - apex - 0.48 * depth) / (0.085 * hs)) ** 2
    hq = np.minimum(np.minimum(ventricles, atrium), np.minimum(knob, trunk_pa))
    heart = chord(hq)
    lung = lung * (1.0 - 0.62 * np.minimum(heart * 1.6, 1.0))

    # what is in the lungs
    vessels, streaks, bronchi = _lung_markings(c, p, sx, y, width, apex, depth, rng)
    clouds = c.noise(rng, 9) * 0.55 + c.noise(rng, 17) * 0.35 + c.noise(rng, 33) * 0.25
    fine = c.noise(rng, 65)
    lesion = _consolidation_density(p, clouds, sx, y, width, apex, depth, inner, bronchi, u, floor)
    central = np.exp(-((ax - 0.25 * width) ** 2) / (0.30 * width) ** 2)
    haze = p.haze * np.clip(0.55 + 0.5 * clouds, 0, 2) * (0.4 + 0.6 * central)
    base_haze = (0.10 + max(0.0, -1.6 * pose.inspiration)) * np.clip(v * 1.6 - 0.6, 0, 1)
    air = np.clip(1.0 - haze - base_haze, 0.2, 1.0) * (1.0 - lesion)
    texture = 0.025 * clouds + 0.02 * fine

    a = tissue - lung * (1.62 + 0.12 * p.hyperinflation) * p.bulk * air + 0.55 * heart
    a += (vessels + streaks + texture) * np.minimum(hull * 1.5, 1.0) * air_m * (0.25 + 0.75 * air_d)

    # abdomen
    belly = step(below / 0.05) * np.clip(1.2 - uw * uw, 0.0, 1.0)
    a += belly * (0.55 + 0.06 * clouds)
    if p.stomach[2] > 0:
        gx, gr, gc = p.stomach
        gq = ((sx - gx * s) / (1.2 * gr)) ** 2 + ((y - dome_l - 0.03 - gr) / gr) ** 2 + 0.35 * clouds
        a -= gc * chord(gq)
    bowel = np.maximum(clouds - 1.0, 0.0) * step((below - 0.14) / 0.06)
    a -= 0.5 * bowel

    # bones
    a += _spine(p, ax, y, s, apex)
    a += _ribs(c, p, sx, yt, u, cu, width, apex, s, pose)
    a += limb_bones + _clavicles(c, p, pose, sx, yt, width, apex, s)

    # trachea and main bronchi
    carina = apex + 0.30 * depth
    tx = sx + 0.012 - 0.05 * pose.rotation
    a -= 0.42 * chord((tx / (0.021 * s)) ** 2) * step((carina - y) / 0.03) * step((y - apex + 0.12) / 0.08)
    arm = np.maximum(y - carina, 0.0)
    for sign, slope in ((-1.0, 0.75), (1.0, 1.05)):
        a -= 0.22 * chord(((sign * tx - slope * arm) / 0.017) ** 2) * ((y > carina) & (y < carina + 0.075))

    np.maximum(a, 0.0, out=a)
    visible = air_d * air_m * (lung_u < 1.0) * (hq > 0.8) * (y > apex)
    diffuse = np.minimum(streaks * 3.0, 1.0) if p.streaks > 0.3 else 0.0
    return Maps(a, lung, np.maximum(lesion, diffuse) * (hull > 0), visible)


def _arms(c, p, pose, sx, yt, width, apex, s):
    """Upper arms and the shoulder blades: (soft tissue, bone)."""
    soft = np.zeros((c.n, c.n), F32)
    bones = np.zeros((c.n, c.n), F32)
    radius = 0.062 * s + 0.5 * p.wall
    blur = max(0.01, c.px)
    for sign in (-1.0, 1.0):
        cut = _columns(c, sx, sign, 0.45 * width)
        lx, ly = sign * sx[:, cut], yt[:, cut]
        jx, jy = width * 0.93 + p.shoulder[0] * s, apex + 0.035 * s + p.shoulder[1]
        lean = 0.5 + p.shoulder[2] + pose.arm
        angle = np.pi - lean if p.arms_up else 0.30 * lean
        direction = (float(np.sin(angle)), float(np.cos(angle)))
        d = capsule(lx - jx, ly - jy, direction, 0.5)
        soft[:, cut] = np.maximum(soft[:, cut], 1.15 * p.bulk * chord((d / radius) ** 2))
        shaft = 0.018 * s
        head = np.exp(-((np.maximum(0.0, capsule(lx - jx, ly - jy, direction, 0.0)) / (0.030 * s)) ** 4))
        bones[:, cut] += 0.42 * bone(d / max(shaft, 1.2 * c.px)) + 0.25 * head
        # shoulder blade: a thin plate between three lines, thick at its outer border
        bx, by = lx - width * 0.66, ly - (apex + 0.045 * s)
        outer = (width * 0.36 - bx) * 0.95 - 0.30 * by
        inner_edge = bx - 0.28 * by
        plate = step(outer / blur) * step(inner_edge / blur) * step((by + 0.03) / 0.02)
        border = np.exp(-((outer / 0.010) ** 2)) * (inner_edge > 0) * step((by + 0.02) / 0.02)
        ridge = np.exp(-(((by + 0.02 + 0.25 * (bx - 0.1)) / 0.010) ** 2)) * step((bx - 0.02) / 0.03) * (bx < 0.42 * width)
        bones[:, cut] += (0.13 * plate + 0.20 * border + 0.16 * ridge) * p.rib_density
    return soft, bones


def _columns(c, sx, sign, start):
    """Slice of columns in which sign * sx can exceed `start`."""
    reach = (sign * sx).max(axis=0) > start
    index = np.flatnonzero(reach)
    return slice(int(index[0]), int(index[-1]) + 1) if index.size else slice(0, 0)


def _clavicles(c, p, pose, sx, yt, width, apex, s):
    ax = np.abs(sx)
    t = (ax - 0.045 * s) / (width * 0.95)  # 0 at the sternum, 1 at the shoulder
    line = apex + 0.045 * s - 0.075 * s * t + 0.016 * np.sin(6.0 * t - 0.6) + p.shoulder[1] * t
    half = (0.0125 + 0.003 * np.exp(-((t - 0.0) ** 2) / 0.02)) * s
    window = step(t / 0.04) * step((1.0 - t) / 0.05)
    return 0.36 * p.rib_density * bone((yt - line) / np.maximum(half, c.px)) * window


def _spine(p, ax, y, s, apex):
    """Vertebral bodies, discs, pedicles and processes below each other."""
    pitch = p.rib_spacing * 0.86 * s
    phase = (y - apex) / pitch
    ph = phase - np.floor(phase)
    body = step((0.42 - np.abs(ph - 0.5)) / 0.06)
    half = 0.040 * s * (0.9 + 0.2 * np.clip(y, 0, 1))
    out = (0.42 + 0.20 * body) * step((half - ax) / 0.006)
    out = out + 0.12 * body * np.exp(-(((ax - half * 0.92) / 0.006) ** 2))
    pedicle = np.exp(-(((ph - 0.38) / 0.16) ** 2)) * np.exp(-(((ax - half * 0.60) / 0.008) ** 2))
    process = np.exp(-(((ph - 0.45) / 0.14) ** 2)) * step((half * 1.75 - ax) / 0.01)
    spinous = np.exp(-(((ph - 0.75) / 0.16) ** 2)) * np.exp(-((ax / 0.009) ** 2))
    return (out + 0.20 * pedicle + 0.12 * process + 0.16 * spinous) * (0.85 + 0.15 * p.rib_density)


def _ribs(c, p, sx, yt, u, cu, width, apex, s, pose):
    """Ribs as tilted ellipses: seen from the front, back and front halves are y0 + k (1 -+ sqrt(1 - u^2))."""
    k = p.rib_drop * s * (1.0 - 0.8 * pose.inspiration)
    spacing = p.rib_spacing * s
    half = max(p.rib_width * s, 0.9 * c.px)
    first = apex - 0.035 * s
    # signed distance to the nearest rib, tabulated over the height at the spine
    centres = first + spacing * (np.arange(13) * (0.90 + 0.012 * np.arange(13))) + p.rib_jitter[:13] * s
    heights = (np.arange(int(1.9 * TABLE)) / TABLE - 0.5).astype(F32)
    middles = (centres[1:] + centres[:-1]) / 2
    nearest = np.searchsorted(middles, heights)
    table = heights - centres[nearest].astype(F32)
    table[heights > centres[11] + spacing * 0.5] = 1.0
    front_table = table.copy()
    front_table[heights > centres[8] + spacing * 0.5] = 1.0
    slope = k / width
    cosine = cu / np.sqrt(cu * cu + slope * slope * u * u + 1e-6)
    inside = u < 1.0
    back_y = yt - k * (1.0 - cu) - 0.25 * k * u
    z = table[np.clip((back_y + 0.5) * TABLE, 0, table.size - 1).astype(np.int32)] * cosine
    tangent = 1.0 + 0.5 * (1.0 - cu) ** 3
    out = 0.30 * bone(z / half) * tangent
    front_y = yt - k * (1.0 + 0.9 * cu) - 0.25 * k * u
    z = front_table[np.clip((front_y + 0.5) * TABLE, 0, table.size - 1).astype(np.int32)] * cosine
    out += 0.20 * bone(z / (half * 1.05)) * step((u - 0.52) / 0.12) * tangent
    return out * inside * p.rib_density


def _lung_markings(c, p, sx, y, width, apex, depth, rng):
    """Vessels, interstitial streaks and bronchi (for air bronchograms), as attenuation."""
    side, vx, vy, level, weight = p.vessels
    # the spine is taken at the height of the hilum: vessels don't follow the lean
    hilum_y = apex + 0.50 * depth
    row = min(int(hilum_y * c.n), c.n - 1)
    spine = float(c.x[0, 0] - sx[row, 0])
    px_ = spine + side * (0.17 * width + vx * width * 0.92)
    py_ = hilum_y + vy * depth * 0.80
    out = np.zeros((c.n, c.n), F32)
    gain = 9.0 * p.vessel_gain
    for low, high, sigma in ((0, 0, 0.0085), (1, 1, 0.0058), (2, 2, 0.0040), (3, 5, 0.0028)):
        pick = (level >= low) & (level <= high)
        w = weight[pick] * gain
        out += c.blur(c.splat(px_[pick], py_[pick], w), sigma)
    pick = level <= 1
    bronchi = c.blur(c.splat(px_[pick] + 0.012, py_[pick] - 0.01, weight[pick] * 9.0), 0.006)
    streaks = np.zeros((c.n, c.n), F32)
    count = int(40 + 420 * p.streaks)
    z = rng.standard_normal((4, 460)).astype(F32)[:, :count]
    u = rng.random((3, 460), dtype=F32)[:, :count]
    if p.streaks > 0.02:
        sign = np.where(u[0] < 0.5, F32(-1), F32(1))
        radius = 0.10 + 0.75 * u[1]
        theta = 1.15 * z[0]
        cx, cy = radius * np.cos(theta), radius * np.sin(theta)
        heading = theta + 0.75 * z[1]
        length = 0.05 + 0.05 * np.abs(z[2])
        t = np.linspace(-0.5, 0.5, 9, dtype=F32)[:, None]
        qx = spine + sign * (0.17 * width + (cx + t * length * np.cos(heading)) * width)
        qy = hilum_y + (cy + t * length * np.sin(heading)) * depth * 0.8
        w = (2.2e-5 * (0.4 + u[2]) * (0.4 + 0.6 * p.streaks) * (1.2 - radius)) * np.ones_like(t)
        streaks = c.blur(c.splat(qx.ravel(), qy.ravel(), w.ravel()), 0.0038)
    if p.cuffs > 0.05:
        pick = level <= 2
        streaks = streaks + 0.8 * p.cuffs * c.blur(c.splat(px_[pick], py_[pick], weight[pick] * 9.0), 0.013)
    return out, streaks, bronchi


def _consolidation_density(p, clouds, sx, y, width, apex, depth, inner, bronchi, u, floor):
    """Share of the air that is replaced by fluid, 0..1."""
    out = np.zeros_like(clouds)
    ax = np.abs(sx)
    for side, across, down, rx, ry, angle, density in p.lesions:
        here = sx < 0 if side < 0 else sx > 0
        dx = (ax - across * width) / width
        dy = (y - apex - down * depth) / depth
        ca, sa = float(np.cos(angle)), float(np.sin(angle))
        r = np.sqrt(((dx * ca + dy * sa) / rx) ** 2 + ((dy * ca - dx * sa) / ry) ** 2)
        blob = step((1.0 - r + 0.45 * clouds) / 0.65) * density
        if p.fissure and side < 0 and down < 0.4:
            blob = blob * step((0.42 - dy - down + 0.05 * dx) / 0.012)
        out = np.maximum(out, blob * here)
    if p.lesions:
        out = out * (1.0 - np.minimum(2.0 * bronchi, 0.45))
    for amount, here in zip(p.effusion, (sx < 0, sx > 0)):
        if amount:
            level = floor - amount * (0.5 + 0.9 * u * u)
            out = np.maximum(out, 0.95 * step((y - level) / 0.025) * here)
    return out
