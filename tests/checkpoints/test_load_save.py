import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import detect, files, load_transformer, load_weights, save_diffusers, save_native
from pixart_nodes.checkpoints.keys import to_diffusers
from pixart_nodes.model import KVCompress

CONV = KVCompress("conv", 2, (1,))
VARIED = [
    {}, {"micro_condition": True}, {"qk_norm": True, "kv_compress": CONV}, {"learned_variance": False},
    {"kv_compress": KVCompress("uniform", 2, (0,)), "pe_interpolation": 0.5}, {"mlp_ratio": 2.5, "base_size": 7},
]  # fmt: skip


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changes", VARIED)
def test_a_native_file_gives_back_the_same_model(tmp_path, tiny, make_model, picture, changes):
    params = tiny(**changes)
    model = make_model(params)
    save_native(model, params, tmp_path / "m.safetensors", "sigma", "a test")
    loaded, found = load_transformer(tmp_path / "m.safetensors")
    assert found.params == params and found.family == "sigma" and found.layout == "native" and found.notes == ()
    assert same(loaded.state_dict(), model.state_dict())
    # where the weights lie in memory changes the last bits of a product on some processors
    torch.testing.assert_close(picture(loaded), picture(model), rtol=0, atol=1e-5)
    metadata = files.read_header(tmp_path / "m.safetensors").metadata
    assert metadata["pixart.origin"] == "a test" and metadata["pixart.format"] == "native"
    assert json.loads(metadata["pixart.params"])["base_size"] == params.base_size


@pytest.mark.parametrize("changes", [{}, {"micro_condition": True}, {"learned_variance": False, "depth": 12}])
def test_a_diffusers_folder_gives_back_the_same_model(tmp_path, tiny, make_model, changes):
    params = tiny(**changes)
    model = make_model(params)
    save_diffusers(model, params, tmp_path / "transformer", "alpha", "a test")
    loaded, found = load_transformer(tmp_path / "transformer")
    assert (found.params, found.family, found.layout, found.notes) == (params, "alpha", "diffusers", ())
    assert same(loaded.state_dict(), model.state_dict())
    assert load_transformer(tmp_path)[1].params == params


@pytest.mark.parametrize("micro", [False, True])
def test_diffusers_itself_loads_our_folder_and_draws_the_same(tmp_path, tiny, make_model, picture, micro, caplog):
    diffusers = pytest.importorskip("diffusers")
    params = tiny(micro_condition=micro)
    model = make_model(params)
    save_diffusers(model, params, tmp_path, "alpha", "a test")
    theirs, info = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(1, 4, 8, 12, generator=g), torch.randn(1, 5, 16, generator=g)
    size = {"resolution": torch.tensor([[64.0, 96.0]]), "aspect_ratio": torch.tensor([[0.67]])}
    if not micro:
        size = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        out = theirs(x, encoder_hidden_states=y, timestep=torch.tensor([500.0]), added_cond_kwargs=size).sample
    assert torch.allclose(out, picture(model), atol=1e-5)


def test_what_diffusers_cannot_build_is_not_saved_for_it(tmp_path, tiny, make_model):
    params = tiny(kv_compress=CONV, qk_norm=True)
    with pytest.raises(ValueError, match="no KV compression and no QK normalisation.*native"):
        save_diffusers(make_model(params), params, tmp_path / "m", "sigma", "a test")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_the_parameters_is_not_saved(tmp_path, tiny, make_model):
    state = make_model(tiny()).state_dict()
    with pytest.raises(ValueError, match=r"Incomplete.*blocks\.2"):
        save_native(state, tiny(depth=3), tmp_path / "m.safetensors", "sigma", "a test")
    del state["y_embedder.y_embedding"]
    with pytest.raises(ValueError, match="null caption"):
        save_native(state, tiny(), tmp_path / "m.safetensors", "sigma", "a test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stored_dtypes_are_kept_and_positions_stay_in_float32(tmp_path, tiny, make_model, dtype):
    save_native(make_model(tiny()), tiny(), tmp_path / "m.safetensors", "sigma", "a test", dtype=dtype)
    assert load_file(tmp_path / "m.safetensors")["pos_embed"].dtype == torch.float32
    model, _ = load_transformer(tmp_path / "m.safetensors")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype} and model.dtype == dtype
    model, _ = load_transformer(tmp_path / "m.safetensors", dtype=torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_our_native_file_is_what_the_original_would_have_saved(tmp_path, tiny, original):
    params = tiny(pe_interpolation=2.0)
    save_native(original(params), params, tmp_path / "m.safetensors", "sigma", "a test")
    assert same(load_file(tmp_path / "m.safetensors"), original(params))
    assert detect(load_file(tmp_path / "m.safetensors"), config={"num_heads": 2}).params == params


def test_an_original_pth_is_loaded_with_and_without_ema(tmp_path, tiny, original):
    torch.save({"state_dict": original(tiny()), "state_dict_ema": original(tiny(), 1)}, tmp_path / "m.pth")
    for ema in (False, True):
        model, _ = load_transformer(tmp_path / "m.pth", ema=ema, config={"num_heads": 2})
        expected = original(tiny(), int(ema))
        del expected["pos_embed"]
        assert same(model.state_dict(), expected)


def test_a_missing_null_caption_is_filled_always_alike_and_said(tiny, original):
    state = to_diffusers(original(tiny()))
    choice = {"family": "sigma", "base_size": 512, "config": {"num_heads": 2}}
    (first, found), (second, _) = load_transformer(state, **choice), load_transformer(state, **choice)
    rows = first.y_embedder.y_embedding
    assert rows.shape == (300, 16) and rows.isfinite().all() and torch.equal(rows, second.y_embedder.y_embedding)
    assert any("null caption" in note for note in found.notes)


def test_a_loaded_model_can_be_trained_and_leaves_its_file_alone(tmp_path, tiny, make_model, picture):
    save_native(make_model(tiny()), tiny(), tmp_path / "m.safetensors", "sigma", "a test")
    before = (tmp_path / "m.safetensors").read_bytes()
    model, _ = load_transformer(tmp_path / "m.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.ones(1, 4, 4, 4), torch.ones(1, 3, 16)
    model(x, torch.tensor([5.0]), y, learned_variance=True).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_unused_compression_weights_are_dropped_with_a_note(tiny, original):
    state = original(tiny(kv_compress=CONV))
    model, found = load_transformer(state, config={"num_heads": 2, "kv_compress": None})
    assert model.params.kv_compress is None and any("attn.norm" in note for note in found.notes)


def test_errors_name_the_file(tmp_path, tiny, original):
    state = original(tiny())
    del state["blocks.1.mlp.fc2.bias"]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors: Incomplete.*blocks\.1\.mlp\.fc2\.bias"):
        load_transformer(tmp_path / "half.safetensors", config={"num_heads": 2})
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors: This is not.*Stable Diffusion LoRA"):
        load_transformer(tmp_path / "lora.safetensors")


def test_the_published_name_of_a_folder_tells_family_and_size(tmp_path, tiny, original):
    folder = tmp_path / "PixArt-Sigma-XL-2-512-MS" / "transformer"
    folder.mkdir(parents=True)
    save_file(to_diffusers(original(tiny())), folder / "diffusion_pytorch_model.safetensors")
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 64}
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    _, found = load_weights(folder)
    assert found.params == tiny() and found.family == "sigma" and any("By its name" in note for note in found.notes)


def test_a_config_of_another_model_beside_a_file_is_ignored_with_a_note(tmp_path, tiny, make_model):
    save_native(make_model(tiny()), tiny(), tmp_path / "m.safetensors", "sigma", "a test")
    config = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 128}
    config["_class_name"] = "PixArtTransformer2DModel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, found = load_transformer(tmp_path / "m.safetensors")
    assert found.params == tiny() and any("of another model (depth 28" in note for note in found.notes)


def comfy_quantised(state, layout, prefix="", dtype=torch.float8_e4m3fn):
    """(tensors, metadata) as ComfyUI saves scaled fp8, and the state dict that this stands for."""
    file, layers, plain = {}, {}, dict(state)
    for name, tensor in state.items():
        if tensor.ndim != 2 or ".weight" not in name or "blocks." not in name:
            file[prefix + name] = tensor
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().max() / torch.finfo(dtype).max
        file[prefix + name] = (tensor / scale).to(dtype)
        plain[name] = file[prefix + name].float() * scale
        file[f"{prefix}{layer}.{'scale_weight' if layout == 'first' else 'weight_scale'}"] = scale
        file[f"{prefix}{layer}.{'scale_input' if layout == 'first' else 'input_scale'}"] = torch.tensor(0.5)
        layers[prefix + layer] = {"format": str(dtype).removeprefix("torch.")}
        if layout == "second":
            text = json.dumps(layers[prefix + layer]).encode()
            file[f"{prefix}{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if layout == "first":
        file[prefix + "scaled_fp8"] = torch.empty(0, dtype=dtype)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if layout == "header" else None
    return file, metadata, plain


@pytest.mark.parametrize("spelling", ["native", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["first", "second", "header"])
def test_scaled_fp8_of_comfyui_is_read_as_the_weights_it_stands_for(tmp_path, tiny, original, layout, dtype, spelling):
    state = original(tiny()) if spelling == "native" else to_diffusers(original(tiny()))
    file, metadata, plain = comfy_quantised(state, layout, "model.diffusion_model.", dtype)
    save_file(file, tmp_path / "q.safetensors", metadata)
    choice = {"family": "sigma", "base_size": 512, "config": {"num_heads": 2}}
    model, found = load_transformer(tmp_path / "q.safetensors", **choice)
    assert found.params == tiny() and found.layout == spelling
    assert same(model.state_dict(), load_transformer(plain, **choice)[0].state_dict())


def test_scaled_fp8_comes_out_in_the_dtype_of_the_biases(tiny, original):
    state = {name: tensor.bfloat16() for name, tensor in original(tiny()).items()}
    model, _ = load_transformer(comfy_quantised(state, "first")[0], config={"num_heads": 2})
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["second", "header"])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise", "asym_w4a8_int8"])
def test_quantisation_that_is_not_read_is_named_with_the_loader_that_reads_it(tmp_path, tiny, original, kind, layout):
    file, metadata, _ = comfy_quantised(original(tiny()), layout)
    weights = {"nvfp4": torch.uint8, "mxfp8": torch.float8_e4m3fn}
    for name in [name for name in file if name.endswith(".weight_scale")]:
        layer = name.removesuffix(".weight_scale")
        file[f"{layer}.weight"] = torch.zeros(file[f"{layer}.weight"].shape).to(weights.get(kind, torch.int8))
        file[name] = torch.ones(24) if kind in weights else file[name]
        if layout == "second":
            text = json.dumps({"format": kind}).encode()
            file[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    metadata = metadata and {name: text.replace("float8_e4m3fn", kind) for name, text in metadata.items()}
    save_file(file, tmp_path / "q.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"q\.safetensors: blocks\..* is quantised as {kind}\..*Load Diffusion Model"):
        load_transformer(tmp_path / "q.safetensors", config={"num_heads": 2})


def test_a_scaled_fp8_file_of_another_model_is_named_before_anything_is_computed():
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4), "scaled_fp8": torch.zeros(0)}
    t5 |= {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(())}
    with pytest.raises(ValueError, match="a T5 text encoder"):
        load_transformer(t5)


@pytest.mark.parametrize("stray", [
    {"model_type": "bert", "num_attention_heads": 12, "hidden_size": 768},
    {"_class_name": "OmniGenTransformer2DModel", "num_attention_heads": 12},
    {"model_type": "llama", "num_attention_heads": 40},
])  # fmt: skip
def test_a_language_models_config_beside_a_file_does_not_change_the_heads(tmp_path, tiny, make_model, stray):
    model = make_model(tiny(hidden_size=72, num_heads=1))
    save_file({"pos_embed": torch.zeros(1, 1, 72), **model.state_dict()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(stray))
    _, found = load_transformer(tmp_path / "m.safetensors", family="sigma", base_size=512)
    assert found.params.num_heads == 1


@pytest.mark.parametrize("said", ["[1]", "{x", '{"num_heads": 0}', '{"kv_compress": [1]}'])
def test_a_damaged_header_is_one_sentence(tmp_path, tiny, make_model, said):
    params = tiny()
    save_native(make_model(params), params, tmp_path / "m.safetensors", "sigma", "a test")
    tensors, metadata = files.load_file_tensors(tmp_path / "m.safetensors")
    stated = said if said in ("[1]", "{x") else json.dumps(json.loads(metadata["pixart.params"]) | json.loads(said))
    save_file(dict(tensors), tmp_path / "d.safetensors", {**metadata, "pixart.params": stated})
    with pytest.raises(ValueError, match="d.safetensors: .*header.*(again)"):
        load_transformer(tmp_path / "d.safetensors")
