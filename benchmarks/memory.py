"""Peak memory of each stage at 1024 px: T5-XXL encodes, the transformer denoises, the VAE decodes. Random weights.

    python benchmarks/memory.py --comfyui PATH [--device cpu] [--t5 int8] [--model auto] [--steps N] [--layers N]

Two numbers for each stage. Counted: the bytes of all tensors that live at once, weights included, when the stage runs
in 16 bit (T5 in fp32) on tensors without data; it takes seconds. Measured: torch.cuda.max_memory_allocated on a GPU, on
a CPU the growth of the process's peak resident memory (the transformer and the VAE then compute in fp32). Every stage
runs in a process of its own, as in a graph where each model leaves before the next one comes. The peak is that of one
step, so a CPU takes one step unless --steps says otherwise; --layers makes all networks shallower, to try it out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from benchmarks.decode import SD, resident  # noqa: E402
from benchmarks.live_tensors import LiveTensors  # noqa: E402

GIB = 2**30
LIMIT, TARGET = 8, 6  # GiB for a stage
TILE = 512  # px, of the decode
XXL = {"vocab_size": 32128, "d_model": 4096, "num_heads": 64, "d_kv": 64, "d_ff": 10240, "gated": True,
       "num_buckets": 32, "max_distance": 128, "layer_norm_eps": 1e-6, "eos": 1, "pad": 0}  # fmt: skip
# name -> (variant of the network, prompt tokens, rows of a step: 2 with guidance, steps)
RUNS = {"alpha-LCM, 4 steps": ("alpha-1024", 120, 1, 4), "Sigma, 20 steps": ("sigma-1024", 300, 2, 20)}
STAGES = ("encode", "denoise", "decode")


def start_comfyui(path: str, device: str):
    """ComfyUI's modules and ours, importable."""
    sys.path.insert(1, path)
    sys.argv = ["main.py", *(["--cpu"] if device == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401  it reads sys.argv


def operations(kind: str):
    import comfy.ops

    from pixart_nodes.comfy_bridge import quantize

    return quantize.operations(kind) if kind in quantize.KINDS else comfy.ops.manual_cast


def random_weights(model, wanted, device: str):
    """Gives a model that was built on the meta device random weights; packed where it has quantised layers."""
    from pixart_nodes.comfy_bridge.quantize import QuantizedLinear, packed_bytes

    for prefix, module in model.named_modules():
        for name, empty in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if isinstance(module, QuantizedLinear) and name == "weight" and wanted(f"{prefix}.weight", empty):
                size = packed_bytes(tuple(empty.shape), module.quantization)
                value = torch.full((size,), 60, dtype=torch.uint8, device=device)  # float32 scales of 0.01
            else:
                value = torch.empty(empty.shape, dtype=empty.dtype, device=device).normal_(std=0.02)
            if isinstance(empty, torch.nn.Parameter):
                module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(name, value)
    return model.eval().requires_grad_(False)


def encode(run, device: str, options):
    """T5-XXL on one prompt -> (model, function that encodes it)."""
    from pixart_nodes.comfy_bridge.text_encoder import build_t5, t5_config
    from pixart_nodes.text.t5 import T5Params

    params = T5Params(num_layers=options.layers or 24, **XXL)
    model = build_t5(t5_config(params), torch.float16, "meta", operations(options.t5), params=params)
    random_weights(model, lambda name, weight: ".block." in name, device)
    tokens = torch.ones(1, RUNS[run][1], dtype=torch.long, device=device)
    return model, lambda: model(tokens, None, dtype=torch.float32)


def denoise(run, device: str, options):
    """The transformer on the latent of a 1024 px picture -> (model, function that makes one step)."""
    from dataclasses import replace

    from pixart_nodes.comfy_bridge.model import ComfyPixArtTransformer, block_matrices
    from pixart_nodes.model import VARIANTS

    variant, tokens, rows, _ = RUNS[run]
    params = VARIANTS[variant]
    params = replace(params, depth=options.layers or params.depth)
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = ComfyPixArtTransformer(torch.float16, "meta", operations(options.model), **vars(params))
    random_weights(model, lambda name, weight: bool(block_matrices({name: weight})), device)
    if device == "meta":  # a fused kernel's result; torch would count an attention matrix here
        for block in model.blocks:
            block.attn.attention = block.cross_attn.attention = lambda q, *_, **__: torch.empty_like(q)
    x = torch.zeros(rows, 4, 128, 128, dtype=dtype, device=device)
    t = torch.full((rows,), 500.0, device=device)
    context = torch.zeros(rows, tokens, params.caption_channels, dtype=dtype, device=device)
    mask = torch.ones(rows, tokens, dtype=torch.long, device=device)
    size = torch.full((rows, 2), 1024.0, device=device)
    ratio = torch.ones(rows, 1, device=device)
    extra = {"c_size": size, "c_ar": ratio} if params.micro_condition else {}
    return model, lambda: model(x, t, context, mask, **extra)


def decode(run, device: str, options):
    """Stable Diffusion's VAE decoder, in exact tiles of 512 px -> (model, function that decodes)."""
    from diffusers import AutoencoderKL

    from pixart_nodes.vae import exact_tiles

    with torch.device("meta"):
        vae = AutoencoderKL(**SD).to(torch.float32 if device == "cpu" else torch.bfloat16)  # ComfyUI's choices
    vae.encoder = vae.quant_conv = None
    random_weights(vae, lambda name, weight: False, device)
    latent = torch.zeros(1, 4, 128, 128, device=device)
    return vae, lambda: exact_tiles.decode(vae, latent, tile=TILE)


def counted(stage: str, run: str, options) -> int:
    """Bytes that live at once in 16 bit, by running the stage on tensors without data."""
    model, work = globals()[stage](run, "meta", options)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if stage == "decode":  # it looks at values; its own plan says what it will take
        from pixart_nodes.vae import adapters, plan

        steps, itemsize = plan.steps(adapters.decoder_layers(model), 128, 128), 2
        stored = plan.stored_elements(steps) * itemsize
        return weights + stored + plan.working_bytes(steps, TILE, itemsize, on_cpu=False)
    with LiveTensors() as live:
        work()
    return weights + live.peak


def measured(stage: str, run: str, options) -> int:
    """Bytes above what the process needed before the weights came."""
    cuda = options.device.startswith("cuda")
    before = resident()
    _, work = globals()[stage](run, options.device, options)
    for _ in range(options.steps or (RUNS[run][3] if cuda and stage == "denoise" else 1)):
        work()
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def child(stage: str, run: str, options):
    start_comfyui(options.comfyui, options.device)
    import diffusers  # noqa: F401  its memory is none of the stage's

    with torch.inference_mode():
        row = {"counted": counted(stage, run, options)}
        if not options.count_only:
            row["measured"] = measured(stage, run, options)
    print(json.dumps(row))


def main():
    options = arguments()
    if options.child:
        return child(*options.child, options)
    print(f"1024 px, T5-XXL {options.t5}, transformer {options.model} (fp16 else), VAE in exact tiles of 512 px; "
          f"measured on {options.device}\n")  # fmt: skip
    print("| run | stage | counted GiB | measured GiB | counted fits in |")
    print("|---|---|---|---|---|", flush=True)
    worst = 0
    for run in RUNS:
        for stage in STAGES:
            command = [sys.executable, __file__, "--child", stage, run, *sys.argv[1:]]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = {key: value / GIB for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
            worst = max(worst, row["counted"])
            real = f"{row['measured']:.2f}" if "measured" in row else "-"
            fits = f"{TARGET} GB" if row["counted"] < TARGET else f"{LIMIT} GB" if row["counted"] < LIMIT else "no"
            print(f"| {run} | {stage} | {row['counted']:.2f} | {real} | {fits} |", flush=True)
    if worst >= LIMIT:
        sys.exit(f"A stage needs {worst:.2f} GiB, more than {LIMIT}.")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI source tree")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--t5", default="int8", help="int8, nf4, fp4 or auto (fp16)")
    parser.add_argument("--model", default="auto", help="the transformer: int8, nf4, fp4 or auto (fp16)")
    parser.add_argument("--steps", type=int, help="steps of the measured run (default: all on a GPU, 1 on a CPU)")
    parser.add_argument("--layers", type=int, help="layers of T5 and of the transformer, to try it out")
    parser.add_argument("--count-only", action="store_true", help="leave out the measured run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.comfyui:
        parser.error("which ComfyUI? Give its folder with --comfyui, or set COMFYUI_PATH")
    return options


if __name__ == "__main__":
    main()
