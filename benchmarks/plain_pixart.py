"""PixArt's network and training losses by formula, in plain torch, as the original trains them.

Captions of 120 tokens are projected whole and then cut to their own tokens, modulation is made in each block, teachers
run one after another.

Names of the weights are the original's, so that one state dict serves this and ours.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart_nodes.model import PixArtParams
from pixart_nodes.model.position import position_table


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                       # (B, heads, N, C / heads)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:                                   # x (B, N, C)
        q, k, v = (heads_first(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.q_linear = heads, nn.Linear(width, width)
        self.kv_linear, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, packed: Tensor, lengths: list[int]) -> Tensor:
        """packed (1, sum of lengths, C): every picture attends to its own captions' tokens."""
        rows, kv = self.q_linear(x).split(1), self.kv_linear(packed).split(lengths, dim=1)
        out = []
        for q, pair in zip(rows, kv, strict=True):
            q, k, v = (heads_first(part, self.heads) for part in (q, *pair.chunk(2, -1)))
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.proj(torch.cat(out))


class Mlp(nn.Module):
    def __init__(self, inner: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inner, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attn, self.cross_attn = Attention(width, heads), CrossAttention(width, heads)
        self.mlp = Mlp(width, hidden, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    def forward(self, x, packed, t0, lengths):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table[None] + t0).chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross_attn(x, packed, lengths)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainPixArt(nn.Module):
    def __init__(self, params: PixArtParams, gradient_checkpointing: bool):
        super().__init__()
        width, heads = params.hidden_size, params.num_heads
        self.params, self.gradient_checkpointing = params, gradient_checkpointing
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(params.in_channels, width, 2, 2)})
        self.t_embedder = nn.ModuleDict({
            "mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        })  # fmt: skip
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Module()
        self.y_embedder.y_proj = Mlp(params.caption_channels, width, width)
        self.y_embedder.register_buffer("y_embedding", torch.empty(params.caption_tokens, params.caption_channels))
        self.blocks = nn.ModuleList(Block(width, heads, int(width * params.mlp_ratio)) for _ in range(params.depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, 4 * params.out_channels)})
        self.final_layer.scale_shift_table = nn.Parameter(torch.empty(2, width))

    def forward(self, x: Tensor, t: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """x (B, 4, H, W), t (B,), caption (B, 120, D), mask (B, 120) boolean -> (B, 8, H, W)."""
        p, (rows, cols) = self.params, (side // 2 for side in x.shape[-2:])
        table = position_table(rows, cols, p.hidden_size, p.base_size, p.pe_interpolation).to(x)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + table
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angle = t[:, None].float() * frequencies
        t = self.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], -1).to(h.dtype))
        t0 = self.t_block(t).unflatten(1, (6, -1))
        packed = self.y_embedder.y_proj(caption.to(h.dtype))[mask][None]
        lengths = mask.sum(1).tolist()
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, packed, t0, lengths, use_reentrant=False)
            else:
                h = block(h, packed, t0, lengths)
        shift, scale = (self.final_layer.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        h = h.unflatten(2, (2, 2, p.out_channels)).unflatten(1, (rows, cols))
        return torch.einsum("bhwpqc->bchpwq", h).reshape(len(h), p.out_channels, 2 * rows, 2 * cols)


class PlainLora(nn.Module):
    """x W + scale x A B beside a frozen layer; `on` switches the second part."""

    on = True

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.scale * self.up(self.down(x)) if PlainLora.on else out


BETAS = np.linspace(1e-4, 2e-2, 1000)
ALPHAS = np.cumprod(1 - BETAS)
BEFORE = np.append(1.0, ALPHAS[:-1])
POSTERIOR = BETAS * (1 - BEFORE) / (1 - ALPHAS)


def extract(array: np.ndarray, t: Tensor) -> Tensor:
    return torch.from_numpy(array).to(t.device)[t].float().view(-1, 1, 1, 1)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return extract(np.sqrt(ALPHAS), t) * x0 + extract(np.sqrt(1 - ALPHAS), t) * noise


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def noise_loss(predict, batch, noise: Tensor, t: Tensor) -> Tensor:
    """Noise MSE plus the bound of the learned variance, whose mean is detached."""
    x0, x = batch.latent, add_noise(batch.latent, noise, t)
    output = predict(x, t, batch.context, batch.mask).float()
    eps, values = output.chunk(2, dim=1)
    low = extract(np.log(np.append(POSTERIOR[1], POSTERIOR[1:])), t)
    log_variance = low + (values + 1) / 2 * (extract(np.log(BETAS), t) - low)
    of_x0, of_x = BETAS * np.sqrt(BEFORE) / (1 - ALPHAS), (1 - BEFORE) * np.sqrt(1 - BETAS) / (1 - ALPHAS)
    guess = extract(np.sqrt(1 / ALPHAS), t) * x - extract(np.sqrt(1 / ALPHAS - 1), t) * eps.detach()
    true_mean, mean = (extract(of_x0, t) * start + extract(of_x, t) * x for start in (x0, guess))
    divergence = log_variance - low - 1 + (low - log_variance).exp() + (true_mean - mean) ** 2 * (-log_variance).exp()
    spread, centred = (-0.5 * log_variance).exp(), x0 - mean
    above, below = normal_cdf(spread * (centred + 1 / 255)), normal_cdf(spread * (centred - 1 / 255))
    inside = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    likelihood = -inside.clamp(min=1e-12).log()
    bound = torch.where(t == 0, likelihood.mean((1, 2, 3)), 0.5 * divergence.mean((1, 2, 3))) / math.log(2)
    return ((noise - eps) ** 2).mean() + bound.mean()


def consistency(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    x0 = (x - extract(np.sqrt(1 - ALPHAS), t) * output) / extract(np.sqrt(ALPHAS), t)
    scaled = (10 * t).float().view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x0


def consistency_loss(student, teacher, target, batch, null: Tensor, noise: Tensor, index: Tensor, w: float) -> Tensor:
    """One step of 20 of the guided teacher, then pseudo-Huber between student and target."""
    t = index * 20 + 19
    before, x = (t - 20).clamp(min=0), add_noise(batch.latent, noise, t)
    prediction = consistency(x, student(x, t, batch.context, batch.mask).float()[:, :4], t)
    with torch.no_grad():
        cond = teacher(x, t, batch.context, batch.mask).float()[:, :4]
        uncond = teacher(x, t, null.expand_as(batch.context), batch.mask).float()[:, :4]
        eps = cond + w * (cond - uncond)
        x0 = (x - extract(np.sqrt(1 - ALPHAS), t) * eps) / extract(np.sqrt(ALPHAS), t)
        x = extract(np.sqrt(ALPHAS), before) * x0 + extract(np.sqrt(1 - ALPHAS), before) * eps
        goal = consistency(x, target(x, before, batch.context, batch.mask).float()[:, :4], before)
    return (((prediction - goal) ** 2 + 0.001**2).sqrt() - 0.001).mean()
