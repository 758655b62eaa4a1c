"""The HED edge detector whose maps PixArt-delta's ControlNet was trained on (PixArt-alpha diffusion/model/hed.py).

VGG-16's convolutions with one single-channel map beside each of the five blocks; the edge map is their mean.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

BLOCKS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))  # channels in, out, convolutions
STRIDES = (1, 2, 4, 8, 16)
REACH = 112  # pixels: a value of the coarsest map sees 105 to one side; rounded up to its stride
SMALLEST = 16  # pixels: the coarsest map then has one value


class HEDBlock(nn.Module):
    """3x3 convolutions with ReLU, and the map that is read off behind them."""

    def __init__(self, channels_in: int, channels_out: int, count: int, *, operations, dtype=None, device=None):
        super().__init__()
        widths = (channels_in, *[channels_out] * count)
        self.convs = nn.ModuleList(
            operations.Conv2d(a, b, 3, padding=1, dtype=dtype, device=device)
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.projection = operations.Conv2d(channels_out, 1, 1, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:                    # x (B, channels_in, H, W)
        for conv in self.convs:
            x = conv(x).relu()
        return x, self.projection(x)                                          # (B, channels_out, H, W), (B, 1, H, W)


class HED(nn.Module):
    """Attribute names are those of the original, so ControlNetHED.pth loads without a mapping."""

    def __init__(self, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(1, 3, 1, 1, dtype=dtype, device=device))
        for n, sizes in enumerate(BLOCKS, 1):
            setattr(self, f"block{n}", HEDBlock(*sizes, operations=operations, dtype=dtype, device=device))

    def side_maps(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) in 0..1 -> five maps (B, 1, H / s, W / s), s = 1, 2, 4, 8, 16, rounded down."""
        x, maps = image * 255 - self.norm.to(image), []
        for n in range(1, len(BLOCKS) + 1):
            if n > 1:
                x = max_pool2d(x, 2)
            x, side = getattr(self, f"block{n}")(x)
            maps.append(side)
        return maps

    def tiled_side_maps(self, image: Tensor, tile: int) -> list[Tensor]:
        """The same values in the memory of one tile of `tile` pixels and its surroundings."""
        height, width = image.shape[-2:]
        full = [image.new_empty(image.shape[0], 1, height // s, width // s) for s in STRIDES]
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                y, x = max(top - REACH, 0), max(left - REACH, 0)
                part = image[:, :, y : top + tile + REACH, x : left + tile + REACH]
                for s, whole, side in zip(STRIDES, full, self.side_maps(part), strict=True):
                    to = whole[:, :, top // s : (top + tile) // s, left // s : (left + tile) // s]
                    rows, cols = (top - y) // s, (left - x) // s
                    to.copy_(side[:, :, rows : rows + to.shape[2], cols : cols + to.shape[3]])
        return full

    def forward(self, image: Tensor, tile: int = 1024) -> Tensor:
        """image (B, 3, H, W) in 0..1 -> edges (B, 1, H, W) in 0..1, bright on black.

        Pictures larger than `tile` pixels (a multiple of 16) are taken in tiles, with the same result. Raises
        ValueError for a picture below 16 x 16 pixels and for another tile size.
        """
        height, width = size = image.shape[-2:]
        if min(size) < SMALLEST:
            raise ValueError(f"HED needs pictures of at least {SMALLEST} x {SMALLEST} pixels, not {width} x {height}.")
        if tile < STRIDES[-1] or tile % STRIDES[-1]:
            raise ValueError(f"A tile of {tile} pixels is no multiple of {STRIDES[-1]}.")
        maps = self.side_maps(image) if max(size) <= tile else self.tiled_side_maps(image, tile)
        resized = (interpolate(side, size, mode="bilinear", align_corners=False) for side in maps)
        return torch.sigmoid(sum(resized) / len(maps))
