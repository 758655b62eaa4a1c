"""The PixArt transformer: adaLN-single blocks over image patches, attending to a T5 caption.

Attribute names are those of the original code, so its checkpoints load without a mapping.
Letters: B batch, N image tokens, C width, H/W latent size, L caption tokens, D caption width.
"""

import torch
from torch import Tensor, nn

from .attention import CrossAttention, SelfAttention, sdpa
from .embedders import CaptionEmbedder, Mlp, PatchEmbedder, ScalarEmbedder
from .params import PixArtParams
from .position import position_table


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column of (B, 4, H, W) until both sides are multiples."""
    for dim in (2, 3):
        missing = -x.shape[dim] % multiple
        if missing:
            last = x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat([x] + [last] * missing, dim=dim)
    return x


class PixArtBlock(nn.Module):
    """Self-attention and MLP, modulated by the timestep; cross-attention, not modulated."""

    def __init__(self, params: PixArtParams, index: int, *, operations, attention, dtype=None, device=None):
        super().__init__()
        C, factory = params.hidden_size, {"dtype": dtype, "device": device}
        kv = params.kv_compress if params.kv_compress is not None and index in params.kv_compress.layers else None
        self.norm1 = operations.LayerNorm(C, elementwise_affine=False, eps=1e-6, **factory)
        self.attn = SelfAttention(params, kv, operations=operations, attention=attention, **factory)
        self.cross_attn = CrossAttention(params, operations=operations, attention=attention, **factory)
        self.norm2 = operations.LayerNorm(C, elementwise_affine=False, eps=1e-6, **factory)
        self.mlp = Mlp(C, int(C * params.mlp_ratio), C, operations=operations, **factory)
        self.scale_shift_table = nn.Parameter(torch.empty(6, C, **factory))

    def forward(self, x, caption, t0, mask, grid, transformer_options):       # x (B, N, C); t0 (B, 6, C)
        table = self.scale_shift_table.to(t0)[None] + t0
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)  # (B, 1, C) each
        h = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), grid, transformer_options)
        x = torch.addcmul(x, gate_attn, h)
        x = x + self.cross_attn(x, caption, mask, transformer_options)
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return torch.addcmul(x, gate_mlp, h)


class FinalLayer(nn.Module):
    def __init__(self, params: PixArtParams, *, operations, dtype=None, device=None):
        super().__init__()
        C, factory = params.hidden_size, {"dtype": dtype, "device": device}
        self.norm_final = operations.LayerNorm(C, elementwise_affine=False, eps=1e-6, **factory)
        self.linear = operations.Linear(C, params.patch_size**2 * params.out_channels, **factory)
        self.scale_shift_table = nn.Parameter(torch.empty(2, C, **factory))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:                        # x (B, N, C); t (B, C)
        shift, scale = (self.scale_shift_table.to(t)[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))        # (B, N, p * p * out)


class PixArtTransformer(nn.Module):
    """Predicts the noise in a latent, given the timestep and a T5-encoded caption.

    `operations` supplies Linear, Conv2d and LayerNorm; `attention(q, k, v, heads, mask, transformer_options)`
    works on (B, N, C) tensors. Weights are uninitialised where a checkpoint owns them: load one, or call
    `training.initialise.initialise`.
    """

    def __init__(self, params: PixArtParams, *, operations=nn, attention=sdpa, dtype=None, device=None):
        super().__init__()
        C, factory = params.hidden_size, {"operations": operations, "dtype": dtype, "device": device}
        self.params = params
        self.dtype = dtype
        self.x_embedder = PatchEmbedder(params, **factory)
        self.t_embedder = ScalarEmbedder(C, **factory)
        if params.micro_condition:
            self.csize_embedder = ScalarEmbedder(C // 3, **factory)
            self.ar_embedder = ScalarEmbedder(C // 3, **factory)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(C, 6 * C, dtype=dtype, device=device))
        self.y_embedder = CaptionEmbedder(params, **factory)
        self.blocks = nn.ModuleList(
            PixArtBlock(params, i, attention=attention, **factory) for i in range(params.depth)
        )
        self.final_layer = FinalLayer(params, **factory)

    def forward(
        self, x, timesteps, context, context_mask=None, img_hw=None, aspect_ratio=None,
        control=None, transformer_options=None, learned_variance=False,
    ):  # fmt: skip
        """x (B, 4, H, W), timesteps (B,) in 0..999, context (B, L, D) -> noise (B, 4, H, W) of x.

        context_mask (B, L), non-zero = keep; fewer mask rows than images are repeated. A row that keeps nothing
        attends to everything. img_hw (B, 2) in pixels and aspect_ratio (B, 1) are read by micro-conditioned models.
        control: {"output": [residual (B, N, C) or None, ...]}, entry i enters the input of block i + 1.
        With learned_variance=True all output channels come back: noise, then the variance interpolation.
        """
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.params.patch_size)
        grid = (x.shape[2] // self.params.patch_size, x.shape[3] // self.params.patch_size)
        mask = self.attention_mask(context_mask, x.shape[0])
        t, t0 = self.embed_time(timesteps, img_hw, aspect_ratio, x.dtype)
        caption = self.y_embedder(context.to(x.dtype))                        # (B, L, C)
        tokens = self.embed_image(x, grid)                                    # (B, N, C)
        tokens = self.run_blocks(tokens, caption, t0, mask, grid, control, transformer_options or {})
        out = self.unpatchify(self.final_layer(tokens, t), grid)[:, :, :height, :width]
        return out if learned_variance else out[:, : self.params.in_channels]

    @staticmethod
    def attention_mask(mask: Tensor | None, batch: int) -> Tensor | None:
        if mask is None:
            return None
        mask = mask.reshape(-1, mask.shape[-1]) != 0                          # (b, L)
        mask = mask | ~mask.any(dim=1, keepdim=True)
        return mask.repeat(batch // mask.shape[0], 1)[:, None, None]          # (B, 1, 1, L)

    def embed_image(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.params
        table = position_table(*grid, p.hidden_size, p.base_size, p.pe_interpolation, device=x.device)
        return self.x_embedder(x) + table.to(x.dtype)

    def embed_time(self, timesteps, img_hw, aspect_ratio, dtype) -> tuple[Tensor, Tensor]:
        """t (B, C) for the final layer and its projection t0 (B, 6, C) that all blocks share."""
        t = self.t_embedder(timesteps, dtype)
        if self.params.micro_condition:
            if img_hw is None or aspect_ratio is None:
                raise ValueError("This PixArt-alpha model is micro-conditioned: it needs img_hw and aspect_ratio.")
            B = t.shape[0]
            size = self.csize_embedder(img_hw.reshape(-1), dtype).reshape(img_hw.shape[0], -1)
            ratio = self.ar_embedder(aspect_ratio.reshape(-1), dtype)
            size, ratio = (e.repeat(B // e.shape[0], 1) for e in (size, ratio))
            t = t + torch.cat([size, ratio], dim=1)
        return t, self.t_block(t).unflatten(1, (6, -1))

    def run_blocks(self, x, caption, t0, mask, grid, control, transformer_options):
        residuals = (control or {}).get("output", [])
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        options = {**transformer_options, "total_blocks": len(self.blocks), "block_type": "double", "grid": grid}
        for i, block in enumerate(self.blocks):
            options["block_index"] = i
            if ("double_block", i) in replace:
                x = self.replaced_block(replace[("double_block", i)], block, x, caption, t0, mask, grid, options)
            else:
                x = block(x, caption, t0, mask, grid, options)
            if i < len(residuals) and residuals[i] is not None:
                x = x + residuals[i].to(x)
        return x

    @staticmethod
    def replaced_block(patch, block, x, caption, t0, mask, grid, options):
        """ComfyUI's block replacement: the patch gets the arguments and may call the original block."""

        def original_block(args):
            return {"img": block(args["img"], args["txt"], args["vec"], mask, grid, args["transformer_options"])}

        args = {"img": x, "txt": caption, "vec": t0, "transformer_options": options}
        return patch(args, {"original_block": original_block})["img"]

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:         # x (B, N, p * p * out)
        (rows, cols), p = grid, self.params.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, cols))             # (B, rows, cols, p, p, out)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, rows * p, cols * p)
