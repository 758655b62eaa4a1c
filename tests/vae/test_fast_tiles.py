"""The fast mode: exact up to its reference size, near beyond it, and without seams."""

import torch

from pixart_nodes.vae import decode, fast_tiles

from .autoencoders import assert_same, noise, psnr, random_vae


def field(height, width):
    """A smooth latent, as pictures are."""
    return torch.nn.functional.interpolate(noise(1, 4, 5, 4), size=(height, width), mode="bicubic")


def test_up_to_the_reference_size_it_is_exact():
    vae, latent = random_vae(), noise(1, 4, 20, 24)
    assert_same(decode(vae, latent, tile=64, fast=True), vae.decode(latent).sample)


def test_beyond_it_tiles_do_not_show_and_the_picture_is_near(monkeypatch):
    monkeypatch.setattr(fast_tiles, "REFERENCE", 16)
    vae, latent = random_vae(), field(32, 27)
    small_tiles, one_tile = (decode(vae, latent, tile=tile, fast=True) for tile in (48, 4096))
    assert_same(small_tiles, one_tile)
    assert 12 < psnr(one_tile, vae.decode(latent).sample) < 100


def test_a_store_of_half_precision_changes_little(monkeypatch):
    monkeypatch.setattr(fast_tiles, "REFERENCE", 8)
    vae, latent = random_vae(), field(16, 14)
    vae.decoder.conv_in.weight *= 1e6  # beyond what fp16 holds, so that stores are scaled
    vae.decoder.mid_block.resnets[0].conv2.weight *= 1e6
    whole, half = (decode(vae, latent, tile=48, fast=True, store=store) for store in (None, torch.float16))
    assert psnr(half, whole) > 50


def test_progress_covers_the_small_run_too(monkeypatch):
    monkeypatch.setattr(fast_tiles, "REFERENCE", 8)
    seen = []
    decode(random_vae(), field(16, 16), tile=64, fast=True, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and 0.8 < seen[-1] <= 1
