"""Training pictures for the rest of the tiny family, as files: what a user of the pack's trainer would have.

Each set is a folder with captions.jsonl and PNGs. A set that is complete is kept.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from . import text
from .captions import caption
from .edges import loose_places, outline
from .scenes import CONCEPT_COLOUR, CONCEPT_SHAPE, Scene, SceneObject, place, render_at, sample_scene

SHAPES_OF_PICTURES = ((192, 192), (192, 192), (192, 192), (224, 160), (160, 224))  # width, height in px
LINE_WIDTHS = (5.0, 9.0)  # px of the hints' lines
LONG_CAPTIONS = (1, 1, 2, 3, 4)  # a scene may be said several times, in other words: up to about 200 tokens


def tidy(scene: Scene) -> list:
    return [place(item, scene.width, scene.height) for item in scene.objects]


def scene_record(rng, width, height):
    """Tidy scenes of every kind under every caption, as the base model's last stage had them."""
    scene, words = text.sample_caption(rng, width=width, height=height)
    return scene, words, tidy(scene), None


def edge_record(rng, width, height):
    """Scenes whose objects lie anywhere in their cells, and their outlines."""
    scene, words = text.sample_caption(rng, width=width, height=height)
    if rng.random() < 0.5:
        scene = sizeless(scene)
        words = caption(scene, rng, "dense")
    places = loose_places(scene, rng)
    return scene, words, places, outline(scene, places, rng.uniform(*LINE_WIDTHS))


def sizeless(scene: Scene) -> Scene:
    """The scene with no size said: only the hint can know it."""
    objects = tuple(SceneObject(item.shape, item.colour, item.position) for item in scene.objects)
    return replace(scene, objects=objects)


def concept_record(rng, width, height):
    """Every other picture has the concept in place of one of its objects; the others keep what the model knows."""
    scene = sample_scene(rng, width=width, height=height)
    if rng.random() < 0.6:
        scene = with_concept(scene)
    return scene, caption(scene, rng, "dense"), tidy(scene), None


def with_concept(scene: Scene) -> Scene:
    """The scene with its first object turned into the concept."""
    first, *others = scene.objects
    return replace(scene, objects=(replace(first, shape=CONCEPT_SHAPE, colour=CONCEPT_COLOUR), *others))


def long_record(rng, width, height):
    """Tidy scenes under captions of up to some 200 tokens."""
    scene, words = text.sample_caption(rng, width=width, height=height)
    more = [caption(scene, rng, "dense") for _ in range(int(rng.choice(LONG_CAPTIONS)) - 1)]
    return scene, " ".join([words, *more]), tidy(scene), None


SETS = {"scenes": scene_record, "edges": edge_record, "concept": concept_record, "long": long_record}


def make_set(name: str, folder: Path, count: int, *, scale: float = 1.0, seed: int = 0) -> Path:
    """Writes `count` pictures of SETS[name], `scale` times as large, unless they are there."""
    if (folder / "captions.jsonl").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, *name.encode()))
    lines = []
    for number in range(count):
        sides = SHAPES_OF_PICTURES[rng.integers(len(SHAPES_OF_PICTURES))]
        scene, words, places, hint = SETS[name](rng, *(int(scale * side) // 16 * 16 for side in sides))
        record = {"file_name": f"{number:05}.png", "text": words}
        Image.fromarray(render_at(scene, places)).save(folder / record["file_name"], compress_level=1)
        if hint is not None:
            record["control"] = f"control/{number:05}.png"
            (folder / "control").mkdir(exist_ok=True)
            Image.fromarray((255 * hint).round().astype(np.uint8)).save(folder / record["control"], compress_level=1)
        lines.append(json.dumps(record))
    unfinished = folder / "captions.part"
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return unfinished.replace(folder / "captions.jsonl").parent
