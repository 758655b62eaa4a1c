"""The up-sampling of an AutoencoderKL: every value four times, then a 3x3 convolution."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

from .store import Store
from .tiles import Tile


class MergedKernels:
    """The up-sampled convolution as four 2x2 convolutions of the small activation: 4/9 of the multiplications.

    An even row of the result sees one row of copies of the value above it and two of its own, an odd one two and one;
    the same goes for columns. So each pair of parities has a kernel of its own, with taps that are sums.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype):
        weight = weight.to(device, torch.float32)  # (C', C, 3, 3)
        self.bias = None if bias is None else bias.to(device, dtype)
        self.kernels = {
            (row, column): merged(merged(weight, 2, 1 + row), 3, 1 + column).to(dtype)
            for row in (0, 1) for column in (0, 1)
        }  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """x (1, C, h, w) -> (1, C', 2h, 2w), with zeros around x."""
        height, width = x.shape[2:]
        padded = pad(x, (1, 1, 1, 1))
        out = x.new_empty(1, len(self.kernels[0, 0]), 2 * height, 2 * width)
        for (row, column), kernel in self.kernels.items():
            seen = padded[:, :, row : row + height + 1, column : column + width + 1]
            out[:, :, row::2, column::2] = conv2d(seen, kernel, self.bias)
        return out


def merged(weight: Tensor, dim: int, first: int) -> Tensor:
    """Three taps become two: the sum of the first `first`, and the sum of the rest."""
    head, tail = weight.split((first, 3 - first), dim)
    return torch.cat([head.sum(dim, keepdim=True), tail.sum(dim, keepdim=True)], dim)


class Upsampled:
    """An up-sampled activation that is computed wherever it is read. Looks like a Store to its reader."""

    def __init__(self, source: Store, conv: nn.Conv2d, merged: MergedKernels | None, dtype: torch.dtype):
        self.source, self.conv, self.merged, self.dtype = source, conv, merged, dtype
        self.moments = None

    @property
    def shape(self) -> torch.Size:
        _, height, width = self.source.shape
        return torch.Size((self.conv.out_channels, 2 * height, 2 * width))

    def read(self, tile: Tile, device: torch.device) -> Tensor:
        """(1, C, h, w) float32 on `device`."""
        _, height, width = self.source.shape
        small = tile.mapped(lambda start: (start - 1) // 2, lambda end: end // 2 + 1, height, width)
        large = Tile(*(2 * edge for edge in small))
        x = self.source.read(small, device).to(self.dtype)
        y = self.merged(x) if self.merged else self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return y[tile.inside(large).index].float().contiguous()

    def write(self, tile: Tile, y: Tensor):
        """Keeps nothing but the moments."""
        self.moments.add(y)
