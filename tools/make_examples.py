"""Draw the example data sets that the training workflows use, into pixart_nodes/assets/examples.

    python tools/make_examples.py

Each is a folder of small pictures with a .txt caption beside each, as a user would have it; "edges" has control images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from tools.tiny.datasets import SETS
from tools.tiny.scenes import CONCEPT, render_at

EXAMPLES = Path(__file__).resolve().parents[1] / "pixart_nodes" / "assets" / "examples"
RECORDS = {CONCEPT: "concept", "scenes": "scenes", "edges": "edges"}  # folder -> of tools.tiny.datasets.SETS
COUNT, SIDE = 12, 192


def write_set(name: str, folder: Path, seed: int = 0) -> None:
    """Writes COUNT pictures; those of the concept all show it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, number = np.random.default_rng((seed, *name.encode())), 0
    while number < COUNT:
        scene, words, places, hint = SETS[RECORDS[name]](rng, SIDE, SIDE)
        if name == CONCEPT and CONCEPT not in words:
            continue
        file = f"{name}_{number:02}"
        save(render_at(scene, places), folder / f"{file}.png")
        (folder / f"{file}.txt").write_text(words + "\n", encoding="utf-8")
        if hint is not None:
            save((255 * hint).round().astype(np.uint8), folder / "control" / f"{file}.png")
        number += 1


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, optimize=True)


if __name__ == "__main__":
    for name in RECORDS:
        write_set(name, EXAMPLES / name)
