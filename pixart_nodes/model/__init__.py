"""The PixArt network (alpha and Sigma): one definition for inference and training."""

from .controlnet import ControlNetTransformer
from .params import VARIANTS, ControlParams, KVCompress, PixArtParams
from .transformer import PixArtTransformer

__all__ = [
    "VARIANTS", "ControlNetTransformer", "ControlParams", "KVCompress", "PixArtParams", "PixArtTransformer",
]  # fmt: skip
