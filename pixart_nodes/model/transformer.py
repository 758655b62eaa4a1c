"""The PixArt transformer: adaLN-single blocks over image patches, attending to a T5 caption.

Attribute names are those of the original code, so its checkpoints load without a mapping.
Letters: B batch, N image tokens, C width, H/W latent size, L caption tokens, D caption width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from .attention import CrossAttention, SelfAttention, sdpa
from .embedders import CaptionEmbedder, Mlp, PatchEmbedder, ScalarEmbedder
from .memo import call, memo_of
from .params import PixArtParams
from .position import position_table
from .step_cache import KEY as STEP_CACHE

# Tokens of all pictures that go through an MLP at one time: at 4096 px the hidden layer of all is four times larger
# than anything else in a block. On a CPU parts are as small as matrix products stay fast: they stay in its caches, and
# larger allocations come as new pages each time.
MLP_ROWS, MLP_ROWS_CPU = 8192, 1024


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x (B, N, C) times scale plus shift, (B or 1, 1, C): one kernel where all rows share them."""
    if len(shift) == 1:
        return layer_norm(x, x.shape[-1:], scale[0, 0].to(x), shift[0, 0].to(x), eps=1e-6)
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), scale)


def modulations(blocks, t0: Tensor) -> Tensor:
    """What the blocks make of t0 (B or 1, 6, C): (depth, 6, B or 1, 1, C), one entry for each block's forward.

    The six are shift, 1 + scale and gate of the attention, then of the MLP.
    """
    tables = torch.stack([block.scale_shift_table.to(t0) for block in blocks])  # (depth, 6, C)
    six = tables[:, None] + t0                                                # (depth, B, 6, C)
    six[:, :, 1::3] += 1
    return six.transpose(1, 2).unsqueeze(3)


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
        self.attn = SelfAttention(params, kv, operations=operations, attention=attention, **factory)
        self.cross_attn = CrossAttention(params, operations=operations, attention=attention, **factory)
        self.mlp = Mlp(C, int(C * params.mlp_ratio), C, operations=operations, **factory)
        self.scale_shift_table = nn.Parameter(torch.empty(6, C, **factory))

    def forward(self, x, caption, modulation, mask, grid, transformer_options):
        """x (B, N, C), caption (B, L, C), modulation (6, B or 1, 1, C) of `modulations`, mask of `attention_mask`."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        h = self.attn(modulated_norm(x, shift_attn, scale_attn), grid, transformer_options)
        x = torch.addcmul(x, gate_attn, h)
        here = None if torch.is_grad_enabled() else x  # nobody else has this x: no new memory for each sum
        x = torch.add(x, self.cross_attn(x, caption, mask, transformer_options), out=here)
        for part in self.parts(x):
            h = self.mlp(modulated_norm(part, shift_mlp, scale_mlp))
            done = torch.addcmul(part, gate_mlp, h, out=None if here is None else part)
        return done if here is None else x

    @staticmethod
    def parts(x: Tensor) -> tuple[Tensor, ...]:
        """Views of x (B, N, C), with which the MLP can be computed one after the other; with gradients x itself."""
        rows = MLP_ROWS_CPU if x.device.type == "cpu" else MLP_ROWS
        return (x,) if torch.is_grad_enabled() else x.split(max(1, rows // len(x)), dim=1)


class FinalLayer(nn.Module):
    def __init__(self, params: PixArtParams, *, operations, dtype=None, device=None):
        super().__init__()
        C, factory = params.hidden_size, {"dtype": dtype, "device": device}
        self.linear = operations.Linear(C, params.patch_size**2 * params.out_channels, **factory)
        self.scale_shift_table = nn.Parameter(torch.empty(2, C, **factory))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:                        # x (B, N, C); t (B, C)
        shift, scale = (self.scale_shift_table.to(t)[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, 1 + scale))               # (B, N, p * p * out)


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
        """x (B, 4, H, W), timesteps (B,) or (1,) in 0..999, context (B, L, D) -> noise (B, 4, H, W) of x.

        context_mask (B, L), non-zero = keep; fewer mask rows than images are repeated. A row that keeps nothing
        attends to everything. img_hw (B, 2) in pixels and aspect_ratio (B, 1) are read by micro-conditioned models.
        control: {"output": [residual (B, N, C) or None, ...], "branches": [branch, ...], "who": anything that tells
        these from other sources, for the step cache}, all optional; residual i
        enters the input of block i + 1. A branch is called with the state behind block 0 and gives such residuals,
        one when each block has run (see `controlnet.ControlNetTransformer.branch`).
        With learned_variance=True all output channels come back: noise, then the variance interpolation.
        """
        options, (height, width) = transformer_options or {}, x.shape[-2:]
        once = memo_of(options)
        x = pad_to_multiple(x, self.params.patch_size)
        grid = (x.shape[2] // self.params.patch_size, x.shape[3] // self.params.patch_size)
        mask = None if context_mask is None else once(self.attention_mask, context_mask, x.shape[0], x.dtype)
        t, t0 = self.embed_time(timesteps, img_hw, aspect_ratio, x.dtype, once)
        caption = once(self.y_embedder, context.to(x.dtype))                  # (B, L, C)
        tokens = self.embed_image(x, grid, once)                              # (B, N, C)
        tokens = self.run_blocks(tokens, caption, t0, mask, grid, control, options)
        out = self.unpatchify(self.final_layer(tokens, t), grid)[:, :, :height, :width]
        return out if learned_variance else out[:, : self.params.in_channels]

    @staticmethod
    def attention_mask(mask: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """(b, L), non-zero = keep -> (B, 1, 1, L) to add to the scores: 0 or -inf. Rows that keep nothing keep all."""
        mask = mask.reshape(-1, mask.shape[-1]) != 0                          # (b, L)
        dropped = ~mask & mask.any(dim=1, keepdim=True)
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(dropped, -torch.inf)
        return scores.repeat(batch // len(mask), 1)[:, None, None]

    def embed_image(self, x: Tensor, grid: tuple[int, int], once=call) -> Tensor:
        return self.x_embedder(x) + once(self.position_codes, grid, x.dtype, x.device)

    def position_codes(self, grid: tuple[int, int], dtype: torch.dtype, device) -> Tensor:
        """Where each token is, (1, N, C): computed in float64 and rounded once."""
        p = self.params
        return position_table(*grid, p.hidden_size, p.base_size, p.pe_interpolation, device=device).to(dtype)

    def embed_time(self, timesteps, img_hw, aspect_ratio, dtype, once=call) -> tuple[Tensor, Tensor]:
        """t (B, C) for the final layer and its projection t0 (B, 6, C) for all blocks; B is 1 for one timestep."""
        t = self.t_embedder(timesteps, dtype)
        if self.params.micro_condition:
            if img_hw is None or aspect_ratio is None:
                raise ValueError("This PixArt-alpha model is micro-conditioned: it needs img_hw and aspect_ratio.")
            parts = once(self.csize_embedder, img_hw, dtype), once(self.ar_embedder, aspect_ratio, dtype)
            batch = max(len(t), *map(len, parts))
            t = t + torch.cat([part.repeat(batch // len(part), 1) for part in parts], dim=1)
        return t, self.t_block(t).unflatten(1, (6, -1))

    def run_blocks(self, x, caption, t0, mask, grid, control, transformer_options):
        control = control or {}
        sources = [iter(control.get("output", ()))]  # each gives what enters block 1, 2, ...
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        options = {**transformer_options, "total_blocks": len(self.blocks), "block_type": "double", "grid": grid}
        cache = transformer_options.get(STEP_CACHE)
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations(self.blocks, t0), strict=True)):
            options["block_index"], before, patch = i, x, replace.get(("double_block", i))
            if patch is not None:
                x = self.replaced_block(patch, block, x, caption, modulation, mask, grid, options)
            else:
                x = block(x, caption, modulation, mask, grid, options)
            if i == 0 and cache is not None and (skipped := cache.skip(before, x, control, options)) is not None:
                return skipped
            if i == 0:  # a control net starts from here, and runs along
                branches = control.get("branches", ())
                sources += [branch(self, x, caption, t0, mask, grid, options) for branch in branches]
            for residual in [next(source, None) for source in sources]:
                x = x if residual is None else x + residual.to(x)
        return x if cache is None else cache.keep(x)

    @staticmethod
    def replaced_block(patch, block, x, caption, modulation, mask, grid, options):
        """ComfyUI's block replacement: the patch gets the arguments and may call the original block."""

        def original_block(args):
            return {"img": block(args["img"], args["txt"], args["vec"], mask, grid, args["transformer_options"])}

        args = {"img": x, "txt": caption, "vec": modulation, "transformer_options": options}
        return patch(args, {"original_block": original_block})["img"]

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:         # x (B, N, p * p * out)
        (rows, cols), p = grid, self.params.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (rows, cols))             # (B, rows, cols, p, p, out)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, rows * p, cols * p)
