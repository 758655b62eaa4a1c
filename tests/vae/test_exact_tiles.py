"""Tiled decode and encode give what diffusers' AutoencoderKL gives in one piece."""

import pytest
import torch

from pixart_nodes.vae import decode, encode
from pixart_nodes.vae.plan import steps

from .autoencoders import assert_same, noise, psnr, random_vae


@pytest.fixture(scope="module")
def vae():
    return random_vae()


def whole_decode(vae, latent):
    return vae.decode(latent).sample


def whole_encode(vae, image):
    return vae.encode(image).latent_dist.parameters


@pytest.mark.parametrize("tile", [16, 31, 64, 100, 1000])
def test_no_tile_size_changes_the_picture(vae, tile):
    latent = noise(1, 4, 13, 18)
    assert_same(decode(vae, latent, tile=tile), whole_decode(vae, latent))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 30), (3, 2), (17, 16), (40, 7)])
def test_latents_of_any_shape_are_decoded(vae, height, width):
    latent = noise(1, 4, height, width, seed=height)
    assert_same(decode(vae, latent, tile=48), whole_decode(vae, latent))


def test_every_picture_of_a_batch_has_its_own_statistics(vae):
    latent = torch.cat([noise(1, 4, 9, 12), 30 * noise(1, 4, 9, 12, seed=1) + 5, torch.zeros(1, 4, 9, 12)])
    assert_same(decode(vae, latent, tile=32), whole_decode(vae, latent))


@pytest.mark.parametrize("height, width", [(64, 64), (8, 8), (40, 136), (67, 45)])
@pytest.mark.parametrize("tile", [16, 40, 512])
def test_encoding_in_tiles_gives_the_same_moments(vae, height, width, tile):
    image = noise(2, 3, height, width)
    assert_same(encode(vae, image, tile=tile), whole_encode(vae, image))


@pytest.mark.parametrize("config", [
    {"channels": (32, 16, 48), "blocks": 1}, {"channels": (16, 16, 16, 16)}, {"channels": (8,), "groups": 4},
    {"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False},
    {"latent_channels": 16}, {"channels": (8, 24, 16, 40), "groups": 2, "blocks": 3},
])  # fmt: skip
def test_other_channels_and_depths_work_too(config):
    vae = random_vae(**config)
    latent, image = noise(1, config.get("latent_channels", 4), 9, 11), noise(1, 3, 40, 56)
    for options in ({}, {"recompute": False}, {"merge": False}):
        assert_same(decode(vae, latent, tile=24, **options), whole_decode(vae, latent))
    assert_same(encode(vae, image, tile=24), whole_encode(vae, image))


def test_attention_with_several_heads_works():
    vae = random_vae()
    for module in (vae.decoder, vae.encoder):
        module.mid_block.attentions[0].heads = 4
    latent, image = noise(1, 4, 9, 11), noise(1, 3, 40, 56)
    assert_same(decode(vae, latent, tile=24), whole_decode(vae, latent))
    assert_same(encode(vae, image, tile=24), whole_encode(vae, image))


def test_the_decoder_alone_and_strange_statistics_work(vae):
    """A bare decoder has no 1x1 convolution before it; large means would hurt careless variances."""
    latent = noise(1, 4, 10, 10) * 0.01 + 40
    assert_same(decode(vae.decoder, latent, tile=32), vae.decoder(latent))


def test_tiles_with_statistics_of_their_own_would_be_noticed(vae):
    """The comparison itself: diffusers' own tiling is far off."""
    latent = noise(1, 4, 24, 24)
    exact = whole_decode(vae, latent)
    tiled = random_vae()
    tiled.enable_tiling()
    tiled.tile_latent_min_size, tiled.tile_sample_min_size = 12, 96
    assert psnr(tiled.decode(latent).sample, exact) < 40
    assert psnr(decode(vae, latent, tile=96), exact) > 100


# Stores


def test_a_store_of_half_precision_loses_less_than_a_picture_file(vae):
    latent = noise(1, 4, 20, 20)
    exact = whole_decode(vae, latent)
    assert 60 < psnr(decode(vae, latent, tile=64, store=torch.float16), exact) < 100
    image = noise(1, 3, 96, 96)
    assert psnr(encode(vae, image, tile=64, store=torch.float16), whole_encode(vae, image)) > 60


def test_half_precision_holds_activations_that_exceed_fp16():
    """As in the SDXL VAE: values beyond 65504 in the residual stream."""
    vae = random_vae()
    vae.decoder.conv_in.weight *= 1e6
    vae.decoder.mid_block.resnets[0].conv2.weight *= 3e7
    latent = noise(1, 4, 12, 12)
    exact = whole_decode(vae, latent)
    assert torch.isfinite(exact).all()
    assert psnr(decode(vae, latent, tile=32, store=torch.float16), exact) > 55


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_compute_is_no_further_from_fp32_than_one_piece_is(dtype):
    vae, latent = random_vae(), noise(1, 4, 8, 10)
    exact = whole_decode(vae, latent)
    narrow = random_vae().to(dtype)
    whole = narrow.decode(latent.to(dtype)).sample.float()
    tiled = decode(narrow, latent, tile=48)
    assert tiled.dtype == torch.float32
    assert psnr(tiled, exact) > psnr(whole, exact) - 1


def test_the_latent_stays_as_it_is(vae):
    latent = noise(1, 4, 8, 8)
    before = latent.clone()
    decode(vae, latent)
    encode(vae, image := noise(1, 3, 32, 32))
    assert torch.equal(latent, before) and torch.equal(image, noise(1, 3, 32, 32))


# Progress and errors


def test_progress_grows_to_the_total_and_can_end_the_run(vae):
    seen = []
    decode(vae, noise(2, 4, 8, 8), tile=32, progress=lambda done, total: seen.append((done, total)))
    fractions = [done / total for done, total in seen]
    assert len({total for _, total in seen}) == 1 and len(seen) > 50
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1, abs=1e-6)

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        decode(vae, noise(1, 4, 8, 8), progress=stop)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 1, 8, 8), (0, 4, 8, 8), (1, 4, 0, 8)])
def test_latents_of_a_wrong_shape_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"\(batch, 4, height, width\)"):
        decode(vae, torch.zeros(shape))


def test_tiles_that_are_too_small_are_refused(vae):
    with pytest.raises(ValueError, match="16 or more"):
        decode(vae, noise(1, 4, 8, 8), tile=8)


def test_only_the_upsampling_before_the_widest_activation_is_recomputed(vae):
    from pixart_nodes.vae import decoder_layers

    plan = steps(decoder_layers(vae), 8, 8)
    assert [step.out_size for step in plan if step.recomputed] == [(64, 64)]
    even = steps(decoder_layers(random_vae(channels=(16, 16, 16, 16))), 8, 8)
    assert not any(step.recomputed for step in even)  # the block after it has as many channels: nothing to gain
