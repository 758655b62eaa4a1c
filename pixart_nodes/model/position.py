"""Fixed 2-D sine-cosine positions (PixArt-alpha diffusion/model/nets/PixArt.py:217-264)."""

import torch
from torch import Tensor


def positions(count: int, base_size: int, pe_interpolation: float, device=None) -> Tensor:
    """Positions of `count` tokens along one axis: they always span [0, base_size / pe_interpolation).

    Divided in float32 and in this order, as the original does.
    """
    return torch.arange(count, dtype=torch.float32, device=device) / (count / base_size) / pe_interpolation  # (count,)


def sincos(position: Tensor, channels: int) -> Tensor:
    """Codes [sin(p w), cos(p w)] with w_k = 10000^(-k / (channels / 2)), in float64."""
    k = torch.arange(channels // 2, dtype=torch.float64, device=position.device)
    angle = position.double()[:, None] * 10000.0 ** (-k / (channels / 2))     # (count, channels / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                       # (count, channels)


def position_table(
    rows: int, cols: int, hidden_size: int, base_size: int, pe_interpolation: float, device=None
) -> Tensor:
    """Position of every token of a rows x cols grid, row-major: float32 (1, rows * cols, hidden_size).

    The column fills the first half of the channels and the row the second, as in the original.
    `base_size` and `pe_interpolation` belong to the model, not to the current size.
    """
    half = hidden_size // 2
    row = sincos(positions(rows, base_size, pe_interpolation, device), half)  # (rows, half)
    col = sincos(positions(cols, base_size, pe_interpolation, device), half)  # (cols, half)
    grid = torch.cat([col[None].expand(rows, -1, -1), row[:, None].expand(-1, cols, -1)], dim=2)
    return grid.reshape(1, rows * cols, 2 * half).float()
