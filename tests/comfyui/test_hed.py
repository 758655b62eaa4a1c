"""PixArt HED Edges inside a real ComfyUI."""

import pytest
import torch

from pixart_nodes.checkpoints.hed import load_hed

from .tiny import random_hed


@pytest.fixture(scope="module")
def hed_file(comfy):
    path = comfy.folder("controlnet") / "ControlNetHED.pth"
    torch.save(random_hed(), path)
    return path


def pictures(height=40, width=72, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(1))


def edges_of(comfy, image):
    return comfy.call("PixArtHEDEdges", image=image, hed_name="ControlNetHED.pth")[0]


def test_the_node_gives_the_detectors_edges_as_white_on_black_pictures(comfy, hed_file):
    image = pictures(batch=2)
    edges = edges_of(comfy, image)
    with torch.no_grad():
        expected = load_hed(hed_file)(image.movedim(-1, 1))
    assert edges.shape == (2, 40, 72, 3) and torch.equal(edges[..., 0], edges[..., 2])
    assert (edges[..., 0] - expected[:, 0]).abs().max() < 1e-5


def test_a_batch_is_its_pictures_one_by_one(comfy, hed_file):
    image = pictures(batch=3)
    assert torch.allclose(edges_of(comfy, image)[1:2], edges_of(comfy, image[1:2]), atol=1e-6)


def test_grey_and_transparent_pictures_are_taken(comfy, hed_file):
    image = pictures(channels=4)
    visible = image[..., :3] * image[..., 3:]
    out = comfy.classes["PixArtHEDEdges"].execute(image=image, hed_name="ControlNetHED.pth")
    assert torch.allclose(out.result[0], edges_of(comfy, visible), atol=1e-6)
    assert "alpha channel" in out.ui.as_dict()["text"][0]
    assert edges_of(comfy, pictures(channels=1)).shape == (1, 40, 72, 3)


def test_detectors_are_listed_first(comfy, hed_file):
    (hed_file.parent / "a.safetensors").touch()
    names = comfy.classes["PixArtHEDEdges"].define_schema().inputs[1].options
    assert names[0] == "ControlNetHED.pth" and "a.safetensors" in names[1:]


def test_a_picture_too_small_says_what_it_needs(comfy, hed_file):
    with pytest.raises(ValueError, match="PixArt HED Edges got an image of 8 x 40 pixels.* at least 16 x 16"):
        edges_of(comfy, pictures(width=8))


def test_a_picture_of_no_numbers_is_refused(comfy, hed_file):
    with pytest.raises(ValueError, match="PixArt HED Edges got an image with values that are no numbers"):
        edges_of(comfy, pictures() * torch.nan)
