"""Attenuation maps of the procedural phantom: a posed patient drawn on a grid.

Everything is a function of continuous image coordinates (x to the right, y down, both in [0, 1]), so one patient
looks the same at any resolution. The maps are line integrals of attenuation (dimensionless, about 3 through the
abdomen and 1 through a lung); `films.py` turns them into a film.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from primia_lite.phantom.anatomy import Patient, Pose
from primia_lite.phantom.canvas import Canvas, Textures, bone, capsule, step, unit

F32 = np.float32
TABLE = 1024  # entries per unit length in the look-up table of the ribs


@dataclass
class Maps:
    """Result of `attenuate`, each [n, n]: attenuation, share of the lung that is diseased, lung as a reader sees it."""

    attenuation: np.ndarray
    lesion: np.ndarray
    visible_lung: np.ndarray


def attenuate(canvas: Canvas, patient: Patient, pose: Pose, textures: Textures) -> Maps:
    """Attenuation of a patient in a pose on a canvas."""
    p, c = patient, canvas
    f = _Frame(c, p, pose)
    clouds, fine = textures.clouds, textures.fine
    lung, heart, visible = _lungs_and_heart(c, p, f)
    markings, bronchi = _lung_markings(c, p, f, textures)
    lesion = _consolidation_density(p, f, clouds, bronchi)

    # air that is replaced by fluid: haze of the whole lung, poorly aired bases, consolidations
    base = (0.06 + max(0.0, -1.8 * pose.inspiration)) * unit(f.v * 1.6 - 0.6)
    air = (0.97 - 0.62 * p.haze) - base - (0.28 * p.haze) * clouds
    air = np.maximum(air, 0.15) * (1.0 - lesion)
    markings = markings / (1.0 + 0.4 * markings) + 0.02 * clouds + 0.035 * fine
    a = _soft_tissue(c, p, pose, f, clouds, fine)
    a += (0.30 + 0.036 * clouds) * heart
    a -= lung * air * ((1.46 + 0.10 * p.hyperinflation) * p.bulk)
    a += markings * np.minimum(lung * 2.2 + 0.15, 1.0)
    a += _abdomen(p, f, clouds, fine)
    _add_airways(p, pose, f, a)
    _add_spine(c, p, f, a)
    a += _ribs(c, p, pose, f)
    _add_shoulder_bones(c, p, pose, f, a)
    np.maximum(a, 0.0, out=a)
    if p.label == 2:  # diffuse disease: the zone around the hila where most streaks are
        q = ((f.uw - 0.35) * (1.0 / 0.45)) ** 2 + ((f.y - f.apex - 0.46 * f.depth) * (1.0 / (0.42 * f.depth))) ** 2
        lesion = np.maximum(lesion, (q + 0.35 * clouds < 1.0) * F32(1.0))
    return Maps(a, lesion * visible, visible)


class _Frame:
    """Coordinates of a posed patient on a canvas, shared by everything that is drawn.

    sx: distance from the spine, negative on the patient's right (left of the film); ax: |sx|; yt: height with the tilt
    of the shoulders; v: 0 at the lung apex, 1 at the costophrenic angle; u: 1 at the rib cage.
    """

    def __init__(self, c: Canvas, p: Patient, pose: Pose):
        y, s = c.y, pose.scale
        self.s, self.width, self.apex = s, p.half_width * s, pose.apex
        self.depth = (p.height + pose.inspiration + 0.050 * p.hyperinflation) * s
        self.dome = (self.apex + self.depth, self.apex + self.depth + p.dome_offset * s)
        self.fall = tuple(max(0.03, d - 0.3 * pose.inspiration) * s for d in p.dome_shape)
        self.floor = max(self.dome[0] + self.fall[0], self.dome[1] + self.fall[1])
        self.y = y
        self.sx = c.x - (pose.x + pose.lean * (y - 0.5) + 0.15 * pose.lean * np.sin(7 * y))
        self.ax = np.abs(self.sx)
        self.right = self.sx < 0
        self.yt = y + pose.tilt * self.sx
        self.v = np.clip((y - self.apex) / (self.floor - self.apex), 0.0, 1.4)
        rise = (1.0 - np.maximum(1.0 - self.v, 0.0) ** 2.8) ** 0.66
        self.cage = self.width * (0.33 + 0.67 * rise) * (1.0 + 0.06 * (self.v - 0.6))
        gain = np.where(self.right, F32(1.0 / (1.0 - pose.rotation)), F32(1.0 / (1.0 + pose.rotation)))
        self.u = self.ax * gain / self.cage
        # the diaphragm: height of the domes, highest at `peak` of the way to the side
        uw = self.ax * (1.0 / self.width)
        lateral = np.maximum(uw - p.dome_peak, 0.0) * (1.0 / (1.0 - p.dome_peak))
        medial = np.maximum(p.dome_peak - uw, 0.0) * (1.0 / p.dome_peak)
        lateral *= lateral
        curve = lateral * (0.55 + 0.45 * lateral) + (0.35 + 0.1 * p.dome_peak) * medial * medial
        roof = np.where(self.right, self.dome[0] + self.fall[0] * curve, self.dome[1] + self.fall[1] * curve)
        roof -= 0.7 * pose.tilt * self.sx
        self.below = y - roof
        self.uw = uw


def _lungs_and_heart(c: Canvas, p: Patient, f: _Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth of air (0..1), depth of heart and great vessels (0..1), and the lungs as a reader would outline them."""
    s = f.s
    # borders of the mediastinum to the right and left of the spine, as functions of the height
    h = (f.y - f.apex) / f.depth  # 0 at the apex, 1 at the right dome
    size, shift = p.heart_size, p.heart_shift / s
    upper = 0.056 + 0.05 * p.thymus * np.exp(-(((h - 0.25) / 0.16) ** 2))
    top = 0.018 * np.exp(-np.maximum(h, 0.0) / 0.06)
    bulge = np.exp(-((unit(0.72 - h) / 0.24) ** 2)) * (1.0 - 0.5 * unit(h - 0.75))
    right = upper + top + (0.068 * size - shift) * bulge
    knob = 0.020 * p.knob * np.exp(-(((h - 0.27) / 0.07) ** 2)) + 0.016 * np.exp(-(((h - 0.45) / 0.10) ** 2))
    apex_of_heart = unit((h - 0.15) / 0.65)
    beyond = unit((h - 0.82) / 0.62)
    swell = np.sin(0.5 * np.pi * apex_of_heart) ** (1.3 + 0.8 * p.heart_round) * np.sqrt(1.0 - beyond * beyond)
    left = upper + top + knob + (0.155 * size + shift) * swell
    border = np.where(f.right, right * s, left * s).astype(F32)
    edge = np.maximum(0.007 + 0.012 * unit(1.0 - 2.5 * np.abs(h - 0.15)), 0.7 * c.px).astype(F32)
    out = f.ax - border
    air_m = step(out * (1.0 / edge))
    inside = np.maximum(-out, 0.0)
    heart = np.minimum(np.sqrt(inside * (1.0 / 0.16)), 1.0) * unit(h * 3.0 + 0.3) * (1.0 - 0.5 * unit(h - 1.05))
    air_d = step(f.below * (-1.0 / max(0.007, 0.7 * c.px)))
    z = np.maximum(f.below, 0.0) * (1.0 / 0.05)
    recess = 0.15 / (1.0 + z * z)  # lung behind the dome
    tip = np.sqrt(unit((f.y - f.apex) / 0.09))
    lu = f.u * 1.03
    hull = np.sqrt(np.maximum(1.0 - lu * lu, 0.0))
    hull = np.sqrt(hull) * (0.70 + 0.30 * hull) * tip
    behind = 0.17 + air_m * (0.64 + 0.19 * unit(out * 10.0))  # the lung is thinner beside the heart
    lung = hull * behind * np.maximum(air_d, recess)
    visible = (out > 0) & (f.below < 0) & (lu < 1.0) & (f.y > f.apex)
    return lung, heart, visible


def _soft_tissue(c: Canvas, p: Patient, pose: Pose, f: _Frame, clouds: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Trunk, shoulders, neck, arms and chin."""
    s, v, width = f.s, f.v, f.width
    narrow = 0.84 + 0.16 * unit(v * 2.0)
    trunk_half = (width + p.wall) * narrow
    q = f.ax * (1.0 / trunk_half)
    trunk = np.sqrt(np.maximum(1.0 - q * q, 0.0)) * (2.12 + 0.30 * unit(v - 0.5))
    # folds of the armpit and the skin of the chest wall
    fold_half = (width + p.wall) * (1.06 + (0.30 - 0.16 * p.arms_up) * unit(1.0 - 1.25 * v))
    q = f.ax * (1.0 / fold_half)
    fold = np.sqrt(np.maximum(1.0 - q * q, 0.0)) * (1.42 + 0.40 * unit(1.0 - 1.6 * v))
    body = np.maximum(trunk, fold)
    # outline of the shoulders: the trapezius rises to the neck
    neck = (0.105 + 0.02 * (1 - p.age)) * s
    out = np.maximum(f.ax - neck, 0.0)
    top = f.apex - 0.22 * s + p.shoulder[1] + ((0.24 if p.arms_up else 0.36) - 0.3 * out) * out
    cover = np.sqrt(unit((f.yt - top) * (1.0 / (0.20 * s))))
    q = f.ax * (1.0 / (neck * 1.45))
    column = np.maximum(1.0 - q * q, 0.0) * (1.65 * unit((f.floor - f.y) * 5.0))
    body = np.maximum(body * cover, column) * p.bulk
    radius = (0.092 + 0.8 * (p.wall - 0.05)) * s
    rows, dx, dy, direction = _upper_arms(c, p, pose, f)
    d, _ = capsule(dx, dy, direction)
    arm = np.sqrt(np.maximum(1.0 - d * (1.0 / (radius * radius)), 0.0)) * (1.02 * p.bulk)
    here = body[rows]
    body[rows] = np.maximum(here, arm) + 0.30 * np.minimum(here, arm)
    rows = slice(0, max(1, int((p.head + 0.03) * c.n)))
    if p.head > 0.0:
        qx = (f.sx[rows] - 1.5 * pose.lean) * (1.0 / ((0.165 + 0.03 * p.knob) * s))
        qy = (f.y[rows] - p.head + 0.16) * (1.0 / 0.16)
        q = qx * qx + qy * qy
        skull = np.sqrt(np.maximum(1.0 - q, 0.0)) * (1.4 + 0.08 * fine[rows] + 0.2 * clouds[rows])
        body[rows] += skull + 0.40 * np.exp(-(((q - 0.85) * (1 / 0.16)) ** 2))
    return body


def _upper_arms(c: Canvas, p: Patient, pose: Pose, f: _Frame):
    """Upper arms: rows, coordinates from the shoulder joint (both sides at once), direction of the arm."""
    jx = f.width * (0.95 if p.arms_up else 0.98) + p.shoulder[0] * f.s
    jy = f.apex - 0.03 * f.s + p.shoulder[1] + (0.0 if p.arms_up else 0.02)
    rows = slice(0, min(c.n, int((jy + 0.22 * f.s) * c.n)) if p.arms_up else c.n)
    lean = min(max(0.15 + p.shoulder[2] + pose.arm, -0.12 if p.arms_up else 0.10), 0.6)
    angle = np.pi - lean if p.arms_up else 0.6 * lean
    direction = (float(np.sin(angle)), float(np.cos(angle)))
    return rows, f.ax[rows] - jx, f.yt[rows] - jy, direction


def _abdomen(p: Patient, f: _Frame, clouds: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """What lies under the diaphragm: liver and spleen, gas in the stomach and the bowel."""
    belly = unit(f.below * 9.0 + 0.25)
    a = belly * np.maximum(1.15 - f.uw * f.uw, 0.0) * (0.50 + 0.10 * clouds)
    gx, gr, gc = p.stomach
    if gc > 0:
        q = ((f.sx - gx * f.s) * (1.0 / (1.3 * gr))) ** 2 + ((f.y - f.dome[1] - 0.035 - gr) * (1.0 / gr)) ** 2
        a -= gc * np.sqrt(np.maximum(1.0 - q - 0.45 * clouds, 0.0)) * belly
    a -= np.minimum(np.maximum(clouds + 0.08 * fine - 0.7 + p.gas, 0.0) * 0.35, 0.5) * unit((f.below - 0.12) * 12.0)
    return a


def _add_airways(p: Patient, pose: Pose, f: _Frame, a: np.ndarray) -> None:
    """Trachea and main bronchi: narrow bands of less attenuation."""
    carina = f.apex + 0.30 * f.depth
    n = a.shape[0]
    rows = slice(0, min(n, int((carina + 0.10) * n) + 1))
    tx, y = f.sx[rows] + (0.006 - 0.08 * pose.rotation), f.y[rows]
    q = tx * (1.0 / (0.026 * f.s))
    a[rows] -= 0.40 * np.maximum(1.0 - q * q, 0.0) * unit((carina - y) * 25.0) * unit((y - 0.02) * 20)
    arm = np.clip(y - carina, 0.0, 0.08)
    fade = 0.16 * unit((y - carina) * 60.0) * unit((carina + 0.08 - y) * 30.0)
    for sign, slope in ((-1.0, 0.75), (1.0, 1.05)):
        q = (sign * tx - slope * arm) * (1.0 / 0.016)
        a[rows] -= fade * np.sqrt(np.maximum(1.0 - q * q, 0.0))


def _add_spine(c: Canvas, p: Patient, f: _Frame, a: np.ndarray) -> None:
    """Vertebral bodies, discs, pedicles and processes below each other."""
    near = np.flatnonzero(f.ax.min(axis=0) < 0.09)
    cut = slice(int(near[0]), int(near[-1]) + 1) if near.size else slice(0, 1)
    ax, y = f.ax[:, cut], f.y
    pitch = p.rib_spacing * 0.74 * f.s * (0.85 + 0.3 * unit(y))
    phase = (y - f.apex) / pitch
    ph = phase - np.floor(phase)
    body = unit((0.39 - np.abs(ph - 0.5)) * 5.0 + 0.5)
    half = 0.046 * f.s * (0.92 + 0.16 * unit(y)) * (0.96 + 0.05 * body)
    below = unit((y - f.apex + 0.05) * 6.0)
    depth = (0.22 + 0.24 * body) * (1.0 + 0.10 * np.sin(2.1 * phase + 7.0 * p.age)) * (0.55 + 0.45 * below)
    out = depth * step((half - ax) * (1.0 / max(0.005, 0.7 * c.px)))
    cortex = (ax - half * 0.94) * (1.0 / 0.005)
    out += (0.10 * body) * np.maximum(1.0 - cortex * cortex, 0.0)
    rim = np.exp(-(((np.abs(ph - 0.5) - 0.38) / 0.08) ** 2)) * 0.10
    out += rim * (ax < half)
    d = (ax - half * 0.62) * (1.0 / 0.011)
    out += (0.36 * np.exp(-(((ph - 0.36) / 0.17) ** 2))) * np.maximum(1.0 - d * d, 0.0)
    out += (0.10 * np.exp(-(((ph - 0.42) / 0.16) ** 2))) * step((half * 1.75 - ax) * 70.0)
    d = ax * (1.0 / 0.011)
    out += (0.16 * np.exp(-(((ph - 0.78) / 0.17) ** 2))) * np.maximum(1.0 - d * d, 0.0)
    a[:, cut] += out * (0.7 + 0.3 * p.rib_density)


def _ribs(c: Canvas, p: Patient, pose: Pose, f: _Frame) -> np.ndarray:
    """Ribs as tilted ellipses: seen from the front, back and front halves are y0 + k (1 -+ sqrt(1 - u^2))."""
    s, u = f.s, np.minimum(f.u, 0.985)
    cu = np.sqrt(1.0 - u * u)
    k = p.rib_drop * s * (1.0 - 0.8 * pose.inspiration)
    lead = p.rib_slope * s * (0.75 + 0.45 * np.clip(f.v, 0.0, 1.2))  # lower ribs are steeper
    spacing = p.rib_spacing * s
    half = max(p.rib_width * s, 0.8 * c.px)
    # signed distance to the nearest rib, tabulated over the height at the spine
    order = np.arange(13)
    centres = f.apex - 0.055 * s + spacing * order * (0.86 + 0.012 * order) + p.rib_jitter[:13] * s
    heights = np.arange(int(1.9 * TABLE)) / TABLE - 0.5
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, heights)
    table = (heights - centres[nearest]).astype(F32)
    table[heights > centres[10] + 0.5 * spacing] = 1.0
    front = table.copy()
    front[heights > centres[7] + 0.5 * spacing] = 1.0
    slope = (k * u + (2.0 * lead) * u * cu) * (1.0 / f.width)
    cosine = np.maximum(cu / np.sqrt(cu * cu + slope * slope + 1e-6), 0.80)
    thick = 1.0 - cu
    thick = 1.0 + 1.2 * thick * thick  # rays pass along the rib at the side
    scale = cosine * (1.0 / half)
    # the back: nearly level beside the spine, then falling; the front goes on falling towards the sternum
    fall = lead * (u * u * 1.1 - 0.1 * u)
    at = ((f.yt + (0.5 - k) - fall + k * cu) * TABLE).astype(np.int32)
    out = 0.43 * bone(table.take(at, mode="clip") * scale)
    at = ((f.yt + (0.5 - k) - lead - (p.rib_front_drop * s) * cu) * TABLE).astype(np.int32)
    fade = unit((u - p.rib_front) * 6.0)
    out += (0.18 * fade) * bone(front.take(at, mode="clip") * scale)
    out *= thick
    out *= 0.30 + np.minimum(np.maximum((u - 0.12) * 1.8, 0.0), 0.70)  # thin and steep beside the spine
    out *= 1.0 - unit((u - 0.93) * 10.0)
    # at the side of the cage the ray runs along muscle, and along each rib where it turns to the front
    turn = bone(table.take(((f.y + (0.5 - 0.85 * k) - lead) * TABLE).astype(np.int32), mode="clip") * (0.75 / half))
    rim = (0.16 + 0.42 * turn) * unit((f.y - f.apex) * 25.0)
    out += rim * np.maximum(1.0 - np.abs(f.u - 0.965) * 17.0, 0.0)
    # soft towards the outside; below the diaphragm, ribs drown in scatter
    edge = np.minimum(np.maximum((1.022 - f.u) * (f.width / max(1.2 * c.px, 0.010)), 0.0), 1.0)
    return out * edge * (p.rib_density * (1.0 - 0.55 * unit(f.below * 10.0 + 0.1)))


def _add_shoulder_bones(c: Canvas, p: Patient, pose: Pose, f: _Frame, a: np.ndarray) -> None:
    """Clavicles, shoulder blades and the upper ends of the humeri."""
    s, width, n = f.s, f.width, c.n
    rows = slice(max(0, int((f.apex - 0.20 * s) * n)), min(n, int((f.apex + 0.10) * n)))
    ax, yt = f.ax[rows], f.yt[rows]
    t = (ax - 0.038 * s) * (1.0 / (width * 0.92))  # 0 at the sternum, 1 at the shoulder
    ts = np.clip(t, 0.0, 1.2)
    line = f.apex + s * (p.clavicle - p.clavicle_rise * ts + p.clavicle_bend * np.sin(6.2 * ts + 0.9))
    line += p.shoulder[1] * ts + pose.tilt * f.sx[rows]  # shoulders tilt more than the chest
    t = t + 0.5 * pose.rotation * np.sign(f.sx[rows])
    half = np.maximum((0.0145 + 0.004 * np.cos(7.0 * ts)) * s, c.px)
    ends = unit((t - 0.06) * 10.0) * unit((p.clavicle_end - t) * 8.0)
    a[rows] += (0.62 * p.rib_density) * bone((yt - line) / half) * ends
    rows, dx, dy, direction = _upper_arms(c, p, pose, f)
    d, along = capsule(dx, dy, direction)
    w = along * (1.0 / 0.035)
    shaft = np.maximum(s * (0.017 + 0.017 / (1.0 + w * w)), c.px)  # the bone widens towards the joint
    out = 0.42 * bone(np.sqrt(np.maximum(d, 0.0)) / shaft)
    # shoulder blade: its neck and outer border run from the joint inwards and fade, a thin plate is behind the ribs
    bx, by = dx + 0.025 * s, dy - 0.02 * s
    far = unit((by * 0.93 - bx * 0.37) * (1.0 / (0.13 * s)))
    bar = (bx * 0.93 + by * 0.37) / ((0.020 - 0.010 * far) * s + 0.3 * c.px)
    out += bone(bar) * (0.40 - 0.26 * far) * unit(by * (1.0 / (0.02 * s))) * (far < 1.0)
    bx, by = dx + 0.17 * s, dy - 0.03 * s
    plate = unit((bx + 0.02 - 0.30 * by) * 40.0) * unit((0.13 * s - bx - 0.45 * by) * 40.0)
    out += 0.16 * plate * unit(by * 40.0)
    a[rows] += out * p.rib_density


def _lung_markings(c: Canvas, p: Patient, f: _Frame, textures: Textures) -> tuple[np.ndarray, np.ndarray]:
    """Attenuation of vessels and interstitial streaks, and that of the bronchi (for air bronchograms)."""
    hilum_y = f.apex + 0.46 * f.depth
    row = min(int(hilum_y * c.n), c.n - 1)
    spine = float(c.x[0, 0] - f.sx[row, 0])  # vessels follow the spine at the height of the hilum
    root = 0.10 * f.s
    side, x, y, level, weight = p.vessels
    x = spine + side * (root + x * (f.width * 0.92))
    y = hilum_y + y * (f.depth * 0.90)
    wide = int(np.searchsorted(level, 2))  # levels are in ascending order
    # thickened walls of the bronchi: the large branches become wider and denser
    cuff = round(3 * min(p.cuffs, 1.0)) / 3
    coarse = c.splat(x[:wide], y[:wide], weight[:wide] * (3.2 * p.vessel_gain * (1.0 + 1.5 * cuff)))
    coarse = c.blur(coarse, 0.0065 + 0.0045 * cuff)
    s_side, s_x, s_y, s_weight = textures.streaks
    x = np.concatenate((x[wide:], spine + s_side * (root + s_x * f.width)))
    y = np.concatenate((y[wide:], hilum_y + s_y * (f.depth * 0.9)))
    fine = c.blur(c.splat(x, y, np.concatenate((weight[wide:] * (7.0 * p.vessel_gain), s_weight))), 0.0038)
    shift = max(1, round(0.010 * c.n))
    bronchi = np.roll(coarse, shift, axis=1)
    fine += coarse
    return fine, bronchi


def _consolidation_density(p: Patient, f: _Frame, clouds: np.ndarray, bronchi: np.ndarray) -> np.ndarray:
    """Share of the air that is replaced by fluid, 0..1."""
    out = np.zeros_like(clouds)
    for side, across, down, rx, ry, angle, density in p.lesions:
        here = f.right if side < 0 else ~f.right
        dx = (f.ax - across * f.width) * (1.0 / f.width)
        dy = (f.y - f.apex - down * f.depth) * (1.0 / f.depth)
        ca, sa = float(np.cos(angle)), float(np.sin(angle))
        r = np.sqrt(((dx * ca + dy * sa) * (1 / rx)) ** 2 + ((dy * ca - dx * sa) * (1 / ry)) ** 2)
        blob = step((1.0 - r + 0.45 * clouds) * (1 / 0.75)) * density
        if p.fissure and side < 0 and down < 0.4:
            blob = blob * step((0.44 - dy - down + 0.05 * dx) * (1 / 0.015))
        out = np.maximum(out, blob * here)
    if p.lesions:
        out = out * (1.0 - np.minimum(1.6 * bronchi, 0.40))
    for amount, here in zip(p.effusion, (f.right, ~f.right), strict=True):
        if amount:
            level = f.floor - amount * (0.5 + 0.9 * f.uw * f.uw)
            out = np.maximum(out, 0.95 * step((f.y - level) * 40.0) * here)
    return out
