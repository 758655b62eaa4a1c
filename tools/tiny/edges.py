"""Outlines of scenes as hints for a ControlNet, and how well a picture keeps to them."""

import numpy as np
from scipy import ndimage

from .scenes import CELL_MARGIN, POSITIONS, SIZES, Scene, signed_distance

LOOSENESS = 0.16  # a stated size varies by so much, of the diameter
UNSAID = (0.18, 0.3)  # diameters of objects without a stated size, of the short side
STRENGTH = 45  # of 255 between neighbours two px apart: an edge. Textures have 30, objects 80 and more.
TOLERANCE = 1.5  # px by which an edge may be off, at 192 px


def loose_places(scene: Scene, rng: np.random.Generator, sizes=UNSAID) -> list[tuple[float, float, float]]:
    """Centres x, y and radii in px: anywhere in the objects' grid cells, larger or smaller than a prompt could say.

    sizes: range of the diameters, of the short side, where the scene states none.
    """
    short = min(scene.width, scene.height)
    places = []
    for item in scene.objects:
        row, column = divmod(POSITIONS.index(item.position), 3)
        size = rng.uniform(*sizes)
        if item.size:
            size = SIZES[item.size] * (1 + rng.uniform(-LOOSENESS, 0.5 * LOOSENESS))
        radius, centre = 0.5 * short * size, []
        for cell, side in ((column, scene.width), (row, scene.height)):
            room = max(0.0, side / 6 - CELL_MARGIN * short - radius)
            centre.append((cell + 0.5) * side / 3 + room * rng.uniform(-1, 1))
        places.append((centre[0], centre[1], radius))
    return places


def outline(scene: Scene, places, width: float) -> np.ndarray:
    """White lines of `width` px along the objects' edges on black, float32 (H, W) in 0..1."""
    lines = np.zeros((scene.height, scene.width), np.float32)
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32) + 0.5
    for item, (cx, cy, radius) in zip(scene.objects, places, strict=True):
        away = np.abs(signed_distance(item.shape, x - cx, y - cy, radius))
        lines = np.maximum(lines, np.clip(0.5 * width + 0.5 - away, 0, 1))
    return lines


def edges(image: np.ndarray) -> np.ndarray:
    """Where a picture, uint8 (H, W, 3), changes more than a texture does: bool (H, W)."""
    padded = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    return np.sqrt(across**2 + down**2).max(-1) > STRENGTH


def agreement(image: np.ndarray, lines: np.ndarray) -> float:
    """F1 of a picture's edges against outlines of one px, float (H, W): how many of each have the other near by."""
    found, wanted = edges(image), lines > 0.5
    if not found.any() or not wanted.any():
        return 0.0
    near = TOLERANCE * min(wanted.shape) / 192
    precision = (ndimage.distance_transform_edt(~wanted)[found] <= near).mean()
    recall = (ndimage.distance_transform_edt(~found)[wanted] <= near).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9))
