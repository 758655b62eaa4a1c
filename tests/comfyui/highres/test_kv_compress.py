"""KV compression as a model patch, inside a real ComfyUI."""

import logging

import pytest
import torch

from ..drive import latent, noise, prompt, sample
from .conftest import compress, denoised, key_counts, lora_of_qkv


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
