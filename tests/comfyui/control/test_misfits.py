"""What does not fit is refused with a sentence, and a base in a ControlNet's file can be taken."""

from dataclasses import replace

import pytest
import torch

from pixart_nodes.checkpoints import save_controlnet

from ..drive import prompt, sample
from ..tiny import SIGMA, random_control, random_weights
from .conftest import edges


def nan_image():
    image = edges()
    image[0, 5, 5, 1] = torch.nan
    return image


@pytest.mark.parametrize("image, message", [
    (nan_image(), r"values that are no numbers .* Look at what"), (edges(1, 1), r"1 x 1 pixels, .* at least 16 x 16"),
    (torch.rand(1, 64, 64, 5), r"shape \(1, 5, 64, 64\).* Connect an IMAGE"),
])  # fmt: skip
def test_an_image_that_cannot_be_followed_is_refused_where_it_is_applied(load, apply, apply_ours, image, message):
    for node in (apply, apply_ours):
        with pytest.raises(ValueError, match=rf"sigma.safetensors got an image .*{message}"):
            node(load(), image)


def test_without_a_vae_the_node_says_what_to_connect(load, apply):
    with pytest.raises(ValueError, match="connect the VAE that belongs to the PixArt model to the `vae` input"):
        apply(load(), vae=None)


def test_a_vae_of_another_kind_is_named_by_its_latents(comfy, sigma, load, apply):
    class Vae:
        def encode(self, pixels):
            return torch.zeros(pixels.shape[0], 16, pixels.shape[1] // 8, pixels.shape[2] // 8)

    with pytest.raises(ValueError, match=r"latents of shape \(16, 16, 16\).* works on \(4, 16, 16\)"):
        sample(comfy, sigma, *apply(load(), vae=Vae()))


def test_a_control_net_of_another_base_is_refused_with_the_difference(comfy, sigma, load_model, files, load, apply):
    wide = replace(SIGMA, hidden_size=72, num_heads=6)
    save_controlnet(random_control(wide), files / "wide.safetensors", wide, "sigma", "a test")
    deep = replace(SIGMA, depth=5)
    save_controlnet(random_control(deep, 4), files / "deep.safetensors", deep, "sigma", "a test")
    for name, reason in (
        ("wide", "the width of its blocks is 72, of the model's 48"), ("deep", "trained on 5 blocks, the model has 3"),
        ("alpha_ms", "trained on PixArt-alpha, the model is PixArt-sigma"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.safetensors does not fit sigma.safetensors: .*{reason}"):
            sample(comfy, sigma, *apply(load(f"{name}.safetensors")))


def test_our_control_net_on_a_model_of_another_loader_is_refused(comfy, load, apply):
    import comfy.model_base

    class Other(comfy.model_base.BaseModel):
        def __init__(self):
            pass

    control = apply(load())[0][0][1]["control"]
    with pytest.raises(ValueError, match="used on a Other model. Load the PixArt model with PixArt Load Model"):
        control.pre_run(Other(), lambda percent: 1 - percent)


def test_a_control_net_of_another_kind_on_our_model_is_refused(comfy, sigma, apply_ours):
    from comfy.controlnet import ControlNet

    foreign = ControlNet(torch.nn.Linear(1, 1), load_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="another model's ControlNet. Load it with PixArt Load ControlNet"):
        apply_ours(foreign)
    conds = [[entry[0], {"control": foreign}] for entry in prompt(7, 1)]
    with pytest.raises(ValueError, match="sigma.safetensors got a ControlNet for another kind of model. Take one for"):
        sample(comfy, sigma, conds)


@pytest.mark.parametrize("widgets, message", [
    ({"block_weights": "1, x"}, "'1, x' should be numbers"), ({"block_weights": "nan"}, "should be numbers"),
    ({"block_weights": "1 1 1"}, "has 3 numbers, but this ControlNet has 2 blocks"),
    ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 is after end_percent 0.2"),
])  # fmt: skip
def test_widgets_that_make_no_sense_are_refused(load, apply_ours, widgets, message):
    with pytest.raises(ValueError, match=message):
        apply_ours(load(), **widgets)


def test_a_name_that_is_not_listed_is_refused(load):
    with pytest.raises(FileNotFoundError, match="not in ComfyUI's ControlNet folders"):
        load("../../etc/passwd")


def test_the_base_in_the_file_can_be_taken(comfy, files, load_model, apply):
    from comfy_execution.graph_utils import ExecutionBlocker

    both = {f"base_model.{name}": tensor for name, tensor in random_weights(SIGMA).items()} | random_control(SIGMA)
    torch.save({"state_dict": both}, files / "original.pth")
    (files / "config.json").write_text('{"num_heads": 4, "hidden_size": 48, "caption_channels": 32, "base_size": 16, '
                                       '"pe_interpolation": 0.5}')  # fmt: skip
    try:
        widgets = {"control_net_name": "original.pth", "weight_dtype": "auto"}
        control, model = comfy.call("PixArtLoadControlNet", base="from this file", **widgets)
        other, blocked = comfy.call("PixArtLoadControlNet", base="load it elsewhere", **widgets)
    finally:
        (files / "config.json").unlink()
    assert isinstance(blocked, ExecutionBlocker) and "PixArt Load Model" in blocked.message
    out = sample(comfy, model, *apply(control))
    assert torch.allclose(out, sample(comfy, load_model(), *apply(other)), atol=1e-6)
    loader, arguments = model.cached_patcher_init[:2]
    assert arguments[-1] is True


def test_a_file_without_a_base_says_so(comfy, files):
    with pytest.raises(ValueError, match="sigma.safetensors: There is no base model in this ControlNet's file"):
        comfy.call("PixArtLoadControlNet", control_net_name="sigma.safetensors", base="from this file",
                   weight_dtype="auto")  # fmt: skip
