"""The HED edge detector: hand-computed, of any size, in tiles, and refused when the file is another."""

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints.hed import load_hed
from pixart_nodes.model.hed import BLOCKS, HED, REACH, STRIDES

# ControlNetHED.pth, by its layout: 29 tensors.
LAYOUT = {
    "norm": (1, 3, 1, 1),
    "block1.convs.0.weight": (64, 3, 3, 3), "block1.convs.1.weight": (64, 64, 3, 3),
    "block2.convs.0.weight": (128, 64, 3, 3), "block2.convs.1.weight": (128, 128, 3, 3),
    "block3.convs.0.weight": (256, 128, 3, 3), "block3.convs.1.weight": (256, 256, 3, 3),
    "block3.convs.2.weight": (256, 256, 3, 3),
    "block4.convs.0.weight": (512, 256, 3, 3), "block4.convs.1.weight": (512, 512, 3, 3),
    "block4.convs.2.weight": (512, 512, 3, 3),
    "block5.convs.0.weight": (512, 512, 3, 3), "block5.convs.1.weight": (512, 512, 3, 3),
    "block5.convs.2.weight": (512, 512, 3, 3),
    "block1.projection.weight": (1, 64, 1, 1), "block2.projection.weight": (1, 128, 1, 1),
    "block3.projection.weight": (1, 256, 1, 1), "block4.projection.weight": (1, 512, 1, 1),
    "block5.projection.weight": (1, 512, 1, 1),
}  # fmt: skip
LAYOUT |= {name[:-6] + "bias": shape[:1] for name, shape in LAYOUT.items() if name.endswith("weight")}


def random_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        for name, shape in LAYOUT.items()
    }


def narrow(monkeypatch):
    """The same network with few channels, where width does not matter."""
    widths = ((3, 4, 2), (4, 6, 2), (6, 6, 3), (6, 8, 3), (8, 8, 3))
    assert [count for *_, count in widths] == [count for *_, count in BLOCKS]
    monkeypatch.setattr("pixart_nodes.model.hed.BLOCKS", widths)
    torch.manual_seed(0)
    model = HED()
    torch.nn.init.uniform_(model.norm, 0, 255)
    return model.eval().requires_grad_(False)


def picture(height, width, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_it_has_the_tensors_of_the_published_file():
    assert {name: tuple(t.shape) for name, t in HED(device="meta").state_dict().items()} == LAYOUT
    assert sum(t.numel() for t in HED(device="meta").parameters()) == 14_716_168


def test_a_hand_computed_case():
    """All kernels pass channel 0 on, so side map n is the picture's red after n - 1 poolings, times n, plus a bias."""
    model = HED()
    for name, tensor in model.state_dict().items():
        tensor.zero_()
        if name.endswith("weight") and "convs" in name:
            tensor[0, 0, 1, 1] = 1
        if name.endswith("projection.weight"):
            tensor[0, 0] = int(name[5]) / 255
    model.norm.data[0, 0] = 51.0
    model.block5.projection.bias.data[0] = -1.0
    red = torch.zeros(16, 16)
    red[5, 9], red[0, 0] = 1.0, 0.4                     # minus the norm: 204 and 51; everywhere else -51, cut off to 0
    edges = model(torch.stack([red, red * 0.3, 1 - red])[None]).detach()
    # Side maps at (5, 9): 0.8, then 2 x 0.8, 3 x 0.8, 4 x 0.8 (interpolated) and 5 x 0.8 - 1 (one value for all).
    s2, s4, s8 = torch.zeros(8, 8), torch.zeros(4, 4), torch.zeros(2, 2)
    s2[2, 4], s4[1, 2], s8[0, 1] = 1.6, 2.4, 3.2
    s2[0, 0], s4[0, 0], s8[0, 0] = 0.4, 0.6, 0.8
    up = [torch.nn.functional.interpolate(s[None, None], (16, 16), mode="bilinear") for s in (s2, s4, s8)]
    s1 = torch.zeros(16, 16)
    s1[5, 9], s1[0, 0] = 0.8, 0.2
    expected = torch.sigmoid((s1 + sum(up)[0, 0] + 3.0) / 5)
    assert torch.allclose(edges[0, 0], expected, atol=1e-6)
    # By hand: pixel 5 lies between centres 2 and 3 of 8 at weight 3/4, pixel 9 at 4 with 3/4 to 5.
    at = 0.8 + 1.6 * 0.75 * 0.75 + 2.4 * 0.875 * 0.875 + 3.2 * (1 - 0.1875) * 0.6875 + 0.8 * 0.8125 * 0.3125 + 3.0
    assert edges[0, 0, 5, 9].item() == pytest.approx(1 / (1 + 2.718281828 ** (-at / 5)), abs=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (40, 100), (129, 65)])
def test_any_size_gives_edges_of_that_size(monkeypatch, size):
    edges = narrow(monkeypatch)(picture(*size, batch=2))
    assert edges.shape == (2, 1, *size) and edges.min() >= 0 and edges.max() <= 1 and edges.std() > 0


@pytest.mark.parametrize("size", [(400, 300), (397, 411), (64, 700)])
def test_tiles_change_nothing(monkeypatch, size):
    model, image = narrow(monkeypatch), picture(*size)
    whole = model(image, tile=1024)
    assert torch.allclose(model(image, tile=64), whole, atol=1e-6)
    assert torch.allclose(model(image, tile=112), whole, atol=1e-6)


def test_a_tile_has_all_the_surroundings_that_the_coarsest_map_sees():
    convolutions = sum(count * stride for (*_, count), stride in zip(BLOCKS, STRIDES, strict=True))
    poolings = sum(stride for stride in STRIDES[:-1])  # each looks one value of its input further to one side
    assert convolutions + poolings <= REACH and REACH % STRIDES[-1] == 0


def test_a_picture_too_small_and_a_crooked_tile_are_refused(monkeypatch):
    model = narrow(monkeypatch)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, not 64 x 15"):
        model(picture(15, 64))
    with pytest.raises(ValueError, match="100 pixels is no multiple of 16"):
        model(picture(16, 16), tile=100)


def test_a_published_file_loads_and_detects(tmp_path):
    weights = random_weights()
    torch.save(weights, tmp_path / "ControlNetHED.pth")
    model = load_hed(tmp_path / "ControlNetHED.pth")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model(picture(32, 32)).std() > 0
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "hed.safetensors")
    assert load_hed(tmp_path / "hed.safetensors").norm.dtype == torch.float32


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("block3.convs.1.bias"), r"lacks block3.convs.1.bias"),
    (lambda w: w.update(extra=torch.ones(1)), "also holds extra"),
    (lambda w: w.update(norm=torch.ones(3)), r"norm is \(3,\), expected \(1, 3, 1, 1\)"),
])  # fmt: skip
def test_a_damaged_file_says_what_is_wrong(tmp_path, change, message):
    weights = random_weights()
    change(weights)
    torch.save(weights, tmp_path / "hed.pth")
    with pytest.raises(ValueError, match=f"hed.pth is not the HED detector of ControlNet: .*{message}"):
        load_hed(tmp_path / "hed.pth")


@pytest.mark.parametrize("names, message", [
    (("controlnet.0.after_proj.weight",), "a PixArt ControlNet"),
    (("t_block.1.weight",), "a PixArt transformer"),
    (("encoder.conv_in.weight",), "a VAE"),
    (("something",), "tensors named something"),
])  # fmt: skip
def test_another_file_is_named(tmp_path, names, message):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors is no HED edge detector but {message}"):
        load_hed(tmp_path / "x.safetensors")
