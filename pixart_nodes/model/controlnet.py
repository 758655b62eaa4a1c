"""PixArt-delta's ControlNet-Transformer: trained copies of a transformer's first blocks that steer its own.

PixArt-alpha diffusion/model/nets/pixart_controlnet.py; arXiv 2401.05252, section 4. Attribute names are those of the
original's control half.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from .attention import sdpa
from .memo import memo_of
from .params import ControlParams
from .transformer import PixArtBlock, PixArtTransformer, modulations, pad_to_multiple


class ControlBlock(nn.Module):
    """A copied block between two projections that start at zero; only the first one has a `before_proj`."""

    def __init__(self, params: ControlParams, index: int, *, operations, attention, dtype=None, device=None):
        super().__init__()
        C, factory = params.hidden_size, {"dtype": dtype, "device": device}
        self.copied_block = PixArtBlock(params, index, operations=operations, attention=attention, **factory)
        self.before_proj = operations.Linear(C, C, **factory) if index == 0 else None
        self.after_proj = operations.Linear(C, C, **factory)

    def forward(self, x, c, *args) -> tuple[Tensor, Tensor]:                  # x, c (B, N, C)
        if self.before_proj is not None:
            c = x + self.before_proj(c)
        c = self.copied_block(c, *args)
        return c, self.after_proj(c)                                          # (B, N, C) each


class ControlNetTransformer(nn.Module):
    """Copies of the blocks 0, 1, ... of a PixArtTransformer; copy i steers the base's block i + 1."""

    def __init__(self, params: ControlParams, *, operations=nn, attention=sdpa, dtype=None, device=None):
        super().__init__()
        self.params = params
        self.controlnet = nn.ModuleList(
            ControlBlock(params, i, operations=operations, attention=attention, dtype=dtype, device=device)
            for i in range(params.num_blocks)
        )

    @classmethod
    def from_base(cls, base: PixArtTransformer, num_blocks: int = 13) -> "ControlNetTransformer":
        """A ControlNet before training: the base's first blocks, and projections of zero, so nothing is steered yet.

        Raises ValueError when the base has too few blocks.
        """
        like = base.blocks[0].scale_shift_table
        net = cls(ControlParams.of(base.params, num_blocks), dtype=like.dtype, device=like.device)
        for block, original in zip(net.controlnet, base.blocks, strict=False):
            block.copied_block.load_state_dict(original.state_dict())
        for name, parameter in net.named_parameters():
            if "_proj." in name and "copied_block" not in name:
                nn.init.zeros_(parameter)
        return net

    def branch(self, hint: Tensor, weights: Sequence[float] | None = None) -> Callable[..., Iterator[Tensor | None]]:
        """An entry for control["branches"] of `PixArtTransformer.forward`.

        hint (B, 4, H, W): the scaled latent of the control image, of the size of the noisy latent; one row serves a
        whole batch. weights: a factor for each copy's residual (default 1).
        """
        return partial(self.residuals, hint=hint, weights=weights or (1.0,) * len(self.controlnet))

    def residuals(self, base, x, caption, t0, mask, grid, transformer_options, *, hint, weights):
        """Yields what enters the base's blocks 1, 2, ...: (B, N, C), or None where the weight is zero.

        x (B, N, C) is the base's state behind its block 0; caption, t0 and mask are the base's own. The hint goes
        through the base's patch embedder and positions. Works block by block with the base, so that only one residual
        exists at a time, and stops behind the last weight that is not zero.
        """
        hint = pad_to_multiple(hint.to(x), base.params.patch_size)
        c = base.embed_image(hint, grid, memo_of(transformer_options))        # (B or 1, N, C)
        last = max((i for i, weight in enumerate(weights) if weight), default=-1)
        tables = modulations([block.copied_block for block in self.controlnet], t0)
        for i, block in enumerate(self.controlnet[: last + 1]):
            options = {**transformer_options, "block_type": "control", "block_index": i}
            c, residual = block(x, c, caption, tables[i], mask, grid, options)
            yield residual * weights[i] if weights[i] else None
