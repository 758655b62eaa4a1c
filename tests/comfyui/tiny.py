"""Small random PixArt checkpoints: every tensor differs from zero, so that every part of the network shows."""

from dataclasses import replace

import torch

from pixart_nodes.checkpoints import save_native
from pixart_nodes.model import ControlNetTransformer, ControlParams, PixArtParams, PixArtTransformer
from pixart_nodes.model.hed import HED

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


def random_hed(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of the HED detector with which neither activations nor edges saturate."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, t in HED(device="meta").state_dict().items():
        scale = 0.01 if "projection" in name else (2 / max(1, t[0].numel())) ** 0.5
        weights[name] = torch.randn(t.shape, generator=generator) * scale * (t.ndim > 1)
    return weights


def random_control(params: PixArtParams, num_blocks: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """A ControlNet for a base of these parameters that steers strongly: no projection is zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ControlNetTransformer(ControlParams.of(params, num_blocks), device="meta").state_dict()
    scale = {name: 0.02 if name.endswith("bias") else t.shape[-1] ** -0.5 for name, t in shapes.items()}
    return {name: torch.randn(t.shape, generator=generator) * scale[name] for name, t in shapes.items()}
