"""Time, memory and error of tiled VAE decodes: ours, ComfyUI's VAEDecodeTiled and diffusers' enable_tiling.

    python benchmarks/decode.py [--sizes 1024 1536 2048] [--tile 512] [--comfyui PATH] [--device cpu] [--methods ...]

The VAE has the full size of Stable Diffusion's and random weights of unit gain; the latent is a synthetic scene (a 1/f
field, a flat sky, a busy corner). Every decode runs in a process of its own, so that its peak memory can be told.
Prints a Markdown table; errors are those against the untiled decode in the same dtype, PSNR for a peak of 2 (-1..1).
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SD = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
OURS = {
    "exact, fp32 store": {},
    "exact, fp32 store, nothing recomputed": {"recompute": False},
    "exact, half store": {"store": torch.float16},
    "fast": {"fast": True},
}
METHODS = ["untiled", *OURS, "ComfyUI VAEDecodeTiled", "diffusers enable_tiling"]


def unit_gain_(vae: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights with which convolutions and linear layers keep the size of what they get."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / math.sqrt(parameter[0].numel())
        else:
            value = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        parameter.data = value
    return vae.eval().requires_grad_(False)


def scene(height: int, width: int, seed: int = 1) -> torch.Tensor:
    """A latent (1, 4, height, width) of about unit size: a 1/f field with a flat sky and a busy corner."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.fft.rfft2(torch.randn(1, 4, height, width, generator=generator))
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    field = torch.fft.irfft2(noise / (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width)),
                             s=(height, width))  # fmt: skip
    field = field / field.std()
    field[..., : height // 3, :] = torch.tensor([1.5, 0.5, -0.5, 0.2]).view(4, 1, 1)
    corner = field[..., height // 2 :, width // 2 :]
    corner += torch.randn(corner.shape, generator=generator)
    return field


def diffusers_vae(folder: Path, device: str):
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**SD, sample_size=512)
    vae.load_state_dict(torch.load(folder / "vae.pt", mmap=True, weights_only=True), assign=True)
    return vae.eval().requires_grad_(False).to(device)


def comfyui_vae(folder: Path, comfyui: str, device: str):
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--fp32-vae", *(["--cpu"] if device == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    vae = comfy.sd.VAE(sd=torch.load(folder / "vae.pt", weights_only=True))
    vae.process_output = lambda image: image  # as the network gives it, not clamped to 0..1
    return vae


def prepare(method: str, folder: Path, options):
    """The decode as a function of the latent (1, 4, h, w) -> (1, 3, 8h, 8w). Loads all weights."""
    if method.startswith("ComfyUI"):
        vae = comfyui_vae(folder, options.comfyui, options.device)
        tile = options.tile // 8
        overlap = min(8, tile // 4)  # 64 px, the node's default, and its rule for small tiles
        return lambda z: vae.decode_tiled(z, tile_x=tile, tile_y=tile, overlap=overlap).movedim(-1, 1)
    vae = diffusers_vae(folder, options.device)
    if method in OURS:
        sys.path.insert(0, str(ROOT))
        from pixart_nodes.vae import exact_tiles

        keywords = dict(OURS[method])
        decode = exact_tiles.decode
        return lambda z: decode(vae, z, tile=options.tile, **keywords)
    if method == "diffusers enable_tiling":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = options.tile, options.tile // 8
    return lambda z: vae.decode(z.to(options.device)).sample.cpu()


def child(method: str, size: int, folder: Path, options):
    """Decodes in this process; writes the picture and what it took."""
    cuda = options.device.startswith("cuda")
    z = scene(size // 8, size // 8)
    with torch.inference_mode():
        decode = prepare(method, folder, options)
        decode(z[..., :16, :16])  # loads code and kernels
        before = torch.cuda.memory_allocated() if cuda else resident()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter if cuda else time.process_time  # a GPU is waited for when the picture is copied
        start = clock()
        image = decode(z)
        seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = file_name(method, size)
    torch.save(image.cpu(), folder / f"{name}.pt")
    row = {"method": method, "size": size, "seconds": seconds, "bytes": peak - before, "file": f"{name}.pt"}
    (folder / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")


def file_name(method: str, size: int) -> str:
    return f"{method}-{size}".replace(" ", "_").replace(",", "")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(method: str, size: int, folder: Path, options) -> dict:
    command = [sys.executable, __file__, "--child", method, str(size), str(folder), "--tile", str(options.tile),
               "--device", options.device, "--comfyui", options.comfyui or ""]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / f"{file_name(method, size)}.json").read_text(encoding="utf-8"))


def errors(row: dict, reference: torch.Tensor, folder: Path) -> tuple[float, float]:
    """(PSNR in dB, largest absolute error)"""
    difference = torch.load(folder / row["file"], mmap=True, weights_only=True) - reference
    return 20 * math.log10(2 / max(difference.square().mean().sqrt().item(), 1e-30)), difference.abs().max().item()


def main():
    options = arguments()
    if options.child:
        method, size, folder = options.child
        return child(method, int(size), Path(folder), options)
    methods = [m for m in options.methods if options.comfyui or not m.startswith("ComfyUI")]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, tile {options.tile} px\n")
    print("| px | decode | time s | to untiled | memory above weights GB | PSNR dB | max error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from diffusers import AutoencoderKL

        torch.save(unit_gain_(AutoencoderKL(**SD)).state_dict(), folder / "vae.pt")
        for size in options.sizes:
            untiled, reference = None, None
            for method in ["untiled", *(m for m in methods if m != "untiled")]:
                row = measure(method, size, folder, options)
                if method == "untiled":
                    untiled, reference = row, torch.load(folder / row["file"], weights_only=True)
                psnr, most = errors(row, reference, folder)
                accuracy = "- | -" if row is untiled else f"{psnr:.1f} | {most:.1e}"
                print(f"| {size} | {method} | {row['seconds']:.1f} | {row['seconds'] / untiled['seconds']:.2f} | "
                      f"{row['bytes'] / 1e9:.2f} | {accuracy} |", flush=True)  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI source tree")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
