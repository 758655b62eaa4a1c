"""Encodings that are kept and a T5 that leaves: when its weights are read from disk, and what depends on them."""

import gc
import os
import shutil
import weakref

import pytest
import torch

from .drive import latent, sample
from .tiny_t5 import config, expected, random_model, same

LORA = "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo"


@pytest.fixture
def cache(comfy):
    module = comfy.pack("comfy_bridge.text_cache")
    module.ENCODINGS.entries.clear()
    return module


@pytest.fixture
def loads(comfy, monkeypatch):
    """The list grows by one path whenever weights are read."""
    module, paths = comfy.pack("comfy_bridge.text_encoder"), []
    original = module.load_clip

    def counting(path, *args, **options):
        paths.append(path)
        return original(path, *args, **options)

    monkeypatch.setattr(module, "load_clip", counting)
    return paths


@pytest.fixture
def leaving(comfy, tiny_t5, loads, cache):
    """A new run of PixArt Load T5 with after_encoding = leave."""

    def load(path=tiny_t5.path, dtype="auto"):
        name = path.relative_to(comfy.folder("text_encoders")).as_posix()
        return comfy.call("PixArtLoadT5", t5_name=name, dtype=dtype, device="default", after_encoding="leave")[0]

    return load


def test_weights_are_read_for_the_first_prompt_and_for_no_old_one(encode, tiny_t5, leaving, loads):
    clip = leaving()
    assert not loads
    (cond, _), *_ = encode("a red fox", clip)[0]
    assert same(cond, expected(tiny_t5.model, tiny_t5.tokenizer, "a red fox"))
    encode("a blue dog", clip)
    assert len(loads) == 1
    clip.drop()
    assert encode("a red fox", clip)[0][0][0].equal(cond)
    assert len(loads) == 1
    encode("a new prompt", clip)
    assert len(loads) == 2


def test_a_loader_that_runs_again_finds_the_old_prompts(encode, leaving, loads):
    (cond, _), *_ = encode("a red fox", leaving())[0]
    again = leaving()
    assert encode("a red fox", again)[0][0][0].equal(cond)
    assert len(loads) == 1 and not again.is_loaded


def test_both_prompts_are_encoded_with_one_load_and_sampling_drops_t5(comfy, sigma, encode, leaving, loads):
    clip = leaving()
    positive, negative = encode("a red fox", clip)[0], encode("", clip)[0]
    alive = weakref.ref(clip.cond_stage_model)
    assert clip.is_loaded and len(loads) == 1
    first = sample(comfy, sigma, positive, negative)
    gc.collect()
    assert alive() is None and not clip.is_loaded
    again = encode("a red fox", clip)[0], encode("", clip)[0]
    assert sample(comfy, sigma, *again).equal(first)
    assert not sample(comfy, sigma, *again, seed=1).equal(first)
    assert len(loads) == 1


@pytest.fixture
def foreign(comfy):
    """A MODEL around ComfyUI's own PixArt network, of the tiny models' size."""
    from comfy import model_base, model_management, model_patcher, supported_models

    config = supported_models.PixArtSigma({
        "image_model": "pixart_ms", "depth": 1, "hidden_size": 48, "num_heads": 4, "caption_channels": 32,
        "pe_interpolation": 1.0, "model_max_length": 300,
    })  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = model_base.PixArt(config)
    for parameter in model.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    device = model_management.get_torch_device()
    return model_patcher.ModelPatcher(model, device, device)


def test_sampling_a_model_of_comfyui_s_own_loaders_drops_t5_too(comfy, foreign, encode, leaving, loads):
    from comfy.patcher_extension import CallbacksMP

    clip, loaded = leaving(), []
    positive, negative = encode("a red fox", clip)[0], encode("", clip)[0]
    foreign.add_callback(CallbacksMP.ON_LOAD, lambda *_: loaded.append(clip.is_loaded))
    assert clip.is_loaded
    sample(comfy, foreign, positive, negative, latent(40, 40))
    assert loaded == [False] and not clip.is_loaded
    encode("a blue dog", clip)
    sample(comfy, foreign, positive, negative, latent(40, 40))
    assert not clip.is_loaded and len(loads) == 2


def test_comfyui_forgets_an_encoder_that_left(comfy, sigma, encode, leaving):
    import comfy.model_management as mm

    mm.unload_all_models()
    clip = leaving()
    encode("a red fox", clip)
    assert [model.model for model in mm.current_loaded_models] == [clip.patcher]
    sample(comfy, sigma)
    assert [model.model.model for model in mm.current_loaded_models] == [sigma.model]


def test_an_encoder_that_shall_stay_stays(comfy, sigma, encode, load_t5, tiny_t5, loads, cache):
    clip = load_t5(tiny_t5.path)
    before = encode("a red fox", clip)[0][0][0]
    sample(comfy, sigma)
    assert clip.is_loaded and len(loads) == 1
    assert encode("a red fox", clip)[0][0][0].equal(before)


def test_a_changed_file_is_read_again(encode, folder, leaving, loads):
    random_model(config()).save_pretrained(folder)
    before = encode("a red fox", leaving(folder))[0][0][0]
    random_model(config(), seed=1).save_pretrained(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    after = encode("a red fox", leaving(folder))[0][0][0]
    assert len(loads) == 2 and not same(before, after, 0.01)


def test_a_file_that_changes_while_t5_is_away_does_not_lend_the_old_one_its_encodings(
    encode, folder, leaving, loads, tiny_t5
):
    shutil.copytree(tiny_t5.path, folder, dirs_exist_ok=True)
    clip = leaving(folder)
    encode("a red fox", clip)
    clip.drop()
    random_model(config(), seed=1).save_pretrained(folder)
    changed = encode("a blue dog", clip)[0][0][0]
    shutil.copytree(tiny_t5.path, folder, dirs_exist_ok=True)  # the old file, with its old time
    again = encode("a blue dog", leaving(folder))[0][0][0]
    assert same(again, expected(tiny_t5.model, tiny_t5.tokenizer, "a blue dog")) and not same(again, changed, 0.01)
    assert len(loads) == 3


def test_a_changed_file_makes_comfyui_run_the_loader_again(comfy, folder):
    def fingerprint(dtype="auto"):
        return comfy.classes["PixArtLoadT5"].fingerprint_inputs(
            t5_name=folder.name, dtype=dtype, device="default", after_encoding="keep"
        )

    random_model(config()).save_pretrained(folder)
    before = fingerprint()
    assert before == fingerprint() != fingerprint("bf16")
    for name in ("model.safetensors", "config.json"):
        os.utime(folder / name, (1, 1))
        assert fingerprint() != before
        before = fingerprint()


@pytest.mark.parametrize("text", ["(a red fox:1.5)", "a red fox .", "A red fox"])
def test_another_weight_or_spelling_is_another_prompt(encode, leaving, loads, text):
    clip = leaving()
    plain = encode("a red fox", clip)[0][0][0]
    other = encode(text, clip)[0][0][0]
    assert other.shape != plain.shape or not other.equal(plain)


def test_the_dtype_is_a_part_of_the_key(encode, leaving, loads):
    first, second = (encode("a red fox", leaving(dtype=dtype))[0][0][0] for dtype in ("fp32", "int8"))
    assert len(loads) == 2 and not first.equal(second)


def test_masked_and_unmasked_pads_are_different_encodings(encode, leaving, loads, tiny_t5):
    clip, kept = leaving(), tiny_t5.clip
    positive = encode("a red fox in the snow", clip)[0]
    for which in (clip, kept, clip):
        null = encode("", which, unconditional="null caption", positive=positive)[0][0][0]
        assert same(null, encode("", kept, unconditional="null caption", positive=positive)[0][0][0], 1e-6)
        assert null.shape == positive[0][0].shape
    assert len(loads) == 1


def test_what_a_node_does_to_an_encoding_does_not_reach_the_cache(encode, leaving):
    clip = leaving()
    cond, settings = encode("a red fox", clip)[0][0]
    before = cond.clone()
    with torch.inference_mode():
        cond.zero_()
    settings["aspect_ratio"] = 7.0
    again, fresh = encode("a red fox", clip)[0][0]
    assert again.equal(before) and "aspect_ratio" not in fresh


def test_encodings_are_bounded_and_the_longest_unused_go_first(cache):
    store = cache.TextCache(limit=1000)
    for name in "abc":
        store.put(name, {"cond": torch.zeros(1, 1, 100), "pooled_output": None})  # 400 bytes each
    assert store.get("a") is None and store.get("b") and store.get("c")
    store.get("b")
    store.put("d", {"cond": torch.zeros(1, 1, 100)})
    assert store.get("c") is None and store.get("b") and store.nbytes <= 1000
    store.put("huge", {"cond": torch.zeros(1, 1, 1000)})
    assert store.get("huge") is None


def test_comfyui_asking_for_memory_use_does_not_load_anything(leaving, loads):
    clip = leaving()
    assert getattr(clip, "patcher", None) is None and clip.get_ram_usage() == 0
    assert not loads


def test_comfyui_short_of_memory_may_ask_an_encoder_that_is_away(encode, leaving, loads):
    clip = leaving()
    assert clip.is_dynamic() is False
    encode("a fox", clip)
    assert clip.is_dynamic() is False  # without DynamicVRAM
    clip.drop()
    assert clip.is_dynamic() is False and len(loads) == 1


def test_comfyui_s_own_text_encode_uses_the_cache(comfy, leaving, loads):
    for _ in range(2):
        comfy.call("CLIPTextEncode", clip=leaving(), text="a red fox")
    assert len(loads) == 1


def test_a_lora_for_t5_loads_it_and_leaves_the_cache_alone(comfy, encode, leaving, loads):
    import comfy.sd

    clip = leaving()
    before = encode("a red fox", clip)[0][0][0]
    torch.manual_seed(0)
    lora = {f"{LORA}.lora_up.weight": torch.randn(32, 4), f"{LORA}.lora_down.weight": torch.randn(4, 48)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)
    changed = encode("a red fox", patched)[0][0][0]
    assert not same(changed, before, 0.01)
    assert encode("a red fox", clip)[0][0][0].equal(before) and len(loads) == 1


def test_a_graph_with_another_seed_or_an_emptied_cache_does_not_load_t5(comfy, tiny_t5, loads, cache):
    graph = {
        "model": {"class_type": "PixArtLoadModel", "inputs": {"model_name": "sigma.safetensors", "family": "auto",
                  "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}},
        "t5": {"class_type": "PixArtLoadT5", "inputs": {"t5_name": tiny_t5.path.name, "dtype": "auto",
               "device": "default", "after_encoding": "leave"}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["t5", 0], "text": "a red fox"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["t5", 0], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "sampler": {"class_type": "KSampler", "inputs": {"model": ["model", 0], "positive": ["positive", 0],
                    "negative": ["negative", 0], "latent_image": ["latent", 0], "seed": 1, "steps": 2, "cfg": 4.5,
                    "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "latent"}},
    }  # fmt: skip
    for seed in (1, 2):  # each by an executor of its own: nothing of ComfyUI's own cache is left
        graph["sampler"]["inputs"]["seed"] = seed
        executor = comfy.run(graph)
        assert executor.success, executor.status_messages
    assert len(loads) == 1
    graph["positive"]["inputs"]["text"] = "a blue fox"
    assert comfy.run(graph).success
    assert len(loads) == 2
