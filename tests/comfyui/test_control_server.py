"""Wrong ControlNets and wrong images on a real server: what is said, and that the server goes on."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixart_nodes.checkpoints import load_transformer, save_controlnet
from tools.comfy_client import ComfyError, images

from .tiny import random_control

BUNDLED = Path(__file__).parents[2] / "pixart_nodes" / "assets" / "tiny" / "diffusion_models"
BASE = "pixart-tiny-alpha.safetensors"


@pytest.fixture(scope="module")
def server(comfy_server):
    """The server with ControlNets for the bundled model and for others, and files that are something else."""
    folder = comfy_server.models / "controlnet"
    folder.mkdir(exist_ok=True)
    _, found = load_transformer(BUNDLED / BASE)
    wide = replace(found.params, hidden_size=48, num_heads=4)
    for name, params, family in (
        ("right", found.params, "alpha"), ("wide", wide, "alpha"), ("sigma", found.params, "sigma")
    ):  # fmt: skip
        save_controlnet(random_control(params), folder / f"{name}.safetensors", params, family, "a test")
    (folder / "base.safetensors").write_bytes((BUNDLED / BASE).read_bytes())
    stable_diffusion = {"zero_convs.0.0.weight": torch.zeros(2), "input_hint_block.0.weight": torch.zeros(2)}
    save_file(stable_diffusion, folder / "sd.safetensors")
    (folder / "broken.pth").write_bytes(b"<html>not found</html>")
    nothing = {"latent_tensor": torch.full((1, 4, 16, 16), torch.nan), "latent_format_version_0": torch.zeros(0)}
    save_file(nothing, comfy_server.base / "input" / "nan.latent")
    yield comfy_server
    for name in ("right", "wide", "sigma", "base", "sd"):
        (folder / f"{name}.safetensors").unlink()
    (folder / "broken.pth").unlink()


def graph(control="right.safetensors", image=("picture", 0), node="PixArtApplyControlNet", **widgets):
    """Two steps of the bundled model with a ControlNet, and images to choose from."""
    apply = {
        "positive": ["prompt", 0], "negative": ["prompt", 0], "control_net": ["control", 0], "image": list(image),
        "vae": ["vae", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
    }  # fmt: skip
    if node == "PixArtApplyControlNet":
        apply |= {"fit": "crop", "posterior": "mode", "posterior_seed": 0, "block_weights": ""}
    nodes = {
        "model": ("PixArtLoadModel", {"model_name": BASE, "family": "auto", "base_size": "auto",
                                      "weight_dtype": "auto", "weights": "ema if present"}),
        "t5": ("PixArtLoadT5", {"t5_name": "pixart-tiny-t5", "dtype": "auto", "device": "default"}),
        "vae": ("VAELoader", {"vae_name": "pixart-tiny-vae.safetensors"}),
        "control": ("PixArtLoadControlNet", {"control_net_name": control, "base": "load it elsewhere",
                                             "weight_dtype": "auto"}),
        "prompt": ("CLIPTextEncode", {"clip": ["t5", 0], "text": "a red circle"}),
        "picture": ("EmptyImage", {"width": 128, "height": 128, "batch_size": 1, "color": 0x808080}),
        "dot": ("EmptyImage", {"width": 1, "height": 1, "batch_size": 1, "color": 0xFFFFFF}),
        "mask": ("SolidMask", {"value": 0.5, "width": 128, "height": 128}),
        "alpha": ("JoinImageWithAlpha", {"image": ["picture", 0], "alpha": ["mask", 0]}),
        "nan": ("LoadLatent", {"latent": "nan.latent"}),
        "no numbers": ("VAEDecode", {"samples": ["nan", 0], "vae": ["vae", 0]}),
        "apply": (node, apply | widgets),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sampler": ("KSampler", {"model": ["model", 0], "positive": ["apply", 0], "negative": ["apply", 1],
                                 "latent_image": ["latent", 0], "seed": 1, "steps": 2, "cfg": 4.5,
                                 "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "control"}),
    }  # fmt: skip
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def drawn(server, **settings):
    (entry,) = images(server.queue(graph(**settings)))
    return np.asarray(Image.open(io.BytesIO(server.image(entry)))).astype(int)


def test_both_apply_nodes_steer_alike_and_by_their_strength(server):
    ours = drawn(server)
    assert np.array_equal(ours, drawn(server, node="ControlNetApplyAdvanced"))
    assert np.array_equal(drawn(server, strength=0.0), drawn(server, strength=0.0, node="ControlNetApplyAdvanced"))
    assert abs(ours - drawn(server, strength=0.0)).mean() > 1


def test_an_image_with_an_alpha_channel_counts_as_its_visible_part(server):
    transparent = drawn(server, image=("alpha", 0))
    assert abs(transparent - drawn(server)).mean() > 0.1
    assert "alpha channel: its transparent parts count as black" in server.log()


@pytest.mark.parametrize("settings, message", [
    ({"control": "base.safetensors"},
     "base.safetensors: This is not a PixArt ControlNet but a PixArt transformer: load it with PixArtLoadModel"),
    ({"control": "sd.safetensors"},
     "sd.safetensors: This is not a PixArt ControlNet but a Stable Diffusion ControlNet: it does not fit PixArt"),
    ({"control": "broken.pth"}, "broken.pth cannot be read: it is a web page. Please download the file itself"),
    ({"control": "wide.safetensors"},
     rf"wide.safetensors does not fit {BASE}: the width of its blocks is 48, of the model's \d+.* Use the model that"),
    ({"control": "sigma.safetensors"},
     rf"sigma.safetensors does not fit {BASE}: it was trained on PixArt-sigma, the model is PixArt-alpha. Use the"),
    ({"image": ("no numbers", 0)}, r"right.safetensors got an image with values that are no numbers .* Look at what"),
    ({"image": ("dot", 0)}, "right.safetensors got an image of 1 x 1 pixels.* Connect one of at least 16 x 16 pixels"),
    ({"strength": 11.0}, r"node apply \(.*\): Value 11.0 bigger than max of 10.0"),
    ({"strength": -1.0}, r"node apply \(.*\): Value -1.0 smaller than min of 0.0"),
])  # fmt: skip
@pytest.mark.parametrize("node", ["PixArtApplyControlNet", "ControlNetApplyAdvanced"])
def test_what_cannot_work_is_explained_and_the_server_goes_on(server, node, settings, message):
    with pytest.raises(ComfyError, match=message):
        server.queue(graph(node=node, **settings))
    assert images(server.queue(graph(node=node)))


def test_without_a_vae_comfyuis_node_is_told_what_to_connect(server):
    without = graph(node="ControlNetApplyAdvanced")
    del without["apply"]["inputs"]["vae"]
    with pytest.raises(ComfyError, match="node apply .*right.safetensors reads its image through the VAE: connect"):
        server.queue(without)


def test_the_model_output_without_a_model_says_what_to_do(server):
    wrong = graph()
    wrong["sampler"]["inputs"]["model"] = ["control", 1]
    with pytest.raises(ComfyError, match="hands out a model only with `base` set to 'from this file'"):
        server.queue(wrong)


def test_a_file_without_a_base_cannot_hand_one_out(server):
    wrong = graph()
    wrong["control"]["inputs"]["base"] = "from this file"
    with pytest.raises(ComfyError, match="no base model in this ControlNet's file: take one from PixArtLoadModel"):
        server.queue(wrong)


def test_a_control_net_given_to_the_model_loader_is_named(server):
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    (folder / "control.safetensors").write_bytes((server.models / "controlnet" / "right.safetensors").read_bytes())
    wrong = graph()
    wrong["model"]["inputs"]["model_name"] = "control.safetensors"
    try:
        with pytest.raises(ComfyError, match="a PixArt ControlNet: load it with PixArtLoadControlNet"):
            server.queue(wrong)
    finally:
        (folder / "control.safetensors").unlink()
