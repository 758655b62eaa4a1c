"""Checkpoint files and their names: detection, loading and saving."""

from .controlnet import ControlDetection, load_controlnet, save_controlnet, save_diffusers_controlnet
from .detect import Detection, detect
from .load import load_transformer, load_weights
from .lora_export import save_lora
from .lora_files import Lora, load_lora, read_lora
from .save import save_diffusers, save_native

__all__ = [
    "ControlDetection", "Detection", "Lora", "detect", "load_controlnet", "load_lora", "load_transformer",
    "load_weights", "read_lora", "save_controlnet", "save_diffusers", "save_diffusers_controlnet", "save_lora",
    "save_native",
]  # fmt: skip
