"""Every node does its work with the defaults of its widgets: no name is missing, no option misspelt."""

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints import save_controlnet

from ..data.conftest import write_pictures
from .drive import prompt
from .test_tiled_vae import make_vae
from .tiny import SIGMA, random_control, random_hed

ELSEWHERE = {"PixArtCaption": "tests/data/test_captions.py", "PixArtTrain": "tests/comfyui/test_train_node.py"}
NODES = ("ApplyControlNet", "CacheFeatures", "Compile", "DMDSampler", "Dataset", "GuidanceInterval", "HEDEdges",
         "KVCompress", "LCMSample", "LCMSampler", "LoadControlNet", "LoadLora", "LoadModel", "LoadT5", "PositionSpan",
         "Resolution", "Sampling", "SaveModel", "StepCache", "TextEncode", "TiledDecode", "TiledEncode",
         "UpscaleLatent")  # fmt: skip


@pytest.fixture(scope="module")
def given(comfy, tiny_t5, tmp_path_factory):
    """What widgets without a default are set to, and what comes through each kind of socket."""
    folder = comfy.folder("controlnet")
    save_controlnet(random_control(SIGMA), folder / "defaults.safetensors", SIGMA, "sigma", "a test")
    torch.save(random_hed(), folder / "defaults_hed.pth")
    module = "blocks.0.attn.proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 48), f"{module}.lora_B.weight": torch.ones(48, 2)}
    save_file(factors, comfy.folder("loras") / "defaults.safetensors")
    pictures = write_pictures(tmp_path_factory.mktemp("defaults") / "pictures", [(1024, 1024)])
    widgets = {"model_name": "sigma.safetensors", "t5_name": tiny_t5.path.name, "lora_name": "defaults.safetensors",
               "control_net_name": "defaults.safetensors", "hed_name": "defaults_hed.pth", "folder": str(pictures),
               "cache_folder": str(pictures / "cache"), "text": "a red fox"}  # fmt: skip
    defaults = {"family": "auto", "base_size": "auto", "weight_dtype": "auto", "weights": "ema if present"}
    (model,) = comfy.call("PixArtLoadModel", model_name="sigma.safetensors", **defaults)
    control = {"control_net_name": "defaults.safetensors", "base": "load it elsewhere", "weight_dtype": "auto"}
    sockets = {
        "MODEL": model, "CLIP": tiny_t5.clip, "VAE": comfy.call("VAELoader", vae_name="pixart-tiny-vae.safetensors")[0],
        "CONTROL_NET": comfy.call("PixArtLoadControlNet", **control)[0], "CONDITIONING": prompt(5, 1),
        "IMAGE": torch.rand(1, 128, 128, 3), "LATENT": {"samples": torch.zeros(1, 4, 16, 16)},
    }  # fmt: skip
    return widgets, sockets


def inputs_of(node, widgets, sockets):
    """Connected sockets, and widgets as they stand when the node is new. Optional sockets stay open."""
    found = {}
    for item in node.GET_SCHEMA().inputs:
        kind, default = item.get_io_type(), getattr(item, "default", None)
        if kind in sockets:
            found |= {} if item.optional else {item.id: sockets[kind]}
        elif kind in ("COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"):
            first = (getattr(item, "options", None) or [""])[0]
            found[item.id] = widgets[item.id] if default in (None, "") and item.id in widgets else (
                first if default is None else default)  # fmt: skip
    return found


def test_every_node_of_the_pack_is_looked_at(comfy):
    ours = {name for name in comfy.classes if name.startswith("PixArt")}
    assert {f"PixArt{name}" for name in NODES} | set(ELSEWHERE) == ours


@pytest.mark.parametrize("name", NODES)
def test_a_node_works_with_the_defaults_of_its_widgets(comfy, given, name):
    widgets, sockets = given
    node = comfy.classes[f"PixArt{name}"]
    inputs = inputs_of(node, widgets, sockets)
    if name.startswith("Tiled"):  # the bundled VAE is of a kind that they refuse
        inputs["vae"] = make_vae()
    if name == "CacheFeatures":  # its sockets are optional, because features can be imported instead
        inputs |= {"vae": sockets["VAE"], "clip": sockets["CLIP"], "cache_folder": widgets["cache_folder"],
                   "dataset": comfy.call("PixArtDataset", **inputs_of(comfy.classes["PixArtDataset"], widgets, {}))[0]}
    with torch.inference_mode():
        output = node.execute(**inputs)
    results = output.result or ()
    assert len(results) == len(node.GET_SCHEMA().outputs)
    assert all(result is not None for result in results)
