"""What an AutoencoderKL is made of, without the names that ComfyUI and diffusers give it."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Conv:
    """A 1x1 or 3x3 convolution, after GroupNorm and SiLU where there is a norm."""

    conv: nn.Conv2d
    norm: nn.GroupNorm | None = None


@dataclass(frozen=True, eq=False)
class ResBlock:
    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None  # 1x1, where the number of channels changes


@dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention over all positions. q, k, v and out are 1x1 convolutions (ComfyUI) or linear (diffusers)."""

    norm: nn.GroupNorm
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    heads: int


@dataclass(frozen=True, eq=False)
class Upsample:
    """Every value four times, then a 3x3 convolution."""

    conv: nn.Conv2d


@dataclass(frozen=True, eq=False)
class Downsample:
    """A 3x3 convolution of stride 2 that pads on the right and at the bottom only."""

    conv: nn.Conv2d


Layer = Conv | ResBlock | Attention | Upsample | Downsample


def channels(layer: Layer) -> tuple[int, int]:
    """(in, out)"""
    if isinstance(layer, ResBlock):
        return layer.conv1.in_channels, layer.conv2.out_channels
    if isinstance(layer, Attention):
        return layer.norm.num_channels, layer.norm.num_channels
    return layer.conv.in_channels, layer.conv.out_channels


def norm_of(layer: Layer | None) -> nn.GroupNorm | None:
    """The GroupNorm with which a layer begins."""
    return getattr(layer, "norm1", None) or getattr(layer, "norm", None)
