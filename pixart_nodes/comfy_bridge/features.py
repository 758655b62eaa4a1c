"""ComfyUI's VAE and CLIP as what the feature cache is filled with: moments of pictures, T5 features of captions."""

import comfy.model_management
import torch
from torch import Tensor

from ..text.captions import TOKEN_LIMITS
from .conditioning import encode_empty, escape, tokenize, truncate
from .text_encoder import NAME


def vae_encoder_weights(vae) -> list[Tensor]:
    """The weights that an encoding depends on, for a fingerprint. Raises ValueError for what is no image VAE."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise ValueError("This is no VAE. Connect Load VAE; a checkpoint without a VAE gives none.")
    if getattr(vae, "latent_channels", 4) != 4 or getattr(vae, "latent_dim", 2) != 2:
        raise ValueError("This VAE does not make latents of 4 channels: take SD 1.5's for alpha, SDXL's for Sigma.")
    state = vae.first_stage_model.state_dict()
    return [
        weight for name, weight in state.items()
        if name.startswith(("encoder.", "quant_conv.", "taesd_encoder.", "vae_scale", "vae_shift"))
    ]  # fmt: skip


def vae_moments(vae, pixels: Tensor) -> Tensor:
    """pixels (B, H, W, 3) in 0..1 -> unscaled mean and std (B, 8, H/8, W/8), or the latent alone (B, 4, H/8, W/8).

    ComfyUI keeps the mean and throws the variance away; it is picked up on its way there. When ComfyUI had to encode
    in tiles, for lack of memory, the std is 0.
    """
    seen = []
    regularization = getattr(vae.first_stage_model, "regularization", None)
    hook = regularization.register_forward_hook(lambda _, args, out: seen.append(args[0])) if regularization else None
    try:
        mean = vae.encode(pixels).cpu().float()
    finally:
        if hook:
            hook.remove()
    if hook is None:
        return mean
    logvar = torch.cat([moments.chunk(2, 1)[1].cpu().float() for moments in seen]) if seen else mean[:0]
    std = (logvar.clamp(-30, 20) / 2).exp() if logvar.shape == mean.shape else torch.zeros_like(mean)
    return torch.cat([mean, std], 1)


def t5_weights(clip, text: str) -> tuple[list[Tensor], str]:
    """(the weights that features depend on, the ids of `text`), for a fingerprint. ValueError when no T5."""
    ids = [token for token, _ in tokenize(clip, text)]
    if clip.patcher.patches:
        raise ValueError("This T5 has a LoRA on it. Connect the loader itself: the cache is made with the plain T5.")
    model = clip.cond_stage_model.state_dict()
    weights = [weight for name, weight in model.items() if ".encoder." in name or name.endswith("shared.weight")]
    return weights, repr(ids)


def encode_captions(clip, texts: list[str], limit: int) -> list[Tensor]:
    """Features of captions, cut to `limit` tokens as in training: (L, D) each. Parentheses are no weights here."""
    rows = [truncate(tokenize(clip, escape(text)), limit)[0] for text in texts]
    return [clip.encode_from_tokens_scheduled({NAME: [row]})[0][0][0].cpu() for row in rows]


def encode_null(clip, family: str) -> Tensor:
    """T5("") with its pads, (token limit, D)."""
    return encode_empty(clip, TOKEN_LIMITS[family], {})[0][0][0].cpu()


def free_memory():
    """Unloads ComfyUI's models, for a model that ComfyUI does not manage."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
