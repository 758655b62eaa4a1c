"""Self-attention with optional KV token compression, and masked cross-attention."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .memo import memo_of
from .params import KVCompress


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, transformer_options=None) -> Tensor:
    """Multi-head attention on (B, N, C) tensors; mask broadcastable to (B, heads, N, M): boolean, True = attend, or
    added to the scores."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, C / heads)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention among image tokens; keys and values may be thinned out on the token grid (PixArt-Sigma 3.3)."""

    def __init__(self, params, kv_compress: KVCompress | None, *, operations, attention, dtype=None, device=None):
        super().__init__()
        C = params.hidden_size
        self.num_heads = params.num_heads
        self.attention = attention
        self.kv_compress = kv_compress
        self.qkv = operations.Linear(C, 3 * C, dtype=dtype, device=device)
        self.proj = operations.Linear(C, C, dtype=dtype, device=device)
        self.qk_norm = params.qk_norm
        if params.qk_norm:  # over the full width, before the split into heads
            self.q_norm = operations.LayerNorm(C, eps=1e-5, dtype=dtype, device=device)
            self.k_norm = operations.LayerNorm(C, eps=1e-5, dtype=dtype, device=device)
        if kv_compress is not None and kv_compress.sampling == "conv":
            s = kv_compress.scale_factor
            self.sr = operations.Conv2d(C, C, s, stride=s, groups=C, dtype=dtype, device=device)
            self.norm = operations.LayerNorm(C, eps=1e-5, dtype=dtype, device=device)

    def compress(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Keys or values (B, N, C) on the grid -> (B, M, C), M about N / scale_factor^2.

        A last row or column that does not fill a cell is dropped by "conv" and "ave", as in the original.
        """
        s, (rows, cols) = self.kv_compress.scale_factor, grid
        sampling = self.kv_compress.sampling
        if sampling == "uniform_every":
            return x[:, ::s]                                                  # (B, N / s, C)
        x = x.unflatten(1, (rows, cols))                                      # (B, rows, cols, C)
        if sampling == "conv":
            return self.norm(self.sr(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        if sampling == "ave":  # nearest sampling in spite of its name (PixArt_blocks.py:109-112)
            x = x[:, : rows // s * s, : cols // s * s]
        return x[:, ::s, ::s].flatten(1, 2)

    def forward(self, x: Tensor, grid: tuple[int, int], transformer_options) -> Tensor:  # x (B, N, C)
        q, k, v = self.qkv(x).chunk(3, dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kv_compress is not None:
            k, v = self.compress(k, grid), self.compress(v, grid)
        for patch in transformer_options.get("patches", {}).get("attn1_kv_patch", ()):
            k, v = patch(k, v, transformer_options)
        if k.shape[1] < q.shape[1]:  # q is a view: a copy lets go of the keys and values that it shares memory with
            q = q.clone()
        return self.proj(self.attention(q, k, v, self.num_heads, transformer_options=transformer_options))


class CrossAttention(nn.Module):
    """Image tokens attend to caption tokens."""

    def __init__(self, params, *, operations, attention, dtype=None, device=None):
        super().__init__()
        C = params.hidden_size
        self.num_heads = params.num_heads
        self.attention = attention
        self.q_linear = operations.Linear(C, C, dtype=dtype, device=device)
        self.kv_linear = operations.Linear(C, 2 * C, dtype=dtype, device=device)
        self.proj = operations.Linear(C, C, dtype=dtype, device=device)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor | None, transformer_options) -> Tensor:
        q = self.q_linear(x)                                                  # (B, N, C)
        k, v = memo_of(transformer_options)(self.kv_linear, caption).chunk(2, dim=2)  # (B, L, C) each
        return self.proj(self.attention(q, k, v, self.num_heads, mask=mask, transformer_options=transformer_options))
