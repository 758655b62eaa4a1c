"""What KV token compression saves in one guided forward of PixArt-Sigma XL/2: arithmetic, memory and time.

    python benchmarks/kv_compress.py                                        # times up to 512 px
    python benchmarks/kv_compress.py --device cuda --dtype fp16 --time-up-to 4096

Arithmetic and the memory of tensors are exact and need no such device: they come from the meta device. Times are
medians of alternated runs with random weights. Prints a Markdown table; --json writes the numbers.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.live_tensors import LiveTensors  # noqa: E402
from pixart_nodes.model import VARIANTS, KVCompress, PixArtTransformer  # noqa: E402
from pixart_nodes.model.attention import sdpa  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH, PROMPT = 2, 300  # guidance as one batch, Sigma's longest prompt


def settings(depth: int) -> dict[str, KVCompress | None]:
    """Name -> compression, in the order of the table's columns."""
    deep, every = tuple(range(depth // 2, depth)), tuple(range(depth))
    return {
        "none": None,
        "2 in deep half": KVCompress("conv", 2, deep),
        "4 in deep half": KVCompress("conv", 4, deep),
        "2 in all": KVCompress("conv", 2, every),
        "4 in all": KVCompress("conv", 4, every),
    }


def fused(q, k, v, heads, mask=None, transformer_options=None):
    """Allocates what an attention allocates that never holds its scores; for the meta device."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def on_meta(kv, depth, dtype, attention=sdpa) -> PixArtTransformer:
    params = replace(VARIANTS["sigma-1024"], depth=depth, kv_compress=kv)
    return PixArtTransformer(params, device="meta", dtype=dtype, attention=attention)


def real_models(ways, depth, device, dtype) -> dict[str, PixArtTransformer]:
    """One model for each setting; random weights, which they share."""
    generator, weights, models = torch.Generator(device).manual_seed(0), {}, {}
    for name, kv in ways.items():
        models[name] = model = on_meta(kv, depth, dtype)
        for key, tensor in model.state_dict().items():
            if key not in weights or weights[key].shape != tensor.shape:
                weights[key] = torch.empty_like(tensor, device=device).normal_(0, 0.02, generator=generator)
        model.load_state_dict({key: weights[key] for key in model.state_dict()}, assign=True)
    return models


@torch.no_grad()
def forward(model, pixels: int):
    like = model.t_block[1].weight
    x = like.new_zeros(BATCH, 4, pixels // 8, pixels // 8)
    mask = torch.ones(BATCH, PROMPT, device=like.device)
    return model(x, torch.full((BATCH,), 500.0, device=like.device), like.new_zeros(BATCH, PROMPT, 4096), mask)


def arithmetic(kv, pixels, depth) -> float:
    """TFLOP, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter:
        forward(on_meta(kv, depth, torch.float16), pixels)
    return counter.get_total_flops() / 1e12


def tensor_memory(kv, pixels, depth, dtype, attention) -> float:
    """MiB of tensors at the peak, above weights."""
    model = on_meta(kv, depth, dtype, attention)
    with LiveTensors() as live:
        forward(model, pixels)
    return live.peak / 2**20


def timed(models: dict, pixels: int, device, repeats: int) -> dict[str, tuple[float, float | None]]:
    """{setting: (median seconds, MiB measured at the peak on a GPU)}; the runs of the settings alternate."""
    cuda, seconds, memory = torch.device(device).type == "cuda", {name: [] for name in models}, {}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, model in models.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            forward(model, pixels)
            if cuda:
                torch.cuda.synchronize()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), memory.get(name)) for name in models}


def measure(args) -> list[dict]:
    rows, ways = [], settings(args.depth)
    timing = any(pixels <= args.time_up_to for pixels in args.sizes)
    models = real_models(ways, args.depth, args.device, DTYPES[args.dtype]) if timing else {}
    for pixels in args.sizes:
        measured = timed(models, pixels, args.device, args.repeats) if pixels <= args.time_up_to else {}
        for name, kv in ways.items():
            seconds, peak = measured.get(name, (None, None))
            rows.append({
                "pixels": pixels, "setting": name, "tflop": arithmetic(kv, pixels, args.depth),
                "fused_mib": tensor_memory(kv, pixels, args.depth, DTYPES[args.dtype], fused),
                "unfused_mib": tensor_memory(kv, pixels, args.depth, DTYPES[args.dtype], sdpa),
                "seconds": seconds, "measured_mib": peak,
            })  # fmt: skip
    return rows


def table(rows) -> str:
    lines = ["| px | compression | TFLOP | relative | fused MiB | unfused MiB | seconds | relative | measured MiB |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        plain = next(r for r in rows if r["pixels"] == row["pixels"] and r["setting"] == "none")
        slower = row["seconds"] and f"{row['seconds'] / plain['seconds']:.2f}"
        cells = [
            row["pixels"], row["setting"], f"{row['tflop']:.2f}", f"{row['tflop'] / plain['tflop']:.2f}",
            f"{row['fused_mib']:.0f}", f"{row['unfused_mib']:.0f}", row["seconds"] and f"{row['seconds']:.3f}", slower,
            row["measured_mib"] and f"{row['measured_mib']:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="pixels of a square")
    parser.add_argument("--time-up-to", type=int, default=512, help="pixels above which only arithmetic is done")
    parser.add_argument("--depth", type=int, default=28, help="blocks; 28 is the released model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    print(table(rows))
    if args.json:
        report = {"torch": torch.__version__, "rows": rows, **{name: str(value) for name, value in vars(args).items()}}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
