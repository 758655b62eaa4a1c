"""Quantised matrices and models: size, memory management, files, and what stays unquantised."""

import sys

import bitsandbytes.functional
import pytest
import torch

from pixart_nodes.checkpoints import load_transformer, save_native

from ..drive import sample
from ..tiny import SIGMA, random_weights, save_random
from .conftest import TOLERANCE, WIDE, denoised, every_kind, forward, lora, offload, relative


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
