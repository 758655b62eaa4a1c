"""LoRA on quantised weights: connected, scheduled, on offloaded layers, and taken off again."""

import pytest
import torch

from ..drive import prompt, sample
from .conftest import apply_hooks, denoised, every_kind, forward, hooks, lora, offload, relative


@every_kind
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_lora_is_added_to_the_dequantised_weight(load_model, quantize, kind, offloaded):
    model = load_model(weight_dtype=kind)
    layer = model.model.diffusion_model.blocks[0].attn.qkv
    packed, before = layer.weight.clone(), forward(model)
    patch, update = lora()
    patched = model.clone()
    assert patched.add_patches(patch)
    offload(patched) if offloaded else patched.patch_model(patched.load_device)
    changed = forward(patched)
    patched.detach()
    assert relative(changed, before) > 1e-3 and forward(model).equal(before)

    exact = quantize.unpack(packed, kind, (144, 48), torch.float32)
    exact[96:] += update
    layer.weight = torch.nn.Parameter(exact, requires_grad=False)  # merged by hand
    assert relative(forward(model), changed) < 1e-5


@every_kind
def test_removing_a_lora_restores_the_weights_bit_for_bit(load_model, kind):
    model = load_model(weight_dtype=kind)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plain = denoised(model)
    patched = model.clone()
    patched.add_patches(lora()[0])
    second = patched.clone()
    second.add_patches(lora(seed=1)[0])
    assert not denoised(patched).equal(plain) and not denoised(second).equal(denoised(patched))
    assert denoised(model).equal(plain)
    after = model.model.state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_a_lora_below_half_a_quantisation_step_is_not_rounded_away(load_model):
    model = load_model(weight_dtype="nf4")
    before, patched = denoised(model), model.clone()
    patched.add_patches(lora(strength=1e-3)[0])
    small = relative(denoised(patched), before)
    stronger = model.clone()
    stronger.add_patches(lora(strength=1e-2)[0])
    assert relative(denoised(stronger), before) == pytest.approx(10 * small, rel=0.1)


def scheduled(comfy, model, first, second):
    return sample(comfy, model, prompt(7, 1, hooks=first), prompt(3, 2, **({"hooks": second} if second else {})))


@every_kind
def test_a_scheduled_lora_is_as_exact_as_a_connected_one(comfy, load_model, kind):
    model = load_model(weight_dtype=kind)
    before, patched = sample(comfy, model), model.clone()
    patched.add_patches(lora(strength=0.05)[0], 0.1)
    expected, group = sample(comfy, patched), hooks(0.1)
    found = scheduled(comfy, model, group, group)
    assert 0 < (expected - before).norm() and (found - expected).norm() < 0.001 * (expected - before).norm()
    assert all(getattr(layer, "scheduled", None) is None for layer in model.model.modules())
    assert sample(comfy, model).equal(before)


@pytest.mark.parametrize("connected", [False, True])
def test_a_scheduled_lora_reaches_offloaded_layers(load_model, connected):
    """Beside a connected one too, which ComfyUI adds at each call then."""
    model = load_model(weight_dtype="nf4")
    one = model.clone()
    if connected:
        one.add_patches(lora(strength=0.05, seed=1)[0], 0.5)
    both = one.clone()
    both.add_patches(lora(strength=0.05)[0], 0.5)
    offload(both)
    expected = forward(both)
    both.detach()
    offload(one)
    alone, group = forward(one), hooks(0.5)
    apply_hooks(one, group, lora(strength=0.05)[0], 0.5)
    for _ in range(2):
        assert relative(forward(one) - alone, expected - alone) < 0.001
    one.patch_hooks(None)
    assert forward(one).equal(alone)
    one.detach()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_scheduled_lora_adds_to_a_connected_one(comfy, load_model, kind):
    model = load_model(weight_dtype=kind)
    one, both = model.clone(), model.clone()
    one.add_patches(lora(strength=0.05, seed=1)[0], 0.5)
    both.add_patches(lora(strength=0.05, seed=1)[0], 0.5)
    both.add_patches(lora(strength=0.05)[0], 0.5)
    alone, expected = sample(comfy, one), sample(comfy, both)
    group = hooks(0.5)
    found = scheduled(comfy, one, group, group)
    assert (found - expected).norm() < 0.001 * (expected - alone).norm()
    assert sample(comfy, one).equal(alone)


def test_a_prompt_with_a_scheduled_lora_leaves_the_other_prompt_alone(comfy, load_model):
    model = load_model(weight_dtype="nf4")
    plain, group = sample(comfy, model), hooks(0.5)
    mixed = scheduled(comfy, model, group, None)
    assert not mixed.equal(plain) and not mixed.equal(scheduled(comfy, model, group, group))
    assert not mixed.equal(scheduled(comfy, model, hooks(0.5, seed=1), None))
    assert sample(comfy, model).equal(plain)


def test_a_patch_of_a_layer_that_is_not_quantised_works_as_ever(load_model):
    model = load_model(weight_dtype="int8")
    before, patched = denoised(model), model.clone()
    key = "diffusion_model.final_layer.linear.weight"
    patched.add_patches({key: ("diff", (torch.ones(32, 48) * 0.01,))})
    assert not denoised(patched).equal(before)
    assert denoised(model).equal(before)
