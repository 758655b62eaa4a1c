"""T5 with quantised weights."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..tiny_t5 import config, expected, random_model
from .conftest import TOLERANCE, apply_hooks, every_kind, hooks, offload, relative


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
