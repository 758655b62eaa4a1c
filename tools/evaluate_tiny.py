"""Score the tiny model: captions in, pictures through ComfyUI's own KSampler, the oracle's verdict out.

    python tools/evaluate_tiny.py --comfyui PATH             in this process, held-out captions
    python tools/evaluate_tiny.py --server http://127.0.0.1:8188 --captions mine.jsonl

A captions file has one JSON object per line: {"caption": "a red circle at the top", "scene": {"objects": [{"shape":
"circle", "color": "red", "position": "top"}]}}; names as in tools/tiny/scenes.py. The only line on stdout is the
result as JSON; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from tools.comfy_client import ComfyClient  # noqa: E402
from tools.comfy_inprocess import InProcessComfy  # noqa: E402
from tools.comfy_source import locate  # noqa: E402
from tools.progress import Failure  # noqa: E402
from tools.tiny.captions import caption  # noqa: E402
from tools.tiny.grid import Tile, save_grid  # noqa: E402
from tools.tiny.oracle import score, summarise  # noqa: E402
from tools.tiny.scenes import Scene, SceneObject, sample_scene  # noqa: E402

TEXT = {"family": "alpha", "clean": "auto", "token_limit": 0, "width": 0, "height": 0}
GRAPH = {
    "model": {"class_type": "PixArtLoadModel", "inputs": {
        "family": "auto", "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}},
    "t5": {"class_type": "PixArtLoadT5", "inputs": {"dtype": "auto", "device": "default"}},
    "vae": {"class_type": "VAELoader", "inputs": {}},
    "positive": {"class_type": "PixArtTextEncode", "inputs": {
        **TEXT, "clip": ["t5", 0], "unconditional": "prompt", "one_prompt_per_line": True}},
    "negative": {"class_type": "PixArtTextEncode", "inputs": {
        **TEXT, "clip": ["t5", 0], "text": "", "unconditional": "null caption", "one_prompt_per_line": False,
        "model": ["model", 0], "positive": ["positive", 0]}},
    "latent": {"class_type": "EmptyLatentImage", "inputs": {}},
    "sampler": {"class_type": "KSampler", "inputs": {
        "model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
        "denoise": 1.0}},
    "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["vae", 0]}},
    "images": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
}  # fmt: skip
MODEL_INPUTS = {"model": ("model", "model_name", "diffusion_models"), "t5": ("t5", "t5_name", "text_encoders"),
                "vae": ("vae", "vae_name", "vae")}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A caption and the scene that it describes."""

    caption: str
    scene: Scene


# -- captions ----------------------------------------------------------------------------------------------------------


def held_out_samples(count: int, seed: int) -> list[Sample]:
    """Captions of scenes whose every (shape, colour, position) was held out of training. Only these are scored."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        scene = sample_scene(rng, split="held_out")
        wanted = tuple(SceneObject(item.shape, item.colour, item.position) for item in scene.objects)
        samples.append(Sample(caption(scene, rng, "dense"), Scene(wanted)))
    return samples


def read_samples(path: Path) -> list[Sample]:
    """Read a captions file. Raises Failure that names the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path} cannot be read: {error}.") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                samples.append(_sample(json.loads(line)))
            except json.JSONDecodeError as error:
                raise Failure(f"{path}, line {number}: no JSON ({error.msg} at character {error.pos}).") from error
            except (ValueError, TypeError) as error:
                raise Failure(f"{path}, line {number}: {error}.") from error
    if not samples:
        raise Failure(f"{path} holds no captions: one JSON object per line is expected.")
    return samples


def _sample(data) -> Sample:
    text = data.get("caption") if isinstance(data, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError('expected {"caption": "...", "scene": {...}}; there is no caption')
    if "scene" not in data:
        raise ValueError("there is no scene")
    return Sample(" ".join(text.split()), Scene.from_dict(data["scene"]))


# -- pictures ----------------------------------------------------------------------------------------------------------


def make_graph(texts: list[str], seed: int, options: argparse.Namespace) -> dict:
    """The API-form graph that draws one picture for each text."""
    graph = copy.deepcopy(GRAPH)
    for option, (node, name, _) in MODEL_INPUTS.items():
        graph[node]["inputs"][name] = getattr(options, option)
    graph["model"]["inputs"]["weight_dtype"], graph["t5"]["inputs"]["dtype"] = options.weight_dtype, options.t5_dtype
    graph["positive"]["inputs"]["text"] = "\n".join(_literal(text) for text in texts)
    graph["latent"]["inputs"] |= {"width": options.width, "height": options.height, "batch_size": len(texts)}
    graph["sampler"]["inputs"] |= {"seed": seed, "steps": options.steps, "cfg": options.guidance,
                                   "sampler_name": options.sampler, "scheduler": options.scheduler}  # fmt: skip
    return graph


def _literal(text: str) -> str:
    """A caption is plain text: its brackets are no prompt weights."""
    return text.replace("\\", "").replace("(", "\\(").replace(")", "\\)")


def draw(comfy, texts: list[str], seed: int, options: argparse.Namespace) -> list[Image.Image]:
    """One picture for each text, by `comfy` (an InProcessComfy or a ComfyClient)."""
    return run_graph(comfy, make_graph(texts, seed, options), len(texts))


def run_graph(comfy, graph: dict, count: int) -> list[Image.Image]:
    """The `count` pictures of a graph's node `images`."""
    entries = comfy.run(graph)["outputs"]["images"]["images"]
    if len(entries) != count:
        raise Failure(f"ComfyUI returned {len(entries)} pictures for {count} captions.")
    return [Image.open(io.BytesIO(comfy.image(entry))).convert("RGB") for entry in entries]


def evaluate(comfy, samples: list[Sample], options: argparse.Namespace) -> tuple[dict, list[Tile]]:
    """Draw and score every sample: the result line, and the tiles of the grid."""
    scores, tiles = [], []
    start = time.perf_counter()
    for first in range(0, len(samples), options.batch):
        chunk = samples[first : first + options.batch]
        pictures = draw(comfy, [sample.caption for sample in chunk], options.seed + first, options)
        for sample, picture in zip(chunk, pictures, strict=True):
            scores.append(score(np.asarray(picture), sample.scene))
            right = sum(row["all"] for row in scores[-1]["objects"])
            tiles.append(Tile(picture, sample.caption, right, len(sample.scene.objects)))
        print(f"{len(scores)} of {len(samples)} pictures, objects right so far: "
              f"{summarise(scores)['object_accuracy']:.3f}", file=sys.stderr, flush=True)  # fmt: skip
    seconds = (time.perf_counter() - start) / len(samples)
    rates = {key: value for key, value in summarise(scores).items() if value is not None}
    settings = {key: getattr(options, key) for key in ("steps", "guidance", "sampler", "scheduler", "width", "height")}
    return {"captions": len(samples), **rates, **settings, "seed": options.seed,
            "seconds_per_image": round(seconds, 3), "model": options.model}, tiles  # fmt: skip


# -- command line ------------------------------------------------------------------------------------------------------


def connect(options: argparse.Namespace, base: Path):
    """The ComfyUI that draws. A model, T5 or VAE given as a path becomes a name that its loaders know."""
    if options.server:
        comfy = ComfyClient(options.server)
        try:
            comfy.json("/system_stats")
        except (OSError, ValueError) as error:
            raise Failure(f"No ComfyUI answers at {options.server}: {error}.") from error
        return comfy
    source = locate(ROOT)
    if not (options.comfyui or source):
        raise Failure("Which ComfyUI shall draw? Give its folder with --comfyui, or a running one with --server.")
    comfy = InProcessComfy(Path(options.comfyui or source.path).resolve(), ROOT, base)
    for option, (_, _, kind) in MODEL_INPUTS.items():
        path = Path(getattr(options, option))
        if len(path.parts) > 1 and path.exists():
            comfy.add_models(kind, path.resolve().parent)
            setattr(options, option, path.name)
    return comfy


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, metavar="FILE", help="JSON lines; default: held-out captions")
    parser.add_argument("--count", type=_positive, default=300, help="how many captions to generate (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated captions and of the pictures")
    parser.add_argument("--steps", type=_positive, default=20)
    parser.add_argument("--guidance", type=float, default=4.5, help="KSampler's cfg")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="sgm_uniform")
    parser.add_argument("--width", type=_positive, default=192, help="px")
    parser.add_argument("--height", type=_positive, default=192, help="px")
    parser.add_argument("--batch", type=_positive, default=8, help="pictures per run of the graph")
    parser.add_argument("--model", default="pixart-tiny-alpha.safetensors", help="name, or in process also a path")
    parser.add_argument("--t5", default="pixart-tiny-t5")
    parser.add_argument("--weight-dtype", default="auto", help="of the model loader: fp32, int8, nf4, ...")
    parser.add_argument("--t5-dtype", default="auto", help="of the T5 loader: fp32, int8, nf4, ...")
    parser.add_argument("--vae", default="pixart-tiny-vae.safetensors")
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI with this pack")
    parser.add_argument("--comfyui", metavar="PATH",
                        help="a ComfyUI folder, to run in process (default: COMFYUI_PATH, or the one around this pack)")
    parser.add_argument("--save-grid", type=Path, metavar="PNG", help="write the first 16 pictures with their captions")
    return parser.parse_args(words)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return int(word)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        if options.save_grid and not options.save_grid.parent.is_dir():
            raise Failure(f"The folder of {options.save_grid} does not exist.")
        samples = read_samples(options.captions) if options.captions else held_out_samples(options.count, options.seed)
        with tempfile.TemporaryDirectory(prefix="pixart-evaluate-") as base, contextlib.redirect_stdout(sys.stderr):
            result, tiles = evaluate(connect(options, Path(base)), samples, options)
        if options.save_grid:
            save_grid(tiles, options.save_grid)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
