"""Position spans and larger latents."""

import pytest
import torch

from pixart_nodes.model.position import position_table

from ..drive import latent, noise, sample
from .conftest import compress, denoised


@pytest.mark.parametrize(
    "name, size, span",
    [("sigma.safetensors", (32, 32), 32), ("sigma.safetensors", (512, 64), 32), ("alpha.safetensors", (32, 32), 16),
     ("alpha.safetensors", (16, 64), 16), ("alpha.safetensors", (64, 64), 32), ("alpha.safetensors", (512, 512), 32)],
)  # fmt: skip
def test_auto_spans_what_the_published_model_of_that_size_spans(comfy, load_model, name, size, span):
    (model,) = comfy.call("PixArtPositionSpan", model=load_model(name), span="auto")
    grid = (size[0] // 2, size[1] // 2)
    codes = model.get_model_object("diffusion_model.position_codes")(grid, torch.float32, "cpu")
    assert torch.equal(codes, position_table(*grid, 48, span, 1.0))


def test_trained_is_what_the_model_does_by_itself(comfy, load_model):
    model = load_model("alpha.safetensors")                                   # 256 px, positions to 16
    (auto,) = comfy.call("PixArtPositionSpan", model=model, span="auto")
    (trained,) = comfy.call("PixArtPositionSpan", model=auto, span="trained")
    plain = denoised(model, 64, 64)
    changed = denoised(auto, 64, 64)
    assert not torch.equal(changed, plain)
    assert torch.equal(denoised(trained, 64, 64), plain) and torch.equal(denoised(model, 64, 64), plain)
    assert torch.equal(denoised(auto, 64, 64), changed)


def upscale(comfy, samples, table="2048", method="bicubic", **extra):
    return comfy.call("PixArtUpscaleLatent", samples={"samples": samples, **extra}, table=table, method=method)


@pytest.mark.parametrize("method", ["bicubic", "bilinear", "nearest-exact", "area", "bislerp"])
def test_a_latent_grows_to_the_bucket_of_its_shape(comfy, method):
    out, width, height = upscale(comfy, noise(2, 72, 168), "2048", method)    # 1344 x 576 px, 0.43 of 1024's table
    assert (width, height) == (3072, 1280) and out["samples"].shape == (2, 4, 160, 384)
    assert out["samples"].isfinite().all()


@pytest.mark.parametrize("table", ["2048", "2880", "4096"])
def test_what_sticks_out_is_cut_off_and_nothing_is_stretched(comfy, table):
    """A latent whose values are its columns keeps equal steps in both directions."""
    ramp = torch.arange(128.0).expand(1, 4, 96, 128)
    down = torch.arange(96.0)[:, None].expand(1, 4, 96, 128)
    out, down = (upscale(comfy, tensor, table, "bilinear")[0]["samples"] for tensor in (ramp, down))
    across, along = out[0, 0, 5].diff()[40:60].mean(), down[0, 0, :, 5].diff()[40:60].mean()
    assert across.item() == pytest.approx(along.item(), rel=0.03)


def test_a_mask_follows_and_the_rest_is_kept(comfy):
    mask = torch.zeros(1, 512, 512)
    mask[..., 256:] = 1
    samples = noise(1, 64, 64)
    out, _, _ = upscale(comfy, samples, noise_mask=mask, batch_index=[3])
    assert out["noise_mask"].shape == (1, 1, 256, 256) and out["batch_index"] == [3]
    assert not out["noise_mask"][..., :127].any() and out["noise_mask"][..., 129:].all()
    assert samples.shape == (1, 4, 64, 64)


def test_latents_of_other_models_and_broken_ones_are_named(comfy):
    with pytest.raises(ValueError, match=r"image latents of 4 channels.*got \(1, 16, 8, 8\)"):
        upscale(comfy, torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"image latents of 4 channels.*got \(1, 4, 3, 8, 8\)"):
        upscale(comfy, torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="values that are no numbers"):
        upscale(comfy, torch.full((1, 4, 8, 8), torch.nan))


def test_two_stages_keep_the_composition_and_add_to_it(comfy, sigma):
    first = sample(comfy, sigma, size=latent(16, 16))
    larger, _, _ = upscale(comfy, first, "256")
    second = sample(comfy, compress(comfy, sigma, "all"), size=larger, denoise=0.3, steps=4, cfg=1.0)
    assert second.shape == (1, 4, 32, 32)
    assert 0 < (second - larger["samples"]).norm() < larger["samples"].norm()
