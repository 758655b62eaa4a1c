"""Small AutoencoderKLs with random weights of unit gain, scenes to decode, and the measure of their likeness."""

import math

import torch
from diffusers import AutoencoderKL


def random_vae(channels=(16, 32, 32, 32), blocks=2, groups=8, latent_channels=4, seed=0, **config) -> AutoencoderKL:
    """All standard stages, attention in the middle included."""
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=blocks, norm_num_groups=groups, latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, **config,
    )  # fmt: skip
    return randomise(vae, seed)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
    return module.eval().requires_grad_(False)


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In dB, for a peak of 2 (-1..1)."""
    return 20 * math.log10(2 / max((ours - theirs).double().square().mean().sqrt().item(), 1e-30))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, decibels=100.0, most=1e-4):
    assert ours.shape == theirs.shape
    assert psnr(ours, theirs) >= decibels
    assert (ours - theirs).abs().max() <= most
