"""int8, NF4 and FP4 weights inside a real ComfyUI: memory management, LoRA, saving, and what stays unquantised."""

import sys
from dataclasses import replace

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import load_transformer, save_native

from .drive import noise, predict, prompt, sample
from .tiny import SIGMA, random_weights, save_random
from .tiny_t5 import config, expected, random_model

# Relative error of random Gaussian weights, with a margin: int8 0.8 %, NF4 9 %, FP4 12 %.
TOLERANCE = {"int8": 0.012, "nf4": 0.11, "fp4": 0.14}
every_kind = pytest.mark.parametrize("kind", TOLERANCE)
QKV = "diffusion_model.blocks.0.attn.qkv.weight"
WIDE = replace(SIGMA, hidden_size=144, num_heads=4)  # rows that are no multiple of a 4-bit block


@pytest.fixture
def quantize(comfy):
    return comfy.pack("comfy_bridge.quantize")


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def lora(rank=2, seed=0, strength=0.5):
    """A patch as LoRA loaders make it, on the values (last third) of a fused qkv."""
    generator = torch.Generator().manual_seed(seed)
    update = strength * torch.randn(48, rank, generator=generator) @ torch.randn(rank, 48, generator=generator) / 7
    return {(QKV, (0, 96, 48)): ("diff", (update,))}, update


def denoised(model):
    return predict(model, [prompt(7, 1), prompt(3, 2)], noise())[0]


def offload(model):
    """What ComfyUI does when a model does not fit: layers stay in system memory and are fetched for each call."""
    model.detach()
    model.patch_model(model.load_device, lowvram_model_memory=1)
    assert model.model.model_lowvram


@torch.inference_mode()
def forward(model):
    """The network's output on the weights as they are right now."""
    return model.model.diffusion_model(noise(), torch.tensor([500.0]), prompt(7, 1)[0][0])


# One matrix


@every_kind
@pytest.mark.parametrize("shape", [(48, 144), (144, 48), (5, 7), (1, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_matrix_of_any_shape_survives_within_the_error_of_its_kind(quantize, kind, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quantize.pack(weight, kind)
    assert packed.dtype == torch.uint8 and packed.numel() == quantize.packed_bytes(shape, kind)
    restored = quantize.unpack(packed, kind, shape, dtype)
    assert restored.shape == shape and restored.dtype == dtype
    assert relative(restored, weight) < TOLERANCE[kind] + 0.005


def test_int8_weights_are_those_of_bitsandbytes(quantize):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    expected = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
    restored = quantize.unpack(quantize.pack(weight, "int8"), "int8", (6, 50), torch.float32)
    assert relative(restored, expected) < 0.003  # fp16 rounds before it quantises, and is scaled otherwise here


@every_kind
def test_rows_of_zeros_and_rows_far_below_fp16_survive(quantize, kind):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2] = 0, weight[2] * 1e-9
    restored = quantize.unpack(quantize.pack(weight, kind), kind, (4, 64), torch.float32)
    assert (restored[1] == 0).all()
    assert relative(restored[2], weight[2]) < TOLERANCE[kind] * 1.5


# The model


@every_kind
def test_only_the_matrices_of_the_blocks_are_quantised(comfy, load_model, kind):
    network = load_model(weight_dtype=kind).model.diffusion_model
    packed = {name for name, tensor in network.state_dict().items() if tensor.dtype == torch.uint8}
    layers = (
        "attn.qkv",
        "attn.proj",
        "cross_attn.q_linear",
        "cross_attn.kv_linear",
        "cross_attn.proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    assert packed == {f"blocks.{n}.{layer}.weight" for n in range(3) for layer in layers}
    plain, _ = load_transformer(comfy.folder("diffusion_models") / "sigma.safetensors")
    for name, tensor in network.state_dict().items():
        assert name in packed or tensor.equal(plain.state_dict()[name])


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.25), ("nf4", 0.141), ("fp4", 0.141)])
def test_comfyui_counts_the_quantised_size(comfy, kind, share, load_model, quantize):
    import comfy.model_management as mm

    save_random(comfy.folder("diffusion_models") / "wide.safetensors", WIDE, "sigma")
    full, small = (load_model("wide.safetensors", weight_dtype=dtype) for dtype in ("fp32", kind))
    names = [name for name, t in small.model.diffusion_model.state_dict().items() if t.dtype == torch.uint8]
    rest = sum(t.nbytes for name, t in full.model.diffusion_model.state_dict().items() if name not in names)
    other = mm.module_size(full.model) - mm.module_size(full.model.diffusion_model)
    blocks = full.model_size() - rest - other
    assert small.model_size() - rest - other == pytest.approx(share * blocks, rel=0.03)


@every_kind
def test_a_quantised_model_predicts_nearly_the_same(load_model, kind):
    exact, quantised = denoised(load_model(weight_dtype="fp32")), denoised(load_model(weight_dtype=kind))
    assert 0 < relative(quantised, exact) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_width_that_no_block_divides_predicts_nearly_the_same(comfy, load_model, kind):
    save_random(comfy.folder("diffusion_models") / "wide.safetensors", WIDE, "sigma")
    exact, quantised = (denoised(load_model("wide.safetensors", weight_dtype=dtype)) for dtype in ("fp32", kind))
    assert 0 < relative(quantised, exact) < TOLERANCE[kind]


@every_kind
def test_a_quantised_model_samples_and_survives_unloading(comfy, load_model, kind):
    import comfy.model_management as mm

    model = load_model(weight_dtype=kind)
    before = sample(comfy, model)
    mm.unload_all_models()
    assert sample(comfy, model).equal(before)
    assert sample(comfy, model.clone()).equal(before)


def test_two_quantised_models_do_not_touch_each_other(comfy, load_model):
    first, second = load_model(weight_dtype="int8"), load_model("alpha.safetensors", weight_dtype="nf4")
    before = sample(comfy, first), sample(comfy, second)
    assert sample(comfy, first).equal(before[0]) and sample(comfy, second).equal(before[1])


@every_kind
def test_offloaded_layers_compute_the_same(load_model, kind):
    model = load_model(weight_dtype=kind)
    whole = forward(model)
    offload(model)
    assert forward(model).equal(whole)
    model.partially_load(model.load_device, extra_memory=10**9)
    assert not model.model.model_lowvram and forward(model).equal(whole)
    assert model.partially_unload(model.offload_device, 10**9) > 0
    assert forward(model).equal(whole)


# Patches


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


def hooks(strength, seed=0):
    """A schedule of LoRAs (hooks) that has all of its strength from the start."""
    import comfy.hooks

    hook = comfy.hooks.WeightHook(strength_model=strength)
    hook.weights, hook.need_weight_init = lora(strength=0.05, seed=seed)[0], False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


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


def apply_hooks(patcher, group, patches, strength):
    patcher.add_hook_patches(group.hooks[0], patches, strength)
    patcher.patch_hooks(group)


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


# Files


@every_kind
def test_a_saved_model_is_an_ordinary_checkpoint_with_its_lora_merged(comfy, load_model, quantize, kind):
    model = load_model(weight_dtype=kind)
    packed = model.model.diffusion_model.blocks[0].attn.qkv.weight.clone()
    patch, update = lora()
    patched = model.clone()
    patched.add_patches(patch)
    comfy.call("ModelSave", model=patched, filename_prefix=f"saved_{kind}")
    (path,) = (comfy.base / "output").glob(f"saved_{kind}*.safetensors")
    network, _ = load_transformer(path, family="sigma", base_size=256, config={"num_heads": 4})
    expected = quantize.unpack(packed, kind, (144, 48), torch.float32)
    expected[96:] += update
    assert relative(network.blocks[0].attn.qkv.weight, expected) < 1e-6


def test_comfyui_can_load_a_quantised_model_a_second_time(load_model):
    model = load_model(weight_dtype="nf4")
    loader, arguments = model.cached_patcher_init
    again = loader(*arguments, disable_dynamic=True)
    assert all(t.equal(again.model.state_dict()[name]) for name, t in model.model.state_dict().items())


def test_without_bitsandbytes_the_loader_says_what_to_install(load_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="int8 weights need bitsandbytes: run `pip install bitsandbytes`"):
        load_model(weight_dtype="int8")


def test_weights_that_are_not_finite_are_named(comfy, load_model):
    path = comfy.folder("diffusion_models") / "nan.safetensors"
    weights = random_weights(SIGMA)
    weights["blocks.1.mlp.fc1.weight"][3, 3] = float("nan")
    save_native(weights, SIGMA, path, "sigma", "a damaged file for a test")
    with pytest.raises(ValueError, match=r"nan.safetensors: blocks.1.mlp.fc1.weight has values that are not finite"):
        load_model(path.name, weight_dtype="int8")


# T5


def linear_layers(clip):
    return {
        name: layer for name, layer in clip.cond_stage_model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }  # fmt: skip


@every_kind
def test_a_quantised_t5_is_transformers_t5_with_the_rounded_weights(tiny_t5, load_t5, encode, kind):
    clip = load_t5(tiny_t5.path, kind)
    assert {layer.weight.dtype for layer in linear_layers(clip).values()} == {torch.uint8}
    assert len(linear_layers(clip)) == 3 * 7
    rounded, state = random_model(config()), clip.get_sd()
    for name, weight in rounded.named_parameters():
        plain = state[f"t5xxl.transformer.{name}"].float()
        assert relative(plain, weight) < TOLERANCE[kind]
        weight.data = plain
    cond = encode("a red fox", clip)[0][0][0]
    assert relative(cond, expected(rounded, tiny_t5.tokenizer, "a red fox")) < 0.01  # bf16 tables in between


def test_int8_t5_encodes_nearly_the_same(tiny_t5, load_t5, encode):
    cond = encode("a red fox", load_t5(tiny_t5.path, "int8"))[0][0][0]
    assert relative(cond, expected(tiny_t5.model, tiny_t5.tokenizer, "a red fox")) < 0.05


@every_kind
def test_a_quantised_t5_survives_unloading_and_offloading(tiny_t5, load_t5, encode, kind):
    import comfy.model_management as mm

    clip = load_t5(tiny_t5.path, kind)
    clip.identity = None  # nothing from the cache
    before = encode("a red fox", clip)[0][0][0]
    mm.unload_all_models()
    assert encode("a red fox", clip)[0][0][0].equal(before)
    assert encode("a red fox", clip.clone())[0][0][0].equal(before)
    offload(clip.patcher)
    with torch.inference_mode():
        after = clip.cond_stage_model.encode_token_weights(clip.tokenize("a red fox"))[0]
    assert after.equal(before)


@torch.inference_mode()
def test_int8_holds_activations_beyond_fp16(folder, load_t5, encode, tiny_t5):
    """Why T5's wo may be quantised here: LLM.int8's own product would cast these to fp16."""
    model = random_model(config())
    for block in model.encoder.block:
        for name in ("wi_0", "wi_1", "wo"):
            getattr(block.layer[1].DenseReluDense, name).weight.mul_(60)
    model.save_pretrained(folder)
    (cond, _), *_ = encode("a red fox", load_t5(folder, "int8"))[0]
    assert cond.isfinite().all()
    assert relative(cond, expected(model, tiny_t5.tokenizer, "a red fox")) < 0.05


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_lora_for_a_quantised_t5_changes_a_clone_and_leaves_the_original(encode, tiny_t5, load_t5, kind):
    import comfy.sd

    clip = load_t5(tiny_t5.path, kind)
    before = encode("a red fox", clip)[0][0][0]
    name = "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo"
    torch.manual_seed(0)
    lora = {f"{name}.lora_up.weight": torch.randn(32, 4), f"{name}.lora_down.weight": torch.randn(4, 48)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)
    assert relative(encode("a red fox", patched)[0][0][0], before) > 0.01
    clip.identity = None
    assert encode("a red fox", clip)[0][0][0].equal(before)


def test_a_scaled_fp8_file_becomes_int8_of_the_values_it_stands_for(folder, encode, tiny_t5, load_t5, quantize):
    state = {k: v.clone() for k, v in tiny_t5.model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    name = "encoder.block.1.layer.0.SelfAttention.q"
    scale = state[f"{name}.weight"].abs().max() / 448
    file = {k: v.to(torch.float8_e4m3fn) if k == f"{name}.weight" else v for k, v in state.items()}
    file[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    file[f"{name}.scale_weight"] = scale
    save_file(file, folder / "scaled.safetensors")
    layer = linear_layers(load_t5(folder / "scaled.safetensors", "int8"))[f"t5xxl.transformer.{name}"]
    assert relative(layer.plain(layer.weight, torch.float32), file[f"{name}.weight"].float() * scale) < 0.01


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_saved_quantised_t5_is_an_ordinary_file(comfy, folder, encode, tiny_t5, load_t5, kind):
    clip = load_t5(tiny_t5.path, kind)
    cond = encode("a red fox", clip)[0][0][0]
    comfy.call("CLIPSave", clip=clip, filename_prefix=f"t5_{kind}")
    (path,) = (comfy.base / "output").glob(f"t5_{kind}*.safetensors")
    path = path.rename(folder / "saved.safetensors")
    assert all(tensor.is_floating_point() for tensor in load_file(path).values())
    assert relative(encode("a red fox", load_t5(path))[0][0][0], cond) < 0.01


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_scheduled_lora_for_a_quantised_t5_is_as_exact_as_a_connected_one(tiny_t5, load_t5, kind):
    clip = load_t5(tiny_t5.path, kind)
    key = "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight"
    patches = {key: ("diff", (0.01 * torch.randn(32, 48, generator=torch.Generator().manual_seed(0)),))}

    @torch.inference_mode()
    def encoded():
        return clip.cond_stage_model.encode_token_weights(clip.tokenize("a red fox"))[0]

    clip.patcher.patch_model(clip.patcher.load_device)
    before, group = encoded(), hooks(1.0)
    apply_hooks(clip.patcher, group, patches, 1.0)
    found = encoded()
    clip.patcher.patch_hooks(None)
    assert encoded().equal(before)
    clip.patcher.detach()
    patched = clip.clone()
    patched.add_patches(patches)
    patched.patcher.patch_model(patched.patcher.load_device)
    expected = encoded()
    patched.patcher.detach()
    assert (expected - before).norm() > 0 and relative(found - before, expected - before) < 0.01


def test_t5_without_bitsandbytes_says_what_to_install_before_it_reads_anything(tiny_t5, load_t5, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="nf4 weights need bitsandbytes: run `pip install bitsandbytes`"):
        load_t5(tiny_t5.path, "nf4")
