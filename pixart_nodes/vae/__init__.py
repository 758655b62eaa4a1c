"""Decode and encode with an AutoencoderKL in tiles, with the result of doing it in one piece: see exact_tiles."""

from .adapters import NotDecomposable, decoder_layers, encoder_layers
from .exact_tiles import decode, encode, run

__all__ = ["NotDecomposable", "decode", "decoder_layers", "encode", "encoder_layers", "run"]
