"""What a run starts from: the training set, the base model, and how precisely this machine computes."""

import zlib
from pathlib import Path

import torch

from ..checkpoints import load_transformer
from ..data.index import Index
from .config import RunConfig
from .recipes import Start

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMA_CHOICE = {"auto": None, "ema": True, "raw": False}


def precision_of(config: RunConfig) -> str:
    """ "auto" made concrete for this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def open_cache(path) -> Index:
    """The training set of a file, or of a feature cache's folder that has exactly one."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("sets/*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"cache {path} must have one training set in its folder sets, but has {names}: name one.")
        path = found[0]
    return Index(path)


def load_start(config: RunConfig, device, dtype) -> Start:
    base = config.base
    family = None if base.family == "auto" else base.family
    model, found = load_transformer(
        base.path, family=family, base_size=base.base_size, ema=EMA_CHOICE[base.weights], dtype=torch.float32
    )
    return Start(model, found.family, dtype, device, found.has_null_caption, fingerprint(model))


def fingerprint(model) -> int:
    """CRC-32 of two layers, to know a base model again wherever its file lies."""
    layers = model.blocks[0].attn.qkv.weight, model.final_layer.linear.weight
    return zlib.crc32(b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in layers))
