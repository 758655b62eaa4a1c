"""Samples of a run: the cached validation prompts, drawn with fixed noise, as latents and as pictures.

The pictures are decoded where run.json names a VAE; else they are linear guesses of the colours from the latent. The
.safetensors beside them decode in any VAE node.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.files import save_atomic
from ..data.dataset import seeded
from ..data.index import Index
from ..diffusion.consistency import consistency_function
from ..diffusion.schedule import alphas_cumprod, predict_x0
from .recipes import Recipe, Start

logger = logging.getLogger(__name__)
Painter = Callable[[Tensor], Image.Image]  # scaled latent (4, H, W) -> a picture of 8 W x 8 H

STEPS, LCM_STEPS = 20, 4
NOISE = 3  # what a random stream decides; 0 to 2 are taken
# Red, green and blue of each latent channel and the offset, ComfyUI's public preview factors of the SD and SDXL VAEs.
COLOURS = {
    "alpha": ([[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721],
               [-0.2120, -0.2616, -0.7177]], [0.0, 0.0, 0.0]),
    "sigma": ([[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362],
               [-0.3165, -0.2492, -0.2188]], [0.1084, -0.0175, -0.0011]),
}  # fmt: skip


@torch.no_grad()
def draw_samples(recipe: Recipe, index: Index, folder: Path, step: int, paint: Painter | None) -> list[str]:
    """Writes step-000250_0.png, ... and step-000250.safetensors; the names of the pictures. Empty without prompts.

    All are drawn before any is written, so that a full disk holds up no process that shares the weights. paint None:
    computes all the same, and writes nothing.
    """
    latents = {
        f"latent_{i}": denoise(recipe, recipe.network, index, features, i % len(index), i)
        for i, (_, features) in enumerate(index.prompts())
    }
    if paint is None or not latents:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"step-{step:06}_{i}.png" for i in range(len(latents))]
    for name, latent in zip(names, latents.values(), strict=True):
        paint(latent[0]).save(folder / name)
    save_atomic(latents, folder / f"step-{step:06}.safetensors", {"pixart.format": "scaled latents"})
    return names


def denoise(recipe: Recipe, network, index: Index, features: Tensor, row: int, number: int) -> Tensor:
    """A scaled latent (1, 4, H, W): DDIM with guidance, or an LCM's few steps; the noise depends on `number` alone."""
    device, bucket, config = recipe.start.device, index.bucket(row), recipe.config
    generator = seeded(NOISE, config.seed, number)

    def noise():
        return torch.randn((1, 4, bucket.height // 8, bucket.width // 8), generator=generator).to(device)

    context = features[None].to(device, torch.float32)
    null = recipe.start.model.y_embedder.y_embedding[None, : context.shape[1]].float()
    extras, alphas = recipe.preview_extras(index, row), alphas_cumprod().to(device)
    guidance = 1.0 if recipe.consistency else recipe.preview_guidance
    timesteps = torch.linspace(999, 0, (LCM_STEPS if recipe.consistency else STEPS) + 1).round().long()[:-1]
    x = noise()
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        at = t[None].to(device)
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=device)
        eps = network(x, at, context, mask, **extras).float()
        if guidance != 1:
            uncond = network(x, at, null, mask, **extras).float()
            eps = uncond + guidance * (eps - uncond)
        x0 = consistency_function(x, eps, at, alphas) if recipe.consistency else predict_x0(x, eps, alphas[at])
        if after is None:
            return x0
        a = alphas[after]
        x = a.sqrt().float() * x0 + (1 - a).sqrt().float() * (noise() if recipe.consistency else eps)


def make_painter(vae: str, start: Start) -> tuple[Painter, str]:
    """What turns latents into pictures, and why it is not the VAE that was asked for, else ""."""
    plain = partial(colours, family=start.family)
    dtype = torch.bfloat16 if start.dtype == torch.bfloat16 else torch.float32  # fp16 is too narrow for SDXL's VAE
    if not vae:
        return plain, ""
    from ..data.loading import load_decoder

    try:
        decode = load_decoder(Path(vae), start.family, start.device, dtype)
    except (ValueError, OSError, RuntimeError) as error:
        return plain, f"Samples are drawn in rough colours: {error}"

    def paint(latent: Tensor) -> Image.Image:
        try:
            with torch.autocast(start.device.type, enabled=False):
                return picture(decode(latent[None].float())[0])
        except RuntimeError as error:  # most likely too little memory, which training shall not feel
            logger.warning("a sample is drawn in rough colours: %s", error)
            return plain(latent)

    return paint, ""


def colours(latent: Tensor, family: str) -> Image.Image:
    """(4, H, W) -> a picture of W x H, enlarged 8 times."""
    factors, offset = (torch.tensor(values) for values in COLOURS[family])
    pixels = (torch.einsum("chw,cd->hwd", latent.float().cpu(), factors) + offset + 1) / 2
    small = picture(pixels)
    return small.resize((small.width * 8, small.height * 8), Image.Resampling.BICUBIC)


def picture(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in 0..1; what is no number is black."""
    return Image.fromarray((pixels.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
