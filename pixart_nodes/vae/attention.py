"""Self-attention over all positions of an activation, with the queries of one tile at a time."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .layers import Attention

QUERIES = {"cpu": 2048}  # tokens in one call: few on a CPU, so that a large picture can be interrupted
MORE_QUERIES = 16384  # elsewhere: enough to fill a GPU with one head


def queries(device_type: str) -> int:
    return QUERIES.get(device_type, MORE_QUERIES)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """x (1, C, h, w) -> tokens (1, h * w, C) through a 1x1 convolution or a linear layer."""
    if isinstance(module, nn.Linear):
        return module(x.flatten(2).transpose(1, 2))
    return module(x).flatten(2).transpose(1, 2)


def attend(layer: Attention, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """x (1, C, h, w), normalised, attends to keys and values (1, N, C) -> (1, C, h, w) after the last projection."""
    q, k, v = (split_heads(t, layer.heads) for t in (project(layer.q, x), keys, values))
    out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (1, h * w, C)
    if isinstance(layer.out, nn.Linear):
        return layer.out(out).transpose(1, 2).reshape(x.shape)
    return layer.out(out.transpose(1, 2).reshape(x.shape))


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(1, N, C) -> (1, heads, N, C / heads)"""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)
