"""Score what was trained from the tiny base: pictures through ComfyUI, the oracle's verdict, side by side.

    python tools/evaluate_family.py lcm --comfyui PATH           few steps against the base's twenty
    python tools/evaluate_family.py controlnet --comfyui PATH    outlines kept, with and without
    python tools/evaluate_family.py lora --comfyui PATH          the new word, and what the old ones lose
    python tools/evaluate_family.py sigma --comfyui PATH         with KV compression and with it taken out

All captions and outlines are of combinations that no training saw. The only output on stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from tools import evaluate_tiny as tiny  # noqa: E402
from tools.evaluate_tiny import Sample  # noqa: E402
from tools.progress import Failure  # noqa: E402
from tools.tiny import edges  # noqa: E402
from tools.tiny.captions import caption  # noqa: E402
from tools.tiny.datasets import sizeless, with_concept  # noqa: E402
from tools.tiny.grid import Tile, save_grid  # noqa: E402
from tools.tiny.oracle import score, summarise  # noqa: E402
from tools.tiny.scenes import sample_scene  # noqa: E402

SMALL = (0.18, 0.25)  # diameters of the outlines' objects: small ones can lie far from where a prompt puts them
LINE_WIDTH = 7.0  # px of the hints at 192 px
CONTROL_STRENGTH, CONTROL_GUIDANCE = 1.0, 2.5  # with outlines, less guidance by the prompt is better in both respects
FAMILY = {"lcm": "pixart-tiny-lcm.safetensors", "controlnet": "pixart-tiny-controlnet.safetensors",
          "lora": "pixart-tiny-zorb.safetensors", "sigma": "pixart-tiny-sigma.safetensors"}  # fmt: skip
KINDS = {"lcm": "diffusion_models", "controlnet": "controlnet", "lora": "loras", "sigma": "diffusion_models"}


@dataclass(frozen=True)
class Picture:
    """A caption with its scene, and where the outlines of its objects shall be."""

    sample: Sample
    places: tuple


def held_out_pictures(count: int, seed: int, change=None, side: int = 192, **scene_options) -> list[Picture]:
    """Held-out scenes, changed by `change`, under dense captions, with places that no caption says."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        scene = sample_scene(rng, split="held_out", width=side, height=side, **scene_options)
        scene = change(scene) if change else scene
        words = caption(scene, rng, "dense")
        wanted = replace(sizeless(scene), background=None, texture=None)
        pictures.append(Picture(Sample(words, wanted), tuple(edges.loose_places(scene, rng, SMALL))))
    return pictures


# -- graphs ------------------------------------------------------------------------------------------------------------


def few_steps(graph: dict, grid: str = "original"):
    """The pack's LCM sampler in place of ComfyUI's."""
    old = graph["sampler"]["inputs"]
    graph["sampler"] = {"class_type": "PixArtLCMSample", "inputs": {
        "model": old["model"], "positive": old["positive"], "latent_image": old["latent_image"], "seed": old["seed"],
        "steps": old["steps"], "grid": grid, "denoise": 1.0, "cfg": 1.0}}  # fmt: skip


def with_lora(graph: dict, name: str):
    graph["lora"] = {"class_type": "PixArtLoadLora", "inputs": {
        "model": ["model", 0], "lora_name": name, "strength": 1.0, "alpha": 0.0}}  # fmt: skip
    graph["sampler"]["inputs"]["model"] = ["lora", 0]


def with_control(graph: dict, name: str, hints: list[str], strength: float = CONTROL_STRENGTH):
    """One hint for each picture of the batch."""
    for number, hint in enumerate(hints):
        graph[f"hint{number}"] = {"class_type": "LoadImage", "inputs": {"image": hint}}
    joined = ["hint0", 0]
    for number in range(1, len(hints)):
        graph[f"join{number}"] = {"class_type": "ImageBatch",
                                  "inputs": {"image1": joined, "image2": [f"hint{number}", 0]}}  # fmt: skip
        joined = [f"join{number}", 0]
    graph["control"] = {"class_type": "PixArtLoadControlNet", "inputs": {
        "control_net_name": name, "base": "load it elsewhere", "weight_dtype": "auto"}}  # fmt: skip
    graph["apply"] = {"class_type": "PixArtApplyControlNet", "inputs": {
        "positive": ["positive", 0], "negative": ["negative", 0], "control_net": ["control", 0], "image": joined,
        "vae": ["vae", 0], "strength": strength, "start_percent": 0.0, "end_percent": 1.0, "fit": "crop",
        "posterior": "mode", "posterior_seed": 0, "block_weights": ""}}  # fmt: skip
    graph["sampler"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}


# -- measuring ---------------------------------------------------------------------------------------------------------


class Evaluation:
    """One ComfyUI and its options; `score` draws all pictures with a changed graph."""

    def __init__(self, comfy, options: argparse.Namespace):
        self.comfy, self.options, self.tiles = comfy, options, []

    def draw(self, pictures: list[Picture], change=None, **settings) -> list[Image.Image]:
        options = argparse.Namespace(**{**vars(self.options), **settings})
        images = []
        for first in range(0, len(pictures), options.batch):
            chunk = pictures[first : first + options.batch]
            graph = tiny.make_graph([p.sample.caption for p in chunk], options.seed + first, options)
            if change:
                change(graph, chunk)
            images += tiny.run_graph(self.comfy, graph, len(chunk))
            print(f"{len(images)} of {len(pictures)}", file=sys.stderr, flush=True)
        return images

    def score(self, pictures, change=None, *, show=True, **settings) -> dict:
        """Rates of the oracle, and how well outlines are kept."""
        images = [np.asarray(image) for image in self.draw(pictures, change, **settings)]
        scores = [score(image, picture.sample.scene) for image, picture in zip(images, pictures, strict=True)]
        for image, picture, said in list(zip(images, pictures, scores, strict=True))[: 4 * show]:
            right = sum(row["all"] for row in said["objects"])
            self.tiles.append(Tile(Image.fromarray(image), picture.sample.caption, right, len(said["objects"])))
        rates = {key: value for key, value in summarise(scores).items() if value is not None}
        return rates | {"edges": round(float(np.mean([
            edges.agreement(image, edges.outline(picture.sample.scene, picture.places, 1.0))
            for image, picture in zip(images, pictures, strict=True)
        ])), 4)}  # fmt: skip

    def hints(self, pictures: list[Picture], folder: Path) -> list[str]:
        """The outlines as files that ComfyUI's Load Image finds."""
        names = []
        for number, picture in enumerate(pictures):
            lines = edges.outline(picture.sample.scene, picture.places, LINE_WIDTH)
            names.append(f"hint{number:04}.png")
            Image.fromarray((255 * lines).round().astype(np.uint8)).save(folder / names[-1])
        return names


def lcm(run: Evaluation) -> dict:
    pictures, model = held_out_pictures(run.options.count, run.options.seed), run.options.member
    result = {"base, 20 steps": run.score(pictures), "base, 4 steps": run.score(pictures, steps=4)}
    result["base, 4 steps, LCM sampler"] = run.score(pictures, lambda graph, _: few_steps(graph), steps=4)
    for steps in (1, 2, 4):
        name = f"lcm, {steps} steps"
        result[name] = run.score(pictures, lambda graph, _: few_steps(graph), model=model, steps=steps)
    return result


def controlnet(run: Evaluation) -> dict:
    pictures, model = held_out_pictures(run.options.count, run.options.seed, sizeless), run.options.member
    import folder_paths

    folder = Path(folder_paths.get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(map(id, pictures), run.hints(pictures, folder), strict=True))

    def controlled(graph, chunk):
        with_control(graph, model, [names[id(picture)] for picture in chunk])

    settings = {"guidance": CONTROL_GUIDANCE}
    return {"without": run.score(pictures, **settings), "with": run.score(pictures, controlled, **settings)}


def lora(run: Evaluation) -> dict:
    options, name = run.options, run.options.member
    concept = held_out_pictures(options.count, options.seed, with_concept, max_objects=1)
    mixed = held_out_pictures(options.count, options.seed + 1, with_concept)
    others = held_out_pictures(options.count, options.seed + 2)
    return {
        "concept, base": run.score(concept), "concept": run.score(concept, lambda graph, _: with_lora(graph, name)),
        "concept among others": run.score(mixed, lambda graph, _: with_lora(graph, name)),
        "others, base": run.score(others), "others": run.score(others, lambda graph, _: with_lora(graph, name)),
    }  # fmt: skip


def sigma(run: Evaluation) -> dict:
    pictures, model = held_out_pictures(run.options.count, run.options.seed, side=256), run.options.member

    def as_sigma(graph, chunk):
        for node in ("positive", "negative"):
            graph[node]["inputs"]["family"] = "sigma"

    settings = {"vae": "pixart-tiny-sigma-vae.safetensors", "width": 256, "height": 256}
    result = {"compressed": run.score(pictures, as_sigma, model=model, **settings)}
    if run.options.uncompressed:
        result["uncompressed"] = run.score(pictures, as_sigma, model=run.options.uncompressed, **settings)
    return result


# -- command line ------------------------------------------------------------------------------------------------------

MEASUREMENTS = {"lcm": lcm, "controlnet": controlnet, "lora": lora, "sigma": sigma}


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--comfyui", metavar="PATH", help="as for evaluate_tiny.py")
    parser.add_argument("--count", type=int, default=150, help="pictures for each row (default 150)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the trained file lies, if it is not the shipped one")
    parser.add_argument("--uncompressed", metavar="NAME", help="sigma: the model without KV compression, to compare")
    parser.add_argument("--save-grid", type=Path, metavar="PNG", help="the first pictures of every row")
    options = parser.parse_args(words)
    defaults = vars(tiny.parse([]))
    options = argparse.Namespace(**{**defaults, **vars(options)})
    options.member = FAMILY[options.what]
    return options


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        with tempfile.TemporaryDirectory(prefix="pixart-evaluate-") as base, contextlib.redirect_stdout(sys.stderr):
            run = Evaluation(tiny.connect(options, Path(base)), copy.copy(options))
            if options.folder:
                for kind in (KINDS[options.what], "vae"):
                    run.comfy.add_models(kind, options.folder.resolve())
            result = MEASUREMENTS[options.what](run)
        if options.save_grid:
            save_grid(run.tiles, options.save_grid)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(json.dumps({"captions": options.count, "seed": options.seed, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
