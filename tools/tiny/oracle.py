"""Reads a scene back from pixels, and scores a picture against the scene that its caption described.

The reader knows the vocabulary of scenes.py and nothing else about a picture. It finds the background as the most
frequent known colour, takes what differs from it apart into connected pieces, and compares each piece with drawn
templates of the six shapes. A piece that looks like none of them has the shape None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from . import scenes
from .scenes import BACKGROUNDS, COLOURS, CONCEPT_COLOUR, CONCEPT_RGB, POSITIONS, SHAPES, SIZES, TEXTURES, TONE, Scene

WORKING_SIDE = 128  # px; larger pictures are averaged down to about this short side
FOREGROUND = 28.0  # RGB distance from the background that starts a piece; the closest legal pair is 80 apart
MIN_AREA = 0.004  # of the squared short side; a quarter of the smallest star
MAX_EXTENT = 0.38  # of the short side; longer pieces are neighbours that touch, and are cut between grid cells
MIN_IOU = 0.6  # below this no shape is recognised
TEMPLATE_SCALES = (0.92, 1.0, 1.08)


@dataclass(frozen=True)
class FoundObject:
    """What the reader saw. `shape` is None where no template fits; `score` is the overlap (IoU) with the best one."""

    shape: str | None
    colour: str
    position: str
    size: str
    score: float


@dataclass(frozen=True)
class Reading:
    """All objects of a picture, and its background."""

    objects: tuple[FoundObject, ...]
    background: str
    texture: str


# -- reading -----------------------------------------------------------------------------------------------------------


def read_scene(image: np.ndarray, colours: dict = COLOURS) -> Reading:
    """Read a picture, uint8 (H, W, 3), with objects in these colours. Raises ValueError for other kinds of arrays."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 32:
        raise ValueError(f"the oracle reads uint8 (H, W, 3) of at least 32 px, not {image.dtype} {image.shape}")
    factor = max(1, min(image.shape[:2]) // WORKING_SIDE)
    pixels = _average_down(image, factor)  # (h, w, 3) float32
    sample = pixels[::2, ::2].reshape(-1, 3)
    name, is_background = _background_name(sample)
    low, high = _tones(sample[is_background])
    along, distance = _to_segment(pixels, low, high)
    pieces = _pieces(distance)
    objects = [found for piece in pieces if (found := _describe(piece, pixels, distance, colours)) is not None]
    empty = ndimage.binary_erosion(distance < FOREGROUND)
    return Reading(tuple(objects), name, _texture(along * np.linalg.norm(high - low), empty, image.shape, factor))


def _average_down(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.mean((1, 3), dtype=np.float32)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB 0..255, any leading shape: distances in it are roughly perceptual."""
    c = np.asarray(rgb, np.float32) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = c @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@cache
def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Lab of three tones of every background, then of every object colour; and the index of each one's name."""
    tones = [np.clip(np.array(rgb) + tone, 0, 255) for rgb in BACKGROUNDS.values() for tone in (-TONE, 0, TONE)]
    names = np.concatenate([np.repeat(np.arange(len(BACKGROUNDS)), 3), len(BACKGROUNDS) + np.arange(len(COLOURS))])
    return lab(np.array(tones + list(COLOURS.values()))), names


def _background_name(sample: np.ndarray) -> tuple[str, np.ndarray]:
    """The most frequent background colour among pixels (N, 3), and the mask (N,) of those that have it."""
    colours, names = _palette()
    nearest = ((colours**2).sum(1) - 2 * lab(sample) @ colours.T).argmin(1)
    label = names[nearest]
    best = int(np.bincount(label, minlength=len(BACKGROUNDS))[: len(BACKGROUNDS)].argmax())
    mask = label == best
    if not mask.any():  # no pixel has a background colour: take them all, the objects come out as they may
        mask = np.ones_like(mask)
    return tuple(BACKGROUNDS)[best], mask


def _tones(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dark and the light tone of background pixels (N, 3), RGB. They are about equal when it is plain."""
    light = values.sum(1)
    low, high = np.quantile(light, (0.2, 0.8))
    return np.median(values[light <= low], 0), np.median(values[light >= high], 0)


def _to_segment(pixels: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel falls between the two tones (-0.5 .. 0.5 and a little beyond), and its distance from there."""
    axis = high - low
    along = ((pixels - low) @ axis / max(float(axis @ axis), 1.0)).clip(-0.2, 1.2)
    return along - 0.5, np.linalg.norm(pixels - low - along[..., None] * axis, axis=-1)


# -- pieces ------------------------------------------------------------------------------------------------------------


def _pieces(distance: np.ndarray) -> list[np.ndarray]:
    """Masks (h, w) of connected foreground, cut between grid cells where two neighbours touch."""
    height, width = distance.shape
    short = min(height, width)
    labels, count = ndimage.label(distance > FOREGROUND)
    pieces = []
    for index, box in enumerate(ndimage.find_objects(labels, count), start=1):
        mask = labels == index
        if max(box[0].stop - box[0].start, box[1].stop - box[1].start) > MAX_EXTENT * short:
            cells = _cells(height, width)
            pieces += [mask & (cells == cell) for cell in range(9)]
        else:
            pieces.append(mask)
    return [piece for piece in pieces if piece.sum() >= MIN_AREA * short**2]


@cache
def _cells(height: int, width: int) -> np.ndarray:
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 3 // width
    return rows[:, None] * 3 + columns[None, :]


def _describe(piece: np.ndarray, pixels: np.ndarray, distance: np.ndarray, colours) -> FoundObject | None:
    """Colour, shape, size and position of one piece; None for what is no object, such as a faint stain."""
    height, width = piece.shape
    short = min(height, width)
    core = piece & (distance >= np.median(distance[piece]))
    rgb = np.median(pixels[core], 0)
    colour = tuple(colours)[int(np.linalg.norm(lab(np.array(list(colours.values()))) - lab(rgb), axis=1).argmin())]
    near = ndimage.binary_dilation(piece, iterations=2)
    coverage = np.where(near, distance / np.median(distance[core]), 0).clip(0, 1)
    coverage[coverage < 0.25] = 0  # noise and texture
    if (coverage > 0.5).sum() < MIN_AREA * short**2:
        return None
    shape, score, (x, y), radius = _best_template(coverage)
    position = POSITIONS[min(2, int(3 * y / height)) * 3 + min(2, int(3 * x / width))]
    middle = sum(SIZES.values()) / 2
    size = "small" if 2 * radius / short < middle else "large"
    return FoundObject(shape if score >= MIN_IOU else None, colour, position, size, round(score, 3))


# -- shapes ------------------------------------------------------------------------------------------------------------


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below the middle of its box."""
    grid = (np.arange(-64, 64) + 0.5) / 50
    inside = scenes.signed_distance(shape, grid[None, :], grid[:, None], 1.0) < 0
    return float(inside.sum() / 50**2), float(grid[np.nonzero(inside)[0]].mean())


def _best_template(coverage: np.ndarray) -> tuple[str, float, tuple[float, float], float]:
    """The shape of the same area and centroid that overlaps best: name, IoU, centre (x, y) and radius in px."""
    rows, columns = np.nonzero(coverage)
    top, left = max(0, rows.min() - 3), max(0, columns.min() - 3)
    window = coverage[top : rows.max() + 4, left : columns.max() + 4]
    area = float(window.sum())
    y, x = np.arange(window.shape[0]) + 0.5, np.arange(window.shape[1]) + 0.5
    cy, cx = float(window.sum(1) @ y / area), float(window.sum(0) @ x / area)
    best = ("", -1.0, (0.0, 0.0), 0.0)
    for shape in SHAPES:
        unit_area, offset = _moments(shape)
        for scale in TEMPLATE_SCALES:
            radius = scale * math.sqrt(area / unit_area)
            middle = cy - offset * radius
            template = (0.5 - scenes.signed_distance(shape, x[None, :] - cx, y[:, None] - middle, radius)).clip(0, 1)
            iou = float(np.minimum(window, template).sum() / np.maximum(window, template).sum())
            if iou > best[1]:
                best = (shape, iou, (left + cx, top + middle), radius)
    return best


def _texture(tone: np.ndarray, empty: np.ndarray, size: tuple[int, ...], factor: int) -> str:
    """The pattern that explains most of the tone (RGB distance from the middle tone) of the empty background."""
    values = tone[empty] - tone[empty].mean() if empty.any() else np.zeros(1)
    best, name = 0.5 * math.sqrt(3) * TONE / 2, "plain"  # a pattern this weak is no pattern
    for texture in TEXTURES[1:]:
        pattern = _average_down(scenes.background_image("gray", texture, size[1], size[0]), factor)[..., 0] - 128
        pattern = pattern[empty] if empty.any() else np.zeros(1)
        pattern = pattern - pattern.mean()
        strength = float(values @ pattern / max(np.linalg.norm(pattern) * math.sqrt(len(pattern)), 1e-6))
        if strength > best:
            best, name = strength, texture
    return name


# -- scores ------------------------------------------------------------------------------------------------------------


def score(image: np.ndarray, scene: Scene) -> dict:
    """Compare a picture, uint8 (H, W, 3), with the scene that it should show.

    Each expected object is paired with at most one found object so that as much as possible is right. `objects` has
    one dict of booleans for each expected object: colour, shape, position, all (these three), size (None where the
    scene does not state it). `count_correct`: as many objects as asked for, no more and no fewer.
    """
    colours = COLOURS
    if any(item.colour == CONCEPT_COLOUR for item in scene.objects):
        colours = COLOURS | {CONCEPT_COLOUR: CONCEPT_RGB}
    reading = read_scene(image, colours)
    agree = np.array([[[getattr(found, key) == getattr(item, key) for key in ("colour", "shape", "position")]
                       for found in reading.objects] for item in scene.objects], dtype=float)
    agree = agree.reshape(len(scene.objects), len(reading.objects), 3)
    # A complete match outweighs everything; otherwise the position says most about which object was meant.
    gain = agree @ np.array([1.0, 1.0, 1.1]) + 4 * agree.all(-1)
    partner = dict(zip(*linear_sum_assignment(gain, maximize=True), strict=True))
    rows = []
    for index, item in enumerate(scene.objects):
        found = reading.objects[partner[index]] if index in partner else None
        row = {key: found is not None and getattr(found, key) == getattr(item, key)
               for key in ("colour", "shape", "position")}
        row["all"] = all(row.values())
        row["size"] = None if item.size is None else found is not None and found.size == item.size
        rows.append(row)
    return {
        "objects": rows,
        "found": len(reading.objects),
        "count_correct": len(reading.objects) == len(scene.objects),
        "background": None if scene.background is None else reading.background == scene.background,
        "texture": None if scene.texture is None else reading.texture == scene.texture,
    }


def summarise(scores: list[dict]) -> dict:
    """Rates (0..1) over many scores. `object_accuracy`: colour, shape and position all right. None: nothing stated."""
    rows = [row for entry in scores for row in entry["objects"]]
    exact = [entry["count_correct"] and all(row["all"] for row in entry["objects"]) for entry in scores]
    return {
        "objects": len(rows),
        "object_accuracy": _rate([row["all"] for row in rows]),
        **{key: _rate([row[key] for row in rows]) for key in ("colour", "shape", "position", "size")},
        "count": _rate([entry["count_correct"] for entry in scores]),
        "scenes_exact": _rate(exact),
        **{key: _rate([entry[key] for entry in scores]) for key in ("background", "texture")},
    }


def _rate(values: list[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
