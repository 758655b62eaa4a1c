"""KV token compression as a model patch: fewer keys and values in self-attention, the MODEL itself untouched.

The patch has no weights, so LoRA, offloading, 8-bit weights and torch.compile never meet it. It works on what `qkv`
gave, whoever patched that.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ..model.kv_compress import compress_untrained, lost_tokens
from ..model.params import KVCompress

logger = logging.getLogger(__name__)

PATCH = "attn1_kv_patch"  # the list of model patches that model.attention.SelfAttention goes through
PATCH_SAMPLINGS = ("conv", "uniform")
LAYER_NAMES = ("deep half", "shallow half", "all")


@dataclass(frozen=True)
class KVPatch:
    """How each block thins out its keys and values: {block: (sampling, scale_factor)}."""

    plan: Mapping[int, tuple[str, int]]

    def __call__(self, k: Tensor, v: Tensor, transformer_options) -> tuple[Tensor, Tensor]:  # k, v (B, N, C)
        how = self.plan.get(transformer_options["block_index"])
        if how is None:
            return k, v
        grid = transformer_options["grid"]
        return compress_untrained(k, grid, *how), compress_untrained(v, grid, *how)  # (B, M, C)


def plan_of(transformer_options) -> dict[int, tuple[str, int]]:
    """What the patches in a MODEL's options do, block by block."""
    patches = transformer_options.get("patches", {}).get(PATCH, ())
    return {block: how for patch in patches if isinstance(patch, KVPatch) for block, how in patch.plan.items()}


def as_plan(kv: KVCompress | None) -> dict[int, tuple[str, int]]:
    return {} if kv is None else {block: (kv.sampling, kv.scale_factor) for block in kv.layers}


def as_kv_compress(plan: Mapping[int, tuple[str, int]]) -> KVCompress | None:
    """The one record that a checkpoint can hold. Raises ValueError where blocks differ in how they compress."""
    ways = sorted(set(plan.values()))
    if len(ways) > 1:
        found = " and ".join(f"{sampling} by {factor}" for sampling, factor in ways)
        raise ValueError(f"A checkpoint holds one kind of KV compression, but this model has {found}: use one of them.")
    return KVCompress(*ways[0], tuple(sorted(plan))) if plan else None


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """"deep half", "shallow half", "all", or numbers and ranges such as "14-27" or "0, 2, 5-9" -> block indices.

    Raises ValueError for anything else, and for blocks that a model of this depth does not have.
    """
    words = " ".join(text.lower().split())
    named = {"deep half": range(depth // 2, depth), "shallow half": range(depth // 2), "all": range(depth)}
    if words in named:
        return tuple(named[words])
    try:
        layers = {block for part in words.split(",") for block in _block_range(part)}
    except ValueError:
        layers = set()
    if not layers or not layers <= set(range(depth)):
        raise ValueError(
            f"PixArt KV Compress: layers {text!r} names no blocks of this model, which has 0 to {depth - 1}. Write "
            f"{', '.join(LAYER_NAMES)}, or numbers such as {depth // 2}-{depth - 1} or 0, 2, 5."
        )
    return tuple(sorted(layers))


def _block_range(part: str) -> range:
    """"7" or "14-27"; ValueError for other words and for ranges that run backwards."""
    ends = [int(end) for end in part.split("-")]
    if len(ends) > 2 or ends[0] > ends[-1]:
        raise ValueError(part)
    return range(ends[0], ends[-1] + 1)


def check_grid(grid: tuple[int, int], kv: KVCompress | None, transformer_options):
    """Logs, once for each size, which tokens the model's own compression and that of its patches leave out.

    Raises ValueError for a picture that has less than one cell.
    """
    for sampling, factor in {*as_plan(kv).values(), *plan_of(transformer_options).values()}:
        if sampling in ("conv", "ave") and min(grid) < factor:
            height, width = (16 * tokens for tokens in grid)
            raise ValueError(
                f"KV compression by {factor} needs pictures of at least {16 * factor} px on both sides, but this one "
                f"has {width} x {height}: make it larger, or compress less."
            )
        _notice_lost_tokens(grid, sampling, factor)


@lru_cache(maxsize=64)
def _notice_lost_tokens(grid, sampling, factor):
    rows, cols = lost_tokens(grid, sampling, factor)
    if rows or cols:
        logger.warning(
            "KV compression by %d leaves the last %d of %d rows and %d of %d columns of tokens out of the keys; every "
            "token is still drawn. Sizes that are multiples of %d px lose nothing.",
            factor, rows, grid[0], cols, grid[1], 16 * factor,
        )  # fmt: skip
