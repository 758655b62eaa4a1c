"""KV compression as a model patch, positions, larger latents and saved models, inside a real ComfyUI."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import detect, load_transformer
from pixart_nodes.model import KVCompress
from pixart_nodes.model.position import position_table

from .drive import latent, noise, predict, prompt, sample
from .tiny import SIGMA, save_random


def compress(comfy, model, layers="deep half", ratio="2", sampling="conv"):
    return comfy.call("PixArtKVCompress", model=model, layers=layers, ratio=ratio, sampling=sampling)[0]


def denoised(model, height=16, width=16):
    return predict(model, [prompt(7, 1)], noise(height=height, width=width))[0]


def key_counts(model, **size):
    """How many keys each self-attention of one forward gets."""
    seen, clone = [], model.clone()

    def override(attention, q, k, v, heads, **options):
        if options.get("mask") is None and k.shape[1] != 7:
            seen.append(k.shape[1])
        return attention(q, k, v, heads, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    denoised(clone, **size)
    return seen


# KV compression


def test_only_the_chosen_blocks_see_fewer_keys(comfy, sigma):
    assert key_counts(compress(comfy, sigma)) == [64, 16, 16]
    assert key_counts(compress(comfy, sigma, "0", "4", "uniform")) == [4, 64, 64]
    assert key_counts(compress(comfy, sigma, "0-1, 2", sampling="uniform")) == [16, 16, 16]
    assert key_counts(compress(comfy, sigma, "ALL", "4")) == [4, 4, 4]


def test_the_connected_model_stays_as_it_is(comfy, sigma):
    before = denoised(sigma)
    compressed = compress(comfy, sigma)
    changed = denoised(compressed)
    assert torch.equal(denoised(sigma), before) and not torch.equal(changed, before)
    assert torch.equal(denoised(compressed), changed)
    assert key_counts(sigma) == [64, 64, 64]


def test_two_of_these_nodes_in_a_row_add_up_and_the_later_one_decides(comfy, sigma):
    both = compress(comfy, compress(comfy, sigma, "all", "2"), "2", "4", "uniform")
    assert key_counts(both) == [16, 16, 4]


@pytest.mark.parametrize("sampling", ["conv", "uniform"])
@pytest.mark.parametrize("ratio", ["2", "4"])
@pytest.mark.parametrize("height, width", [(16, 16), (8, 40), (34, 18), (10, 26)])
def test_every_shape_of_picture_is_drawn(comfy, sigma, sampling, ratio, height, width):
    out = sample(comfy, compress(comfy, sigma, "all", ratio, sampling), size=latent(height, width), steps=2)
    assert out.shape == (1, 4, height, width)


def test_rows_that_become_no_keys_are_noticed_once(comfy, sigma, caplog):
    model = compress(comfy, sigma, "all", "4")
    with caplog.at_level(logging.WARNING):
        denoised(model, 20, 28)                                               # 10 x 14 tokens
        denoised(model, 20, 28)
    (text,) = [record.getMessage() for record in caplog.records if "KV compression" in record.getMessage()]
    assert "last 2 of 10 rows and 2 of 14 columns" in text and "multiples of 64 px" in text
    caplog.clear()
    denoised(model, 16, 24)
    denoised(compress(comfy, sigma, "all", "4", "uniform"), 20, 28)
    assert "KV compression" not in caplog.text


def test_a_picture_smaller_than_a_cell_is_refused(comfy, sigma):
    with pytest.raises(ValueError, match="KV compression by 4 needs pictures of at least 64 px .* has 128 x 48"):
        sample(comfy, compress(comfy, sigma, "all", "4"), size=latent(6, 16))


@pytest.mark.parametrize("layers", ["", "9", "0-9", "-1", "2-1", "1-2-2", "deep", "0;1"])
def test_layers_that_the_model_does_not_have_are_refused(comfy, sigma, layers):
    with pytest.raises(ValueError, match=r"names no blocks of this model, which has 0 to 2"):
        compress(comfy, sigma, layers)


@pytest.fixture(scope="session")
def native_pixart(comfy):
    """A MODEL around ComfyUI's own PixArt class, as another loader makes it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.PixArtSigma({"image_model": "pixart_sigma", "disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.PixArt(config)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize(
    "node, inputs",
    [
        ("PixArtKVCompress", {"layers": "all", "ratio": "2", "sampling": "conv"}),
        ("PixArtPositionSpan", {"span": "auto"}),
        ("PixArtSaveModel", {"name": "x", "folder": "output", "dtype": "as loaded"}),
    ],
)
def test_models_of_other_loaders_are_named(comfy, native_pixart, node, inputs):
    with pytest.raises(ValueError, match="works on models from PixArt Load Model, but got a PixArt of another loader"):
        comfy.call(node, model=native_pixart, **inputs)


def lora_of_qkv(comfy):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for i in range(SIGMA.depth):
        for part in "qkv":
            base = f"transformer.transformer_blocks.{i}.attn1.to_{part}"
            lora[f"{base}.lora_A.weight"] = torch.randn(4, 48, generator=generator) * 0.2
            lora[f"{base}.lora_B.weight"] = torch.randn(48, 4, generator=generator) * 0.2
    save_file(lora, comfy.folder("loras") / "qkv.safetensors")
    return "qkv.safetensors"


def test_a_lora_of_qkv_applies_before_and_behind_the_node(comfy, sigma):
    def with_lora(model):
        return comfy.call("LoraLoaderModelOnly", model=model, lora_name=lora_of_qkv(comfy), strength_model=1.0)[0]

    behind = denoised(with_lora(compress(comfy, sigma)))
    before = denoised(compress(comfy, with_lora(sigma)))
    assert torch.equal(behind, before)
    assert not torch.equal(behind, denoised(compress(comfy, sigma)))


@pytest.mark.parametrize("weight_dtype, tolerance", [("fp16", 0.01), ("fp8_e4m3fn", 0.2)])
def test_weights_of_every_dtype_are_compressed_alike(comfy, load_model, weight_dtype, tolerance):
    reference = denoised(compress(comfy, load_model(), "all"))
    out = denoised(compress(comfy, load_model(weight_dtype=weight_dtype), "all"))
    assert (out - reference).norm() <= tolerance * (reference - noise()).norm()


def test_it_survives_unloading_and_offloading(comfy, sigma):
    from comfy import model_management as mm

    model = compress(comfy, sigma)
    before = denoised(model)
    mm.unload_all_models()
    assert torch.equal(denoised(model), before)


def test_compiled_code_compresses_too(comfy, sigma):
    network = compress(comfy, sigma, "all").model.diffusion_model
    options = compress(comfy, sigma, "all").model_options["transformer_options"]
    compiled = torch.compile(network, backend="eager")
    x, t, caption = noise(), torch.tensor([500.0]), prompt(7, 1)[0][0]
    with torch.no_grad():
        plain = network(x, t, caption, transformer_options=options)
        assert torch.allclose(compiled(x, t, caption, transformer_options=options), plain, atol=1e-5)
        assert not torch.allclose(network(x, t, caption), plain, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (10, 14)])
def test_a_control_net_steers_a_compressed_model(comfy, sigma, size):
    controlnet = comfy.pack("model.controlnet").ControlNetTransformer
    model = compress(comfy, sigma, "all")
    network, options = model.model.diffusion_model, model.model_options["transformer_options"]
    net = controlnet.from_base(network, 2)
    for block in net.controlnet:
        torch.nn.init.normal_(block.after_proj.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    x, t, caption = noise(height=size[0], width=size[1]), torch.tensor([500.0]), prompt(7, 1)[0][0]
    with torch.no_grad():
        plain = network(x, t, caption, transformer_options=options)
        steered = network(x, t, caption, control={"branches": [net.branch(x.flip(3))]}, transformer_options=options)
        longer = network(x, t, caption, control={"branches": [net.branch(x.flip(3))]})
    assert steered.isfinite().all() and steered.shape == plain.shape
    assert not torch.allclose(steered, plain, atol=1e-3) and not torch.allclose(steered, longer, atol=1e-3)


# Saving


def save(comfy, model, name, folder="output", dtype="as loaded"):
    (path,) = comfy.call("PixArtSaveModel", model=model, name=name, folder=folder, dtype=dtype)
    return Path(path)


def reload(comfy, load_model, path):
    """Through the loader, from the user's own models folder."""
    target = comfy.folder("diffusion_models") / path.name
    if target != path:
        path.replace(target)
    return load_model(target.name)


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


# Positions


@pytest.mark.parametrize(
    "name, size, span",
    [("sigma.safetensors", (32, 32), 32), ("sigma.safetensors", (512, 64), 32), ("alpha.safetensors", (32, 32), 16),
     ("alpha.safetensors", (16, 64), 16), ("alpha.safetensors", (64, 64), 32), ("alpha.safetensors", (512, 512), 32)],
)  # fmt: skip
def test_auto_spans_what_the_published_model_of_that_size_spans(comfy, load_model, name, size, span):
    (model,) = comfy.call("PixArtPositionSpan", model=load_model(name), span="auto")
    grid = (size[0] // 2, size[1] // 2)
    codes = model.get_model_object("diffusion_model.position_codes")(grid, torch.float32, "cpu")
    assert torch.equal(codes, position_table(*grid, 48, span, 1.0))


def test_trained_is_what_the_model_does_by_itself(comfy, load_model):
    model = load_model("alpha.safetensors")                                   # 256 px, positions to 16
    (auto,) = comfy.call("PixArtPositionSpan", model=model, span="auto")
    (trained,) = comfy.call("PixArtPositionSpan", model=auto, span="trained")
    plain = denoised(model, 64, 64)
    changed = denoised(auto, 64, 64)
    assert not torch.equal(changed, plain)
    assert torch.equal(denoised(trained, 64, 64), plain) and torch.equal(denoised(model, 64, 64), plain)
    assert torch.equal(denoised(auto, 64, 64), changed)


# Larger latents


def upscale(comfy, samples, table="2048", method="bicubic", **extra):
    return comfy.call("PixArtUpscaleLatent", samples={"samples": samples, **extra}, table=table, method=method)


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "nearest-exact", "area", "bislerp"])
def test_a_latent_grows_to_the_bucket_of_its_shape(comfy, method):
    out, width, height = upscale(comfy, noise(2, 72, 168), "2048", method)    # 1344 x 576 px, 0.43 of 1024's table
    assert (width, height) == (3072, 1280) and out["samples"].shape == (2, 4, 160, 384)
    assert out["samples"].isfinite().all()


@pytest.mark.parametrize("table", ["2048", "2880", "4096"])
def test_what_sticks_out_is_cut_off_and_nothing_is_stretched(comfy, table):
    """A latent whose values are its columns keeps equal steps in both directions."""
    ramp = torch.arange(128.0).expand(1, 4, 96, 128)
    down = torch.arange(96.0)[:, None].expand(1, 4, 96, 128)
    out, down = (upscale(comfy, tensor, table, "bilinear")[0]["samples"] for tensor in (ramp, down))
    across, along = out[0, 0, 5].diff()[40:60].mean(), down[0, 0, :, 5].diff()[40:60].mean()
    assert across.item() == pytest.approx(along.item(), rel=0.03)


def test_a_mask_follows_and_the_rest_is_kept(comfy):
    mask = torch.zeros(1, 512, 512)
    mask[..., 256:] = 1
    samples = noise(1, 64, 64)
    out, _, _ = upscale(comfy, samples, noise_mask=mask, batch_index=[3])
    assert out["noise_mask"].shape == (1, 1, 256, 256) and out["batch_index"] == [3]
    assert not out["noise_mask"][..., :127].any() and out["noise_mask"][..., 129:].all()
    assert samples.shape == (1, 4, 64, 64)


def test_latents_of_other_models_and_broken_ones_are_named(comfy):
    with pytest.raises(ValueError, match=r"image latents of 4 channels.*got \(1, 16, 8, 8\)"):
        upscale(comfy, torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"image latents of 4 channels.*got \(1, 4, 3, 8, 8\)"):
        upscale(comfy, torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="values that are no numbers"):
        upscale(comfy, torch.full((1, 4, 8, 8), torch.nan))


def test_two_stages_keep_the_composition_and_add_to_it(comfy, sigma):
    first = sample(comfy, sigma, size=latent(16, 16))
    larger, _, _ = upscale(comfy, first, "256")
    second = sample(comfy, compress(comfy, sigma, "all"), size=larger, denoise=0.3, steps=4, cfg=1.0)
    assert second.shape == (1, 4, 32, 32)
    assert 0 < (second - larger["samples"]).norm() < larger["samples"].norm()
