"""What the names, shapes and position table of a PixArt transformer prove about it."""

import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from ..model.params import KVCompress
from ..model.position import positions, sincos
from .configs import CAPTION_TOKENS
from .keys import Y_EMBEDDING, native_to_diffusers, shortened

PUBLISHED_INTERPOLATIONS = (0.5, 1.0, 2.0, 4.0)  # at 256, 512, 1024 and 2048 px
ONETRAINER_GRID = 64


def spelled(names, layout: str) -> str:
    """Native names as a file of that layout spells them, the first few."""
    if layout == "diffusers":
        names = ["/".join(theirs for theirs, _ in native_to_diffusers(name)) or name for name in names]
    return shortened(names)


def measure(native: Mapping[str, Tensor], layout: str) -> dict:
    """Fields of PixArtParams, and "family" where it shows, from a state dict under native names (meta will do).

    Raises ValueError where a tensor that tells them is missing or has no possible shape.
    """
    rows_of = _Shapes(native, layout)
    hidden, in_channels, patch, _ = rows_of("x_embedder.proj.weight", 4)
    _, caption_channels = rows_of("y_embedder.y_proj.fc1.weight", 2)
    mlp, _ = rows_of("blocks.0.mlp.fc1.weight", 2)
    hidden = _majority(native, hidden)
    ratio = mlp / hidden
    measured = {
        "depth": _depth(native),
        "hidden_size": hidden,
        "in_channels": in_channels,
        "patch_size": patch,
        "mlp_ratio": ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf),
        "caption_channels": caption_channels,
        "micro_condition": any(name.startswith(("csize_embedder.", "ar_embedder.")) for name in native),
        "qk_norm": any(".attn.q_norm." in name for name in native),
        "kv_compress": _kv_compress(native, rows_of),
        "learned_variance": _learned_variance(rows_of, patch**2 * in_channels),
    }
    if Y_EMBEDDING in native:
        measured["caption_tokens"], width = rows_of(Y_EMBEDDING, 2)
        if width != caption_channels:
            names = spelled(["y_embedder.y_proj.fc1.weight", Y_EMBEDDING], layout)
            raise ValueError(f"Wrong shape: {names} have caption widths {caption_channels} and {width}.")
    return measured | _family(measured)


class _Shapes:
    """Looks up shapes and refuses what cannot be."""

    def __init__(self, native, layout):
        self.native, self.layout = native, layout

    def __call__(self, name: str, ndim: int) -> tuple[int, ...]:
        if name not in self.native:
            raise ValueError(f"Incomplete PixArt transformer: {spelled([name], self.layout)} is missing.")
        shape = tuple(self.native[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise ValueError(f"Wrong shape: {spelled([name], self.layout)} is {shape}, expected {ndim} dimensions.")
        return shape


def _majority(native, hidden: int) -> int:
    """The width that most tensors agree on, so that one wrong tensor is named as the wrong one."""
    names = ("t_embedder.mlp.2.bias", "y_embedder.y_proj.fc2.bias", "blocks.0.attn.proj.bias")
    votes = Counter([hidden] + [native[name].shape[0] for name in names if name in native and native[name].ndim])
    return votes.most_common(1)[0][0]


def _depth(native) -> int:
    indices = (name.split(".")[1] for name in native if name.startswith("blocks."))
    return 1 + max(int(index) for index in indices if index.isdigit())


def _kv_compress(native, rows_of) -> KVCompress | None:
    """Only "conv" sampling leaves tensors behind; "ave" and "uniform" have to be declared."""
    layers = {
        int(name.split(".")[1]) for name in native
        if name.startswith("blocks.") and (".attn.sr." in name or ".attn.norm." in name)
    }  # fmt: skip
    if not layers:
        return None
    *_, factor = rows_of(f"blocks.{min(layers)}.attn.sr.weight", 4)
    return KVCompress("conv", factor, tuple(sorted(layers)))


def _learned_variance(rows_of, plain: int) -> bool:
    rows, _ = rows_of("final_layer.linear.weight", 2)
    if rows not in (plain, 2 * plain):
        name = spelled(["final_layer.linear.weight"], rows_of.layout)
        raise ValueError(f"Wrong shape: {name} has {rows} rows, expected {2 * plain} or, without variance, {plain}.")
    return rows == 2 * plain


def _family(measured) -> dict:
    by_tokens = {tokens: family for family, tokens in CAPTION_TOKENS.items()}
    family = by_tokens.get(measured.get("caption_tokens"))
    if family is None and measured["micro_condition"]:  # Sigma was published without
        family = "alpha"
    return {"family": family} if family else {}


def measure_positions(table: Tensor | None, has_null_caption: bool) -> tuple[dict, list[str]]:
    """base_size (tokens) and pe_interpolation from a stored `pos_embed` (1, N, C), and remarks for the user.

    In training the grid is the base grid, so token 1 stands at position 1 / pe_interpolation, which its first sine
    and cosine give away. A meta tensor tells the grid only. A table that cannot be trusted tells nothing.
    """
    if table is None:
        return {}, []
    grid = math.isqrt(table.shape[-2])
    if table.ndim != 3 or grid < 2 or grid**2 != table.shape[1] or table.shape[2] % 4:
        return {}, [f"pos_embed of shape {tuple(table.shape)} is no square grid: ignored."]
    if table.is_meta:
        return ({"base_size": grid} if has_null_caption or grid != ONETRAINER_GRID else {}), []
    scale = _interpolation(table, grid)
    if scale is None:
        return {}, ["pos_embed does not hold PixArt's positions: ignored."]
    if grid == ONETRAINER_GRID and scale == 1.0 and not has_null_caption:
        return {}, ["pos_embed is the one that OneTrainer writes into every file: ignored."]
    return {"base_size": grid, "pe_interpolation": scale}, []


def _interpolation(table: Tensor, grid: int) -> float | None:
    """The interpolation whose positions are in the table's first row and column, None if there is none."""
    half = table.shape[2] // 2
    row, column = table[0, :grid, :half].double(), table[0, ::grid, half:].double()  # (grid, C / 2) each
    position = math.atan2(row[1, 0], row[1, half // 2])
    if position <= 0:
        return None
    scale = min(PUBLISHED_INTERPOLATIONS, key=lambda s: abs(s * position - 1))
    if abs(scale * position - 1) > 0.03:  # stored in bfloat16, a published one is off by up to 2 %
        scale = round(1 / position, 4)
    code = sincos(positions(grid, grid, scale), half)                         # (grid, C / 2)
    error = max((row - code).abs().max(), (column - code).abs().max())
    return scale if error < 0.1 else None
