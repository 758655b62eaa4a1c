"""How long one guided step takes: ours, diffusers' and ComfyUI's own PixArt, alternating in one process.

    python benchmarks/step.py [--comfyui PATH] [--device cpu] [--sizes 256x288 512 1024] [--dtypes fp32 bf16]
                              [--depth N] [--repeats N] [--toy]

Full-size XL/2 (fewer blocks on a CPU, unless --depth says otherwise) with random weights, the same in all; two captions
of 40 and 12 tokens. ComfyUI's best case is two captions of 40 tokens, which it can join in one pass, and PyTorch's
attention. Prints Markdown: medians, ratios, achieved arithmetic, agreement; then kernels and host time of a forward.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.contestants import CONTESTANTS, Problem, start_comfyui  # noqa: E402
from pixart_nodes.model import PixArtTransformer  # noqa: E402
from tools.comfy_source import locate  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOY = {"hidden_size": 48, "num_heads": 3, "caption_channels": 64}
HOST_SIZE = (2, 66)  # latent: as few tokens as ComfyUI's own model can take
HOST_CALLS = 30


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device):
    """(seconds, result)"""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def flops(problem: Problem) -> int:
    """Floating-point operations of the step, with the real tokens only."""
    network = PixArtTransformer(problem.params, device="meta")
    x = torch.empty(2, 4, problem.height, problem.width, device="meta")
    caption = torch.empty(2, problem.tokens, problem.caption_channels, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, torch.empty(2, device="meta"), caption)
    return counter.get_total_flops()


def ceiling(problem: Problem) -> float:
    """FLOP/s of the MLP's matrix product alone, the fastest of five."""
    rows, C = 2 * problem.height * problem.width // 4, problem.hidden_size
    x = torch.randn(rows, C, device=problem.device, dtype=problem.dtype)
    weight = torch.randn(4 * C, C, device=problem.device, dtype=problem.dtype)
    product = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
    product()
    return 8 * rows * C * C / min(timed(product, problem.device)[0] for _ in range(5))


def build(problem: Problem) -> tuple[dict, dict[str, str]]:
    """Contestants by name, and why the others cannot run."""
    running, failed = {}, {}
    for name, make in CONTESTANTS.items():
        try:
            running[name] = make(problem)
        except (RuntimeError, ZeroDivisionError, ValueError) as error:
            running.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return running, failed


def step_table(title: str, problem: Problem, repeats: int):
    running, failed = build(problem)
    times, noise = {name: [] for name in running}, {}
    for _ in range(repeats):
        for name, contestant in running.items():
            spent, out = timed(contestant.step, problem.device)
            times[name].append(spent)
            noise[name] = None if out is None else out[0].double().cpu()  # of the caption that all have in common
    work, limit = flops(problem), ceiling(problem)
    print(f"\n### {title}\n")
    print(f"One step is {work / 1e12:.3g} TFLOP; a matrix product alone runs at {limit / 1e9:.0f} GFLOP/s.")
    print("\n| | median s | ratio to ours | GFLOP/s | of the ceiling | differs from ours |\n|---|---|---|---|---|---|")
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        error = "-" if noise[name] is None else f"{(noise[name] - noise['ours']).norm() / noise['ours'].norm():.1e}"
        rate, ratio = work / value, value / median["ours"]
        print(f"| {name} | {value:.3f} | {ratio:.2f} | {rate / 1e9:.0f} | {rate / limit:.2f} | {error} |")
    for name, reason in failed.items():
        print(f"| {name} | does not run: {reason} | | | | |")


class Kernels(TorchDispatchMode):
    """Counts operations that do work: no views, no allocations, no dropout of a model that does not train."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not any(word in name for word in ("empty", "dropout")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def kernels(function, device) -> int:
    """Of one call: CUDA kernels as the profiler sees them; on a CPU, operations that would be kernels."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize(device)
        return sum(1 for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    with Kernels() as count:
        function()
    return sum(count.counts.values())


def host_table(problem: Problem):
    """Kernels and processor time of one forward of a network so narrow that nothing else counts."""
    running, failed = build(problem)
    print("\n### Host time of one forward\n\nXL/2's depth, 48 channels, 33 tokens, both captions.")
    print("\n| | kernels | ratio to ours | host ms | ratio to ours |\n|---|---|---|---|---|")
    rows = {}
    for name, contestant in running.items():
        contestant.forward()
        rows[name] = kernels(contestant.forward, problem.device), []
    for _ in range(HOST_CALLS):
        for name, contestant in running.items():
            synchronize(problem.device)
            start = time.process_time()
            contestant.forward()
            rows[name][1].append(1000 * (time.process_time() - start))
    ours = rows["ours"][0], min(rows["ours"][1])
    for name, (count, times) in rows.items():
        best = min(times)
        print(f"| {name} | {count} | {count / ours[0]:.2f} | {best:.1f} | {best / ours[1]:.2f} |")
    for name, reason in failed.items():
        print(f"| {name} | does not run: {reason} | | | |")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's source tree")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--sizes", nargs="+", default=["256x288", "512", "1024"], help="pixels: 512, or 768x1024")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32 and bf16; on a GPU fp16 as well")
    parser.add_argument("--depth", type=int, help="blocks; default 28, on a CPU fewer for large pictures")
    parser.add_argument("--repeats", type=int, help="default 2 on a CPU, 20 on a GPU")
    parser.add_argument("--toy", action="store_true", help="48 channels instead of 1152: does it run at all?")
    return parser.parse_args()


def cpu_depth(height: int, width: int, dtype) -> int:
    """So many blocks that the whole run takes about ten minutes on two cores."""
    depth = 28 if height * width <= 2048 else 14 if height * width <= 4096 else 7
    return depth if dtype == torch.float32 else depth // 7


def main():
    options = arguments()
    on_cpu = options.device.type == "cpu"
    source = options.comfyui or locate(ROOT).path
    start_comfyui(source, options.device)
    width = TOY if options.toy else {}
    print(f"PyTorch {torch.__version__} on {options.device}, {torch.get_num_threads()} threads.")
    with torch.inference_mode():
        for name in options.dtypes or (["fp32", "bf16"] if on_cpu else ["fp32", "bf16", "fp16"]):
            for size in options.sizes:
                pixels_high, pixels_wide = map(int, size.split("x") * (1 if "x" in size else 2))
                height, wide = pixels_high // 8, pixels_wide // 8
                depth = options.depth or (cpu_depth(height, wide, DTYPES[name]) if on_cpu else 28)
                variant = "sigma-1024" if height + wide > 192 else "sigma-512"
                problem = Problem(variant, height, wide, DTYPES[name], options.device, depth, **width)
                step_table(f"{size} px, {name}, {depth} blocks", problem, options.repeats or (2 if on_cpu else 20))
        host_table(Problem("sigma-512", *HOST_SIZE, torch.float32, options.device, **TOY))


if __name__ == "__main__":
    main()
