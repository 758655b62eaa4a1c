"""ControlNets inside a real ComfyUI: what its sampler sees."""

import pytest
import torch

from pixart_nodes.checkpoints import save_controlnet
from pixart_nodes.model import ControlNetTransformer

from ..drive import latent, sample
from ..tiny import ALPHA_MS, SIGMA
from .conftest import KV, SCALE, control_network, edges, network, steered, watched


@pytest.mark.parametrize("strength, start, end, active", [
    (1.0, 0.0, 1.0, 6), (0.35, 0.0, 1.0, 6), (2.0, 0.0, 0.5, 3), (0.7, 0.3, 1.0, 4), (1.0, 0.1, 0.5, 2),
])  # fmt: skip
def test_every_step_equals_a_direct_call_of_the_network(comfy, sigma, load, apply, vae, strength, start, end, active):
    image, model = edges(), network(SIGMA)
    watching, calls = watched(sigma)
    positive, negative = apply(load(), image, strength=strength, start=start, end=end)
    sample(comfy, watching, positive, negative, steps=6)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["sigma"]
    assert len(calls) == 6
    sigmas = [sigma.model.model_sampling.sigma(args[1][:1]).item() for args, _ in calls]
    first, last = (sigma.model.model_sampling.percent_to_sigma(p) for p in (start, end))
    assert sum(first >= s * (1 - 1e-6) and s * (1 + 1e-6) >= last for s in sigmas) == active
    for level, ((x, t, context, mask, *_), out) in zip(sigmas, calls, strict=True):
        on = first >= level * (1 - 1e-6) and level * (1 + 1e-6) >= last
        controls = [(control_network(SIGMA), hint, strength)] if on else []
        expected = steered(model, controls, x, t, context, mask) if on else model(x, t, context, mask)
        assert x.shape[0] == 2                                                # both halves of guidance at once
        assert (out - expected).abs().max() < 1e-5
        assert not on or (out - model(x, t, context, mask)).abs().max() > 0.05


def test_a_micro_conditioned_model_of_another_shape_too(comfy, load_model, load, apply, vae):
    image, model = edges(96, 160), network(ALPHA_MS, seed=2)
    watching, calls = watched(load_model("alpha_ms.safetensors"))
    positive, negative = apply(load("alpha_ms.safetensors"), image)
    sample(comfy, watching, positive, negative, latent(12, 20), steps=2)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["alpha"]
    for (x, t, context, mask, img_hw, ratio, *_), out in calls:
        assert img_hw.tolist() == [[96, 160]] * 2
        expected = steered(model, [(control_network(ALPHA_MS), hint, 1.0)], x, t, context, mask, img_hw, ratio)
        assert (out - expected).abs().max() < 1e-5


def test_copies_of_compressing_blocks_get_the_token_grid(comfy, load_model, load, apply, vae):
    image, model = edges(64, 192), network(KV, seed=3)
    watching, calls = watched(load_model("kv.safetensors"))
    positive, negative = apply(load("kv.safetensors"), image)
    sample(comfy, watching, positive, negative, latent(8, 24), steps=2)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["sigma"]
    for (x, t, context, mask, *_), out in calls:
        expected = steered(model, [(control_network(KV), hint, 1.0)], x, t, context, mask)
        assert (out - expected).abs().max() < 1e-5


def test_chained_control_nets_add_up(comfy, sigma, load, apply, apply_ours, vae):
    images = edges(seed=1), edges(seed=2)
    both = apply_ours(load("sigma_one.safetensors"), images[1], *apply(load(), images[0], strength=0.5), strength=0.8)
    watching, calls = watched(sigma)
    sample(comfy, watching, *both, steps=2)
    with torch.inference_mode():
        hints = [vae.encode(image) * SCALE["sigma"] for image in images]
    controls = [(control_network(SIGMA), hints[0], 0.5), (control_network(SIGMA, 1, seed=6), hints[1], 0.8)]
    for (x, t, context, mask, *_), out in calls:
        assert (out - steered(network(SIGMA), controls, x, t, context, mask)).abs().max() < 1e-5


def test_the_same_control_net_twice_is_one_model_in_memory(load, apply):
    control = load()
    positive, negative = apply(control, None, *apply(control))
    first, second = positive[0][1]["control"].get_models()
    assert first is second is control.patcher
    assert positive[0][1]["control"] is negative[0][1]["control"]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_strength_zero_is_the_plain_model_to_the_bit(comfy, sigma, load, apply_ours, strength):
    positive, negative = apply_ours(load(), strength=strength)
    assert torch.equal(sample(comfy, sigma, positive, negative), sample(comfy, sigma)) == (strength == 0)


def test_untrained_copies_change_nothing(comfy, sigma, files, load, apply):
    net = ControlNetTransformer.from_base(network(SIGMA), 2)
    save_controlnet(net, files / "untrained.safetensors", SIGMA, "sigma", "a test")
    out = sample(comfy, sigma, *apply(load("untrained.safetensors")))
    assert (out - sample(comfy, sigma)).abs().max() < 1e-6


def test_no_block_of_the_base_is_run_twice(comfy, sigma, load, apply):
    control, ran = load(), []
    blocks = [*sigma.model.diffusion_model.blocks, *(block.copied_block for block in control.patcher.model.controlnet)]
    handles = [block.register_forward_hook(lambda block, *_: ran.append(blocks.index(block))) for block in blocks]
    try:
        sample(comfy, sigma, *apply(control), steps=2)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 3, 1, 4, 2] * 2


def test_copies_behind_the_last_weight_are_not_run(comfy, sigma, load, apply_ours):
    control, ran = load(), []
    for block in control.patcher.model.controlnet:
        block.register_forward_hook(lambda *_: ran.append(1))
    some = sample(comfy, sigma, *apply_ours(control, block_weights="1, 0"), steps=2)
    assert len(ran) == 2
    assert not torch.equal(some, sample(comfy, sigma, *apply_ours(control), steps=2))


def test_block_weights_scale_each_copy(comfy, sigma, load, apply_ours, vae):
    watching, calls = watched(sigma)
    sample(comfy, watching, *apply_ours(load(), strength=2.0, block_weights="0.5, 0.25"), steps=1)
    ((x, t, context, mask, *_), out), = calls
    net = control_network(SIGMA)
    for block, weight in zip(net.controlnet, (1.0, 0.5), strict=True):
        block.after_proj.weight *= weight
        block.after_proj.bias *= weight
    with torch.inference_mode():
        hint = vae.encode(edges()) * SCALE["sigma"]
    assert (out - steered(network(SIGMA), [(net, hint, 1.0)], x, t, context, mask)).abs().max() < 1e-5


def test_fewer_block_weights_go_on_with_the_last(comfy, sigma, load, apply_ours):
    short = sample(comfy, sigma, *apply_ours(load(), block_weights="0.5"))
    assert torch.equal(short, sample(comfy, sigma, *apply_ours(load(), block_weights="0.5 0.5")))
    assert not torch.equal(short, sample(comfy, sigma, *apply_ours(load())))
