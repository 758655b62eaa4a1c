"""From noise to pixels with an LCM: our nodes in ComfyUI against diffusers' PixArtAlphaPipeline, in one process.

    python benchmarks/end_to_end.py [--comfyui PATH] [--size 1024] [--steps 4] [--dtype fp16] [--compile MODE]
    python benchmarks/end_to_end.py --device cpu        the same with a toy transformer at 128 px: shows that it runs

Needs a GPU for numbers that mean something. PixArt-alpha 1024 and an SD VAE of full size with random weights, the same
in both; the prompt is encoded beforehand (120 tokens, 40 of them real), guidance is off, as an LCM wants it.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.contestants import Problem, diffusers_transformer, our_patcher, start_comfyui  # noqa: E402
from benchmarks.decode import SD, unit_gain_  # noqa: E402
from benchmarks.step import DTYPES, TOY, ceiling, timed  # noqa: E402
from pixart_nodes.model import PixArtTransformer  # noqa: E402
from tools.comfy_source import locate  # noqa: E402


def make_vae(problem: Problem):
    from diffusers import AutoencoderKL

    return unit_gain_(AutoencoderKL(**SD)).to(problem.device, problem.dtype)


def our_pipeline(problem: Problem, vae, steps: int, mode: str | None):
    """PixArt LCM Sampler, SamplerCustom and VAE Decode."""
    from comfy import sd

    from pixart_nodes.comfy_bridge.few_step import lcm_sampling, sample
    from pixart_nodes.comfy_bridge.speed import with_compiled_blocks

    model = our_patcher(problem)
    model = with_compiled_blocks(model, mode) if mode else model
    model, sampler, sigmas = lcm_sampling(model, steps, "diffusers", 1.0, "PixArt LCM Sampler")
    decoder = sd.VAE(sd=vae.state_dict(), device=problem.device, dtype=problem.dtype)
    prompt = [[problem.captions[0], {}]]

    def draw():
        latent = {"samples": torch.zeros(1, 4, problem.height, problem.width)}
        return decoder.decode(sample(model, prompt, prompt, latent, sampler, sigmas, seed=0)["samples"])

    return draw


def diffusers_pipeline(problem: Problem, vae, steps: int):
    from diffusers import LCMScheduler, PixArtAlphaPipeline

    scheduler = LCMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipeline = PixArtAlphaPipeline(None, None, vae, diffusers_transformer(problem), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    caption = problem.captions[0]
    missing = problem.params.caption_tokens - caption.shape[1]
    inputs = {
        "prompt_embeds": torch.nn.functional.pad(caption, (0, 0, 0, missing)).to(problem.device, problem.dtype),
        "prompt_attention_mask": (torch.arange(caption.shape[1] + missing) < caption.shape[1])[None].to(problem.device),
        "negative_prompt": None, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt",
        "height": 8 * problem.height, "width": 8 * problem.width, "use_resolution_binning": False,
    }  # fmt: skip
    return lambda: pipeline(**inputs).images


def work(problem: Problem, steps: int) -> int:
    """Floating-point operations of a picture."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        network, vae = PixArtTransformer(problem.params), AutoencoderKL(**SD)
        x = torch.empty(1, 4, problem.height, problem.width)
        size = {"img_hw": torch.empty(1, 2), "aspect_ratio": torch.empty(1, 1)}
        with FlopCounterMode(display=False) as one_step:
            network(x, torch.empty(1), torch.empty(1, problem.tokens, problem.caption_channels), **size)
        with FlopCounterMode(display=False) as decode:
            vae.decode(x)
    return steps * one_step.get_total_flops() + decode.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's source tree")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--compile", metavar="MODE", help="a mode of PixArt Compile, such as reduce-overhead")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    toy = options.device.type == "cpu"
    if not toy and not torch.cuda.is_available():
        sys.exit("This needs a GPU. With --device cpu it runs at toy size, which shows that it works and no more.")
    start_comfyui(options.comfyui or locate(ROOT).path, options.device)
    if toy:
        print("Toy size on a CPU: the times below say nothing about real pictures.")
        options.size, options.dtype, options.repeats = 128, "fp32", 2
    side = options.size // 8
    with torch.inference_mode():
        numbers = {**TOY, "depth": 2} if toy else {}
        problem = Problem("alpha-1024", side, side, DTYPES[options.dtype], options.device, **numbers)
        vae = make_vae(problem)
        contestants = {
            "ours": our_pipeline(problem, vae, options.steps, options.compile),
            "diffusers": diffusers_pipeline(problem, vae, options.steps),
        }
        times = {name: [] for name in contestants}
        for turn in range(options.repeats + 2):  # the first two warm up
            for name, draw in contestants.items():
                spent, picture = timed(draw, options.device)
                assert picture.numel() == 3 * options.size**2
                times[name] += [spent] if turn >= 2 else []
        limit = work(problem, options.steps) / ceiling(problem)
    print(f"\n### {options.size} px, {options.steps} steps, {options.dtype}, {options.device}\n")
    print("| | median s | ratio to ours | of the limit |\n|---|---|---|---|")
    ours = statistics.median(times["ours"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {median / ours:.2f} | {limit / median:.2f} |")
    print(f"\nThe limit is {limit:.3f} s: all arithmetic at the speed of a matrix product alone.")


if __name__ == "__main__":
    main()
