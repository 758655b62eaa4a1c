"""What a ControlNet adds to one guided step: time and floating-point operations, with 1 to all possible copies.

    python benchmarks/controlnet.py [--size 1024] [--copies 13] [--dtype fp16] [--device cuda] [--repeats 10]
    python benchmarks/controlnet.py --toy       small and on the CPU: shows that it runs, and nothing else

The network alone, without ComfyUI: PixArt-alpha 1024 with random weights, two captions in one batch. The last row is
a control net that computes its residuals beforehand, as ComfyUI asks for them, and so runs the model's embedders and
block 0 a second time. Variants take turns, and medians are shown.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pixart_nodes.model import VARIANTS, ControlNetTransformer, ControlParams, PixArtTransformer  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOY = {"depth": 6, "hidden_size": 72, "num_heads": 2, "caption_channels": 32}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--copies", type=int, default=13)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(arguments)
    if options.toy:
        options.size, options.copies, options.dtype, options.device = 128, 3, "fp32", "cpu"
    return options


def build(options):
    """(base, control net, arguments of a step, hint)."""
    params = replace(VARIANTS["alpha-1024"], **(TOY if options.toy else {}))
    factory = {"dtype": DTYPES[options.dtype], "device": options.device}
    base = PixArtTransformer(params, **factory)
    net = ControlNetTransformer(ControlParams.of(params, options.copies), **factory)
    for tensor in (*base.parameters(), *base.buffers(), *net.parameters()):
        tensor.data.normal_(std=0.02)
    x = torch.randn(2, params.in_channels, options.size // 8, options.size // 8, **factory)
    context = torch.randn(2, 40, params.caption_channels, **factory)
    size = torch.full((2, 2), float(options.size), device=options.device)
    step = (x, torch.full((2,), 500.0, device=options.device), context, None, size, size[:, :1] / size[:, :1])
    return base, net, step, x[:1].clone()


def beforehand(base, net, step, hint):
    """The residuals by a run of their own, which is stopped behind block 0."""

    class Stop(Exception):
        pass

    residuals = []

    def branch(*args):
        residuals.extend(net.residuals(*args, hint=hint, weights=(1.0,) * net.params.num_blocks))
        raise Stop

    try:
        base(*step, control={"branches": [branch]})
    except Stop:
        return {"output": residuals}


def seconds(run, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main(arguments=None):
    options = parse(arguments)
    base, net, step, hint = build(options)
    runs = {
        "model alone": lambda: base(*step),
        "with ControlNet": lambda: base(*step, control={"branches": [net.branch(hint)]}),
        "residuals beforehand": lambda: base(*step, control=beforehand(base, net, step, hint)),
    }
    operations, times = {}, {name: [] for name in runs}
    for name, run in runs.items():  # which warms up, too
        with FlopCounterMode(display=False) as counter:
            run()
        operations[name] = counter.get_total_flops()
    for _ in range(options.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, options.device))
    alone = statistics.median(times["model alone"])
    print(f"{options.size} px, batch 2, {options.dtype}, {options.device}, {options.copies} copies of "
          f"{base.params.depth} blocks, torch {torch.__version__}\n")  # fmt: skip
    print("| | seconds per step | overhead | operations | overhead |\n|---|---|---|---|---|")
    for name, all_times in times.items():
        median, count = statistics.median(all_times), operations[name]
        more = count / operations["model alone"] - 1
        print(f"| {name} | {median:.4f} | {median / alone - 1:+.1%} | {count:.3g} | {more:+.1%} |")


if __name__ == "__main__":
    main()
