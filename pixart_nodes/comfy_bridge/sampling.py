"""PixArt's noise schedule in ComfyUI's terms, and the original samplers' settings as SAMPLER and SIGMAS.

The schedule is linear between integer timesteps in log alpha, as the original DPM-Solver and SA-Solver read it
(PixArt-sigma diffusion/model/dpm_solver.py, NoiseScheduleVP 'discrete'), so both directions accept fractions.
"""

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.k_diffusion.sa_solver import get_tau_interval_func
from torch import Tensor

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
        t = timestep.to(self.log_alphas).clamp(0, len(self.log_alphas) - 1)
        low = t.floor().long()
        log_alpha = torch.lerp(self.log_alphas[low], self.log_alphas[t.ceil().long()], t - low)
        return torch.expm1(-2 * log_alpha).sqrt().to(timestep.device)

    def timestep(self, sigma: Tensor) -> Tensor:
        falling = self.log_alphas
        log_alpha = -0.5 * torch.log1p(sigma.to(falling) ** 2)
        high = torch.searchsorted(-falling, -log_alpha).clamp(1, len(falling) - 1)
        low = high - 1
        t = low + (log_alpha - falling[low]) / (falling[high] - falling[low])
        return t.clamp(0, len(falling) - 1).view(sigma.shape).to(sigma.device)


def schedule_of(model):
    """The noise schedule of a MODEL. Raises ValueError for models of another kind than PixArt's."""
    schedule = model.get_model_object("model_sampling")
    if not isinstance(schedule, comfy.model_sampling.ModelSamplingDiscrete):
        kind = type(model.model).__name__
        raise ValueError(f"PixArt Sampling got a {kind} model, which has no timesteps 0..999. Connect a PixArt model.")
    return schedule


def original_sigmas(model_sampling, steps: int, denoise: float = 1.0, to_zero: bool = True) -> Tensor:
    """Noise levels on the original's grid, equal steps of time from 999 to 0: float32 (steps + 1,).

    to_zero replaces the original's last level, sigma(0) = 0.01, by zero. denoise below 1 keeps the last `steps` of
    a longer grid, as KSampler does; 0 gives no steps at all.
    """
    if denoise <= 0:
        return torch.empty(0)
    timesteps = torch.linspace(model_sampling.num_timesteps - 1, 0, int(steps / denoise) + 1, dtype=torch.float64)
    sigmas = model_sampling.sigma(timesteps).float().cpu()
    if to_zero:
        sigmas[-1] = 0
    return sigmas[-(steps + 1) :]


def original_sampler(preset: str, model_sampling):
    """SAMPLER of a preset: ComfyUI's own solvers with the original's settings."""
    if preset == DPM_SOLVER:
        return comfy.samplers.ksampler("dpmpp_2m")
    # PixArt-alpha diffusion/sa_sampler.py:60-64, mode 'few_steps': orders 2 and 2, the rescaled form of appendix D.
    low, high = model_sampling.sigma(torch.tensor(NOISY_TIMESTEPS)).tolist()
    options = {
        "tau_func": get_tau_interval_func(high, low, eta=1.0),
        "predictor_order": 2,
        "corrector_order": 2,
        "simple_order_2": True,
    }
    return comfy.samplers.ksampler("sa_solver", options)
