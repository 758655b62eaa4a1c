"""The PixArt network (alpha and Sigma): one definition for inference and training."""

from .params import VARIANTS, KVCompress, PixArtParams
from .transformer import PixArtTransformer

__all__ = ["VARIANTS", "KVCompress", "PixArtParams", "PixArtTransformer"]
