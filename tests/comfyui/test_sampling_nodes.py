"""KSampler on our MODEL, PixArt Sampling and PixArt Resolution inside a real ComfyUI."""

import os
from pathlib import Path

import pytest
import torch
from goldens_cases import fake_eps
from safetensors.torch import load_file

from .drive import latent, prompt, sample


@pytest.mark.parametrize("height, width", [(8, 8), (9, 16), (15, 31), (32, 12)])
def test_any_latent_size_works(comfy, sigma, height, width):
    assert sample(comfy, sigma, size=latent(height, width)).shape == (1, 4, height, width)


def test_every_sampler_of_ksampler_works(comfy, sigma):
    from comfy import samplers

    for name in samplers.KSampler.SAMPLERS:
        sample(comfy, sigma, sampler_name=name, steps=2, size=latent(8, 8))


def test_every_scheduler_of_ksampler_works(comfy, sigma):
    from comfy import samplers

    for name in samplers.KSampler.SCHEDULERS:
        sample(comfy, sigma, scheduler=name, size=latent(8, 8))


def test_comfyuis_lcm_settings_apply(comfy, sigma):
    (lcm,) = comfy.call("ModelSamplingDiscrete", model=sigma, sampling="lcm", zsnr=False)
    levels, clone = [], lcm.clone()

    def note(apply_model, args):
        levels.append(float(args["timestep"][0]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(note)
    sample(comfy, clone, sampler_name="lcm", scheduler="simple", steps=4, cfg=1.0)
    timesteps = sigma.model.model_sampling.timestep(torch.tensor(levels))
    assert timesteps.round().tolist() == [999, 759, 499, 259]


def test_image_to_image_stays_near_the_picture(comfy, sigma):
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9)) * 5
    little, much = (
        sample(comfy, sigma, size={"samples": picture}, steps=4, denoise=denoise, cfg=1.0) for denoise in (0.05, 0.6)
    )
    assert 0 < (little - picture).norm() < (much - picture).norm()


def test_inpainting_leaves_the_rest_alone(comfy, sigma):
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9)) * 5
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    out = sample(comfy, sigma, size={"samples": picture, "noise_mask": mask})
    assert (out[..., :8] - picture[..., :8]).abs().max() < 1e-4
    assert (out[..., 8:] - picture[..., 8:]).abs().max() > 0.1


def test_a_seed_gives_the_same_picture_alone_and_again(comfy, sigma):
    assert torch.equal(sample(comfy, sigma, seed=5), sample(comfy, sigma, seed=5))
    assert not torch.equal(sample(comfy, sigma, seed=5), sample(comfy, sigma, seed=6))


# PixArt Sampling


def sampling(comfy, model, preset="DPM-Solver++ 2M", steps=20, denoise=1.0, final_sigma="zero"):
    settings = {"preset": preset, "steps": steps, "denoise": denoise, "final_sigma": final_sigma}
    return comfy.call("PixArtSampling", model=model, **settings)


def test_noise_levels_are_those_of_the_original_grid(comfy, sigma):
    _, sigmas = sampling(comfy, sigma, final_sigma="original (0.01)")
    timesteps = sigma.model.model_sampling.timestep(sigmas)
    assert (timesteps - torch.linspace(999, 0, 21)).abs().max() < 1e-2
    assert sigmas[0] == pytest.approx(157.407, rel=1e-5) and sigmas[-1] == pytest.approx(0.0100005, rel=1e-3)


def test_noise_levels_can_end_in_zero_as_comfyuis_do(comfy, sigma):
    from comfy import samplers

    _, sigmas = sampling(comfy, sigma)
    assert sigmas[-1] == 0
    assert torch.allclose(sigmas, samplers.calculate_sigmas(sigma.model.model_sampling, "sgm_uniform", 20), rtol=1e-5)


def test_denoise_keeps_the_end_of_a_longer_grid(comfy, sigma):
    _, whole = sampling(comfy, sigma, steps=40)
    _, half = sampling(comfy, sigma, steps=20, denoise=0.5)
    assert torch.equal(half, whole[-21:])
    assert len(sampling(comfy, sigma, denoise=0.0)[1]) == 0


def test_fractional_timesteps_and_noise_levels_are_each_others_inverse(sigma):
    schedule = sigma.model.model_sampling
    timesteps = torch.linspace(0, 999, 2345)
    assert (schedule.timestep(schedule.sigma(timesteps)) - timesteps).abs().max() < 5e-3
    whole = torch.arange(1000)
    assert torch.allclose(schedule.sigma(whole), schedule.sigmas, rtol=1e-5)
    beyond = schedule.timestep(torch.tensor([0.0, 1e-9, 1e9]))
    assert beyond.tolist() == [0, 0, 999]


@pytest.mark.parametrize("preset", ["DPM-Solver++ 2M", "SA-Solver 2/2"])
@pytest.mark.parametrize("final_sigma", ["zero", "original (0.01)"])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_presets_sample_through_sampler_custom(comfy, sigma, preset, final_sigma, steps):
    sampler, sigmas = sampling(comfy, sigma, preset, steps, final_sigma=final_sigma)
    assert len(sigmas) == steps + 1
    out, _ = comfy.call(
        "SamplerCustom", model=sigma, add_noise=True, noise_seed=0, cfg=4.5, positive=prompt(7, 1),
        negative=prompt(3, 2), sampler=sampler, sigmas=sigmas, latent_image=latent(),
    )  # fmt: skip
    assert torch.isfinite(out["samples"]).all()


def test_sa_solver_adds_noise_between_timesteps_199_and_799_only(comfy, sigma):
    sampler, _ = sampling(comfy, sigma, "SA-Solver 2/2")
    (low, high), level = sampler.extra_options["noisy"], sigma.model.model_sampling.sigma
    noisy = [low <= level(torch.tensor(float(t))) <= high for t in (0, 198, 200, 500, 798, 800, 999)]
    assert noisy == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("final_sigma", ["zero", "original (0.01)"])
def test_sa_solver_ends_where_its_noise_levels_end(comfy, sigma, final_sigma):
    """A picture that the model knows is met, whatever the noise on the way, but for the noise of the last level."""
    sampler, sigmas = sampling(comfy, sigma, "SA-Solver 2/2", 12, final_sigma=final_sigma)
    known = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    start = known + 157 * torch.randn(known.shape, generator=torch.Generator().manual_seed(2))
    out = sampler.sampler_function(lambda x, level: known, start, sigmas, disable=True, **sampler.extra_options)
    assert (out - known).abs().max() <= 6 * sigmas[-1] + 1e-5


def test_a_model_with_another_kind_of_schedule_is_refused(comfy, sigma):
    from comfy.model_sampling import ModelSamplingDiscreteFlow

    flow = sigma.clone()
    flow.add_object_patch("model_sampling", ModelSamplingDiscreteFlow())
    with pytest.raises(ValueError, match="Connect a PixArt model"):
        sampling(comfy, flow)


@pytest.mark.parametrize("family", ["alpha", "sigma"])
@pytest.mark.parametrize("kind", ["tanh", "vp"])
@pytest.mark.parametrize("steps", [14, 20])
def test_dpm_solver_arrives_where_the_repository_of_the_models_family_arrives(comfy, load_model, family, kind, steps):
    """Alpha's ends in a second-order step from 10 steps on, the Sigma repository's always in a first-order one."""
    folder = Path(os.environ.get("PIXART_GOLDEN_DIR") or Path(__file__).parents[1] / "goldens")
    golden = load_file(folder / "dpm_solver.safetensors")
    model = load_model(f"{family}.safetensors", family=family)
    sampler, sigmas = sampling(comfy, model, steps=steps, final_sigma="original (0.01)")
    schedule = model.model.model_sampling

    def denoise(x, level):
        level = level.view(-1, 1, 1, 1)
        return x - level * fake_eps(kind, x / (level**2 + 1).sqrt(), schedule.timestep(level))

    x = golden["in.x_T"] * (sigmas[0] ** 2 + 1).sqrt()
    out = sampler.sampler_function(denoise, x, sigmas, disable=True, **sampler.extra_options)
    out = out / (sigmas[-1] ** 2 + 1).sqrt()
    expected = golden[f"out.original_{family}.{kind}.{steps}.x"][-1]
    assert (out - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


def test_dpm_solver_to_zero_is_comfyuis_dpmpp_2m_on_the_same_noise_levels(comfy, sigma):
    sampler, sigmas = sampling(comfy, sigma, steps=7)
    (theirs,) = comfy.call("KSamplerSelect", sampler_name="dpmpp_2m")
    ours, theirs = (
        comfy.call(
            "SamplerCustom", model=sigma, add_noise=True, noise_seed=0, cfg=4.5, positive=prompt(7, 1),
            negative=prompt(3, 2), sampler=chosen, sigmas=sigmas, latent_image=latent(),
        )[0]["samples"]
        for chosen in (sampler, theirs)
    )  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# PixArt Resolution


def resolution(comfy, table="1024", aspect_ratio="auto (nearest to image)", batch_size=1, image=None):
    return comfy.call("PixArtResolution", table=table, aspect_ratio=aspect_ratio, batch_size=batch_size, image=image)


def test_width_is_width_and_height_is_height(comfy):
    width, height, empty, ratio = resolution(comfy, aspect_ratio="16:9", batch_size=3)
    assert (width, height, ratio) == (1344, 768, 0.57)
    assert empty["samples"].shape == (3, 4, 768 // 8, 1344 // 8) and not empty["samples"].any()
    assert resolution(comfy, aspect_ratio="4.00")[:2] == (512, 2048)


def test_auto_takes_the_shape_of_the_image_or_a_square(comfy):
    assert resolution(comfy, image=torch.zeros(2, 600, 300, 3))[:2] == (704, 1408)
    assert resolution(comfy, table="4096")[:2] == (4096, 4096)


def test_every_ratio_exists_in_every_table(comfy):
    schema = comfy.classes["PixArtResolution"].define_schema()
    tables, ratios = (next(i for i in schema.inputs if i.id == name).options for name in ("table", "aspect_ratio"))
    for table in tables[:2] + tables[4:5]:
        for ratio in ratios[1:]:
            width, height, *_ = resolution(comfy, table, ratio)
            assert width % 16 == height % 16 == 0
