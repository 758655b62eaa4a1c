"""KV token compression for a network that was trained without it: the starting point of PixArt-Sigma, section 3.3.

A compressing block owns a strided convolution and a LayerNorm (`attn.sr`, `attn.norm`). Before any training the
convolution is the plain average of a cell and the LayerNorm has weight 1 and bias 0, so that both can be computed
without weights. The same numbers as tensors make the checkpoint from which fine-tuning starts.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .params import KVCompress, PixArtParams


def compress_untrained(x: Tensor, grid: tuple[int, int], sampling: str, scale_factor: int) -> Tensor:
    """Keys or values (B, N, C) on a grid of (rows, cols) tokens -> (B, M, C), M about N / scale_factor^2.

    "conv" averages cells and normalises, as `attn.sr` and `attn.norm` do before training (PixArt-sigma
    PixArt_blocks.py:85-115); a last row or column that does not fill a cell is left out. "uniform" keeps every
    scale_factor-th row and column, the first included, and changes no value.
    """
    s, (rows, cols) = scale_factor, grid
    x = x.unflatten(1, (rows, cols))                                          # (B, rows, cols, C)
    if sampling == "uniform":
        return x[:, ::s, ::s].flatten(1, 2)
    cells = x[:, : rows // s * s, : cols // s * s].unflatten(2, (-1, s)).unflatten(1, (-1, s))
    return layer_norm(cells.mean((2, 4)).flatten(1, 2), x.shape[-1:], eps=1e-5)  # (B, M, C)


def untrained_tensors(params: PixArtParams, kv: KVCompress) -> dict[str, Tensor]:
    """The tensors, under native names, with which a checkpoint says the same as `compress_untrained`."""
    if kv.sampling != "conv":
        return {}
    C, s = params.hidden_size, kv.scale_factor
    start = {
        "sr.weight": torch.full((C, 1, s, s), 1 / s**2), "sr.bias": torch.zeros(C),
        "norm.weight": torch.ones(C), "norm.bias": torch.zeros(C),
    }  # fmt: skip
    return {f"blocks.{i}.attn.{name}": tensor.clone() for i in kv.layers for name, tensor in start.items()}


def lost_tokens(grid: tuple[int, int], sampling: str, scale_factor: int) -> tuple[int, int]:
    """(rows, columns) at the end of a token grid that become no key and no value."""
    rows, cols = grid
    return (rows % scale_factor, cols % scale_factor) if sampling in ("conv", "ave") else (0, 0)
