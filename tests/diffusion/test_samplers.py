"""The few-step samplers and DPM-Solver++ as functions, and the timesteps they are run at."""

import pytest
import torch
from diffusers import LCMScheduler
from goldens_cases import fake_eps

from pixart_nodes.diffusion import schedule
from pixart_nodes.diffusion.samplers import (
    GRIDS,
    lcm_timesteps,
    lower_order_final,
    original_timesteps,
    sample_dmd,
    sample_dpmpp_2m,
    sample_lcm,
    sample_sa_solver,
)


def latents(batch=2, seed=0):
    return torch.randn(batch, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "steps, original, diffusers",
    [
        (1, [999], [999]),
        (2, [999, 499], [999, 499]),
        (4, [999, 759, 519, 279], [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 519, 399, 279, 159], [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_the_two_grids_are_those_of_the_papers_code_and_of_diffusers(steps, original, diffusers):
    assert lcm_timesteps(steps, "original") == original
    assert lcm_timesteps(steps, "diffusers") == diffusers


@pytest.mark.parametrize("denoise", [1.0, 0.9, 0.58, 0.5, 0.29, 0.02])
def test_the_diffusers_grid_is_that_of_lcmscheduler_for_every_number_of_steps(denoise):
    scheduler = LCMScheduler(original_inference_steps=50)
    for steps in range(1, int(50 * denoise) + 1):
        scheduler.set_timesteps(steps, strength=denoise)
        assert lcm_timesteps(steps, "diffusers", denoise) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("denoise", [1.0, 0.58, 0.5])
def test_every_number_of_steps_falls_through_timesteps_that_the_model_was_distilled_at(grid, denoise):
    highest = 20 * int(50 * denoise) - 1
    for steps in range(1, int(50 * denoise) + 1):
        timesteps = lcm_timesteps(steps, grid, denoise)
        assert len(timesteps) == steps and timesteps[0] == highest
        assert all(above > below for above, below in zip(timesteps, timesteps[1:], strict=False))
        assert set(timesteps) <= set(range(19, 1000, 20))


@pytest.mark.parametrize("steps, grid, denoise", [(51, "original", 1.0), (0, "diffusers", 1.0), (4, "original", 0.05)])
def test_more_steps_than_timesteps_are_refused_in_one_sentence(steps, grid, denoise):
    with pytest.raises(ValueError, match=r"not enough for \d+ steps. Take fewer steps or a higher denoise"):
        lcm_timesteps(steps, grid, denoise)


def test_an_unknown_grid_is_refused_and_denoise_zero_does_nothing():
    with pytest.raises(ValueError, match="Choose original or diffusers"):
        lcm_timesteps(4, "karras")
    assert lcm_timesteps(4, "original", 0.0) == []


def test_lcm_adds_the_given_noise_between_the_steps_and_none_after_the_last():
    sigmas, calls, shown = torch.tensor([157.0, 3.0, 1.0, 0.0]), [], []
    noises = [latents(seed=5), latents(seed=6)]
    supply = iter(noises)

    def model(x, sigma):
        calls.append((x, sigma))
        return x / (1 + sigma.view(-1, 1, 1, 1))

    start = latents()
    out = sample_lcm(model, start, sigmas, callback=shown.append, disable=True, noise_sampler=lambda *_: next(supply))
    assert [sigma.tolist() for _, sigma in calls] == [[157.0, 157.0], [3.0, 3.0], [1.0, 1.0]]
    assert torch.equal(calls[0][0], start)
    assert torch.allclose(calls[1][0], start / 158 + 3 * noises[0])
    assert torch.allclose(calls[2][0], calls[1][0] / 4 + 1 * noises[1])
    assert torch.equal(out, shown[-1]["denoised"]) and [step["i"] for step in shown] == [0, 1, 2]


def test_dmd_gives_the_network_unit_noise_and_returns_what_it_predicts_unclipped():
    sigma, noise, seen = schedule.sigmas()[400].float(), latents(seed=3), []

    def model(x, level):
        seen.append(x / (1 + level.view(-1, 1, 1, 1) ** 2).sqrt())
        return 40 * x

    out = sample_dmd(model, torch.zeros_like(noise), torch.stack([sigma, torch.tensor(0.0)]), disable=True, noise=noise)
    assert torch.allclose(seen[0], noise, atol=1e-6) and len(seen) == 1
    assert out.abs().max() > 40


def gaussian_data(x, sigma):
    """The perfect denoiser of unit Gaussian data; its flow only scales x by sqrt(1 + sigma^2)."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("lower_order_final", [False, True])
def test_dpm_solver_is_of_second_order(lower_order_final):
    x, errors = latents().double(), []
    for steps in (40, 80):
        sigmas = torch.linspace(3, -3, steps + 1, dtype=torch.float64).exp()
        start = x * (1 + sigmas[0] ** 2).sqrt()
        out = sample_dpmpp_2m(gaussian_data, start, sigmas, disable=True, lower_order_final=lower_order_final)
        errors.append((out - x * (1 + sigmas[-1] ** 2).sqrt()).abs().max())
    assert errors[1] < errors[0] / 3.5 and errors[0] < 1e-2


def test_the_order_of_the_last_step_matters_unless_it_goes_to_zero():
    def run(sigmas, first):
        return sample_dpmpp_2m(gaussian_data, latents(), sigmas, disable=True, lower_order_final=first)

    ending = torch.tensor([10.0, 3.0, 1.0, 0.01])
    assert not torch.allclose(run(ending, True), run(ending, False), atol=1e-3)
    ending[-1] = 0
    assert torch.equal(run(ending, True), run(ending, False))


def test_each_repository_ends_its_solver_in_its_own_way():
    assert [lower_order_final("alpha", steps) for steps in (9, 10, 14, 20)] == [True, False, False, False]
    assert all(lower_order_final("sigma", steps) for steps in (9, 10, 14, 20))


@pytest.mark.parametrize(
    "steps, expected",
    [(5, [-0.664155, 0.638032, -0.7481778, 0.5352718]), (14, [-0.2903853, 0.0857304, -0.3158133, 0.1636376])],
)
def test_sa_solver_arrives_where_the_original_arrives(steps, expected):
    """Numbers of PixArt-alpha's SASolver (cac2fd3) in float64, with the settings of diffusion/sa_sampler.py.

    The fake network is "vp" of the golden fixtures, the noise of step k is sin(3 start + k).
    """
    start = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64).view(1, 4, 1, 1)
    table, timesteps = 0.5 * schedule.alphas_cumprod().log(), original_timesteps(steps)

    def level(t):
        return torch.expm1(-2 * schedule.log_alpha_at(table, torch.as_tensor(t, dtype=torch.float64))).sqrt()

    sigmas, calls, noises = level(timesteps), iter(timesteps), []

    def model(x, sigma):
        return x - sigma[0] * fake_eps("vp", x / (1 + sigma[0] ** 2).sqrt(), next(calls))

    def noise(sigma, sigma_next):
        noises.append(sigmas.tolist().index(sigma_next))
        return (3 * start + noises[-1]).sin()

    out = sample_sa_solver(
        model, start * (1 + sigmas[0] ** 2).sqrt(), sigmas, disable=True, noise_sampler=noise,
        noisy=(level(199.0), level(799.0)),
    )  # fmt: skip
    out = out / (1 + sigmas[-1] ** 2).sqrt()
    assert (out.flatten() - torch.tensor(expected)).abs().max() < 2e-6
    assert noises == [k for k, t in enumerate(timesteps.tolist()) if 199 <= t <= 799]


def test_sa_solver_to_zero_returns_the_last_prediction():
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0])
    shown = []
    out = sample_sa_solver(gaussian_data, latents(), sigmas, callback=shown.append, disable=True)
    assert torch.equal(out, shown[-1]["denoised"]) and len(shown) == 3 and out.isfinite().all()


def test_the_originals_timesteps_are_fractions_from_999_to_0():
    assert original_timesteps(20)[:3].tolist() == pytest.approx([999, 949.05, 899.1])
    assert original_timesteps(20)[-1] == 0


def test_timesteps_and_log_alphas_are_each_others_inverse_and_whole_ones_stay_whole():
    table = 0.5 * schedule.alphas_cumprod().log()
    between = torch.tensor([0.0, 11.3, 400.0, 499.5, 949.05, 999.0], dtype=torch.float64)
    assert torch.allclose(schedule.timestep_at(table, schedule.log_alpha_at(table, between)), between, atol=1e-9)
    whole = torch.arange(1000)
    rough = table.float() * (1 + 1e-7 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(schedule.timestep_at(table.float(), rough), whole.float())
