"""PixArtLoadT5 inside a real ComfyUI, against transformers' T5 on the same files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, T5EncoderModel, T5ForConditionalGeneration

from .tiny_t5 import config, expected, random_model, same, save_bin_shards, small_tokenizer


@pytest.mark.parametrize("layout", ["one file", "shards", "bin shards", "full T5", "prefixed file"])
def test_an_encoder_on_disk_gives_what_transformers_gives(folder, load_t5, encode, tiny_t5, layout):
    model = random_model(config(), cls=T5ForConditionalGeneration if layout == "full T5" else T5EncoderModel)
    if layout == "bin shards":
        model.config.save_pretrained(folder)
        save_bin_shards(model, folder)
    elif layout == "prefixed file":
        state = {f"text_encoders.t5xxl.transformer.{k}": v.clone() for k, v in model.state_dict().items()}
        save_file(state, folder / "t5.safetensors")
    else:
        model.save_pretrained(folder, max_shard_size="2MB" if layout == "shards" else "1GB")
    clip = load_t5(folder / "t5.safetensors" if layout == "prefixed file" else folder)
    encoder = model.encoder if layout == "full T5" else model
    for text in ("a red fox in the snow", "", "   ", "Two  cats,\nthree Dogs!"):
        (cond, _), *_ = encode(text, clip)[0]
        assert same(cond, expected(encoder, tiny_t5.tokenizer, text))


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward_proj": "relu"},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-3},
        {"d_model": 20, "num_heads": 3, "d_kv": 16, "num_layers": 1},
    ],
    ids=["v1.0", "constants", "sizes"],
)
def test_any_size_and_kind_of_t5_gives_what_transformers_gives(folder, load_t5, encode, tiny_t5, changes):
    model = random_model(config(**changes))
    model.save_pretrained(folder)
    text = "a red fox in the snow and on the roof " * 5
    (cond, _), *_ = encode(text, load_t5(folder))[0]
    assert same(cond, expected(model, tiny_t5.tokenizer, text))


@pytest.mark.parametrize("place", ["in the folder", "beside the folder"])
def test_an_encoder_with_a_tokenizer_of_its_own_uses_it(folder, load_t5, encode, place):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="</s>", pad_token="<pad>")
    model = random_model(config(vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / ("text_encoder" if place == "in the folder" else "tokenizer"))
    clip = load_t5(folder / "text_encoder")
    for text in ("a red fox in the snow", "", "Two cats!", "猫"):
        (cond, _), *_ = encode(text, clip)[0]
        assert same(cond, expected(model, tokenizer, text))


def test_a_vocabulary_without_a_tokenizer_is_an_error(folder, load_t5):
    random_model(config(vocab_size=50)).save_pretrained(folder)
    with pytest.raises(ValueError, match="vocabulary of 50 tokens.*tokenizer.json"):
        load_t5(folder)


@torch.inference_mode()
def test_fp16_weights_whose_activations_overflow_fp16_give_the_fp32_result(folder, load_t5, encode, tiny_t5):
    model = random_model(config())
    largest = []
    for block in model.encoder.block:
        for name in ("wi_0", "wi_1", "wo"):
            getattr(block.layer[1].DenseReluDense, name).weight.mul_(60)
        block.layer[1].DenseReluDense.wo.register_forward_hook(lambda _, x, out: largest.append(out.abs().max()))
    model.save_pretrained(folder)
    reference = expected(model, tiny_t5.tokenizer, "a red fox")
    assert min(largest) > torch.finfo(torch.float16).max
    (cond, _), *_ = encode("a red fox", load_t5(folder, "fp16"))[0]
    assert cond.isfinite().all()
    assert (cond - reference).abs().max() < 0.01 * reference.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 0.01), ("bf16", 0.05), ("fp8_e4m3fn", 0.3)])
@pytest.mark.parametrize("device", ["default", "cpu"])
def test_weights_are_kept_in_the_chosen_dtype_and_change_little(tiny_t5, load_t5, encode, dtype, tolerance, device):
    clip = load_t5(tiny_t5.path, dtype, device)
    weight = clip.cond_stage_model.t5xxl.transformer.encoder.block[1].layer[0].SelfAttention.q.weight
    stored = getattr(weight, "_qdata", weight)
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    assert str(stored.dtype) == f"torch.{names.get(dtype, 'float8_e4m3fn')}"
    (cond, _), *_ = encode("a red fox", clip)[0]
    assert same(cond, expected(tiny_t5.model, tiny_t5.tokenizer, "a red fox"), tolerance)


def scaled_fp8(state):
    """A file as ComfyUI's t5xxl_fp8_e4m3fn_scaled: fp8 layers with a scale each, the rest in fp16."""
    file = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if value.ndim == 2 and name.startswith("encoder.block") and "relative" not in name:
            scale = value.abs().max() / 448
            file[name] = (value / scale).to(torch.float8_e4m3fn)
            file[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            file[name] = value.half()
    return file


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_fp8_files_load_as_they_are_and_as_bf16(folder, load_t5, encode, tiny_t5, kind, dtype):
    state = {k: v.clone() for k, v in tiny_t5.model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    file = scaled_fp8(state) if kind == "scaled" else {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}
    save_file(file, folder / "t5_fp8.safetensors")
    exact = T5EncoderModel(config()).eval()
    restored = {k: file[k].float() * file.get(k.removesuffix("weight") + "scale_weight", 1.0) for k in state}
    exact.load_state_dict(restored | {"encoder.embed_tokens.weight": restored["shared.weight"]})
    (cond, _), *_ = encode("a red fox", load_t5(folder / "t5_fp8.safetensors", dtype))[0]
    assert same(cond, expected(exact, tiny_t5.tokenizer, "a red fox"), 1e-4 if dtype == "auto" else 0.03)


def test_the_clip_survives_unloading_cloning_and_a_second_instance(encode, tiny_t5, load_t5):
    import comfy.model_management

    before = encode("a red fox")[0][0][0]
    second = load_t5(tiny_t5.path)
    comfy.model_management.unload_all_models()
    assert encode("a red fox")[0][0][0].equal(before)
    assert encode("a red fox", second)[0][0][0].equal(before)
    assert encode("a red fox", tiny_t5.clip.clone())[0][0][0].equal(before)


@pytest.mark.parametrize("dtype", ["auto", "fp16", "fp8_e4m3fn"])
def test_a_lora_for_t5_changes_a_clone_and_leaves_the_original(encode, tiny_t5, load_t5, dtype):
    import comfy.sd

    clip = load_t5(tiny_t5.path, dtype)
    before = encode("a red fox", clip)[0][0][0].clone()
    name = "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo"
    torch.manual_seed(0)
    lora = {f"{name}.lora_up.weight": torch.randn(32, 4) * 0.1, f"{name}.lora_down.weight": torch.randn(4, 48)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)
    changed = encode("a red fox", patched)[0][0][0]
    merged = T5EncoderModel(config()).eval()
    merged.load_state_dict(tiny_t5.model.state_dict())
    with torch.inference_mode():
        merged.encoder.block[1].layer[1].DenseReluDense.wo.weight += torch.mm(*lora.values())
    assert same(changed, expected(merged, tiny_t5.tokenizer, "a red fox"), {"auto": 1e-4, "fp16": 0.01}.get(dtype, 0.5))
    assert not same(changed, before, 0.01)
    assert encode("a red fox", clip)[0][0][0].equal(before)


@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3fn"])
def test_a_saved_clip_loads_again(folder, encode, tiny_t5, load_t5, dtype):
    clip = load_t5(tiny_t5.path, dtype)
    state = {key: value.clone().contiguous() for key, value in clip.get_sd().items()}
    save_file(state, folder / "saved.safetensors")
    again = load_t5(folder / "saved.safetensors")
    assert same(encode("a red fox", again)[0][0][0], encode("a red fox", clip)[0][0][0], 1e-5)


def test_comfyui_can_load_the_encoder_a_second_time(tiny_t5):
    loader, arguments = tiny_t5.clip.patcher.cached_patcher_init
    again = loader(*arguments, disable_dynamic=True)
    assert set(again.model.state_dict()) == set(tiny_t5.clip.patcher.model.state_dict())


def test_new_encoders_appear_in_the_loader(comfy, folder):
    random_model(config()).save_pretrained(folder)
    names = comfy.classes["PixArtLoadT5"].define_schema().inputs[0].options
    assert folder.name in names and f"{folder.name}/model.safetensors" not in names


FOREIGN = {
    "a CLIP model": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "a PixArt transformer": ["t_block.1.weight", "blocks.0.attn.qkv.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "a LoRA": ["transformer.blocks.0.attn.qkv.lora_A.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight"],
    "missing": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_as_what_it_is(folder, load_t5, kind):
    save_file({name: torch.zeros(2, 2) for name in FOREIGN[kind]}, folder / "wrong.safetensors")
    with pytest.raises(ValueError, match=f"wrong.safetensors is no complete T5 encoder.*{kind}"):
        load_t5(folder / "wrong.safetensors")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_truncated_shard_is_named(folder, load_t5, ending):
    model = random_model(config())
    model.save_pretrained(folder, max_shard_size="2MB")
    if ending == "bin":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_bin_shards(model, folder)
    shard = sorted(folder.glob(f"*-00002-of-*.{ending}"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=shard.name):
        load_t5(folder)


def test_a_lost_layer_is_an_error_and_not_a_partial_model(folder, load_t5):
    random_model(config()).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if ".block.2." not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="num_layers = 3, but the weights have 2"):
        load_t5(folder)


@pytest.mark.parametrize("stray", [{"model_type": "umt5", "d_model": 4096}, {"model_type": "t5", "d_model": 768}])
def test_another_models_config_beside_a_single_file_is_ignored_and_in_a_folder_it_is_an_error(
    folder, load_t5, encode, tiny_t5, caplog, stray
):
    random_model(config()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(stray))
    with pytest.raises(ValueError, match="umt5 text encoder|mixed from two models"):
        load_t5(folder)
    clip = load_t5(folder / "model.safetensors")
    assert "model.safetensors: the config.json beside it is of another model: ignored." in caplog.text
    assert same(encode("a fox", clip)[0][0][0], encode("a fox")[0][0][0])


def test_a_umt5_file_beside_its_own_config_is_named(folder, load_t5):
    model = random_model(config())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    state[bias.format(1)] = state[bias.format(0)].clone()  # umt5 has one in every block
    save_file(state, folder / "umt5.safetensors")
    (folder / "config.json").write_text('{"model_type": "umt5"}')
    with pytest.raises(ValueError, match="umt5.safetensors is a UMT5 text encoder .* PixArt needs T5"):
        load_t5(folder / "umt5.safetensors")


@pytest.mark.parametrize("text", ["<html>", "{}", "[]", '{"weight_map": {"a": 1}}'])
def test_an_index_of_shards_that_is_none_is_named(folder, load_t5, text):
    random_model(config()).save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards: download it again"):
        load_t5(folder)
