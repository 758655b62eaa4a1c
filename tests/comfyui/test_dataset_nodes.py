"""PixArtDataset, PixArtCaption and PixArtCacheFeatures inside ComfyUI, with the bundled tiny VAE and T5."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_nodes.data.dataset import Batches
from pixart_nodes.data.index import Index
from pixart_nodes.data.loading import load_encoders
from pixart_nodes.data.pictures import digest, load_pixels
from tests.data.tiny_vlm import save_llava

from .inprocess import PACK

NODES = ("PixArtDataset", "PixArtCaption", "PixArtCacheFeatures")
TINY = PACK / "pixart_nodes" / "assets" / "tiny"


def picture(seed, width=256, height=256):
    noise = torch.randint(256, (8 * 8 * 3,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", (8, 8), bytes(noise.tolist())).resize((width, height))


@pytest.fixture
def pictures(comfy, request):
    """Six pictures with captions below ComfyUI's input folder."""
    folder = comfy.base / "input" / request.node.name.split("[")[0]
    folder.mkdir(parents=True)
    for number, shape in enumerate([(256, 256)] * 4 + [(320, 192)] * 2):
        picture(number, *shape).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"a red circle (number {number}) and a blue square")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny(comfy):
    """The bundled VAE and T5, through the loaders that a user takes."""
    (vae,) = comfy.call("VAELoader", vae_name="pixart-tiny-vae.safetensors")
    (clip,) = comfy.call("PixArtLoadT5", t5_name="pixart-tiny-t5", dtype="auto", device="default")
    return SimpleNamespace(vae=vae, clip=clip)


@pytest.fixture
def run(comfy):
    """(outputs, text, whole NodeOutput) of a node with its widgets' defaults."""

    def run(node, **inputs):
        cls = comfy.classes[node]
        inputs_of = cls.define_schema().inputs
        defaults = {item.id: item.default for item in inputs_of if getattr(item, "default", None) is not None}
        with torch.inference_mode():
            output = cls.execute(**defaults | inputs)
        ui = output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
        return SimpleNamespace(result=output.result, text=ui["text"][0], images=ui.get("images"), output=output)

    return run


@pytest.fixture
def cached(run, tiny, pictures, tmp_path):
    """PixArtCacheFeatures on the six pictures -> (training set, text)."""

    def cache(family="alpha", root=tmp_path / "cache", **inputs):
        (dataset,) = run("PixArtDataset", folder=pictures.name, size="256").result
        done = run("PixArtCacheFeatures", family=family, cache_folder=str(root), dataset=dataset, vae=tiny.vae,
                   clip=tiny.clip, **inputs)  # fmt: skip
        return done.result[0], done.text

    return cache


def graph(folder, root, **dataset):
    settings = {"folder": folder, "size": "256", "trigger_word": "", "repeats": 1, "exclude_problems": False,
                "real_caption_ratio": 0.5, "caption_from_trigger": False, "smallest_bucket": 4,
                "max_enlargement": 1.5, "validation_percent": 0.0, "role": "train"}  # fmt: skip
    return {
        "1": {"class_type": "PixArtDataset", "inputs": settings | dataset},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "pixart-tiny-vae.safetensors"}},
        "3": {"class_type": "PixArtLoadT5", "inputs": {"t5_name": "pixart-tiny-t5", "dtype": "auto",
                                                       "device": "default"}},
        "4": {"class_type": "PixArtCacheFeatures", "inputs": {
            "family": "alpha", "cache_folder": str(root), "validation_prompts": "a red circle\n\na blue square",
            "verify": False, "dataset": ["1", 0], "vae": ["2", 0], "clip": ["3", 0]}},
    }  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_every_widget_is_explained_and_every_node_has_a_help_page(comfy, name):
    schema = comfy.classes[name].define_schema()
    assert schema.description and all(item.tooltip for item in (*schema.inputs, *schema.outputs))
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"`{item.id}`" in page for item in schema.inputs)


def test_a_graph_from_folder_to_cache_runs_through_the_executor(comfy, pictures, tmp_path):
    executor = comfy.run(graph(pictures.name, tmp_path / "cache"))
    assert executor.success, executor.status_messages
    shown = executor.history_result["outputs"]
    assert "6 usable, 0 excluded" in shown["1"]["text"][0]
    sheet = shown["1"]["images"][0]
    assert Image.open(comfy.base / "temp" / sheet["filename"]).width > 500
    assert "6 pictures and 9 captions encoded" in shown["4"]["text"][0]
    (path,) = (tmp_path / "cache" / "sets").glob("*.safetensors")
    index = Index(path)
    assert [text for text, _ in index.prompts()] == ["a red circle", "a blue square"]
    assert len(index) == 6


def test_problems_stop_the_graph_with_a_sentence_until_they_are_excluded(comfy, pictures, tmp_path):
    (pictures / "p0.txt").unlink()
    (pictures / "torn.png").write_bytes((pictures / "p1.png").read_bytes()[:900])
    stopped = comfy.run(graph(pictures.name, tmp_path / "cache"))
    shown = stopped.history_result["outputs"]["1"]["text"][0]
    assert "p0.png: missing caption" in shown and "torn.png: damaged" in shown
    assert "images" in stopped.history_result["outputs"]["1"] and not (tmp_path / "cache").exists()
    said = [data for event, data in stopped.status_messages if event == "execution_error"]
    messages = [data["exception_message"] for data in said] + [
        data.get("exception_message", "") for _, data in stopped.server.messages if isinstance(data, dict)
    ]
    assert any("2 of 7 pictures have problems" in message for message in messages)
    assert comfy.run(graph(pictures.name, tmp_path / "cache", exclude_problems=True)).success
    (path,) = (tmp_path / "cache" / "sets").glob("*.safetensors")
    assert len(Index(path)) == 5


def test_a_changed_caption_makes_the_data_set_run_again(comfy, pictures):
    fingerprint = comfy.classes["PixArtDataset"].fingerprint_inputs
    before = fingerprint(folder=pictures.name, size="256")
    assert fingerprint(folder=pictures.name, size="256") == before
    (pictures / "p0.txt").write_text("another caption")
    assert fingerprint(folder=pictures.name, size="256") != before


def test_a_list_with_a_name_that_no_file_can_have_has_a_fingerprint_too(comfy, pictures):
    (pictures / "metadata.jsonl").write_text(json.dumps({"path": "n" * 300 + ".png", "prompt": "x"}))
    assert comfy.classes["PixArtDataset"].fingerprint_inputs(folder=pictures.name, size="256")


@pytest.mark.parametrize(("folder", "message"), [("", "No data set is named"), ("nowhere", "There is no data set at")])
def test_a_folder_that_is_not_there_is_named(run, folder, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("PixArtDataset", folder=folder)


def test_data_sets_are_joined_by_a_cable_and_what_is_in_both_stops_the_graph(run, pictures, tmp_path):
    (first,) = run("PixArtDataset", folder=pictures.name, size="256", repeats=3).result
    for number in (10, 11):
        picture(number).save(tmp_path / f"p{number}.png")
        (tmp_path / f"p{number}.txt").write_text("of the class")
    inputs = {"folder": str(tmp_path), "size": "256", "role": "prior", "dataset": first}
    (both,) = run("PixArtDataset", **inputs).result
    assert [(s.role, s.repeats) for s in both.samples] == [("train", 3)] * 6 + [("prior", 1)] * 2
    shutil.copy(pictures / "p0.png", tmp_path / "p10.png")
    stopped = run("PixArtDataset", **inputs)
    assert f"p10.png: duplicate (the same file as p0.png for train in {pictures})" in stopped.text
    assert "1 of 2 pictures have problems" in stopped.output.block_execution
    (both,) = run("PixArtDataset", **inputs, exclude_problems=True).result
    assert [s.role for s in both.samples] == ["train"] * 6 + ["prior"]


def test_cached_latents_and_captions_are_those_that_comfyui_makes(comfy, cached, tiny, pictures):
    index, _ = cached()
    bucket, path = index.bucket(4), pictures / "p4.png"
    pixels = load_pixels(str(path), digest(path.read_bytes()), bucket.height, bucket.width)
    with torch.inference_mode():
        expected = tiny.vae.encode(pixels[None])[0]
    assert torch.allclose(index.latent(4), expected, atol=1e-5)
    with torch.inference_mode():
        output = comfy.classes["PixArtTextEncode"].execute(
            clip=tiny.clip, text="a red circle \\(number 4\\) and a blue square", family="alpha",
            unconditional="prompt", clean="auto", token_limit=0, one_prompt_per_line=False, width=0, height=0,
        )  # fmt: skip
    features = output.result[0][0][0][0]
    assert (index.caption(4).float() - features).abs().max() < 2e-3 * features.abs().max()


def test_the_moments_of_a_kl_vae_are_kept_with_their_std(comfy):
    """ComfyUI's own encode returns the mean; the std is what its regulariser is given."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    config = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    with torch.inference_mode():
        model = AutoencoderKL(ddconfig=config, embed_dim=4)
        model.load_state_dict({name: torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()})
        vae = SimpleNamespace(first_stage_model=model, encode=lambda x: model.encode(x.movedim(-1, 1) * 2 - 1))
        pixels = torch.rand(3, 64, 48, 3)
        moments = comfy.pack("comfy_bridge.features").vae_moments(vae, pixels)
        mean, logvar = model.quant_conv(model.encoder(pixels.movedim(-1, 1) * 2 - 1)).chunk(2, 1)
    assert moments.shape == (3, 8, 8, 6)
    assert torch.allclose(moments[:, :4], mean, atol=1e-4)
    assert torch.allclose(moments[:, 4:], (logvar.clamp(-30, 20) / 2).exp(), atol=1e-4)


def test_queueing_again_encodes_nothing_and_another_vae_or_family_keeps_the_old(cached, tmp_path):
    index, text = cached()
    assert "6 pictures and 7 captions encoded" in text
    again, text = cached()
    assert "0 pictures and 0 captions encoded, 6 and 7 were cached already" in text and again.path == index.path
    with pytest.raises(ValueError, match="used for PixArt alpha in .* and now for sigma"):
        cached("sigma")
    other, _ = cached("sigma", tmp_path / "other")
    assert other.family == "sigma" and Index(index.path).family == "alpha"
    with pytest.raises(ValueError, match="made for PixArt sigma, but the model is alpha"):
        Batches(other, "alpha", 1)


def test_verify_finds_a_flipped_bit_and_makes_the_shard_again(cached, tmp_path):
    index, _ = cached()
    shard = next((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    index, text = cached(verify=True)
    assert f"damaged shard put aside, its content made again: {shard.name}" in text
    assert all(torch.isfinite(index.latent(row)).all() for row in range(6))


def test_the_cache_says_what_is_missing(run, tiny, comfy):
    with pytest.raises(ValueError, match="Connect dataset, vae and clip"):
        run("PixArtCacheFeatures", cache_folder="x")


def test_wrong_models_are_named(run, tiny, pictures, tmp_path):
    (dataset,) = run("PixArtDataset", folder=pictures.name, size="256").result
    inputs = {"dataset": dataset, "cache_folder": str(tmp_path / "cache"), "vae": tiny.vae, "clip": tiny.clip}
    sd3 = SimpleNamespace(first_stage_model=tiny.vae.first_stage_model, latent_channels=16, latent_dim=2)
    with pytest.raises(ValueError, match="does not make latents of 4 channels"):
        run("PixArtCacheFeatures", **inputs | {"vae": sd3})
    empty = SimpleNamespace(first_stage_model=None)
    with pytest.raises(ValueError, match="This is no VAE"):
        run("PixArtCacheFeatures", **inputs | {"vae": empty})


def test_the_shell_command_and_the_node_recognise_each_others_models(tiny, comfy):
    """One cache, filled in ComfyUI and by `python -m pixart_nodes.data`: the same ids and the same features."""
    ours = comfy.pack("nodes.cache_features").encoders("alpha", tiny.vae, tiny.clip)
    theirs = load_encoders(
        "alpha", TINY / "vae" / "pixart-tiny-vae.safetensors", TINY / "text_encoders" / "pixart-tiny-t5", "cpu"
    )
    assert (ours.vae_id, ours.t5_id, ours.token_limit) == (theirs.vae_id, theirs.t5_id, theirs.token_limit)
    pixels = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    texts = ["a red circle", "a small blue square (left) on a green triangle, " * 30]
    with torch.inference_mode():
        assert torch.allclose(ours.encode_images(pixels), theirs.encode_images(pixels), atol=1e-4)
        for a, b in zip(ours.encode_captions(texts), theirs.encode_captions(texts), strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3)
        assert torch.allclose(ours.null_caption(), theirs.null_caption(), atol=1e-3)
    assert ours.caption_key("A Fox") == theirs.caption_key("a fox")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_a_t5_in_any_dtype_has_an_id(comfy, dtype):
    (clip,) = comfy.call("PixArtLoadT5", t5_name="pixart-tiny-t5", dtype=dtype, device="cpu")
    weights, ids = comfy.pack("comfy_bridge.features").t5_weights(clip, "a fox")
    assert len(comfy.pack("data.encode").weights_id(weights, ids)) == 16


def test_captions_are_written_by_a_model_in_comfyuis_folder(comfy, run, pictures):
    save_llava(comfy.base / "models" / "vlm" / "tiny-llava")
    for number in range(3):
        (pictures / f"p{number}.txt").unlink()
    assert "tiny-llava" in comfy.classes["PixArtCaption"].define_schema().inputs[1].options
    done = run("PixArtCaption", folder=pictures.name, model_name="tiny-llava", max_new_tokens=6)
    assert done.text.startswith("3 captions written, 3 kept as they were") and done.result == (str(pictures),)
    assert not run("PixArtDataset", folder=done.result[0], size="256").result[0].problems
    with pytest.raises(FileNotFoundError, match="There is no model 'gone'"):
        (pictures / "p0.txt").unlink()
        run("PixArtCaption", folder=pictures.name, model_name="gone")


def test_a_captioner_before_the_data_set_hands_its_folder_on(comfy, pictures, tmp_path):
    save_llava(comfy.base / "models" / "vlm" / "tiny-llava")
    (pictures / "p5.txt").unlink()
    chain = graph(["0", 0], tmp_path / "cache")
    chain["0"] = {"class_type": "PixArtCaption", "inputs": {
        "folder": pictures.name, "model_name": "tiny-llava", "prompt": "describe this image", "max_new_tokens": 5,
        "write": "caption", "existing": "keep", "device": "default"}}  # fmt: skip
    executor = comfy.run(chain)
    assert executor.success, executor.status_messages
    shown = executor.history_result["outputs"]
    assert shown["0"]["text"][0].startswith("1 captions written, 5 kept") and "6 usable" in shown["1"]["text"][0]


def test_features_of_pixarts_scripts_are_imported(run, tmp_path):
    data = tmp_path / "data"
    for folder in ("img_sdxl_vae_features_256resolution_ms_new", "caption_features_new"):
        (data / folder).mkdir(parents=True)
    np.save(data / "img_sdxl_vae_features_256resolution_ms_new" / "a.npy", np.ones((8, 32, 32), np.float32))
    np.savez(data / "caption_features_new" / "a.npz", caption_feature=np.ones((1, 300, 8), np.float16),
             attention_mask=np.eye(1, 300, dtype=np.int16))  # fmt: skip
    (data / "data_info.json").write_text(json.dumps([{"path": "a.png", "prompt": "x"}]))
    inputs = {"cache_folder": str(tmp_path / "cache"), "pixart_features": str(data)}
    done = run("PixArtCacheFeatures", family="sigma", **inputs)
    assert done.text.startswith("1 pictures imported, 0 problems") and len(done.result[0]) == 1
    with pytest.raises(ValueError, match="made for PixArt sigma, but the model is alpha"):
        run("PixArtCacheFeatures", family="alpha", **inputs)
