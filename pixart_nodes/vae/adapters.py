"""The layers of ComfyUI's and of diffusers' AutoencoderKL, in the order in which they run."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layers import Attention, Conv, Downsample, Layer, ResBlock, Upsample


class NotDecomposable(ValueError):
    """This autoencoder is not made of the layers that exact tiles know."""


def decoder_layers(model: nn.Module) -> list[Layer]:
    """The decoder of an autoencoder (or a bare decoder), with the 1x1 convolution before it. Raises NotDecomposable."""
    first = getattr(model, "post_quant_conv", None)
    with _explained(model):
        _no_latent_norm(model)
        body = _decoder(getattr(model, "decoder", model))
        return [*([Conv(_conv(first, 1))] if first is not None else []), *body]


def encoder_layers(model: nn.Module) -> list[Layer]:
    """The encoder of an autoencoder (or a bare encoder), with the 1x1 convolution after it. Raises NotDecomposable."""
    last = getattr(model, "quant_conv", None)
    with _explained(model):
        _no_latent_norm(model)
        body = _encoder(getattr(model, "encoder", model))
        return [*body, *([Conv(_conv(last, 1))] if last is not None else [])]


@contextmanager
def _explained(model: nn.Module):
    """Turns what is missing in a foreign module into one sentence that names it."""
    try:
        yield
    except (AttributeError, _Foreign) as error:
        raise NotDecomposable(
            f"This VAE ({type(model).__name__}) cannot be computed in exact tiles: {error}. Exact tiles know the image "
            "AutoencoderKL of Stable Diffusion 1.5 (for PixArt-alpha) and SDXL (for PixArt-Sigma)."
        ) from error


class _Foreign(Exception):
    pass


def _decoder(decoder: nn.Module) -> list[Layer]:
    if hasattr(decoder, "up_blocks"):
        return [
            Conv(_conv(decoder.conv_in)),
            *_diffusers_mid(decoder.mid_block),
            *(layer for block in decoder.up_blocks for layer in _diffusers_block(block, "UpDecoderBlock2D")),
            Conv(_conv(decoder.conv_out), _norm(decoder.conv_norm_out)),
        ]
    _named(decoder, "Decoder")
    if decoder.tanh_out:
        raise _Foreign("its decoder ends in a tanh")
    return [
        Conv(_conv(decoder.conv_in)),
        *_comfy_mid(decoder.mid),
        *(layer for level in reversed(decoder.up) for layer in _comfy_level(level)),
        Conv(_conv(decoder.conv_out), _norm(decoder.norm_out)),
    ]


def _encoder(encoder: nn.Module) -> list[Layer]:
    if hasattr(encoder, "down_blocks"):
        return [
            Conv(_conv(encoder.conv_in)),
            *(layer for block in encoder.down_blocks for layer in _diffusers_block(block, "DownEncoderBlock2D")),
            *_diffusers_mid(encoder.mid_block),
            Conv(_conv(encoder.conv_out), _norm(encoder.conv_norm_out)),
        ]
    _named(encoder, "Encoder")
    return [
        Conv(_conv(encoder.conv_in)),
        *(layer for level in encoder.down for layer in _comfy_level(level)),
        *_comfy_mid(encoder.mid),
        Conv(_conv(encoder.conv_out), _norm(encoder.norm_out)),
    ]


def _comfy_mid(mid: nn.Module) -> list[Layer]:
    return [_comfy_resblock(mid.block_1), _comfy_attention(mid.attn_1), _comfy_resblock(mid.block_2)]


def _comfy_level(level: nn.Module) -> Iterator[Layer]:
    for index, block in enumerate(level.block):
        yield _comfy_resblock(block)
        if len(level.attn):
            yield _comfy_attention(level.attn[index])
    if hasattr(level, "upsample"):
        if level.upsample.scale_factor != 2:
            raise _Foreign(f"it scales by {level.upsample.scale_factor}")
        yield Upsample(_conv(_named(level.upsample, "Upsample").conv))
    if hasattr(level, "downsample"):
        yield Downsample(_conv(_named(level.downsample, "Downsample").conv, stride=2, padding=0))


def _comfy_resblock(block: nn.Module) -> ResBlock:
    _named(block, "ResnetBlock")
    shortcut = getattr(block, "nin_shortcut", None)
    if hasattr(block, "conv_shortcut"):
        raise _Foreign("its shortcuts are 3x3 convolutions")
    return _resblock(block, shortcut)


def _comfy_attention(block: nn.Module) -> Attention:
    _named(block, "AttnBlock")
    projections = [_conv(conv, 1) for conv in (block.q, block.k, block.v, block.proj_out)]
    return Attention(_norm(block.norm), *projections, heads=1)


def _diffusers_mid(mid: nn.Module) -> Iterator[Layer]:
    """One block first, then attention and block in turn; attention may be missing."""
    first, *others = mid.resnets
    yield _diffusers_resblock(first)
    for attention, block in zip(mid.attentions, others, strict=True):
        if attention is not None:
            yield _diffusers_attention(attention)
        yield _diffusers_resblock(block)


def _diffusers_block(block: nn.Module, kind: str) -> Iterator[Layer]:
    _named(block, kind)
    yield from (_diffusers_resblock(resnet) for resnet in block.resnets)
    for upsample in getattr(block, "upsamplers", None) or ():
        yield Upsample(_conv(_named(upsample, "Upsample2D").conv))
    for downsample in getattr(block, "downsamplers", None) or ():
        yield Downsample(_conv(_named(downsample, "Downsample2D").conv, stride=2, padding=0))


def _diffusers_resblock(block: nn.Module) -> ResBlock:
    _named(block, "ResnetBlock2D")
    if block.output_scale_factor != 1 or type(block.nonlinearity).__name__ != "SiLU":
        raise _Foreign("its residual blocks scale their output or use another activation than SiLU")
    return _resblock(block, block.conv_shortcut)


def _diffusers_attention(block: nn.Module) -> Attention:
    if block.rescale_output_factor != 1 or not block.residual_connection or block.spatial_norm is not None:
        raise _Foreign("its attention is not a plain residual block")
    return Attention(_norm(block.group_norm), block.to_q, block.to_k, block.to_v, block.to_out[0], block.heads)


def _resblock(block: nn.Module, shortcut: nn.Module | None) -> ResBlock:
    return ResBlock(
        _norm(block.norm1), _conv(block.conv1), _norm(block.norm2), _conv(block.conv2),
        None if shortcut is None else _conv(shortcut, 1),
    )  # fmt: skip


def _named(module: nn.Module, name: str) -> nn.Module:
    """By name and not by class: neither ComfyUI nor diffusers is imported here, and subclasses compute other things."""
    if type(module).__name__ != name:
        raise _Foreign(f"it has a {type(module).__name__} in place of a {name}")
    return module


def _conv(conv: nn.Module, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    padding = kernel // 2 if padding is None else padding
    expected = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1), 1, "zeros")
    _named(conv, "Conv2d")
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if found != expected:
        raise _Foreign(f"it has a convolution with kernel, stride, padding, dilation, groups and mode {found}")
    return conv


def _norm(norm: nn.Module) -> nn.GroupNorm:
    return _named(norm, "GroupNorm")


def _no_latent_norm(model: nn.Module):
    if getattr(model, "bn", None) is not None:
        raise _Foreign("it normalises its latents")
