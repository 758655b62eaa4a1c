"""Models saved with their compression and their LoRAs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pixart_nodes.checkpoints import detect, load_transformer
from pixart_nodes.model import KVCompress

from ..drive import noise, prompt
from ..tiny import SIGMA, save_random
from .conftest import compress, denoised, key_counts, lora_of_qkv, reload, save


@pytest.mark.parametrize("sampling", ["conv", "uniform"])
@pytest.mark.parametrize("height, width", [(16, 16), (22, 18)])
def test_a_saved_compressed_model_comes_back_as_the_same_model(comfy, load_model, sigma, sampling, height, width):
    model = compress(comfy, sigma, "1-2", "2", sampling)
    again = reload(comfy, load_model, save(comfy, model, f"kv_{sampling}_{height}"))
    assert asdict(again.model.params.kv_compress) == asdict(KVCompress(sampling, 2, (1, 2)))
    assert (denoised(again, height, width) - denoised(model, height, width)).abs().max() < 1e-4


def test_a_file_with_fresh_compression_holds_the_average_start(comfy, sigma):
    path = save(comfy, compress(comfy, sigma, "2", "4"), "start")
    tensors = load_file(path)
    name = "blocks.2.attn."
    assert torch.equal(tensors[name + "sr.weight"], torch.full((48, 1, 4, 4), 1 / 16))
    assert torch.equal(tensors[name + "norm.weight"], torch.ones(48))
    assert not tensors[name + "sr.bias"].any() and not tensors[name + "norm.bias"].any()
    assert not any(key.startswith("blocks.0.attn.sr") for key in tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["pixart.family"] == "sigma" and metadata["modelspec.architecture"] == "pixart-sigma"
    assert json.loads(metadata["pixart.params"])["kv_compress"]["layers"] == [2]
    assert "sigma.safetensors" in metadata["pixart.origin"] and "untrained" in metadata["pixart.origin"]
    assert detect(tensors, metadata).params == replace(SIGMA, kv_compress=KVCompress("conv", 4, (2,)))


def test_a_saved_file_trains(comfy, sigma):
    """Every parameter of the compression gets a gradient."""
    model, _ = load_transformer(save(comfy, compress(comfy, sigma, "all"), "to_train"))
    out = model(noise(), torch.tensor([500.0]), prompt(7, 1)[0][0])
    out.square().mean().backward()
    assert all(block.attn.sr.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_loras_are_merged_into_the_file_and_not_into_the_model(comfy, load_model, sigma):
    before = denoised(sigma)
    (patched,) = comfy.call("LoraLoaderModelOnly", model=sigma, lora_name=lora_of_qkv(comfy), strength_model=0.7)
    path = save(comfy, patched, "merged")                                     # not loaded yet
    expected = denoised(patched)
    while_loaded = load_file(save(comfy, patched, "merged_while_loaded"))
    assert all(torch.equal(tensor, while_loaded[key]) for key, tensor in load_file(path).items())
    assert (denoised(reload(comfy, load_model, path)) - expected).abs().max() < 1e-4
    assert torch.equal(denoised(sigma), before)


def test_blocks_that_came_compressed_keep_their_trained_tensors(comfy, load_model, caplog):
    weights = save_random(
        comfy.folder("diffusion_models") / "kv.safetensors", replace(SIGMA, kv_compress=KVCompress("conv", 2, (2,))),
        "sigma", seed=7,
    )  # fmt: skip
    model = compress(comfy, load_model("kv.safetensors"), "all")
    assert key_counts(model) == [16, 16, 16]
    path = save(comfy, model, "more")
    assert torch.equal(load_file(path)["blocks.2.attn.sr.weight"], weights["blocks.2.attn.sr.weight"])
    again = reload(comfy, load_model, path)
    assert (denoised(again) - denoised(model)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="blocks 2 of kv.safetensors were trained with compression"):
        compress(comfy, load_model("kv.safetensors"), "2")


def test_two_kinds_of_compression_do_not_fit_into_one_file(comfy, sigma):
    both = compress(comfy, compress(comfy, sigma, "0", "2"), "1", "4")
    with pytest.raises(ValueError, match="one kind of KV compression, but this model has conv by 2 and conv by 4"):
        save(comfy, both, "both")


def test_a_taken_name_gets_a_number_and_nothing_is_overwritten(comfy, sigma):
    first, second, third = (save(comfy, sigma, "folder/taken") for _ in range(3))
    assert [path.name for path in (first, second, third)] == [f"taken{n}.safetensors" for n in ("", "_2", "_3")]
    assert first.parent.name == "folder" and first.parent.parent.name == "diffusion_models"
    assert save(comfy, sigma, "in_models", "models").parent == comfy.folder("diffusion_models")


@pytest.mark.parametrize("name", ["", "  ", ".safetensors", "../outside", "/etc/x", "folder/"])
def test_a_name_that_is_no_name_is_refused(comfy, sigma, name):
    with pytest.raises(ValueError, match="is no file name below"):
        save(comfy, sigma, name)


@pytest.mark.parametrize("dtype, expected", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_chosen_dtype_is_written(comfy, sigma, dtype, expected):
    tensors = load_file(save(comfy, sigma, f"as_{dtype}", dtype=dtype))
    assert {tensor.dtype for name, tensor in tensors.items() if name != "pos_embed"} == {expected}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize("state", ["fresh", "loaded", "offloaded"])
def test_a_saved_quantised_model_is_a_plain_file_that_draws_the_same(comfy, load_model, kind, strength, state):
    """With a LoRA of PixArt Load LoRA or without, wherever the weights are while the model is saved."""
    pytest.importorskip("bitsandbytes")
    model = load_model(weight_dtype=kind)
    if strength:
        lora = lora_of_qkv(comfy)
        (model,) = comfy.call("PixArtLoadLora", model=model, lora_name=lora, strength=strength, alpha=0.0)
    if state == "loaded":
        denoised(model)
    if state == "offloaded":
        model.patch_model(model.load_device, lowvram_model_memory=1)
    path = save(comfy, compress(comfy, model, "2"), f"{kind}_{state}")
    expected = denoised(compress(comfy, model, "2"))
    found, shapes = load_file(path), save_random(path.with_name("shapes.safetensors"), SIGMA, "sigma")
    assert {name: found[name].shape for name in shapes} == {name: tensor.shape for name, tensor in shapes.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert detect(found, metadata).params == replace(SIGMA, kv_compress=KVCompress("conv", 2, (2,)))
    assert (f"{SIGMA.depth} weights patched" in metadata["pixart.origin"]) == bool(strength)
    again = reload(comfy, load_model, path)
    assert (denoised(again) - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_a_saved_fp8_model_draws_the_same_with_its_lora(comfy, load_model):
    model = load_model(weight_dtype="fp8_e4m3fn")
    (patched,) = comfy.call("PixArtLoadLora", model=model, lora_name=lora_of_qkv(comfy), strength=0.7, alpha=0.0)
    path = save(comfy, patched, "fp8")
    assert load_file(path)["blocks.1.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    model.detach()
    patched.patch_model(patched.load_device)
    expected = patched.model.diffusion_model.state_dict()
    assert all(t.float().equal(expected[name].float()) for name, t in load_file(path).items() if name in expected)
    patched.detach()
    again = reload(comfy, load_model, path)
    assert (denoised(again) - denoised(patched)).abs().max() < 1e-4


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp16", "int8"])
def test_a_lora_is_merged_in_the_dtype_that_is_written(comfy, load_model, weight_dtype):
    """Not in that of the model, which rounds small updates away."""
    pytest.importorskip("bitsandbytes")
    name, strength = "blocks.1.attn.qkv.weight", 1e-4
    model = load_model(weight_dtype=weight_dtype)
    lora = lora_of_qkv(comfy)
    files = []
    for sign in (1, -1):
        (patched,) = comfy.call("PixArtLoadLora", model=model, lora_name=lora, strength=sign * strength, alpha=0.0)
        files.append(load_file(save(comfy, patched, f"small_{weight_dtype}", dtype="fp32"))[name])
    tensors = load_file(comfy.folder("loras") / lora)
    base = "transformer.transformer_blocks.1.attn1.to_"
    update = torch.cat([tensors[f"{base}{x}.lora_B.weight"] @ tensors[f"{base}{x}.lora_A.weight"] for x in "qkv"])
    change = 2 * strength * 8 / 4 * update  # PEFT's default alpha, rank 4
    assert (files[0] - files[1] - change).norm() < 1e-3 * change.norm()


def test_a_full_disk_leaves_nothing_behind(comfy, sigma, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfy.pack("checkpoints.files"), "save_file", full)
    folder = save_folder(comfy)
    before = set(folder.rglob("*"))
    with pytest.raises(OSError, match="could not be written .*No space left on device"):
        save(comfy, sigma, "full")
    assert set(folder.rglob("*")) == before


def save_folder(comfy):
    import folder_paths

    path = Path(folder_paths.get_output_directory(), "diffusion_models")
    path.mkdir(parents=True, exist_ok=True)
    return path
