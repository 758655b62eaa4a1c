"""The samplers on the stand-ins for a network."""

import re

import torch
from torch import Tensor

from pixart_nodes.diffusion import consistency, samplers, schedule

from .case import Case
from .diffusion import float32_alphas_cumprod


def fake_eps(kind: str, x: Tensor, t: Tensor, cond: Tensor | float = 0.0) -> Tensor:
    """The stand-ins for a network with which the schedulers' golden trajectories were made; t broadcasts to x."""
    if kind == "tanh":
        return torch.tanh(0.8 * x + 0.5 * t / 1000 + 0.3 * cond)
    tau = t / 1000 + 0.001
    log_alpha = -(0.05 * tau + 4.975 * tau**2)
    x0 = torch.tanh(0.6 * x - 0.4 * t / 1000 + 0.3 * cond)
    return (x - log_alpha.exp() * x0) / (-torch.expm1(2 * log_alpha)).sqrt()


def trajectory(sampler, eps_at, to_denoised, x: Tensor, sigmas: Tensor, timesteps, **options):
    """Runs a k-diffusion sampler from the unit Gaussian x -> (the latents before each step, the predictions, the end).

    eps_at(latent, t) -> noise; to_denoised(latent, eps, t) -> what the sampler's model returns. Latents are scaled to
    the variance of the original's, not to k-diffusion's: in float64, because x0 at t = 999 multiplies the rounding of
    going there and back by 157. The network and its x0 are float32, as in the fixture.
    """
    calls, timesteps = [], iter(timesteps)
    x, sigmas = x.double(), sigmas.double()

    def model(scaled, sigma):
        t = next(timesteps)
        latent = scaled / (1 + sigma[0] ** 2).sqrt()
        calls.append((latent, to_denoised(latent.float(), eps_at(latent.float(), t), t)))
        return calls[-1][1]

    end = sampler(model, x * (1 + sigmas[0] ** 2).sqrt(), sigmas, disable=True, **options)
    latents, predictions = zip(*calls, strict=True)
    return latents, torch.stack(predictions), end / (1 + sigmas[-1] ** 2).sqrt()


def lcm_scheduler(case: Case):
    """Both grids. The original adds noise after the last step, too; its result is the last prediction, as ours.

    The predictions of "vp" stay below 1, but what the division by 0.0064 at t = 999 multiplies is the rounding of x_T,
    and math libraries round sqrt(1 - a) up or down there: that much more is allowed.
    """
    inputs, golden = case.tensors("in"), case.tensors("out")
    alphas, levels = float32_alphas_cumprod(), schedule.sigmas()
    for name, expected in golden.items():
        if name.startswith("timesteps."):
            _, grid, steps = name.split(".")
            yield name, torch.tensor(samplers.lcm_timesteps(int(steps), grid)), expected
            continue
        grid, kind, steps, what = name.split(".")
        timesteps = samplers.lcm_timesteps(int(steps), grid)
        noise = iter(inputs["noise"])
        before, denoised, end = trajectory(
            samplers.sample_lcm,
            lambda x, t, kind=kind: fake_eps(kind, x, torch.tensor(float(t))),
            lambda x, eps, t: consistency.consistency_function(x, eps, torch.full((len(x),), t), alphas),
            inputs["x_T"], torch.tensor([*levels[timesteps], 0.0]), timesteps,
            noise_sampler=lambda *_, noise=noise: next(noise),
        )  # fmt: skip
        gain = max(1.0, inputs["x_T"].abs().max().item()) if kind == "vp" else 1.0
        if what == "denoised":
            yield name, denoised, expected, gain
        else:
            after = torch.stack([*before[1:], end])
            compared = len(after) if grid == "diffusers" or len(after) == 1 else len(after) - 1
            yield name, after[:compared], expected[:compared], gain


def dpm_solver(case: Case):
    """DPM-Solver++ 2M on the grids of both repositories and of diffusers, and the schedule between two timesteps."""
    inputs, golden = case.tensors("in"), case.tensors("out")
    table = 0.5 * schedule.alphas_cumprod().log()
    for name, expected in golden.items():
        if name.startswith("noise_schedule."):
            yield name, _noise_schedule_vp(table, name.split(".")[1], inputs["t_continuous"].double()), expected
        elif name.startswith("original_"):
            yield name, _dpm_original(table, inputs, *name.removeprefix("original_").split(".", 1)), expected
        elif name.startswith("diffusers_"):
            variant, *rest = name.removeprefix("diffusers_").split(".")
            ours = _dpm_diffusers(inputs, golden[f"diffusers.{rest[-2]}.timesteps"], variant, rest)
            yield name, ours, expected
        else:                                  # diffusers' timesteps are the original's, rounded to the nearest
            steps = int(name.split(".")[1])
            yield name, samplers.original_timesteps(steps)[:-1].round().long(), expected
    for steps, row in case.entry["steps"].items():
        ours = samplers.original_timesteps(int(steps))[:-1]
        yield f"{steps} timesteps", ours, torch.tensor(row["original_model_timesteps"])


def _noise_schedule_vp(table, quantity: str, time: Tensor) -> Tensor:
    """The original's functions of continuous time, 0.001 to 1."""
    log_alpha = schedule.log_alpha_at(table, 1000 * time - 1)
    log_sigma = 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    return {
        "log_alpha": log_alpha, "sigma": log_sigma.exp(), "lambda": log_alpha - log_sigma,
        "inverse_lambda_of_lambda": (schedule.timestep_at(table, log_alpha) + 1) / 1000,
    }[quantity]  # fmt: skip


def _dpm_original(table, inputs, repository: str, what: str) -> Tensor:
    kind, steps, result = re.fullmatch(r"(.+)\.(\d+)\.(\w+)", what).groups()
    kind, _, scale = kind.partition("_cfg")
    timesteps = samplers.original_timesteps(int(steps))
    # In float32, as the original: 1 - alphas_cumprod loses four digits at t = 0, which guidance makes visible.
    alpha = schedule.log_alpha_at(table.float(), timesteps).exp()
    sigmas = (1 - alpha**2).sqrt() / alpha

    def eps_at(x, t):
        eps = fake_eps(kind, x, t)
        return eps + float(scale) * (fake_eps(kind, x, t, inputs["cond"]) - eps) if scale else eps

    first_order = samplers.lower_order_final(repository, int(steps))
    latents = _dpm_latents(eps_at, inputs["x_T"], sigmas, timesteps[:-1].float(), first_order)
    return latents[-1] if result == "final" else latents


def _dpm_diffusers(inputs, timesteps, variant: str, rest) -> Tensor:
    """diffusers' grid and its last step: of first order below 15 steps and to sigma 0."""
    levels = schedule.sigmas()
    sigmas = torch.tensor([*levels[timesteps], 0.0 if variant == "zero" else levels[0]])
    if rest[-1] == "sigmas":
        return sigmas
    return _dpm_latents(
        lambda x, t: fake_eps(rest[0], x, t), inputs["x_T"], sigmas, timesteps.float(), len(timesteps) < 15
    )


def _dpm_latents(eps_at, x, sigmas, timesteps, first_order: bool) -> Tensor:
    """The latents after each step."""
    level = dict(zip(timesteps.tolist(), sigmas, strict=False))
    before, _, end = trajectory(
        samplers.sample_dpmpp_2m, eps_at,
        lambda x, eps, t: x * (1 + level[float(t)] ** 2).sqrt() - level[float(t)] * eps,
        x, sigmas, timesteps, lower_order_final=first_order,
    )  # fmt: skip
    return torch.stack([*before[1:], end])
