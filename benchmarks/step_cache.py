"""What cheaper steps cost in quality: PixArt Step Cache and Guidance Interval, ComfyUI's EasyCache and LazyCache.

    python benchmarks/step_cache.py [--comfyui PATH] [--count 48] [--steps 20] [--model NAME or PATH]

The tiny model draws the same held-out captions with every setting. Prints, as Markdown, how much of the network ran,
counting blocks and the rows of their batches, how many objects the oracle found as the caption says, and how far the
pictures are from those of the whole run.
"""

import argparse
import asyncio
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tools import evaluate_tiny  # noqa: E402
from tools.tiny.oracle import score, summarise  # noqa: E402

OURS = {"start_percent": 0.1, "end_percent": 0.95}
INTERVALS = [(0.0, 0.7), (0.2, 0.8), (0.0, 0.4)]
THEIRS = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}
SETTINGS = [
    ("none", None, {}),
    *[(f"PixArt Step Cache {t}", "PixArtStepCache", {"threshold": t, **OURS}) for t in (0.05, 0.1, 0.2, 0.4)],
    *[(f"PixArt Guidance Interval {a} to {b}", "PixArtGuidanceInterval", {"start_percent": a, "end_percent": b})
      for a, b in INTERVALS],
    *[(f"EasyCache {t}", "EasyCache", {"reuse_threshold": t, **THEIRS}) for t in (0.05, 0.1, 0.2)],
    *[(f"LazyCache {t}", "LazyCache", {"reuse_threshold": t, **THEIRS}) for t in (0.05, 0.1, 0.2)],
]


def graph(texts: list[str], seed: int, options, node: str | None, inputs: dict) -> dict:
    prompt = evaluate_tiny.make_graph(texts, seed, options)
    if node:
        prompt["cache"] = {"class_type": node, "inputs": {"model": ["model", 0], **inputs}}
        prompt["sampler"]["inputs"]["model"] = ["cache", 0]
    return prompt


def draw(comfy, samples, options, node, inputs) -> list[np.ndarray]:
    pictures = []
    for first in range(0, len(samples), options.batch):
        texts = [sample.caption for sample in samples[first : first + options.batch]]
        history = comfy.run(graph(texts, options.seed + first, options, node, inputs))
        entries = history["outputs"]["images"]["images"]
        pictures += [np.asarray(Image.open(io.BytesIO(comfy.image(entry))).convert("RGB")) for entry in entries]
    return pictures


def psnr(pictures, exact) -> float:
    """dB over all pictures, for a peak of 255; infinite where they are equal."""
    error = np.mean([np.square(a.astype(float) - b) for a, b in zip(pictures, exact, strict=True)])
    return 10 * np.log10(255**2 / error) if error else float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's source tree")
    parser.add_argument("--count", type=int, default=48, help="captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="pixart-tiny-alpha.safetensors")
    own = parser.parse_args()
    words = ["--steps", str(own.steps), "--model", own.model, *(["--comfyui", str(own.comfyui)] if own.comfyui else [])]
    options = evaluate_tiny.parse(words)
    samples = evaluate_tiny.held_out_samples(own.count, options.seed)
    blocks = []

    def count(module, inputs, _):
        if type(module).__name__ == "PixArtBlock":
            blocks.append(len(inputs[0]))

    register_module_forward_hook(count)
    rows = []
    with tempfile.TemporaryDirectory(prefix="pixart-step-cache-") as base, contextlib.redirect_stdout(sys.stderr):
        comfy = evaluate_tiny.connect(options, Path(base))
        import nodes
        from comfy_extras import nodes_easycache

        easycache = Path(nodes_easycache.__file__)
        with comfy.inference_mode():
            assert asyncio.run(nodes.load_custom_node(str(easycache), module_parent="comfy_extras"))
        for name, node, inputs in SETTINGS:
            blocks.clear()
            pictures = draw(comfy, samples, options, node, inputs)
            verdicts = [score(picture, sample.scene) for picture, sample in zip(pictures, samples, strict=True)]
            rows.append((name, sum(blocks), summarise(verdicts)["object_accuracy"], pictures))
    print(f"{own.count} captions, {own.steps} steps, {options.sampler} {options.scheduler}, cfg {options.guidance}.")
    print("\n| | blocks computed | objects right | PSNR to none |\n|---|---|---|---|")
    _, whole, _, exact = rows[0]
    for name, computed, right, pictures in rows:
        print(f"| {name} | {computed / whole:.0%} | {right:.3f} | {psnr(pictures, exact):.1f} dB |")


if __name__ == "__main__":
    main()
