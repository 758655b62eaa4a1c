"""PixArt LCM Sampler, PixArt LCM Sample and PixArt DMD Sampler inside a real ComfyUI."""

import logging

import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm

from .drive import latent, prompt

TINY = "pixart-tiny-alpha.safetensors"


@pytest.fixture(scope="module")
def tiny(load_model):
    """The bundled model."""
    return load_model(TINY)


@pytest.fixture
def lcm(comfy):
    """PixArt LCM Sampler with its widgets' defaults -> (MODEL, SAMPLER, SIGMAS)."""

    def nodes(model, steps=4, grid="original", denoise=1.0):
        return comfy.call("PixArtLCMSampler", model=model, steps=steps, grid=grid, denoise=denoise)

    return nodes


def caption(model, seed=1, batch=1, tokens=7):
    width = model.model.params.caption_channels
    return [[torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed)), {}]]


def custom(comfy, model, sampler, sigmas, size=None, seed=0, cfg=1.0, add_noise=True, positive=None):
    """SamplerCustom -> its first output, the samples."""
    out, denoised = comfy.call(
        "SamplerCustom", model=model, add_noise=add_noise, noise_seed=seed, cfg=cfg,
        positive=positive or caption(model), negative=caption(model, 2), sampler=sampler, sigmas=sigmas,
        latent_image=size or latent(),
    )  # fmt: skip
    assert torch.isfinite(out["samples"]).all()
    assert torch.allclose(out["samples"], denoised["samples"], atol=1e-4)
    return out["samples"]


def noted(model):
    """A clone of the model that notes (latent, timesteps) of every call of the network."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    calls, clone = [], model.clone()

    def note(executor, *args, **kwargs):
        calls.append((args[0].clone(), args[1].clone()))
        return executor(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note, clone.model_options, is_model_options=True)
    return clone, calls


# LCM


@pytest.mark.parametrize("grid", ["original", "diffusers"])
@pytest.mark.parametrize("steps, denoise", [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (13, 1.0), (50, 1.0), (3, 0.5)])
def test_the_network_is_called_at_the_timesteps_of_the_grid_and_nowhere_else(comfy, sigma, lcm, grid, steps, denoise):
    expected = comfy.pack("diffusion.samplers").lcm_timesteps(steps, grid, denoise)
    model, sampler, sigmas = lcm(sigma, steps, grid, denoise)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    model, calls = noted(model)
    custom(comfy, model, sampler, sigmas, latent(8, 8))
    assert [t.tolist() for _, t in calls] == [[float(t)] for t in expected]


def diffusers_trajectory(comfy, model, steps, start, noises, monkeypatch, timesteps=None, denoise=1.0):
    """diffusers' LCMScheduler around the same network, with the given noises -> the final latent."""
    scheduler = LCMScheduler(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", original_inference_steps=50, clip_sample=False,
        prediction_type="epsilon", timestep_scaling=10.0,
    )  # fmt: skip
    if timesteps:
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        scheduler.set_timesteps(steps, strength=denoise)
    supply = iter(noises)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(supply))
    network, x = model.model.diffusion_model, start
    if denoise < 1:
        x = scheduler.add_noise(*start, scheduler.timesteps[:1])
    context = caption(model)[0][0].expand(len(x), -1, -1)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            eps = network(x, t.float().expand(len(x)), context)
            x, clean = scheduler.step(eps, t, x, return_dict=False)
    return clean


def step_noises(comfy, start, seed, steps):
    draw = comfy.pack("comfy_bridge.noise").PictureNoise(start, seed)
    return [draw(None, None) for _ in range(steps - 1)]


def close(ours, theirs, relative=1e-4):
    return (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("grid", ["diffusers", "original"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_whole_trajectory_equals_that_of_diffusers(comfy, tiny, lcm, monkeypatch, steps, grid):
    """diffusers takes the original's grid as custom timesteps. Two pictures, another seed for each case."""
    from comfy.sample import prepare_noise

    seed, size = 40 + steps, latent(24, 24, batch=2)
    model, sampler, sigmas = lcm(tiny, steps, grid)
    ours = model.model.process_latent_in(custom(comfy, model, sampler, sigmas, size, seed))
    start = prepare_noise(size["samples"], seed)
    own = comfy.pack("diffusion.samplers").lcm_timesteps(steps, grid) if grid == "original" else None
    theirs = diffusers_trajectory(
        comfy, tiny, steps, start, step_noises(comfy, start, seed, steps), monkeypatch, timesteps=own
    )
    assert close(ours, theirs)


@pytest.mark.parametrize("denoise", [0.3, 0.5, 0.9])
def test_image_to_image_equals_diffusers_with_that_strength(comfy, tiny, lcm, monkeypatch, denoise):
    from comfy.sample import prepare_noise

    picture = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(9)) * 5
    model, sampler, sigmas = lcm(tiny, 4, "diffusers", denoise)
    ours = model.model.process_latent_in(custom(comfy, model, sampler, sigmas, {"samples": picture}, seed=3))
    noise = prepare_noise(picture, 3)
    start = (model.model.process_latent_in(picture), noise)
    theirs = diffusers_trajectory(
        comfy, tiny, 4, start, step_noises(comfy, noise, 3, 4), monkeypatch, denoise=denoise
    )
    assert close(ours, theirs)


def test_denoise_zero_returns_the_picture(comfy, sigma, lcm):
    picture = torch.randn(1, 4, 8, 8)
    assert torch.equal(custom(comfy, *lcm(sigma, denoise=0.0), {"samples": picture}), picture)


def test_a_mask_keeps_the_rest_of_the_picture(comfy, sigma, lcm):
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9)) * 5
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    out = custom(comfy, *lcm(sigma), {"samples": picture, "noise_mask": mask})
    assert (out[..., :8] - picture[..., :8]).abs().max() < 1e-4
    assert (out[..., 8:] - picture[..., 8:]).abs().max() > 0.1


def test_a_seed_gives_the_same_picture_again_whatever_was_drawn_in_between(comfy, sigma, lcm):
    nodes = lcm(sigma)
    first = custom(comfy, *nodes, seed=5)
    torch.manual_seed(77)
    assert torch.equal(custom(comfy, *nodes, seed=5), first)
    assert not torch.allclose(custom(comfy, *nodes, seed=6), first, atol=1e-2)


def test_a_picture_of_a_batch_is_the_one_that_its_index_gives_alone(comfy, sigma, lcm):
    """ComfyUI's Latent From Batch keeps the place in the seed's batch as batch_index."""
    nodes, batch = lcm(sigma), latent(batch=4)
    together = custom(comfy, *nodes, batch, seed=11)
    for place in (0, 2, 3):
        (alone,) = comfy.call("LatentFromBatch", samples=batch, batch_index=place, length=1)
        assert torch.allclose(custom(comfy, *nodes, alone, seed=11), together[place : place + 1], atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1
    twice = custom(comfy, *nodes, {**latent(batch=2), "batch_index": [2, 2]}, seed=11)
    assert torch.allclose(twice[0], twice[1], atol=1e-3)


def test_noise_is_fresh_in_every_step_and_different_for_every_picture(comfy):
    draw = comfy.pack("comfy_bridge.noise").PictureNoise(torch.randn(3, 4, 8, 8), seed=1)
    steps = [draw(None, None), draw(None, None)]
    pictures = torch.cat(steps).flatten(1)
    assert (torch.corrcoef(pictures) - torch.eye(6)).abs().max() < 0.35
    assert abs(float(pictures.mean())) < 0.1 and abs(float(pictures.std()) - 1) < 0.1
    without = comfy.pack("comfy_bridge.noise").PictureNoise(torch.zeros(2, 4, 8, 8), seed=1)(None, None)
    assert not torch.allclose(without[0], without[1])


def test_without_first_noise_the_pictures_of_a_batch_still_differ(comfy, sigma, lcm):
    out = custom(comfy, *lcm(sigma), latent(batch=2), add_noise=False)
    assert (out[0] - out[1]).abs().max() > 0.1


def test_the_two_halves_of_split_noise_levels_are_the_whole(comfy, sigma, lcm):
    """SplitSigmas: the second part goes on with add_noise off; its noise is another, its timesteps are the same."""
    model, sampler, sigmas = lcm(sigma)
    model, calls = noted(model)
    half = custom_part(comfy, model, sampler, sigmas[:3])
    custom(comfy, model, sampler, sigmas[2:], {"samples": half}, add_noise=False)
    assert [float(t[0]) for _, t in calls] == [999, 759, 519, 279]


def custom_part(comfy, model, sampler, sigmas):
    out, _ = comfy.call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=1.0, positive=caption(model),
        negative=caption(model, 2), sampler=sampler, sigmas=sigmas, latent_image=latent(),
    )  # fmt: skip
    return out["samples"]


def test_every_sampler_of_comfyui_gets_the_consistency_function(comfy, sigma, lcm):
    """ComfyUI's own lcm sampler on our MODEL and SIGMAS stays on the grid, too."""
    model, _, sigmas = lcm(sigma)
    (theirs,) = comfy.call("KSamplerSelect", sampler_name="lcm")
    model, calls = noted(model)
    custom(comfy, model, theirs, sigmas)
    assert [float(t[0]) for _, t in calls] == [999, 759, 519, 279]


def test_the_model_that_goes_in_is_left_alone_and_another_schedule_is_replaced(comfy, sigma, lcm):
    (patched,) = comfy.call("ModelSamplingDiscrete", model=sigma, sampling="lcm", zsnr=False)
    model, _, sigmas = lcm(patched)
    assert torch.equal(sigmas, lcm(sigma)[2])
    assert type(model.get_model_object("model_sampling")).__name__ == "LCMModelSampling"
    assert type(sigma.get_model_object("model_sampling")).__name__ == "PixArtModelSampling"


@pytest.mark.parametrize("cfg, heard", [(1.0, False), (2.5, True), (0.0, True)])
def test_guidance_on_top_of_the_built_in_one_is_noticed(comfy, sigma, lcm, caplog, cfg, heard):
    with caplog.at_level(logging.WARNING):
        custom(comfy, *lcm(sigma), cfg=cfg)
    assert ("guidance is built into this distilled model" in caplog.text) is heard


@pytest.mark.parametrize("scales, heard", [((1.0, 1.0), False), ((4.5, 1.0), True), ((1.0, 3.0), True)])
def test_guidance_of_a_guider_with_two_scales_is_noticed(comfy, sigma, lcm, caplog, scales, heard):
    model, sampler, sigmas = lcm(sigma)
    (guider,) = comfy.call(
        "DualCFGGuider", model=model, cond1=caption(model), cond2=caption(model, 2), negative=caption(model, 3),
        cfg_conds=scales[0], cfg_cond2_negative=scales[1], style="regular",
    )  # fmt: skip
    (noise,) = comfy.call("RandomNoise", noise_seed=9)
    comfy.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent()
    )
    assert ("DualCFGGuider guides, but guidance is built into this distilled model" in caplog.text) is heard


def test_a_model_of_another_kind_is_refused(comfy, sigma, lcm):
    other = sigma.clone()
    other.model = torch.nn.Module()
    with pytest.raises(ValueError, match="PixArt LCM Sampler got a Module model. Connect a PixArt model"):
        lcm(other)
    with pytest.raises(ValueError, match="leaves 2 of an LCM's 50 timesteps"):
        lcm(sigma, denoise=0.05)


def test_sampler_custom_advanced_draws_the_same(comfy, sigma, lcm):
    model, sampler, sigmas = lcm(sigma)
    (noise,) = comfy.call("RandomNoise", noise_seed=9)
    (guider,) = comfy.call("BasicGuider", model=model, conditioning=caption(model))
    out, _ = comfy.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent()
    )
    assert torch.equal(out["samples"], custom(comfy, model, sampler, sigmas, seed=9))


# One node


def sample_in_one(comfy, model, size=None, **settings):
    options = {"seed": 0, "steps": 4, "grid": "original", "denoise": 1.0, "cfg": 1.0} | settings
    with torch.inference_mode():
        return comfy.classes["PixArtLCMSample"].execute(
            model=model, positive=caption(model), latent_image=size or latent(), **options
        )


def test_one_node_draws_what_sampler_custom_draws(comfy, sigma, lcm):
    size = latent(15, 10, batch=3, batch_index=[4, 1, 0])
    (out,) = sample_in_one(comfy, sigma, size, seed=8).result
    assert torch.equal(out["samples"], custom(comfy, *lcm(sigma), size, seed=8))
    assert out["batch_index"] == [4, 1, 0] and "downscale_ratio_spacial" not in out


def test_one_node_knows_pictures_masks_and_denoise(comfy, sigma, lcm):
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9)) * 5
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    size = {"samples": picture, "noise_mask": mask.unsqueeze(1), "downscale_ratio_spacial": 8}
    (out,) = sample_in_one(comfy, sigma, size, denoise=0.5).result
    assert torch.equal(out["samples"], custom(comfy, *lcm(sigma, denoise=0.5), size))
    assert (out["samples"][..., :8] - picture[..., :8]).abs().max() < 1e-4


def test_one_node_shows_the_notice_of_guidance_and_asks_for_a_negative(comfy, sigma):
    assert sample_in_one(comfy, sigma).ui is None
    with pytest.raises(ValueError, match="set cfg to 1 .* Or connect a negative prompt"):
        sample_in_one(comfy, sigma, cfg=2.0)
    output = sample_in_one(comfy, sigma, cfg=2.0, negative=caption(sigma, 2))
    assert "cfg is 2" in output.ui.as_dict()["text"][0]
    assert not torch.allclose(output.result[0]["samples"], sample_in_one(comfy, sigma).result[0]["samples"], atol=1e-2)


def test_an_unfit_latent_is_refused_in_one_sentence(comfy, sigma):
    with pytest.raises(ValueError, match="works on image latents of 4 channels"):
        sample_in_one(comfy, sigma, {"samples": torch.ones(1, 16, 8, 8)})


# DMD


@pytest.fixture
def dmd(comfy):
    return lambda model, timestep=400: (model, *comfy.call("PixArtDMDSampler", model=model, timestep=timestep))


@pytest.mark.parametrize("timestep", [400, 599, 1])
def test_dmd_shows_the_network_unit_noise_once_and_returns_the_prediction(comfy, tiny, dmd, timestep):
    from comfy.sample import prepare_noise

    model, sampler, sigmas = dmd(tiny, timestep)
    model, calls = noted(model)
    out = model.model.process_latent_in(custom(comfy, model, sampler, sigmas, latent(24, 24, batch=2), seed=4))
    noise = prepare_noise(latent(24, 24, batch=2)["samples"], 4)
    ((seen, t),) = calls
    assert t.tolist() == [timestep] * 2 and torch.allclose(seen, noise, atol=1e-5)
    with torch.inference_mode():
        eps = tiny.model.diffusion_model(noise, t, caption(tiny)[0][0].expand(2, -1, -1))
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)
    assert close(out, scheduler.step(eps, timestep, noise).pred_original_sample, 2e-5)
    if timestep == 400:
        assert close(out, 2.27289 * noise - 2.04109 * eps)


def test_dmd_starts_from_noise_alone_whatever_the_latent_and_keeps_to_masks(comfy, sigma, dmd):
    picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9)) * 5
    assert torch.equal(custom(comfy, *dmd(sigma), {"samples": picture}), custom(comfy, *dmd(sigma)))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    out = custom(comfy, *dmd(sigma), {"samples": picture, "noise_mask": mask})
    assert (out[..., :8] - picture[..., :8]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="turn add_noise on"):
        custom(comfy, *dmd(sigma), add_noise=False)


def test_dmd_is_not_clipped_and_warns_of_guidance(comfy, sigma, dmd, caplog):
    out = sigma.model.process_latent_in(custom(comfy, *dmd(sigma), cfg=3.0))
    assert out.abs().max() > 1.5
    assert "cfg is 3" in caplog.text


def test_dmd_refuses_a_model_with_another_kind_of_schedule(comfy, sigma, dmd):
    from comfy.model_sampling import ModelSamplingDiscreteFlow

    flow = sigma.clone()
    flow.add_object_patch("model_sampling", ModelSamplingDiscreteFlow())
    with pytest.raises(ValueError, match="PixArt DMD Sampler got a"):
        dmd(flow)


def test_prompts_for_each_picture_of_a_batch_work(comfy, sigma, lcm):
    both = custom(comfy, *lcm(sigma), latent(batch=2), positive=prompt(7, 1, batch=2))
    assert (both[0] - both[1]).abs().max() > 0.1
