"""PixArt Guidance Interval inside a real ComfyUI, under each of its guiders."""

import pytest
import torch

from .drive import counted, latent, prompt, sample


def guided(comfy, model, start, end):
    return comfy.call("PixArtGuidanceInterval", model=model, start_percent=start, end_percent=end)[0]


def test_steps_outside_of_the_guidance_interval_cost_half(comfy, sigma):
    model, calls = counted(guided(comfy, sigma, 0.25, 0.75))
    sample(comfy, model, steps=8)
    batches = [batch for batch, _ in calls]
    assert batches[0] == batches[-1] == 1 and batches[4] == 2 and len(batches) == 8


def test_the_whole_interval_is_plain_guidance_and_none_is_no_guidance(comfy, sigma):
    assert torch.equal(sample(comfy, guided(comfy, sigma, 0.0, 1.0)), sample(comfy, sigma))
    assert torch.equal(sample(comfy, guided(comfy, sigma, 1.0, 1.0)), sample(comfy, sigma, cfg=1.0))


def test_guidance_is_back_after_the_run(comfy, sigma):
    model = guided(comfy, sigma, 0.0, 0.5)
    first = sample(comfy, model)
    assert torch.equal(sample(comfy, model), first)
    assert not torch.equal(first, sample(comfy, sigma))


def sample_with(comfy, guider, model, steps=8):
    (out, _) = comfy.call(
        "SamplerCustomAdvanced", noise=comfy.call("RandomNoise", noise_seed=0)[0], guider=guider,
        sampler=comfy.call("KSamplerSelect", sampler_name="euler")[0], latent_image=latent(),
        sigmas=comfy.call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0],
    )  # fmt: skip
    return out["samples"]


def dual_guider(comfy, model, style="regular"):
    return comfy.call(
        "DualCFGGuider", model=model, cond1=prompt(7, 1), cond2=prompt(5, 3), negative=prompt(3, 2), cfg_conds=4.5,
        cfg_cond2_negative=3.0, style=style,
    )[0]  # fmt: skip


def perpendicular_guider(comfy, model):
    return comfy.call(
        "PerpNegGuider", model=model, positive=prompt(7, 1), negative=prompt(5, 3), empty_conditioning=prompt(3, 2),
        cfg=4.5, neg_scale=1.0,
    )[0]  # fmt: skip


@pytest.mark.parametrize("make_guider", [dual_guider, perpendicular_guider])
def test_guiders_with_several_scales_follow_the_first_prompt_alone_outside_of_the_interval(comfy, sigma, make_guider):
    model, calls = counted(guided(comfy, sigma, 0.25, 0.75))
    sample_with(comfy, make_guider(comfy, model), model)
    batches = [batch for batch, _ in calls]
    assert batches[0] == batches[-1] == 1 and batches[4] == 3 and len(batches) == 8
    out = sample_with(comfy, make_guider(comfy, guided(comfy, sigma, 1.0, 1.0)), sigma)
    plain = sample_with(comfy, comfy.call("BasicGuider", model=sigma, conditioning=prompt(7, 1))[0], sigma)
    assert (out - plain).norm() < 1e-4 * plain.norm()
    always = sample_with(comfy, make_guider(comfy, guided(comfy, sigma, 0.0, 1.0)), sigma)
    assert torch.equal(always, sample_with(comfy, make_guider(comfy, sigma), sigma))


def test_nested_dual_guidance_is_off_outside_of_the_interval(comfy, sigma):
    out = sample_with(comfy, dual_guider(comfy, guided(comfy, sigma, 1.0, 1.0), "nested"), sigma)
    plain = sample_with(comfy, comfy.call("BasicGuider", model=sigma, conditioning=prompt(7, 1))[0], sigma)
    assert (out - plain).norm() < 1e-4 * plain.norm()


def test_a_guider_with_unknown_scales_is_named_once_in_a_run(comfy, sigma, caplog):
    from comfy.samplers import CFGGuider, sampling_function

    class Stubborn(CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = self.conds["negative"], self.conds["positive"]
            return sampling_function(self.inner_model, x, timestep, *conds, 4.5, model_options=model_options, seed=seed)

    model = guided(comfy, sigma, 0.0, 0.5)
    for guider in (Stubborn(model), CFGGuider(model), dual_guider(comfy, model), perpendicular_guider(comfy, model)):
        if isinstance(guider, Stubborn) or type(guider) is CFGGuider:
            guider.set_conds(prompt(7, 1), prompt(3, 2))
        sample_with(comfy, guider, model)
    said = [record.getMessage() for record in caplog.records if "PixArt Guidance Interval" in record.getMessage()]
    assert len(said) == 1 and "scales of Stubborn. Sample with KSampler" in said[0]
