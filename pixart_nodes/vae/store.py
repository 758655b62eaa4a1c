"""Whole activations between two sweeps, and the statistics that are gathered while they are written."""

import torch
from torch import Tensor, nn

from .tiles import Tile

HALF_MAX = 32768.0  # half of what fp16 holds: room for rounding


class Moments:
    """Sums and sums of squares per channel, in float64, of tiles that are seen one after the other."""

    def __init__(self, channels: int, device: torch.device):
        device = torch.device("cpu") if device.type == "mps" else device  # has no float64
        self.sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, tile: Tensor):
        """tile (1, C, h, w) float32. Rows are summed in float32, everything longer in float64."""
        rows = torch.stack([tile.sum(3), torch.linalg.vector_norm(tile, dim=3).square_()])  # (2, 1, C, h)
        self.sums += rows.to(self.sums).sum((1, 3))
        self.count += tile.shape[2] * tile.shape[3]

    def affine(self, norm: nn.GroupNorm, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """GroupNorm over everything seen, as a scale and a shift of each channel: (C, 1, 1) float32."""
        grouped = self.sums.unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True) / self.count  # (2, G, 1)
        mean, square = grouped.repeat_interleave(self.sums.shape[1] // norm.num_groups, 1).squeeze(2)  # (C,) each
        scale = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        if weight is not None:
            scale = scale * weight.to(scale)
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias.to(shift)
        return scale.float().view(-1, 1, 1), shift.float().view(-1, 1, 1)


class Store:
    """One activation (C, H, W) of one image, kept in `dtype` on `device`, and its moments.

    A 16-bit store keeps the values divided by a power of two, so that large activations (the SDXL VAE's exceed what
    fp16 holds) lose nothing but the last bits of very small ones.
    """

    def __init__(self, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device):
        self.values = torch.empty(channels, height, width, dtype=dtype, device=device)
        self.scale = 1.0
        self.moments = None

    @classmethod
    def of(cls, values: Tensor) -> "Store":
        """Around a tensor that is there already."""
        store = cls(0, 0, 0, values.dtype, values.device)
        store.values = values
        return store

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def read(self, tile: Tile, device: torch.device) -> Tensor:
        """A float32 copy (1, C, h, w) on `device`."""
        x = self.values[tile.index].unsqueeze(0).to(device, torch.float32, copy=True)
        return x if self.scale == 1 else x.mul_(self.scale)

    def write(self, tile: Tile, y: Tensor):
        """y (1, C, h, w) float32 goes to the first C channels, and into the moments where there are any."""
        if self.moments is not None:
            self.moments.add(y)
        if self.values.dtype == torch.float16:
            self._make_room(y)
        if self.scale != 1:
            y = y / self.scale
        self.values[: y.shape[1]][tile.index] = y[0].to(self.values.device)

    def _make_room(self, y: Tensor):
        peak = float(y.abs().amax())
        factor = 1.0
        while peak / (self.scale * factor) > HALF_MAX and peak < float("inf"):
            factor *= 16
        if factor > 1:
            self.values /= factor
            self.scale *= factor

    def narrow(self, channels: int):
        """Keeps the first channels, and gives the memory of the others back."""
        if channels < self.values.shape[0]:
            self.values = self.values[:channels].clone()
