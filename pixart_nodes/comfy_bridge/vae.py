"""Exact tiles inside ComfyUI's VAE: its scaling, device, dtype, model loading, progress bar and interrupts."""

from contextlib import nullcontext

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ..vae import NotDecomposable, decoder_layers, encoder_layers, exact_tiles
from ..vae import plan as planning
from ..vae.fast_tiles import fast_stored_elements
from ..vae.layers import channels
from . import compat

STORES = {"full": None, "half": torch.float16}
MODES = ("exact", "fast")
OTHER_VAES = ("refuse", "ComfyUI's own tiling")
GIB = 1024**3
MIN_TILE = 64
RESERVE = 1.2  # what is kept free around an estimate of memory
PAIRING = "PixArt-alpha goes with the SD 1.5 VAE and PixArt-Sigma with the SDXL VAE; both have latents of 4 channels."


def tiled_decode(
    vae, samples: Tensor, tile_size: int, memory_gb: float, store: str, mode: str, other_vaes: str
) -> Tensor:
    """Latents (B, C, H, W) as a LATENT holds them -> pictures (B, 8H, 8W, 3), as the VAE's own decode gives them.

    memory_gb above 0 chooses the tile size. Raises NotDecomposable for VAEs of another kind unless other_vaes hands
    them to ComfyUI, ValueError for latents that this VAE cannot decode and for memory that does not suffice.
    """
    node = "PixArt Tiled Decode"
    vae.throw_exception_if_invalid()
    try:
        layers = decoder_layers(vae.first_stage_model)
    except NotDecomposable as error:
        if other_vaes == OTHER_VAES[0]:
            raise explained(node, error) from error
        return comfyui_decode(vae, samples, tile_size)
    check_latent(node, layers, samples)
    fast = mode == "fast"
    tiled = Tiled(node, vae, layers, samples, tile_size, memory_gb, STORES[store], fast)
    pictures = tiled.run(samples, fast=fast)
    check_finite(node, vae, pictures)
    output_dtype = getattr(vae, "vae_output_dtype", lambda: torch.float32)()
    return vae.process_output(pictures.to(vae.output_device, output_dtype)).movedim(1, -1)


def tiled_encode(vae, pixels: Tensor, tile_size: int, memory_gb: float, store: str, other_vaes: str) -> Tensor:
    """Pictures (B, H, W, 3), 0..1 -> latents (B, C, H / 8, W / 8) as the VAE's own encode gives them.

    What exceeds a multiple of 8 pixels is cropped, as ComfyUI does. Raises as tiled_decode does.
    """
    node = "PixArt Tiled Encode"
    vae.throw_exception_if_invalid()
    pixels = pixels[..., :3]
    try:
        layers = encoder_layers(vae.first_stage_model)
    except NotDecomposable as error:
        if other_vaes == OTHER_VAES[0]:
            raise explained(node, error) from error
        return vae.encode_tiled(pixels, tile_x=tile_size, tile_y=tile_size, overlap=tile_size // 4)
    check_picture(node, pixels, vae.spacial_compression_encode())
    pixels = vae.vae_encode_crop_pixels(pixels).movedim(-1, 1)
    tiled = Tiled(node, vae, layers, pixels, tile_size, memory_gb, STORES[store])
    moments = tiled.run(vae.process_input(pixels.float().clone()))
    check_finite(node, vae, moments)
    latent, _ = vae.first_stage_model.regularization(moments)
    return latent.to(vae.output_device)


class Tiled:
    """One decode or encode: where its memory goes, and how it runs in ComfyUI."""

    def __init__(self, node: str, vae, layers, x: Tensor, tile: int, memory_gb: float, store, fast: bool = False):
        self.node, self.vae, self.layers = node, vae, layers
        self.plan = planning.steps(layers, *x.shape[2:])
        self.itemsize = mm.dtype_size(vae.vae_dtype)
        self.store = store if self.itemsize > 2 else None
        values = fast_stored_elements(self.plan) if fast else planning.stored_elements(self.plan)
        self.stored = values * (2 if self.store else self.itemsize)
        self.on_cpu = mm.is_device_cpu(vae.device)
        self.budget = int(memory_gb * GIB)
        self.tile = self.tile_for_budget() if self.budget else tile
        self.working = planning.working_bytes(self.plan, self.tile, self.itemsize, self.on_cpu)

    def tile_for_budget(self) -> int:
        """The largest tile that the budget allows. On a CPU the stores are part of it."""
        stored = self.stored if self.on_cpu else 0
        tile = planning.largest_tile(self.plan, self.budget - stored, self.itemsize, self.on_cpu)
        if tile < MIN_TILE:
            least = planning.working_bytes(self.plan, MIN_TILE, self.itemsize, self.on_cpu) + stored
            raise ValueError(
                f"{self.node}: {self.budget / GIB:.2f} GB are not enough for this picture, it needs "
                f"{least / GIB + 0.005:.2f} GB or more. Raise memory_gb{self.cheaper_store()}."
            )
        return tile

    def cheaper_store(self) -> str:
        return ", or choose store half" if self.store is None and self.itemsize > 2 else ""

    def store_device(self) -> torch.device:
        """The VAE's own device where what is free there (and the budget) allows, else system memory."""
        needed = self.stored + self.working
        if not self.on_cpu and needed * RESERVE < mm.get_free_memory(self.vae.device):
            if not self.budget or needed <= self.budget:
                return self.vae.device
        cpu = torch.device("cpu")
        needed, free = self.stored + self.working * self.on_cpu, mm.get_free_memory(cpu)
        if needed > free:
            raise ValueError(
                f"{self.node}: this picture needs {needed / GIB:.1f} GB of system memory for intermediate results, but "
                f"only {free / GIB:.1f} GB are free. Take a smaller picture{self.cheaper_store()}."
            )
        return cpu

    def run(self, x: Tensor, **options) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W') float32 in system memory."""
        vae, bar = self.vae, comfy.utils.ProgressBar(1000)

        def progress(done, total):
            compat.check_interrupt()
            bar.update_absolute(int(1000 * done / total))

        def weights(module):
            if module.weight is None:
                return None, None
            return comfy.ops.cast_bias_weight(module, device=vae.device, dtype=torch.float32, bias_dtype=torch.float32)

        with getattr(mm, "cuda_device_context", nullcontext)(vae.device):
            mm.load_models_gpu([vae.patcher], memory_required=self.working, force_full_load=vae.disable_offload)
            return exact_tiles.run(
                self.layers, x.float(), tile=self.tile, store=self.store, store_device=self.store_device(),
                device=vae.device, dtype=vae.vae_dtype, weights=weights, progress=progress, **options,
            )  # fmt: skip


def comfyui_decode(vae, samples: Tensor, tile_size: int) -> Tensor:
    """What ComfyUI's VAE Decode (Tiled) does, with an overlap of at most 64 pixels."""
    scale = vae.spacial_compression_decode()
    tile, overlap = (max(1, pixels // scale) for pixels in (tile_size, min(64, tile_size // 4)))
    pictures = vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=overlap)
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures


def explained(node: str, error: NotDecomposable) -> NotDecomposable:
    return NotDecomposable(
        f"{node}: {error} To decode with it all the same, set other_vaes to {OTHER_VAES[1]!r}, which shows seams and "
        "shifts of tone, or use ComfyUI's own VAE nodes."
    )


def check_latent(node: str, layers, samples: Tensor):
    expected = channels(layers[0])[0]
    if samples.ndim != 4 or samples.shape[1] != expected:
        raise ValueError(
            f"{node}: this VAE decodes image latents of {expected} channels, but the latent has the shape "
            f"{tuple(samples.shape)}. It comes from another kind of model. {PAIRING}"
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            f"{node}: the latent holds NaN or infinite values, so there is nothing to decode. The sampling went wrong "
            "before: a model in fp16 may have overflowed (load it in bf16 or fp32), or the settings do not fit it."
        )


def check_picture(node: str, pixels: Tensor, scale: int):
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or min(pixels.shape[1:3]) < scale:
        raise ValueError(
            f"{node}: expected RGB pictures of at least {scale} x {scale} pixels, but got the shape "
            f"{tuple(pixels.shape)} (batch, height, width, channels)."
        )
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{node}: the picture holds NaN or infinite values. Look at the node that made it.")


def check_finite(node: str, vae, result: Tensor):
    if not torch.isfinite(result).all():
        dtype = str(vae.vae_dtype).removeprefix("torch.")
        raise ValueError(
            f"{node}: the VAE overflowed in {dtype}. Start ComfyUI with --fp32-vae or --bf16-vae, or load a VAE that "
            "was made for fp16 (sdxl-vae-fp16-fix)."
        )
