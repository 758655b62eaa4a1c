"""Autoencoders of other kinds are named, never computed wrongly."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from pixart_nodes.vae import NotDecomposable, decode, decoder_layers, encode, encoder_layers

from .autoencoders import noise, random_vae


@pytest.mark.parametrize("other", [AutoencoderTiny, lambda: nn.Sequential(nn.Conv2d(4, 3, 3)), lambda: nn.Identity()])
def test_other_kinds_of_autoencoders_are_refused_by_name(other):
    vae = other()
    for layers in (decoder_layers, encoder_layers):
        with pytest.raises(NotDecomposable, match=rf"{type(vae).__name__}.*AutoencoderKL"):
            layers(vae)


@pytest.mark.parametrize("spoil, reason", [
    (lambda vae: setattr(vae.decoder.conv_in, "padding_mode", "circular"), "circular"),
    (lambda vae: setattr(vae.decoder.mid_block.resnets[0], "output_scale_factor", 2.0), "scale their output"),
    (lambda vae: setattr(vae.decoder.mid_block.attentions[0], "residual_connection", False), "attention"),
    (lambda vae: setattr(vae.decoder, "conv_norm_out", nn.BatchNorm2d(16)), "BatchNorm2d"),
    (lambda vae: setattr(vae.decoder, "conv_out", nn.Conv3d(16, 3, 3)), "Conv3d"),
    (lambda vae: setattr(vae, "bn", nn.BatchNorm2d(4)), "normalises its latents"),
    (lambda vae: vae.decoder.up_blocks[0].upsamplers.__setitem__(0, nn.Upsample(scale_factor=2)), "Upsample2D"),
])  # fmt: skip
def test_layers_that_compute_something_else_are_refused(spoil, reason):
    vae = random_vae()
    spoil(vae)
    with pytest.raises(NotDecomposable, match=reason):
        decode(vae, noise(1, 4, 8, 8))


def test_attention_blocks_in_the_levels_are_refused():
    vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=4, up_block_types=["AttnUpDecoderBlock2D"] * 2,
                        down_block_types=["AttnDownEncoderBlock2D"] * 2)  # fmt: skip
    with pytest.raises(NotDecomposable, match="AttnUpDecoderBlock2D"):
        decode(vae, noise(1, 4, 8, 8))
    with pytest.raises(NotDecomposable, match="AttnDownEncoderBlock2D"):
        encode(vae, torch.zeros(1, 3, 16, 16))
