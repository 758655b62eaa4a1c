"""Noise for samplers that add some in each step."""

import hashlib

import torch
from torch import Tensor


class PictureNoise:
    """Fresh noise for each step and picture of a batch, drawn on the CPU: the same on every device.

    A picture gets the same noise in a batch and alone. Its place in the seed's batch (a latent's batch_index) is not
    told to samplers, but the first noise is different for each place, so that and the seed start its generator. Where
    there is no first noise (add_noise off) the place in the present batch does.
    """

    def __init__(self, first: Tensor, seed: int | None):
        pictures = first.detach().float().cpu()
        starts = [p.numpy().tobytes() if p.any() else str(place).encode() for place, p in enumerate(pictures)]
        digests = [hashlib.sha256(f"{seed} ".encode() + start).digest() for start in starts]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little")) for d in digests]
        self.like = first

    def __call__(self, sigma, sigma_next) -> Tensor:
        """Noise (B, C, H, W) on the device of the first noise."""
        noise = [torch.randn(self.like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.like)


def picture_noise(model, x: Tensor, extra_args: dict | None) -> PictureNoise:
    """The noise of a run, from what ComfyUI gives a k-diffusion sampler; a foreign `model` may have no first noise."""
    return PictureNoise(getattr(model, "noise", x), (extra_args or {}).get("seed"))
