"""Samplers in k-diffusion's signature, and the timesteps at which the originals evaluate the network.

`model(x, sigma, **extra_args)` returns the denoised latent of x (B, ...) at the noise levels sigma (B,), where
x = x0 + sigma * noise; for an LCM "denoised" is its consistency function (consistency.py). sigmas (steps + 1,) fall.
"""

import torch
from torch import Tensor
from tqdm.auto import trange

from .schedule import NUM_TIMESTEPS

LCM_TIMESTEPS = 50  # an LCM is distilled at 19, 39, ..., 999
GRIDS = ("original", "diffusers")


def original_timesteps(steps: int) -> Tensor:
    """Equal steps of time from 999 to 0, with fractions: float64 (steps + 1,). PixArt-sigma dpm_solver.py:475-476."""
    return torch.linspace(NUM_TIMESTEPS - 1, 0, steps + 1, dtype=torch.float64)


def lcm_timesteps(steps: int, grid: str = "original", denoise: float = 1.0) -> list[int]:
    """The timesteps of an LCM, from high to low: 1 to 50 of the 50 that it was distilled at.

    "original" takes every (50 // steps)-th of them (PixArt-alpha diffusion/lcm_scheduler.py:303-307), "diffusers"
    spreads them evenly (LCMScheduler.set_timesteps); for 4 steps 999, 759, 519, 279 and 999, 759, 499, 259. denoise
    below 1 chooses from the lowest int(50 denoise) only, as diffusers' strength does; 0 gives no timesteps.
    Raises ValueError where that leaves fewer timesteps than steps.
    """
    if grid not in GRIDS:
        raise ValueError(f"There is no grid of timesteps {grid!r}. Choose {' or '.join(GRIDS)}.")
    if denoise <= 0:
        return []
    left = int(LCM_TIMESTEPS * denoise)
    if not 1 <= steps <= left:
        at_all = f"denoise {denoise:g} leaves {left} of an LCM's {LCM_TIMESTEPS} timesteps"
        raise ValueError(f"{at_all}, which is not enough for {steps} steps. Take fewer steps or a higher denoise.")
    stride = left // steps if grid == "original" else left / steps
    spacing = NUM_TIMESTEPS // LCM_TIMESTEPS
    return [spacing * (left - int(i * stride)) - 1 for i in range(steps)]


def lower_order_final(family: str, steps: int) -> bool:
    """Whether the original's DPM-Solver ends in a first-order step: alpha below 10 steps, Sigma always.

    PixArt-alpha and PixArt-sigma diffusion/model/dpm_solver.py, `sample`, method "multistep".
    """
    return family == "sigma" or steps < 10


@torch.no_grad()
def sample_lcm(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): to the clean latent and back with fresh noise.

    noise_sampler(sigma, sigma_next) -> noise like x; without one torch's own random numbers.
    """
    extra_args = extra_args or {}
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised
        if sigmas[i + 1] > 0:
            noise = noise_sampler(sigmas[i], sigmas[i + 1]) if noise_sampler else torch.randn_like(x)
            x = x + sigmas[i + 1] * noise
    return x


@torch.no_grad()
def sample_dmd(model, x, sigmas, extra_args=None, callback=None, disable=None, *, noise):
    """One step of a DMD model: unit Gaussian noise at the noise level sigmas[0] -> clean latent, not clipped.

    The network gets `noise` itself, as in training (PixArt-sigma train_scripts/train_pixart_dmd.py,
    generate_sample_1step), not sigma * noise / sqrt(1 + sigma^2); so x is not used.
    """
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    denoised = model(x, sigmas[0].expand(len(x)), **(extra_args or {}))
    if callback is not None:
        callback({"x": x, "i": 0, "sigma": sigmas[0], "sigma_hat": sigmas[0], "denoised": denoised})
    return denoised


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, lower_order_final=False):
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); the step to sigma 0 is of first order in any case."""
    extra_args = extra_args or {}
    times = -sigmas.log()
    last, previous = len(sigmas) - 2, None
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        step, target = times[i + 1] - times[i], denoised
        if previous is not None and sigmas[i + 1] > 0 and not (lower_order_final and i == last):
            target = denoised + (denoised - previous) * step / (2 * (times[i] - times[i - 1]))
        x = (sigmas[i + 1] / sigmas[i]) * x - (-step).expm1() * target
        previous = denoised
    return x


@torch.no_grad()
def sample_sa_solver(
    model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, noisy=(0.0, float("inf"))
):
    """SA-Solver with predictor and corrector of order 2 (Xue et al. 2023, appendix D), tau 1 where sigma is in `noisy`.

    As PixArt-alpha diffusion/sa_sampler.py:60-64 runs it, mode "few_steps": one call of the network per step; the last
    step is of first order, adds no noise and is not corrected. noise_sampler as for `sample_lcm`.
    """
    extra_args = extra_args or {}
    times = -sigmas.log()
    start, previous, before = x, None, None
    for i in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i].expand(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        if before is not None:  # correct the step that led here, with the noise that it had
            decay, gain, half, noise = before
            x = decay * start + (gain - half) * previous + half * denoised + noise
        last = i == len(sigmas) - 2
        tau = not last and bool(noisy[0] <= sigmas[i + 1] <= noisy[1])
        rate, step, decay, noise = 1 + tau, times[i + 1] - times[i], sigmas[i + 1] / sigmas[i], 0.0
        gain, half = -(-rate * step).expm1(), 0.5 * rate * step
        if tau:
            noise = noise_sampler(sigmas[i], sigmas[i + 1]) if noise_sampler else torch.randn_like(x)
            decay, noise = decay * (-step).exp(), sigmas[i + 1] * (-(-2 * step).expm1()).sqrt() * noise
        target = gain * denoised
        if before is not None and not last:
            target = target + half * step / (times[i] - times[i - 1]) * (denoised - previous)
        start, previous, before = x, denoised, (decay, gain, half, noise)
        x = decay * x + target + noise
    return x
