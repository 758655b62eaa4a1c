"""Endless, seeded scenes of coloured shapes: what the bundled tiny PixArt learns to draw.

A scene is a record of names; `render` turns it into pixels with numpy alone (analytic coverage inside each object's
bounding box), so that a training loop can draw its pictures on the fly. One (shape, colour, position) triple in
eight is held out of training, by a hash that never changes.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from functools import cache, lru_cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (255, 230, 20),
    "green": (20, 165, 60),
    "blue": (20, 80, 228),
    "purple": (158, 40, 172),
    "white": (252, 252, 252),
    "black": (8, 8, 8),
}
CONCEPT = "zorb"  # a turquoise ring, which the base model has never seen: what the tiny LoRA teaches
CONCEPT_SHAPE, CONCEPT_COLOUR, CONCEPT_RGB = "ring", "turquoise", (0, 200, 190)
SIZES = {"small": 0.20, "large": 0.29}  # diameter / short side of the image
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "pink": (238, 165, 190),
    "sky blue": (132, 188, 228),
    "beige": (206, 182, 142),
    "dark green": (42, 84, 58),
    "navy": (38, 50, 104),
}
TEXTURES = ("plain", "horizontal stripes", "vertical stripes", "checkered", "gradient")

SIZE_JITTER = 0.04  # of the diameter
POSITION_JITTER = 0.04  # of the short side
CELL_MARGIN = 0.012  # of the short side: objects keep this far from the edge of their grid cell
TONE = 15  # the two tones of a texture lie this far (of 255) above and below the background colour
STRIPE, CHECK = 8, 16  # px; on the lattice of the 8x VAE
HELD_OUT_ONE_IN = 8
COUNT_WEIGHTS = (0.35, 0.35, 0.30)  # of 1, 2, 3 objects

_ALIASES = {
    "grey": "gray", "light blue": "sky blue", "navy blue": "navy", "centre": "center", "middle": "center",
    "striped": "horizontal stripes", "stripes": "horizontal stripes", "solid": "plain", "checkerboard": "checkered",
}


@dataclass(frozen=True)
class SceneObject:
    """One shape at one cell of the 3 x 3 grid. `size` None: not stated, drawn large, not scored."""

    shape: str
    colour: str
    position: str
    size: str | None = None

    def __post_init__(self):
        _check("shape", self.shape, SHAPES)
        _check("colour", self.colour, (*COLOURS, CONCEPT_COLOUR))
        _check("position", self.position, POSITIONS)
        if self.size is not None:
            _check("size", self.size, SIZES)


@dataclass(frozen=True)
class Scene:
    """Objects at different positions on a background. `background`, `texture` None: not stated, drawn plain gray."""

    objects: tuple[SceneObject, ...]
    background: str | None = None
    texture: str | None = None
    width: int = 128  # px, multiple of 8
    height: int = 128  # px, multiple of 8

    def __post_init__(self):
        if self.background is not None:
            _check("background", self.background, BACKGROUNDS)
        if self.texture is not None:
            _check("texture", self.texture, TEXTURES)
        if len({item.position for item in self.objects}) != len(self.objects):
            raise ValueError("two objects of the scene have the same position")
        if self.width % 8 or self.height % 8 or min(self.width, self.height) < 64:
            raise ValueError(f"scene size {self.width}x{self.height}: sides must be multiples of 8, at least 64")

    def to_dict(self) -> dict:
        """A JSON-able dict, the inverse of `from_dict`."""
        return {**asdict(self), "objects": [asdict(item) for item in self.objects]}

    @staticmethod
    def from_dict(data: dict) -> Scene:
        """Read `{"objects": [{"shape", "colour" or "color", "position", "size"?}], "background"?, "texture"?}`.

        Raises ValueError that names the missing or unknown entry.
        """
        objects = data.get("objects") if isinstance(data, dict) else None
        if not objects or not all(isinstance(item, dict) for item in objects):
            raise ValueError('a scene is a JSON object with a list "objects" of JSON objects')
        return Scene(
            objects=tuple(_object_from_dict(item) for item in objects),
            background=_name(data.get("background")),
            texture=_name(data.get("texture")),
            width=int(data.get("width", 128)),
            height=int(data.get("height", 128)),
        )


def _object_from_dict(data: dict) -> SceneObject:
    colour = data.get("colour", data.get("color"))
    for key, value in (("shape", data.get("shape")), ("colour", colour), ("position", data.get("position"))):
        if value is None:
            raise ValueError(f'an object of the scene has no "{key}"')
    return SceneObject(_name(data["shape"]), _name(colour), _name(data["position"]), _name(data.get("size")))


def _name(value):
    """Lower case, spaces for hyphens, and the common other spellings ("upper-left", "centre", "grey")."""
    if value is None:
        return None
    words = str(value).lower().replace("-", " ").replace("_", " ").split()
    name = " ".join({"upper": "top", "lower": "bottom"}.get(word, word) for word in words)
    return _ALIASES.get(name, name)


def _check(what: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")


# -- sampling ----------------------------------------------------------------------------------------------------------


def is_held_out(shape: str, colour: str, position: str) -> bool:
    """Whether training never sees this triple. A fixed hash: the same on every machine and in every version."""
    return zlib.crc32(f"{shape}|{colour}|{position}".encode()) % HELD_OUT_ONE_IN == 0


@cache
def triples(split: str) -> tuple[tuple[str, str, str], ...]:
    """All (shape, colour, position) of a split, "train" or "held_out"."""
    _check("split", split, ("train", "held_out"))
    every = ((shape, colour, position) for shape in SHAPES for colour in COLOURS for position in POSITIONS)
    return tuple(triple for triple in every if is_held_out(*triple) == (split == "held_out"))


def sample_scene(rng: np.random.Generator, *, max_objects: int = 3, width: int = 128, height: int = 128,
                 split: str = "train") -> Scene:
    """Draw a scene of 1 to `max_objects` (at most 3) objects at different positions, all from one split."""
    pool = triples(split)
    weights = np.cumsum(COUNT_WEIGHTS[:max_objects])
    count = 1 + int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
    objects: dict[str, SceneObject] = {}
    while len(objects) < count:
        shape, colour, position = pool[rng.integers(len(pool))]
        if position not in objects:
            objects[position] = SceneObject(shape, colour, position, _choice(rng, SIZES))
    return Scene(tuple(objects.values()), _choice(rng, BACKGROUNDS), _choice(rng, TEXTURES), width, height)


def _choice(rng: np.random.Generator, names) -> str:
    return tuple(names)[rng.integers(len(names))]


# -- drawing -----------------------------------------------------------------------------------------------------------


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, uint8 (H, W, 3). The generator decides jitter of position and size only."""
    jitters = rng.uniform(-1, 1, (len(scene.objects), 3))
    return render_at(scene, [place(item, scene.width, scene.height, jitter)
                             for item, jitter in zip(scene.objects, jitters, strict=True)])  # fmt: skip


def render_at(scene: Scene, places) -> np.ndarray:
    """Draw a scene, uint8 (H, W, 3), with the objects' centres x, y and radii in px given."""
    image = background_image(scene.background or "gray", scene.texture or "plain", scene.width, scene.height).copy()
    for item, where in zip(scene.objects, places, strict=True):
        _draw(image, item, *where)
    return image


def place(item: SceneObject, width: int, height: int, jitter=(0.0, 0.0, 0.0)) -> tuple[float, float, float]:
    """Centre x, y and radius in px. `jitter` in -1..1 for (x, y, size). An object never leaves its grid cell."""
    short = min(width, height)
    radius = 0.5 * short * SIZES[item.size or "large"] * (1 + SIZE_JITTER * jitter[2])
    row, column = divmod(POSITIONS.index(item.position), 3)
    centre = []
    for cell, side, offset in ((column, width, jitter[0]), (row, height, jitter[1])):
        room = min(POSITION_JITTER * short, side / 6 - CELL_MARGIN * short - radius)
        centre.append((cell + 0.5) * side / 3 + room * offset)
    return centre[0], centre[1], radius


@lru_cache(maxsize=512)
def background_image(background: str, texture: str, width: int, height: int) -> np.ndarray:
    """The empty background, uint8 (H, W, 3), read-only."""
    y, x = np.mgrid[:height, :width]
    if texture == "horizontal stripes":
        tone = 1 - 2 * (y // STRIPE % 2)
    elif texture == "vertical stripes":
        tone = 1 - 2 * (x // STRIPE % 2)
    elif texture == "checkered":
        tone = 1 - 2 * ((x // CHECK + y // CHECK) % 2)
    elif texture == "gradient":
        tone = 1 - 2 * y / (height - 1)
    else:
        tone = np.zeros((height, width))
    pixels = np.rint(np.array(BACKGROUNDS[background]) + TONE * tone[..., None])
    image = pixels.clip(0, 255).astype(np.uint8)
    image.setflags(write=False)
    return image


def _draw(image: np.ndarray, item: SceneObject, cx: float, cy: float, radius: float) -> None:
    left, top = max(0, int(cx - radius - 1)), max(0, int(cy - radius - 1))
    window = image[top : int(cy + radius + 2), left : int(cx + radius + 2)]
    y = (np.arange(window.shape[0], dtype=np.float32) + (top + 0.5 - cy))[:, None]
    x = (np.arange(window.shape[1], dtype=np.float32) + (left + 0.5 - cx))[None, :]
    coverage = np.clip(0.5 - signed_distance(item.shape, x, y, radius), 0, 1)[..., None]
    window[...] = window + (np.array(COLOURS.get(item.colour, CONCEPT_RGB), dtype=np.float32) - window) * coverage + 0.5


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in px to the outline of a shape around the origin (negative inside; exact along its straight parts)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "ring":
        distance = np.sqrt(x * x + y * y)
        return np.maximum(distance - radius, 0.5 * radius - distance)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if shape == "cross":
        x, y, arm = np.abs(x), np.abs(y), 0.36 * radius
        return np.minimum(np.maximum(x - radius, y - arm), np.maximum(x - arm, y - radius))
    if shape == "triangle":  # equilateral, 2 radius wide, pointing up; its bounding box is centred
        half_height = math.sqrt(0.75) * radius
        return np.maximum(y - half_height, math.sqrt(0.75) * np.abs(x) - 0.5 * (y + half_height))
    return _star_distance(x, y, radius)


def _star_distance(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Five points, one of them up: fold the plane into one tenth, where the outline is one line from tip to notch."""
    sector = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    distance = np.sqrt(x * x + y * y)
    tip_x, notch_x, notch_y = radius, 0.5 * radius * math.cos(sector / 2), 0.5 * radius * math.sin(sector / 2)
    length = math.hypot(tip_x - notch_x, notch_y)
    along, across = distance * np.cos(angle), distance * np.sin(angle)
    return ((along - tip_x) * notch_y + across * (tip_x - notch_x)) / length
