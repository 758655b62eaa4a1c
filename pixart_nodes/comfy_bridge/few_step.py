"""LCM and DMD models in ComfyUI: the MODEL's schedule, SAMPLER, SIGMAS, and a run from latent to latent."""

import logging
import math

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..diffusion import samplers
from ..diffusion.consistency import boundary_scalings
from . import compat
from .noise import picture_noise
from .sampling import PixArtModelSampling, schedule_of
from .speed import GUIDANCE_OFF, guidance_scales

logger = logging.getLogger(__name__)


class LCMModelSampling(PixArtModelSampling):
    """PixArt's schedule of a model whose clean latent is the consistency function, at whole timesteps only."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return super().timestep(sigma).round()

    def calculate_denoised(self, sigma, model_output, model_input):
        c_skip, c_out = boundary_scalings(self.timestep(sigma).view(-1, *[1] * (model_input.ndim - 1)))
        x0 = super().calculate_denoised(sigma, model_output, model_input)
        return c_skip * self.calculate_input(sigma, model_input) + c_out * x0


def guidance_notice(cfg: float) -> str:
    """What to tell the user who guides a model that has guidance built in; empty for cfg 1."""
    if math.isclose(cfg, 1.0):
        return ""
    return f"cfg is {cfg:g}, but guidance is built into this distilled model: set cfg to 1 (0 in diffusers' counting)."


def warn_of_guidance(model):
    """Logs the notice and shows it under the node that samples. Only ComfyUI's own guiders can be asked."""
    guider = getattr(model, "inner_model", None)
    scales = guidance_scales(guider)
    notice = guidance_notice(scales.pop("cfg", 1.0))
    if not notice and any(not math.isclose(value, GUIDANCE_OFF[name]) for name, value in scales.items()):
        kind = type(guider).__name__.removeprefix("Guider_")
        notice = f"{kind}Guider guides, but guidance is built into this distilled model: take BasicGuider in its place."
    if notice:
        logger.warning(notice)
        compat.show_text(compat.executing_node(), notice)


def sample_lcm(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The k-diffusion sampler behind the SAMPLER of PixArt LCM Sampler."""
    warn_of_guidance(model)
    noise = picture_noise(model, x, extra_args)
    return samplers.sample_lcm(model, x, sigmas, extra_args, callback, disable, noise)


def sample_dmd(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The k-diffusion sampler behind the SAMPLER of PixArt DMD Sampler. Raises ValueError where there is no noise."""
    warn_of_guidance(model)
    if not model.noise.any():
        raise ValueError("PixArt DMD Sampler starts from noise alone, but got none: turn add_noise on.")
    return samplers.sample_dmd(model, x, sigmas, extra_args, callback, disable, noise=model.noise)


def lcm_sampling(model, steps: int, grid: str, denoise: float, node: str):
    """(MODEL, SAMPLER, SIGMAS) that call the network at the grid's timesteps and nowhere else.

    Raises ValueError for a model of another kind and for steps that the grid does not have.
    """
    if not isinstance(model.model, comfy.model_base.PixArt):
        kind = type(model.model).__name__
        raise ValueError(f"{node} got a {kind} model. Connect a PixArt model that was distilled as an LCM.")
    schedule = LCMModelSampling(model.model.model_config)
    sigmas = sigmas_at(schedule, samplers.lcm_timesteps(steps, grid, denoise))
    patched = model.clone()
    patched.add_object_patch("model_sampling", schedule)
    return patched, comfy.samplers.KSAMPLER(sample_lcm), sigmas


def dmd_sampling(model, timestep: int, node: str):
    """(SAMPLER, SIGMAS) of one step at `timestep`."""
    return comfy.samplers.KSAMPLER(sample_dmd), sigmas_at(schedule_of(model, node), [timestep])


def sigmas_at(schedule, timesteps: list[int]) -> Tensor:
    """The noise levels of whole timesteps, and zero: float32 (steps + 1,), empty without timesteps."""
    levels = schedule.sigmas.cpu()[timesteps]
    return torch.cat([levels, levels.new_zeros(min(1, len(levels)))])


def sample(model, positive, negative, latent: dict, sampler, sigmas: Tensor, seed: int, cfg: float = 1.0) -> dict:
    """LATENT -> LATENT, as SamplerCustom does it: noise of the seed, batch_index, noise_mask, previews."""
    samples = compat.fit_empty_latent(model, latent)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    samples = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, samples, noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1), seed=seed,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )  # fmt: skip
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio")}
    return kept | {"samples": samples}
