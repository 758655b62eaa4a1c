"""PixArt Load Model inside a real ComfyUI: what it loads, and that other nodes' hooks reach the network."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import save_diffusers
from pixart_nodes.model import PixArtTransformer

from .drive import noise, predict, prompt, sample
from .inprocess import PACK
from .tiny import ALPHA, SIGMA, random_weights, save_random

# Loading


def test_family_decides_the_latent_format_and_with_it_vae_and_previews(load_model):
    for name, scale in (("alpha.safetensors", 0.18215), ("sigma.safetensors", 0.13025)):
        latent_format = load_model(name).model.latent_format
        assert latent_format.scale_factor == scale
        assert len(latent_format.latent_rgb_factors) == 4
        assert latent_format.taesd_decoder_name == ("taesd_decoder" if "alpha" in name else "taesdxl_decoder")


def test_previews_decode_to_a_picture(load_model):
    import latent_preview

    factors = load_model().model.latent_format.latent_rgb_factors
    assert latent_preview.Latent2RGBPreviewer(factors).decode_latent_to_preview(noise()).size == (16, 16)


def test_the_network_gets_the_weights_of_the_file(load_model):
    state_dict = load_model().model.diffusion_model.state_dict()
    expected = random_weights(SIGMA)
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


def test_the_model_computes_what_the_bare_network_computes(load_model):
    network = PixArtTransformer(SIGMA)
    network.load_state_dict(random_weights(SIGMA))
    x, caption = noise(), prompt(7, 1)
    level = torch.tensor(5.0)
    model = load_model()
    (denoised,) = predict(model, [caption], x)
    t = model.model.model_sampling.timestep(level[None])
    with torch.no_grad():
        eps = network(x / (level**2 + 1).sqrt(), t, caption[0][0])
    assert (denoised - (x - level * eps)).abs().max() < 1e-4


def test_notes_of_the_loader_are_shown_and_logged(comfy, caplog):
    folder = comfy.folder("diffusion_models")
    weights = random_weights(ALPHA)
    save_diffusers(weights, ALPHA, folder / "PixArt-XL-2-512x512" / "transformer", "alpha", "test")
    (folder / "PixArt-XL-2-512x512" / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    (folder / "PixArt-XL-2-512x512" / "transformer" / "null_caption.safetensors").unlink()
    node = comfy.classes["PixArtLoadModel"]
    assert "PixArt-XL-2-512x512" in node.define_schema().inputs[0].options
    with caplog.at_level(logging.INFO):
        out = node.execute("PixArt-XL-2-512x512", "auto", "auto", "auto", "ema if present")
    notes = out.result[0].model.detection.notes
    assert notes and all(note in caplog.text for note in notes)
    assert out.ui.as_dict()["text"] == ("\n".join(notes),)


def test_averaged_weights_are_preferred_and_can_be_chosen(comfy, load_model):
    averaged, trained = random_weights(SIGMA, 4), random_weights(SIGMA, 5)
    path = comfy.folder("checkpoints") / "trained.pth"
    torch.save({"state_dict": trained, "state_dict_ema": averaged}, path)
    config = {"num_heads": 4, "hidden_size": 48, "caption_channels": 32}
    path.with_name("config.json").write_text(json.dumps(config))
    for choice, expected in (("ema if present", averaged), ("ema", averaged), ("model", trained)):
        model = load_model("trained.pth", family="sigma", base_size="256", weights=choice)
        assert torch.equal(model.model.diffusion_model.t_block[1].weight, expected["t_block.1.weight"])


def test_a_name_that_is_not_listed_is_refused(load_model):
    with pytest.raises(FileNotFoundError, match="in none of ComfyUI's model folders"):
        load_model("../../../etc/passwd")


def test_the_bundled_models_are_searched_after_the_users_own(comfy):
    import folder_paths

    for folder in ("diffusion_models", "text_encoders", "vae"):
        assert folder_paths.get_folder_paths(folder)[-1] == str(PACK / "pixart_nodes" / "assets" / "tiny" / folder)


@pytest.mark.parametrize("weight_dtype, tolerance", [("fp32", 0), ("bf16", 0.05), ("fp16", 0.005), ("fp8_e4m3fn", 0.2)])
def test_weights_of_every_dtype_give_the_same_picture(load_model, weight_dtype, tolerance):
    (reference,) = predict(load_model(), [prompt(7, 1)], noise())
    model = load_model(weight_dtype=weight_dtype)
    assert model.model.diffusion_model.blocks[0].mlp.fc1.weight.dtype == model.model.get_dtype()
    (out,) = predict(model, [prompt(7, 1)], noise())
    assert (out - reference).norm() <= tolerance * (reference - noise()).norm()


def test_eight_bit_weights_keep_embedders_and_tables_in_sixteen(load_model):
    network = load_model(weight_dtype="fp8_e4m3fn").model.diffusion_model
    kept = {name for name, tensor in network.state_dict().items() if tensor.dtype == torch.float16}
    assert {"x_embedder.proj.weight", "t_block.1.weight", "blocks.0.scale_shift_table"} <= kept
    assert "blocks.0.attn.qkv.weight" not in kept


@pytest.mark.parametrize("weight_dtype, tolerance", [("auto", 0), ("fp8_e4m3fn", 0.2)])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_of_comfyui_gives_the_picture_of_the_weights_it_stands_for(
    comfy, load_model, suffix, weight_dtype, tolerance
):
    folder = comfy.folder("diffusion_models")
    plain, scaled = load_file(folder / "sigma.safetensors"), {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    metadata = comfy.pack("checkpoints.files").read_header(folder / "sigma.safetensors").metadata
    for name in [name for name in plain if name.startswith("blocks.") and name.endswith(".weight")]:
        scale = scaled[name.replace("weight", suffix)] = plain[name].abs().max() / 448
        scaled[name] = (plain[name] / scale).to(torch.float8_e4m3fn)
        plain[name] = scaled[name].float() * scale
    save_file(plain, folder / "plain.safetensors", metadata)
    save_file({**plain, **scaled}, folder / "scaled.safetensors", metadata)
    (reference,) = predict(load_model("plain.safetensors"), [prompt(7, 1)], noise())
    (out,) = predict(load_model("scaled.safetensors", weight_dtype=weight_dtype), [prompt(7, 1)], noise())
    assert (out - reference).norm() <= tolerance * (reference - noise()).norm()


# What does not fit


def test_a_prompt_of_another_text_encoder_is_named(comfy, sigma):
    clip = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(ValueError, match="sigma.safetensors reads T5 prompts of width 32, but got .* width 768"):
        sample(comfy, sigma, clip)


def test_a_latent_of_another_vae_is_named(comfy, sigma):
    with pytest.raises(ValueError, match="sigma.safetensors works on image latents of 4 channels"):
        sample(comfy, sigma, size={"samples": torch.ones(1, 16, 16, 16)})


def test_an_empty_latent_of_another_kind_is_adapted(comfy, sigma):
    assert sample(comfy, sigma, size={"samples": torch.zeros(1, 16, 16, 16)}).shape == (1, 4, 16, 16)


# The hooks of other nodes


def test_a_lora_changes_the_picture_by_its_strength_and_strength_zero_does_not(comfy, sigma):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for i in range(SIGMA.depth):
        for target, rows in (("attn1.to_q", 48), ("attn1.to_v", 48), ("attn2.to_k", 48), ("ff.net.0.proj", 192)):
            base = f"transformer.transformer_blocks.{i}.{target}"
            lora[f"{base}.lora_A.weight"] = torch.randn(4, 48, generator=generator) * 0.2
            lora[f"{base}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    save_file(lora, comfy.folder("loras") / "lora.safetensors")
    out = {}
    for strength in (0.0, 0.5, 1.0):
        (patched,) = comfy.call(
            "LoraLoaderModelOnly", model=sigma, lora_name="lora.safetensors", strength_model=strength
        )
        out[strength] = sample(comfy, patched)
    plain = sample(comfy, sigma)
    assert torch.equal(out[0.0], plain)
    assert not torch.equal(out[0.5], plain) and not torch.equal(out[0.5], out[1.0])


def test_every_part_of_a_fused_weight_has_its_lora_key(sigma):
    from comfy import lora

    keys, weights = lora.model_lora_keys_unet(sigma.model, {}), sigma.model.state_dict()
    for target, part in (("attn1.to_v", 2), ("attn2.to_v", 1)):
        name, (_, start, length) = keys[f"transformer.transformer_blocks.2.{target}"]
        assert (start, length) == (48 * part, 48) and start + length == weights[name].shape[0]


def test_attention_overrides_see_every_call(sigma):
    seen, clone = [], sigma.clone()

    def override(attention, q, k, v, heads, **options):
        seen.append((attention.__name__, q.shape[1], k.shape[1]))
        return attention(q, k, v, heads, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    (out,) = predict(clone, [prompt(7, 1)], noise())
    assert seen == [("attention_pytorch", 64, 64), ("attention_pytorch", 64, 7)] * SIGMA.depth
    assert torch.equal(out, predict(sigma, [prompt(7, 1)], noise())[0])


def test_attention_output_patches_are_applied(sigma):
    plain = predict(sigma, [prompt(7, 1)], noise())[0]
    for name in ("attn1_output_patch", "attn2_output_patch"):
        clone, blocks = sigma.clone(), []

        def patch(out, options, blocks=blocks):
            blocks.append(options["block_index"])
            return out * 0.5

        clone.set_model_patch(patch, name)
        assert not torch.equal(predict(clone, [prompt(7, 1)], noise())[0], plain)
        assert blocks == list(range(SIGMA.depth))


def test_a_block_can_be_replaced(sigma):
    clone = sigma.clone()
    clone.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1)
    skipped = predict(clone, [prompt(7, 1)], noise())[0]
    clone.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    kept = predict(clone, [prompt(7, 1)], noise())[0]
    plain = predict(sigma, [prompt(7, 1)], noise())[0]
    assert torch.equal(kept, plain) and not torch.equal(skipped, plain)


def test_step_caching_skips_calls_of_the_network(comfy, sigma):
    cached, = comfy.call(
        "EasyCache", model=sigma, reuse_threshold=1.0, start_percent=0.1, end_percent=0.95, verbose=False
    )
    ran = []
    handle = sigma.model.diffusion_model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        sample(comfy, cached, steps=12)
    finally:
        handle.remove()
    assert 0 < len(ran) < 12


def test_an_interrupt_stops_sampling_and_the_next_run_is_whole(comfy, sigma):
    from comfy import model_management as mm

    before = sample(comfy, sigma)
    clone, calls = sigma.clone(), []

    def interrupt(args):
        calls.append(1)
        mm.interrupt_current_processing()
        return args["denoised"]

    clone.set_model_sampler_post_cfg_function(interrupt)
    with pytest.raises(mm.InterruptProcessingException):
        sample(comfy, clone, steps=20)
    assert len(calls) == 1
    assert torch.equal(sample(comfy, sigma), before)


def test_a_model_survives_unloading(comfy, sigma):
    from comfy import model_management as mm

    before = sample(comfy, sigma)
    mm.unload_all_models()
    assert torch.equal(sample(comfy, sigma), before)


def test_two_models_do_not_disturb_each_other(comfy, load_model):
    first, second = load_model("sigma.safetensors"), load_model("alpha.safetensors")
    a, b = sample(comfy, first), sample(comfy, second)
    assert not torch.equal(a, b)
    assert torch.equal(a, sample(comfy, first))


def test_the_recorded_loader_makes_an_equal_and_independent_model(comfy, load_model):
    model = load_model(weight_dtype="fp16")
    loader, arguments = model.cached_patcher_init[:2]
    with torch.inference_mode():
        again = loader(*arguments, disable_dynamic=True)
    assert torch.equal(sample(comfy, again), sample(comfy, model))
    assert again.model.diffusion_model is not model.model.diffusion_model


def test_a_deep_clone_has_weights_of_its_own(comfy, sigma):
    import inspect

    if "force_deepcopy" not in inspect.signature(sigma.clone).parameters:
        pytest.skip("this ComfyUI has no deep clones")
    clone = sigma.clone(force_deepcopy=True)
    before = sample(comfy, sigma)
    assert torch.equal(sample(comfy, clone), before)
    clone.model.diffusion_model.t_block[1].weight.data.zero_()
    assert torch.equal(sample(comfy, sigma), before)


def test_memory_grows_with_tokens_and_the_batch_only(sigma):
    required = sigma.model.memory_required
    small, large = required([2, 4, 128, 128]), required([2, 4, 256, 256])
    assert required([4, 4, 128, 128]) == pytest.approx(2 * small)
    assert 3.5 < large / small < 4.0


@pytest.mark.parametrize(("base_size", "scale"), [(32, 1.0), (64, 2.0)])
def test_what_comfyuis_save_node_writes_is_loaded_again_without_a_choice(comfy, load_model, base_size, scale):
    params = replace(SIGMA, hidden_size=72, num_heads=1, base_size=base_size, pe_interpolation=scale)
    save_random(comfy.folder("diffusion_models") / "to_save.safetensors", params, "sigma")
    model = load_model("to_save.safetensors")
    comfy.call("ModelSave", model=model, filename_prefix=f"saved_{base_size}")
    (written,) = (comfy.base / "output").glob(f"saved_{base_size}_*.safetensors")
    shutil.move(written, comfy.folder("diffusion_models") / "saved.safetensors")
    again = load_model("saved.safetensors")
    assert "model.diffusion_model.pos_embed" in load_file(comfy.folder("diffusion_models") / "saved.safetensors")
    assert (again.model.params.base_size, again.model.params.pe_interpolation) == (base_size, scale)
    torch.testing.assert_close(sample(comfy, again), sample(comfy, model), rtol=0, atol=1e-4)
