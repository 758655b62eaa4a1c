"""The noise schedule of every PixArt model: linear betas, 1000 steps (PixArt-alpha diffusion/iddpm.py:9-46)."""

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 2e-2


def betas() -> Tensor:
    return torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)  # (1000,)


def alphas_cumprod() -> Tensor:
    """The signal's share of the variance after each timestep, float64 (1000,)."""
    return (1 - betas()).cumprod(0)


def sigmas() -> Tensor:
    """k-diffusion's noise levels sqrt((1 - a) / a), float64 (1000,)."""
    a = alphas_cumprod()
    return ((1 - a) / a).sqrt()


def snr(alphas: Tensor) -> Tensor:
    """Signal-to-noise ratio a / (1 - a) of alphas_cumprod values."""
    return alphas / (1 - alphas)


def add_noise(x0: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise; alphas (B,) are alphas_cumprod at each sample's timestep."""
    a = alphas.view(-1, *[1] * (x0.ndim - 1))
    return a.sqrt().to(x0) * x0 + (1 - a).sqrt().to(x0) * noise


def predict_x0(x: Tensor, eps: Tensor, alphas: Tensor) -> Tensor:
    """The clean latent that x_t and its noise imply."""
    a = alphas.view(-1, *[1] * (x.ndim - 1))
    return (x - (1 - a).sqrt().to(x) * eps) / a.sqrt().to(x)


def log_alpha_at(log_alphas: Tensor, timesteps: Tensor) -> Tensor:
    """log sqrt(alphas_cumprod) between two timesteps: linear, as the original's NoiseScheduleVP 'discrete' reads it.

    log_alphas (1000,) falling; timesteps of any shape, fractions allowed, held within 0..999.
    """
    t = timesteps.to(log_alphas).clamp(0, len(log_alphas) - 1)
    low = t.floor().long()
    return torch.lerp(log_alphas[low], log_alphas[t.ceil().long()], t - low)


def timestep_at(log_alphas: Tensor, log_alpha: Tensor) -> Tensor:
    """The inverse of `log_alpha_at`; a value of the table gives its integer timestep, however rounded on the way."""
    high = torch.searchsorted(-log_alphas, -log_alpha.to(log_alphas)).clamp(1, len(log_alphas) - 1)
    low = high - 1
    t = low + (log_alpha - log_alphas[low]) / (log_alphas[high] - log_alphas[low])
    whole = t.round()
    return torch.where((t - whole).abs() < 1e-3, whole, t).clamp(0, len(log_alphas) - 1)
