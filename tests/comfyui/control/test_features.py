"""ControlNets together with ComfyUI's other features: batches, LoRA, areas, masks, dtypes, memory."""

import pytest
import torch
from safetensors.torch import save_file

from ..drive import counted, noise, predict, prompt, sample
from ..tiny import SIGMA
from .conftest import SCALE, control_network, edges, network, steered, watched


def test_prompts_of_unequal_length_stay_in_one_batch(comfy, sigma, load, apply):
    model, calls = counted(sigma)
    sample(comfy, model, *apply(load(), positive=prompt(12, 1), negative=prompt(2, 2)), steps=2)
    assert [batch for batch, _ in calls] == [2, 2] and all(mask is not None for _, mask in calls)


def test_a_lora_on_the_base_reaches_the_hint_too(comfy, sigma, load, apply, vae):
    generator, layer = torch.Generator().manual_seed(0), "transformer.transformer_blocks"
    lora = {
        f"{layer}.{i}.attn1.to_out.0.lora_{part}.weight": torch.randn(*shape, generator=generator) / 4
        for i in range(3) for part, shape in (("A", (4, 48)), ("B", (48, 4)))
    }  # fmt: skip
    save_file(lora, comfy.folder("loras") / "control.safetensors")
    patched, = comfy.call("LoraLoaderModelOnly", model=sigma, lora_name="control.safetensors", strength_model=1.0)
    watching, calls = watched(patched)
    sample(comfy, watching, *apply(load()), steps=1)
    base = network(SIGMA)
    for i in range(3):
        up, down = (lora[f"{layer}.{i}.attn1.to_out.0.lora_{part}.weight"] for part in "BA")
        base.blocks[i].attn.proj.weight += up @ down
    with torch.inference_mode():
        hint = vae.encode(edges()) * SCALE["sigma"]
    ((x, t, context, mask, *_), out), = calls
    assert (out - steered(base, [(control_network(SIGMA), hint, 1.0)], x, t, context, mask)).abs().max() < 1e-5


def test_an_area_of_the_picture_follows_its_own_image(comfy, sigma, load, apply):
    positive, negative = apply(load())
    (area,) = comfy.call("ConditioningSetArea", conditioning=positive, width=64, height=128, x=0, y=0, strength=1.0)
    both = comfy.call("ConditioningCombine", conditioning_1=area, conditioning_2=prompt(7, 1))[0]
    out = sample(comfy, sigma, both, negative)
    plain = sample(comfy, sigma, comfy.call("ConditioningCombine", conditioning_1=prompt(7, 1),
                                            conditioning_2=prompt(7, 1))[0])  # fmt: skip
    assert not torch.equal(out, plain)
    assert set(positive[0][1]["control"].encoded) == {(16, 8), (16, 16)}


def test_a_masked_prompt_keeps_its_control(comfy, sigma, load, apply):
    positive, negative = apply(load())
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    widgets = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
    (masked,) = comfy.call("ConditioningSetMask", conditioning=positive, **widgets)
    both = comfy.call("ConditioningCombine", conditioning_1=masked, conditioning_2=prompt(7, 4))[0]
    assert not torch.equal(sample(comfy, sigma, both, negative), sample(comfy, sigma, *apply(load())))


def test_attention_overrides_see_the_copies_and_output_patches_do_not(comfy, sigma, load, apply):
    seen, patched, clone = [], [], sigma.clone()

    def override(attention, q, k, v, heads, **options):
        seen.append(options["transformer_options"]["block_type"])
        return attention(q, k, v, heads, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    clone.set_model_patch(lambda out, options: patched.append(options["block_type"]) or out, "attn1_output_patch")
    sample(comfy, clone, *apply(load()), steps=1)
    assert seen == ["double"] * 2 + (["control"] * 2 + ["double"] * 2) * 2
    assert patched == ["double"] * 3


def test_weights_come_back_after_unloading_everything(comfy, sigma, load, apply):
    from comfy import model_management as mm

    conds = apply(load())
    before = sample(comfy, sigma, *conds)
    mm.unload_all_models()
    assert torch.equal(sample(comfy, sigma, *conds), before)


@pytest.mark.parametrize("base, control, tolerance", [
    ("fp32", "fp16", 0.01), ("fp32", "bf16", 0.05), ("fp32", "fp8_e4m3fn", 0.2), ("fp16", "fp32", 0.01),
    ("bf16", "fp16", 0.1), ("fp8_e4m3fn", "bf16", 0.3),
])  # fmt: skip
def test_base_and_control_may_have_different_dtypes(load_model, load, apply, base, control, tolerance):
    (reference,) = predict(load_model(), [apply(load())[0]], noise())
    (out,) = predict(load_model(weight_dtype=base), [apply(load(weight_dtype=control))[0]], noise())
    assert (out - reference).norm() <= tolerance * (reference - noise()).norm()
    assert not torch.equal(out, reference)


def test_eight_bit_control_nets_keep_tables_and_biases_in_sixteen(load):
    state_dict = load(weight_dtype="fp8_e4m3fn").patcher.model.state_dict()
    assert state_dict["controlnet.0.copied_block.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    assert state_dict["controlnet.1.after_proj.weight"].dtype == torch.float8_e4m3fn
    assert state_dict["controlnet.0.copied_block.scale_shift_table"].dtype == torch.float16


def test_a_clone_for_another_device_has_weights_of_its_own(comfy, sigma, load, apply):
    positive, negative = apply(load())
    control = positive[0][1]["control"]
    clone = control.deepclone_multigpu(torch.device("cpu"))
    clone.patcher.model.controlnet[0].after_proj.weight.data.zero_()
    changed = [[entry[0], {**entry[1], "control": clone}] for entry in positive]
    assert clone.get_models() != control.get_models()
    assert not torch.equal(sample(comfy, sigma, changed, negative), sample(comfy, sigma, positive, negative))


def test_a_control_net_that_takes_over_from_another_is_not_left_out_by_the_step_cache(comfy, sigma, load, apply):
    cached, control = step_cached(comfy, sigma, 10.0), load()
    first = apply(control, edges(seed=1), end=0.5)
    handed_over = sample(comfy, cached, *apply(control, edges(seed=2), *first, start=0.5005), steps=8)
    alone = sample(comfy, cached, *first, steps=8)
    assert not torch.allclose(handed_over, alone, atol=1e-3)


def step_cached(comfy, model, threshold):
    return comfy.call("PixArtStepCache", model=model, threshold=threshold, start_percent=0.0, end_percent=1.0)[0]
