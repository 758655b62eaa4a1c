"""Patches and latents for pictures beyond the size that a model was trained on."""

from dataclasses import dataclass

import comfy.utils
import torch
from torch import Tensor

from ..checkpoints.configs import VAE_FACTOR, interpolation_for
from ..model.position import position_table
from .kv_compress import PATCH, KVPatch, as_plan, parse_layers, plan_of
from .model import pixart_model

PUBLISHED_SIZES = (256, 512, 1024, 2048)
SPANS = ("trained", "auto")
POSITIONS = "diffusion_model.position_codes"
UPSCALE_METHODS = ("bicubic", "bilinear", "nearest-exact", "area", "bislerp")


def add_kv_compression(model, layers: str, scale_factor: int, sampling: str):
    """A clone of a MODEL whose blocks thin out their keys and values -> (clone, a sentence about it).

    layers as in `parse_layers`. Blocks whose compression came with the checkpoint keep theirs; a patch that is there
    already gives way in these layers. Raises ValueError for other models and where nothing is left to compress.
    """
    pixart = pixart_model(model, "PixArt KV Compress")
    own = as_plan(pixart.params.kv_compress)
    wanted = parse_layers(layers, pixart.params.depth)
    added = {block: (sampling, scale_factor) for block in wanted if block not in own}
    if not added:
        raise ValueError(
            f"PixArt KV Compress: blocks {spelled(wanted)} of {pixart.source} were trained with compression and keep "
            "it, so there is nothing to add. Choose other layers, or leave this node out."
        )
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    patches = options["patches"] = dict(options.get("patches", {}))
    others = [patch for patch in patches.get(PATCH, ()) if not isinstance(patch, KVPatch)]
    patches[PATCH] = [*others, KVPatch(plan_of(options) | added)]
    note = f"{sampling} by {scale_factor} in blocks {spelled(added)} of 0-{pixart.params.depth - 1}."
    kept = [block for block in wanted if block in own]
    return clone, note + (f" Blocks {spelled(kept)} keep the compression of the checkpoint." if kept else "")


def spelled(blocks) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1][1:] = [block]
        else:
            runs.append([block])
    return ", ".join("-".join(map(str, run)) for run in runs)


def set_position_span(model, span: str):
    """A clone of a MODEL whose token positions span what `span` says (see SPANS), at every picture size."""
    pixart = pixart_model(model, "PixArt Position Span")
    clone = model.clone()
    clone.object_patches.pop(POSITIONS, None)
    if span == "auto":
        params = pixart.params
        clone.add_object_patch(
            POSITIONS, PublishedPositions(pixart.detection.family, params.hidden_size, params.patch_size)
        )
    return clone


@dataclass(frozen=True)
class PublishedPositions:
    """Positions as in PixArt's own model of the picture's size, in place of PixArtTransformer.position_codes.

    Weak-to-strong training raises the resolution and keeps the span by interpolating between positions (PixArt-Sigma,
    section 3.2), so they run to 32 at every size, but to 16 for alpha at 256 px.
    """

    family: str
    hidden_size: int
    patch_size: int

    def __call__(self, grid: tuple[int, int], dtype: torch.dtype, device) -> Tensor:
        return position_table(*grid, self.hidden_size, self.span(grid), 1.0, device=device).to(dtype)  # (1, N, C)

    def span(self, grid: tuple[int, int]) -> float:
        rows, cols = grid
        unit = VAE_FACTOR * self.patch_size                                   # pixels for each token
        area = rows * cols * unit**2
        pixels = min(PUBLISHED_SIZES, key=lambda side: max(area / side**2, side**2 / area))
        return pixels / unit / interpolation_for(self.family, pixels)


def upscale_latent(latent: dict, height: int, width: int, method: str) -> dict:
    """A LATENT scaled to a picture size in pixels, what sticks out at the sides cut off. Its noise mask too.

    Raises ValueError for latents of video or of another VAE than PixArt's, and for those with values that are no
    numbers.
    """
    samples = latent["samples"]
    check_latent(samples)
    size = (width // VAE_FACTOR, height // VAE_FACTOR)
    scaled = {**latent, "samples": comfy.utils.common_upscale(samples, *size, method, "center")}
    if "noise_mask" in latent:
        mask = latent["noise_mask"]
        mask = mask.reshape(-1, 1, *mask.shape[-2:])                          # (B, 1, H, W)
        scaled["noise_mask"] = comfy.utils.common_upscale(mask, *size, "bilinear", "center")
    return scaled


def check_latent(samples: Tensor):
    if samples.ndim != 4 or samples.shape[1] != 4:
        raise ValueError(
            f"PixArt Upscale Latent needs image latents of 4 channels, (B, 4, H, W), but got {tuple(samples.shape)}: "
            "they are of another model's VAE. Encode the picture with PixArt's VAE."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            "PixArt Upscale Latent got values that are no numbers (NaN or infinity): the sampler before it went wrong. "
            "Look at its picture; fp16 that overflows and a wrong text encoder are the usual reasons."
        )
