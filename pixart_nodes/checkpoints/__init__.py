"""Checkpoint files and their names: detection, loading and saving."""

from .detect import Detection, detect
from .load import load_transformer, load_weights
from .save import save_diffusers, save_native

__all__ = ["Detection", "detect", "load_transformer", "load_weights", "save_diffusers", "save_native"]
