"""PixArt Tiled Decode and PixArt Tiled Encode inside a real ComfyUI, against its own decode and encode in one piece."""

import pytest
import torch

from ..vae.autoencoders import assert_same, noise, psnr, randomise

STEREOTYPE = {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "num_res_blocks": 2,
              "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
SMALL = {"z_channels": 4, "ch": 32, "ch_mult": [1, 2, 2, 2]}  # ComfyUI's GroupNorm has 32 groups


def make_vae(seed=0, **shape):
    """A ComfyUI VAE around an AutoencoderKL with random weights. Its pictures stay inside 0..1, so nothing is cut."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.sd import VAE

    ddconfig = STEREOTYPE | SMALL | shape
    params = {"ddconfig": ddconfig, "embed_dim": ddconfig["z_channels"]}
    model = randomise(AutoencoderKL(**params), seed)
    model.decoder.conv_out.weight *= 0.2
    vae = VAE(sd=model.state_dict(), config={"params": params}, dtype=torch.float32)
    vae.latent_channels = ddconfig["z_channels"]
    return vae


@pytest.fixture(scope="module")
def vae(comfy):
    return make_vae()


def decode(comfy, vae, samples, **widgets):
    defaults = {"tile_size": 64, "memory_gb": 0.0, "store": "full", "mode": "exact", "other_vaes": "refuse"}
    return comfy.call("PixArtTiledDecode", vae=vae, samples={"samples": samples}, **defaults | widgets)[0]


def encode(comfy, vae, pixels, **widgets):
    defaults = {"tile_size": 64, "memory_gb": 0.0, "store": "full", "other_vaes": "refuse"}
    return comfy.call("PixArtTiledEncode", vae=vae, pixels=pixels, **defaults | widgets)[0]["samples"]


def whole_decode(comfy, vae, samples):
    return comfy.call("VAEDecode", vae=vae, samples={"samples": samples})[0]


def pictures(batch=1, height=64, width=96):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("batch, height, width", [(1, 16, 16), (2, 9, 21), (1, 3, 30)])
def test_decodes_as_comfyui_does_in_one_piece(comfy, vae, batch, height, width):
    samples = noise(batch, 4, height, width)
    whole = whole_decode(comfy, vae, samples)
    assert 0 < whole.min() and whole.max() < 1
    assert_same(2 * decode(comfy, vae, samples), 2 * whole)


@pytest.mark.parametrize("batch, height, width", [(1, 64, 64), (2, 75, 131)])
def test_encodes_as_comfyui_does_in_one_piece(comfy, vae, batch, height, width):
    pixels = pictures(batch, height, width)
    before = pixels.clone()
    (whole,) = comfy.call("VAEEncode", vae=vae, pixels=pixels)
    assert_same(encode(comfy, vae, pixels), whole["samples"])
    assert torch.equal(pixels, before)


def test_pictures_with_transparency_are_encoded_without_it(comfy, vae):
    pixels = pictures()
    assert torch.equal(encode(comfy, vae, torch.cat([pixels, pixels[..., :1]], -1)), encode(comfy, vae, pixels))


def test_the_widgets_trade_memory_but_not_the_picture(comfy, vae):
    samples = noise(1, 4, 12, 16)
    whole = 2 * whole_decode(comfy, vae, samples)
    for widgets in ({"tile_size": 4096}, {"memory_gb": 0.25}, {"mode": "fast"}):
        assert_same(2 * decode(comfy, vae, samples, **widgets), whole)
    half = 2 * decode(comfy, vae, samples, store="half")
    assert 60 < psnr(half, whole) < 100


def test_a_vae_that_computes_in_sixteen_bits_works(comfy):
    vae, samples = make_vae(), noise(1, 4, 12, 12)
    whole = whole_decode(comfy, vae, samples)
    vae.vae_dtype = torch.bfloat16
    vae.first_stage_model.to(torch.bfloat16)
    image = decode(comfy, vae, samples)
    assert image.dtype == torch.float32
    assert psnr(2 * image, 2 * whole) > 40
    assert torch.isfinite(encode(comfy, vae, pictures())).all()


def test_weights_that_comfyui_keeps_elsewhere_are_fetched(comfy):
    """Low VRAM: modules cast their weights when they are called, and some are changed on the way."""
    vae, samples = make_vae(), noise(1, 4, 8, 8)
    whole = 2 * whole_decode(comfy, vae, samples)
    for module in vae.first_stage_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    assert_same(2 * decode(comfy, vae, samples), whole)
    convolution = vae.first_stage_model.decoder.up[1].upsample.conv
    convolution.weight_function = [lambda weight: weight * 0.5]
    assert_same(2 * decode(comfy, vae, samples), 2 * whole_decode(comfy, vae, samples))
    assert psnr(2 * decode(comfy, vae, samples), whole) < 60


def test_cancel_stops_a_decode(comfy, vae):
    from comfy import model_management

    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        decode(comfy, vae, noise(1, 4, 8, 8))
    assert decode(comfy, vae, noise(1, 4, 8, 8)).shape == (1, 64, 64, 3)


def test_the_progress_bar_is_filled(comfy, vae, monkeypatch):
    from comfy import utils

    seen = []
    hook = lambda value, total, preview, **options: seen.append((value, total))  # noqa: E731
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", hook)
    decode(comfy, vae, noise(1, 4, 8, 8))
    assert seen[-1] == (1000, 1000) and [value for value, _ in seen] == sorted(value for value, _ in seen)


# Bad input


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 3, 8, 8), (1, 3, 8, 8)])
def test_latents_of_another_model_are_refused_and_the_vaes_named(comfy, vae, shape):
    with pytest.raises(ValueError, match="4 channels.*SD 1.5 VAE.*SDXL VAE"):
        decode(comfy, vae, torch.zeros(shape))


def test_a_vae_of_another_model_is_refused(comfy):
    with pytest.raises(ValueError, match="image latents of 16 channels.*PixArt-alpha goes with"):
        decode(comfy, make_vae(z_channels=16), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_latents_and_pictures_are_refused(comfy, vae, bad):
    samples, pixels = noise(1, 4, 8, 8), pictures()
    samples[0, 1, 2, 3] = pixels[0, 1, 2, 1] = bad
    with pytest.raises(ValueError, match="PixArt Tiled Decode: the latent holds NaN"):
        decode(comfy, vae, samples)
    with pytest.raises(ValueError, match="PixArt Tiled Encode: the picture holds NaN"):
        encode(comfy, vae, pixels)


@pytest.mark.parametrize("shape", [(1, 7, 64, 3), (1, 64, 64, 1), (64, 64, 3)])
def test_pictures_of_a_wrong_shape_are_refused(comfy, vae, shape):
    with pytest.raises(ValueError, match="RGB pictures of at least 8 x 8"):
        encode(comfy, vae, torch.zeros(shape))


def test_a_budget_that_cannot_do_names_the_least_that_can(comfy, vae):
    samples = noise(1, 4, 64, 64)
    with pytest.raises(ValueError, match=r"0.01 GB are not enough.*it needs 0\.\d\d GB.*store half") as error:
        decode(comfy, vae, samples, memory_gb=0.01)
    least = float(str(error.value).split("it needs ")[1].split(" GB")[0])
    with pytest.raises(ValueError, match="not enough"):
        decode(comfy, vae, samples, memory_gb=0.9 * least)
    assert decode(comfy, vae, noise(1, 4, 8, 8), memory_gb=least).shape == (1, 64, 64, 3)


def test_too_little_system_memory_is_said_before_anything_is_computed(comfy, vae, monkeypatch):
    from comfy import model_management

    monkeypatch.setattr(model_management, "get_free_memory", lambda *args, **options: 1e6)
    with pytest.raises(ValueError, match="GB of system memory for intermediate results, but only 0.0 GB are free"):
        decode(comfy, vae, noise(1, 4, 16, 16))


def test_an_overflow_of_the_vae_is_said(comfy):
    vae = make_vae()
    vae.first_stage_model.decoder.conv_out.bias.data += float("inf")
    with pytest.raises(ValueError, match="the VAE overflowed in float32"):
        decode(comfy, vae, noise(1, 4, 8, 8))


def tiny_vae(comfy):
    (vae,) = comfy.call("VAELoader", vae_name="pixart-tiny-vae.safetensors")
    return vae


def test_vaes_of_another_kind_are_named_and_left_to_comfyui_only_on_demand(comfy):
    vae, samples, pixels = tiny_vae(comfy), noise(1, 4, 16, 16), pictures()
    with pytest.raises(ValueError, match="PixArt Tiled Decode: This VAE .TAESD.*other_vaes"):
        decode(comfy, vae, samples)
    with pytest.raises(ValueError, match="PixArt Tiled Encode: This VAE .TAESD.*other_vaes"):
        encode(comfy, vae, pixels)
    image = decode(comfy, vae, samples, other_vaes="ComfyUI's own tiling")
    assert torch.equal(image, vae.decode_tiled(samples, tile_x=8, tile_y=8, overlap=2))
    assert encode(comfy, vae, pixels, other_vaes="ComfyUI's own tiling").shape == (1, 4, 8, 12)


def test_a_checkpoint_without_a_vae_is_refused(comfy):
    from comfy.sd import VAE

    with pytest.raises(RuntimeError, match="VAE is invalid"):
        decode(comfy, VAE(sd={}), noise(1, 4, 8, 8))


@pytest.mark.slow
def test_the_full_sized_vae_of_stable_diffusion_works(comfy):
    """As VAELoader builds it from a diffusers file: 128 to 512 channels, every stage."""
    from comfy.sd import VAE
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = randomise(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels))
    model.decoder.conv_out.weight *= 0.2
    vae = VAE(sd=model.state_dict(), dtype=torch.float32)
    samples = noise(1, 4, 9, 12)
    assert_same(2 * decode(comfy, vae, samples, tile_size=64), 2 * whole_decode(comfy, vae, samples))
    pixels = pictures(1, 64, 72)
    (whole,) = comfy.call("VAEEncode", vae=vae, pixels=pixels)
    assert_same(encode(comfy, vae, pixels), whole["samples"])


@pytest.mark.parametrize("name", ["PixArtTiledDecode", "PixArtTiledEncode"])
def test_every_widget_is_explained(comfy, name):
    from .inprocess import PACK

    schema = comfy.classes[name].define_schema()
    assert schema.description and all(item.tooltip for item in (*schema.inputs, *schema.outputs))
    page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"`{item.id}`" in page for item in schema.inputs)
