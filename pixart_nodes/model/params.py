"""The numbers that define a PixArt transformer, and the released variants by name."""

from dataclasses import dataclass, replace

KV_SAMPLINGS = ("conv", "ave", "uniform", "uniform_every")


@dataclass(frozen=True)
class KVCompress:
    """Key/value token compression (PixArt-Sigma, section 3.3): which layers, how, and by how much per axis."""

    sampling: str
    scale_factor: int
    layers: tuple[int, ...]

    def __post_init__(self):
        if self.sampling not in KV_SAMPLINGS:
            raise ValueError(f"KV compression sampling {self.sampling!r} is not one of {', '.join(KV_SAMPLINGS)}.")
        if self.scale_factor < 2:
            raise ValueError(f"KV compression by a factor of {self.scale_factor} does nothing; use 2 or 4, or None.")


@dataclass(frozen=True)
class PixArtParams:
    """Everything the network needs to be built. No defaults: a forgotten field is a TypeError."""

    depth: int
    hidden_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    mlp_ratio: float
    caption_channels: int
    caption_tokens: int
    base_size: int
    pe_interpolation: float
    micro_condition: bool
    qk_norm: bool
    kv_compress: KVCompress | None
    learned_variance: bool

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)


@dataclass(frozen=True)
class ControlParams:
    """A ControlNet-Transformer: copies of the first `num_blocks` blocks of a transformer with these numbers."""

    num_blocks: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    kv_compress: KVCompress | None

    @classmethod
    def of(cls, base: PixArtParams, num_blocks: int) -> "ControlParams":
        """Those of a ControlNet for `base`. Raises ValueError unless num_blocks is within 1 .. base.depth - 1."""
        if not 1 <= num_blocks < base.depth:
            raise ValueError(
                f"A ControlNet for {base.depth} blocks has 1 to {base.depth - 1} copies of them, not {num_blocks}: "
                "copy i steers block i + 1."
            )
        return cls(num_blocks, base.hidden_size, base.num_heads, base.mlp_ratio, base.qk_norm, base.kv_compress)


# XL/2: PixArt-alpha diffusion/model/nets/PixArt.py:271; positions span [0, base_size / pe_interpolation).
_XL_2 = PixArtParams(
    depth=28, hidden_size=1152, num_heads=16, in_channels=4, patch_size=2, mlp_ratio=4.0,
    caption_channels=4096, caption_tokens=120, base_size=16, pe_interpolation=1.0,
    micro_condition=False, qk_norm=False, kv_compress=None, learned_variance=True,
)  # fmt: skip

VARIANTS: dict[str, PixArtParams] = {
    "alpha-256": _XL_2,
    "alpha-512": replace(_XL_2, base_size=32),
    "alpha-1024": replace(_XL_2, base_size=64, pe_interpolation=2.0, micro_condition=True),
    "sigma-256": replace(_XL_2, base_size=16, pe_interpolation=0.5, caption_tokens=300),
    "sigma-512": replace(_XL_2, base_size=32, pe_interpolation=1.0, caption_tokens=300),
    "sigma-1024": replace(_XL_2, base_size=64, pe_interpolation=2.0, caption_tokens=300),
    "sigma-2k": replace(_XL_2, base_size=128, pe_interpolation=4.0, caption_tokens=300),
}
