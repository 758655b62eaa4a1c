"""The workflows that users open: saved as the front end saves them, valid, and drawn by a real server."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from pixart_nodes.checkpoints import load_transformer, save_controlnet, save_native
from pixart_nodes.checkpoints.files import save_atomic
from pixart_nodes.checkpoints.keys import to_diffusers
from pixart_nodes.checkpoints.lora_export import save_lora
from pixart_nodes.checkpoints.lora_files import read_lora
from pixart_nodes.model import VARIANTS, ControlNetTransformer, PixArtTransformer
from pixart_nodes.model.position import position_table
from tests.data.conftest import write_pictures
from tests.data.tiny_vlm import save_llava
from tools.comfy_client import images
from tools.tiny import vae
from tools.tiny.oracle import score
from tools.tiny.scenes import Scene, SceneObject

from .tiny import ALPHA, ALPHA_MS, SIGMA, random_control, random_hed, random_weights
from .tiny_t5 import config, random_model, small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
OURS = {"PixArtLoadModel", "PixArtLoadT5", "PixArtTextEncode", "PixArtResolution", "PixArtSampling",
        "PixArtLCMSampler", "PixArtLCMSample", "PixArtDMDSampler", "PixArtLoadLora",
        "PixArtLoadControlNet", "PixArtApplyControlNet", "PixArtHEDEdges",
        "PixArtKVCompress", "PixArtUpscaleLatent", "PixArtTiledDecode", "PixArtTiledEncode", "PixArtPositionSpan",
        "PixArtStepCache", "PixArtGuidanceInterval", "PixArtCompile", "PixArtSaveModel",
        "PixArtDataset", "PixArtCaption", "PixArtCacheFeatures", "PixArtTrain"}  # fmt: skip
SIZE = {"text_to_image_sigma_1024": (288, 208), "sigma_2k": (336, 192), "sigma_4k_two_stage": (672, 384),
        "highres_img2img_tiny": (256, 256)}  # fmt: skip
SMALLER = {"512": "256", "1024": "256", "2048": "256", "4096": "512"}  # tables, for tests
FOLDERS = {"PixArtLoadModel": "diffusion_models", "PixArtLoadT5": "text_encoders", "VAELoader": "vae"}
OPTIONAL = {"PixArtLoadControlNet": "controlnet", "PixArtHEDEdges": "controlnet"}

every_workflow = pytest.mark.parametrize("name", NAMES)


def workflow(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


BUNDLED = [name for name in NAMES if '"pixart-tiny-' in json.dumps(workflow(name))]
bundled = pytest.mark.parametrize("name", [name for name in BUNDLED if name != "sigma_4k_tiny"])
released = pytest.mark.parametrize("name", sorted(set(NAMES) - set(BUNDLED) - {"caption_pictures"}))


def note(name):
    return "".join(node["widgets_values"][0] for node in workflow(name)["nodes"] if node["type"] == "MarkdownNote")


def api_copy(name):
    return json.loads((ROOT / "tests" / "workflows_api" / f"{name}.json").read_text(encoding="utf-8"))


def untitled(graph):
    """A graph without its titles: they are another version's names of ComfyUI's own nodes."""
    return {key: {part: node[part] for part in ("class_type", "inputs")} for key, node in graph.items()}


def nodes_of(graph, kind):
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


def pictures(comfy_server, history):
    saved = [entry for entry in images(history) if entry["type"] == "output"]
    return [Image.open(io.BytesIO(comfy_server.image(entry))) for entry in saved]


def comfy_cli(home, *words):
    """Runs comfy-cli with a configuration folder of its own -> (exit code, its JSON answer, everything it printed)."""
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "DO_NOT_TRACK": "1",
                   "NO_PROXY": "127.0.0.1", "PYTHONUTF8": "1"}  # fmt: skip
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--json", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stdout + done.stderr


# What is in the files


def test_every_node_of_the_pack_is_shown_in_a_workflow():
    assert OURS <= {node["type"] for name in NAMES for node in workflow(name)["nodes"]}


@every_workflow
def test_every_node_says_which_package_it_is_of(name):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    for node in workflow(name)["nodes"]:
        expected = ("pixart-nodes", version) if node["type"] in OURS else ("comfy-core", "0.3.75")
        if node["type"] != "MarkdownNote":
            properties = node["properties"]
            assert (properties["cnr_id"], properties["ver"]) == expected
            assert properties["Node name for S&R"] == node["type"]


@released
def test_every_loader_knows_where_its_released_file_comes_from(name):
    folders = FOLDERS | OPTIONAL
    loaders = [node for node in workflow(name)["nodes"] if node["type"] in folders]
    assert {node["type"] for node in loaders} >= set(FOLDERS)
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["directory"] == folders[node["type"]]
        address, file = model["url"].rsplit("/", 1)
        assert re.fullmatch(r"https://huggingface\.co/[\w-]+/[\w-]+/resolve/main(/transformer)?", address)
        renamed = file == "diffusion_pytorch_model.safetensors" and f"save it as **{model['name']}**" in note(name)
        assert file == model["name"] or renamed


@every_workflow
def test_a_workflow_is_laid_out_from_left_to_right_without_overlaps(name):
    saved = workflow(name)
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in saved["nodes"]}
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes.values(), 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h + 30 <= y2 or y2 + h2 + 30 <= y  # 30 px of title above each
    assert all(boxes[link[1]][0] <= boxes[link[3]][0] for link in saved["links"])
    assert any(node["type"] == "MarkdownNote" for node in saved["nodes"]) and saved["groups"]


# What ComfyUI makes of them


@pytest.fixture(scope="module")
def stand_ins(comfy_server):
    """Tiny random models under the names of the released files."""
    folder = {kind: comfy_server.models / kind for kind in (*FOLDERS.values(), "controlnet")}
    for path in folder.values():
        path.mkdir(exist_ok=True)
    narrow = {"hidden_size": 144, "num_heads": 2, "base_size": 64, "pe_interpolation": 2.0}  # 72 per head, as released
    for file, params in (("PixArt-XL-2-1024-MS.pth", ALPHA_MS), ("PixArt-Sigma-XL-2-1024-MS.pth", SIGMA)):
        params = replace(params, **narrow)
        weights = random_weights(params) | {"pos_embed": position_table(64, 64, 144, 64, 2.0)}
        torch.save({"state_dict": weights}, folder["diffusion_models"] / file)
    for file, params in (("PixArt-LCM-XL-2-1024-MS", ALPHA_MS), ("PixArt-Alpha-DMD-XL-2-512x512", ALPHA)):
        weights = to_diffusers(random_weights(replace(params, **narrow)))
        save_file(
            {key: tensor.clone() for key, tensor in weights.items()}, folder["diffusion_models"] / f"{file}.safetensors"
        )
    weights = random_weights(replace(SIGMA, **narrow)) | {"pos_embed": position_table(128, 128, 144, 128, 4.0)}
    torch.save({"state_dict": weights}, folder["diffusion_models"] / "PixArt-Sigma-XL-2-2K-MS.pth")
    params = replace(ALPHA_MS, **narrow)
    base = {f"base_model.{key}": tensor for key, tensor in random_weights(params).items()}
    torch.save({"state_dict": base | random_control(params)}, folder["controlnet"] / "PixArt-XL-2-1024-ControlNet.pth")
    torch.save(random_hed(), folder["controlnet"] / "ControlNetHED.pth")
    name, g = "transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    factors = {f"{name}.lora_A.weight": torch.randn(4, 144, generator=g), f"{name}.lora_B.weight": torch.ones(144, 4)}
    save_lora(read_lora(factors), comfy_server.models / "loras" / "flash-pixart", "peft")
    encoder = {name: tensor.clone() for name, tensor in random_model(config()).state_dict().items()}
    save_file(encoder, folder["text_encoders"] / "t5xxl_fp16.safetensors")
    save_llava(comfy_server.models / "vlm" / "SmolVLM-Instruct")
    torch.manual_seed(0)
    encoder, decoder = vae.make_encoder(), vae.make_decoder()
    for file in ("vae-ft-ema-560000-ema-pruned.safetensors", "sdxl_vae.safetensors"):
        save_atomic(vae.state_dict(encoder, decoder), folder["vae"] / file, {})
    return comfy_server


@every_workflow
def test_a_workflow_becomes_its_api_copy(comfy_server, name):
    assert untitled(comfy_server.to_api(workflow(name))) == untitled(api_copy(name))


@pytest.mark.usefixtures("tiny_controlnet")
@every_workflow
def test_comfy_cli_finds_no_fault_in_a_workflow(stand_ins, tmp_path, name):
    (tmp_path / "object_info.json").write_text(json.dumps(stand_ins.object_info()), encoding="utf-8")
    path = ROOT / "workflows" / f"{name}.json"
    code, answer, said = comfy_cli(tmp_path, "workflow", "validate", "--workflow", path, "--input", "object_info.json")
    assert code == 0, said
    assert answer["data"]["errors"] == answer["data"]["warnings"] == []


@pytest.fixture(scope="module")
def tiny_controlnet(comfy_server):
    """An untrained ControlNet of the bundled model, unless the pack brings a trained one."""
    name, bundled = "pixart-tiny-controlnet.safetensors", ROOT / "pixart_nodes" / "assets" / "tiny"
    if not (bundled / "controlnet" / name).exists():
        base, found = load_transformer(bundled / "diffusion_models" / "pixart-tiny-alpha.safetensors")
        net = ControlNetTransformer.from_base(base.float(), base.params.depth // 2)
        save_controlnet(net, comfy_server.models / "controlnet" / name, found.params, found.family, "untrained")


@pytest.mark.usefixtures("tiny_controlnet")
@bundled
def test_a_workflow_of_the_bundled_family_draws_as_it_is(comfy_server, name):
    graph = api_copy(name)
    for node in nodes_of(graph, "PixArtTrain"):
        node["steps"] = 2  # what it takes to run; not what it takes to learn
    found = pictures(comfy_server, comfy_server.queue(graph, workflow=workflow(name)))
    assert len(found) == sum(node["batch_size"] for node in nodes_of(graph, "EmptyLatentImage")) or len(found) == 1
    for picture in found:
        assert picture.size == SIZE.get(name, (192, 192))
        assert np.asarray(picture.convert("RGB")).std() > 5
        assert json.loads(picture.info["workflow"])["id"] == workflow(name)["id"]


def test_the_bundled_family_draws_what_its_workflow_says(comfy_server):
    """The prompt of the workflow: 'a large green ring at the left and a large orange star at the right, with ...'."""
    objects = (SceneObject("ring", "green", "left", "large"), SceneObject("star", "orange", "right", "large"),
               SceneObject("triangle", "white", "top", "small"))  # fmt: skip
    found = pictures(comfy_server, comfy_server.queue(api_copy("text_to_image_tiny")))
    read = [item for picture in found for item in score(np.asarray(picture.convert("RGB")), Scene(objects))["objects"]]
    assert len(read) == 12
    assert sum(item["all"] for item in read) >= 10


@released
def test_a_workflow_of_a_released_model_draws_with_tiny_models_in_its_place(stand_ins, name):
    graph = api_copy(name)
    for node in graph.values():
        node["inputs"] |= {"table": SMALLER[node["inputs"]["table"]]} if "table" in node["inputs"] else {}
        node["inputs"] |= {"other_vaes": "ComfyUI's own tiling"} if "other_vaes" in node["inputs"] else {}
        node["inputs"] |= {"steps": 2} if "steps" in node["inputs"] else {}
    (picture,) = pictures(stand_ins, stand_ins.queue(graph))
    assert picture.size == SIZE.get(name, (256, 256))


def test_the_caption_workflow_describes_a_folder_and_shows_it_as_training_data(stand_ins):
    graph = api_copy("caption_pictures")
    (captioner,) = nodes_of(graph, "PixArtCaption")
    captioner["max_new_tokens"] = 6
    folder = write_pictures(stand_ins.server.base / "input" / captioner["folder"], [(1024, 1024), (1300, 800)])
    (folder / "p1.txt").unlink()
    shown = stand_ins.queue(graph, workflow=workflow("caption_pictures"))["outputs"]
    said, listed = (output["text"][0] for output in shown.values())
    assert said.startswith("1 captions written, 1 kept as they were, 0 problems")
    assert (folder / "p0.txt").read_text() == "picture number 0" and (folder / "p1.txt").read_text().strip() in said
    assert "2 usable" in listed and len(images({"outputs": shown})) == 1


@pytest.mark.slow
def test_a_picture_of_4096_pixels_is_drawn_in_bounded_memory(comfy_server):
    """About five minutes on two CPU cores. Memory is read where Linux tells it: the peak since the run began."""
    process = Path("/proc", str(comfy_server.server.process.pid))
    if process.is_dir():
        (process / "clear_refs").write_text("5")
    history = comfy_server.queue(api_copy("sigma_4k_tiny"), workflow=workflow("sigma_4k_tiny"), timeout=1800)
    (picture,) = pictures(comfy_server, history)
    assert picture.size == (4096, 4096) and picture.format == "PNG"
    pixels = np.asarray(picture.convert("RGB"))
    red, blue = pixels[:1024, :1024].mean((0, 1)), pixels[3072:, 3072:].mean((0, 1))
    assert (red - blue)[0] > 20 and (red - blue)[2] < -20                    # the scene of the prompt
    assert pixels.std() > 10
    if process.is_dir():
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[1]) / 2**20
        assert peak < 4, f"{peak:.2f} GiB"


def test_comfy_cli_runs_a_workflow_on_the_server(comfy_server, tmp_path):
    path = ROOT / "workflows" / "text_to_image_tiny.json"
    where = ("--host", "127.0.0.1", "--port", comfy_server.server.port)
    code, answer, said = comfy_cli(tmp_path, "run", "--workflow", path, "--wait", *where)
    assert code == 0, said
    assert answer["ok"] and list(comfy_server.output.glob("pixart_tiny_*.png"))


def test_a_full_size_model_of_six_hundred_million_weights_loads_and_draws(stand_ins):
    params, models = VARIANTS["alpha-256"], stand_ins.models
    path = models / "diffusion_models" / "random-xl-2.safetensors"
    generator, shapes = torch.Generator().manual_seed(0), PixArtTransformer(params, device="meta").state_dict()
    weights = {key: torch.empty(t.shape).normal_(std=0.02, generator=generator).half() for key, t in shapes.items()}
    assert sum(tensor.numel() for tensor in weights.values()) > 0.6e9
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token="</s>", pad_token="<pad>")
    random_model(config(vocab_size=len(tokenizer), d_model=4096, num_layers=1)).save_pretrained(
        models / "text_encoders" / "wide"
    )
    tokenizer.save_pretrained(models / "text_encoders" / "wide")
    graph = api_copy("text_to_image_alpha_1024")
    (loader,), (encoder,) = nodes_of(graph, "PixArtLoadModel"), nodes_of(graph, "PixArtLoadT5")
    (size,), (sampler,) = nodes_of(graph, "PixArtResolution"), nodes_of(graph, "KSampler")
    loader["model_name"], encoder["t5_name"], size["table"], sampler["steps"] = path.name, "wide", "256", 1
    try:
        save_native(weights, params, path, "alpha", "random weights for a test")
        del weights
        (picture,) = pictures(stand_ins, stand_ins.queue(graph))
        assert picture.size == (256, 256)
    finally:
        path.unlink(missing_ok=True)
        stand_ins.post("/free", {"unload_models": True, "free_memory": True})
