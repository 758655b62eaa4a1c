"""Small random PixArt checkpoints: every tensor differs from zero, so that every part of the network shows."""

from dataclasses import replace

import torch

from pixart_nodes.checkpoints import save_native
from pixart_nodes.model import PixArtParams, PixArtTransformer

SIGMA = PixArtParams(
    depth=3, hidden_size=48, num_heads=4, in_channels=4, patch_size=2, mlp_ratio=4.0, caption_channels=32,
    caption_tokens=300, base_size=16, pe_interpolation=0.5, micro_condition=False, qk_norm=False, kv_compress=None,
    learned_variance=True,
)  # fmt: skip
ALPHA = replace(SIGMA, caption_tokens=120, pe_interpolation=1.0)
ALPHA_MS = replace(ALPHA, micro_condition=True)


def random_weights(params: PixArtParams, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in PixArtTransformer(params, device="meta").state_dict().items():
        scale = 0.02 if name.endswith("bias") else tensor.shape[-1] ** -0.5
        weights[name] = torch.randn(tensor.shape, generator=generator) * scale
    return weights


def save_random(path, params: PixArtParams, family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    weights = random_weights(params, seed)
    save_native(weights, params, path, family, "random weights for a test")
    return weights
