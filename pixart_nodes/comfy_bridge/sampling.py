"""PixArt's noise schedule in ComfyUI's terms, and the original samplers' settings as SAMPLER and SIGMAS.

The schedule is linear between integer timesteps in log alpha, as the original DPM-Solver and SA-Solver read it
(PixArt-sigma diffusion/model/dpm_solver.py, NoiseScheduleVP 'discrete'), so both directions accept fractions.
"""

import math

import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from ..diffusion import samplers
from ..diffusion.schedule import log_alpha_at, timestep_at
from .noise import picture_noise

DPM_SOLVER = "DPM-Solver++ 2M"
SA_SOLVER = "SA-Solver 2/2"
PRESETS = (DPM_SOLVER, SA_SOLVER)

# SA-Solver adds noise while the original's continuous time is within 0.2..0.8, that is timestep 199..799.
NOISY_TIMESTEPS = (199.0, 799.0)


class PixArtModelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """ComfyUI's discrete eps model, except that a noise level between two timesteps is a fractional timestep.

    ComfyUI rounds to the nearest integer; the original evaluates 949.05. At integers both agree.
    """

    def set_sigmas(self, sigmas):
        super().set_sigmas(sigmas)
        self.register_buffer("log_alphas", -0.5 * torch.log1p(sigmas**2).float())  # (1000,), falling

    def sigma(self, timestep: Tensor) -> Tensor:
        return torch.expm1(-2 * log_alpha_at(self.log_alphas, timestep)).sqrt().to(timestep.device)

    def timestep(self, sigma: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.log1p(sigma.to(self.log_alphas) ** 2)
        return timestep_at(self.log_alphas, log_alpha).to(sigma.device)


def schedule_of(model, node: str = "PixArt Sampling"):
    """The noise schedule of a MODEL. Raises ValueError, in the name of `node`, for models of another kind."""
    schedule = model.get_model_object("model_sampling")
    if not isinstance(schedule, comfy.model_sampling.ModelSamplingDiscrete):
        kind = type(model.model).__name__
        raise ValueError(f"{node} got a {kind} model, which has no timesteps 0..999. Connect a PixArt model.")
    return schedule


def family_of(model) -> str:
    """The family of a MODEL, "sigma" or "alpha", from this pack's loader or ComfyUI's."""
    return "sigma" if isinstance(model.model.model_config, comfy.supported_models.PixArtSigma) else "alpha"


def original_sigmas(model_sampling, steps: int, denoise: float = 1.0, to_zero: bool = True) -> Tensor:
    """Noise levels on the original's grid, equal steps of time from 999 to 0: float32 (steps + 1,).

    to_zero replaces the original's last level, sigma(0) = 0.01, by zero. denoise below 1 keeps the last `steps` of
    a longer grid, as KSampler does; 0 gives no steps at all.
    """
    if denoise <= 0:
        return torch.empty(0)
    sigmas = model_sampling.sigma(samplers.original_timesteps(int(steps / denoise))).float().cpu()
    if to_zero:
        sigmas[-1] = 0
    return sigmas[-(steps + 1) :]


def sample_sa_solver(model, x, sigmas, extra_args=None, callback=None, disable=None, noisy=(0.0, math.inf)):
    """The k-diffusion sampler behind the SAMPLER of the SA-Solver preset."""
    noise = picture_noise(model, x, extra_args)
    return samplers.sample_sa_solver(model, x, sigmas, extra_args, callback, disable, noise, noisy)


def original_sampler(preset: str, model_sampling, family: str, steps: int):
    """SAMPLER of a preset: SA-Solver, or DPM-Solver++ ending a run of `steps` as the family's repository does."""
    if preset == DPM_SOLVER:
        first_order = samplers.lower_order_final(family, steps)
        return comfy.samplers.KSAMPLER(samplers.sample_dpmpp_2m, {"lower_order_final": first_order})
    noisy = tuple(model_sampling.sigma(torch.tensor(NOISY_TIMESTEPS)).tolist())
    return comfy.samplers.KSAMPLER(sample_sa_solver, {"noisy": noisy})
