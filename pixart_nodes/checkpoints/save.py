"""From a transformer to a file: native or diffusers layout, with everything in the header to load it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.params import PixArtParams
from ..model.position import position_table
from .configs import to_diffusers_config
from .detect import check_tensors
from .files import NULL_CAPTION_FILE, replacing, save_atomic
from .keys import POS_EMBED, Y_EMBEDDING, to_diffusers, to_native


def metadata_of(params: PixArtParams, family: str, origin: str, layout: str) -> dict[str, str]:
    """The header entries by which `detect` knows our files."""
    return {
        "pixart.format": layout,
        "pixart.family": family,
        "pixart.params": json.dumps(asdict(params)),
        "pixart.origin": origin,
        "modelspec.architecture": f"pixart-{family}",
    }


def save_native(model, params: PixArtParams, path, family: str, origin: str, dtype: torch.dtype | None = None):
    """Writes a model or state dict as one safetensors file under native names, atomically.

    dtype None keeps each tensor's. `pos_embed` is written too, in float32: the original code and ComfyUI's own
    detection read it. Raises ValueError for tensors that are not the parameters', OSError when writing fails.
    """
    native = _complete(model, params, dtype)
    p = params
    native[POS_EMBED] = position_table(p.base_size, p.base_size, p.hidden_size, p.base_size, p.pe_interpolation)
    save_atomic(native, path, metadata_of(params, family, origin, "native"))


def save_diffusers(model, params: PixArtParams, folder, family: str, origin: str, dtype: torch.dtype | None = None):
    """Writes the folder that diffusers' PixArtTransformer2DModel.from_pretrained loads, each file atomically.

    The null caption, for which diffusers has no place, goes into a file of its own that diffusers does not look at.
    Raises ValueError for what diffusers cannot express (KV compression, QK norm), OSError when writing fails.
    """
    config = to_diffusers_config(params)
    native, folder = _complete(model, params, dtype), Path(folder)
    metadata = metadata_of(params, family, origin, "diffusers")
    save_atomic(to_diffusers(native), folder / "diffusion_pytorch_model.safetensors", metadata)
    save_atomic({Y_EMBEDDING: native[Y_EMBEDDING]}, folder / NULL_CAPTION_FILE)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _complete(model: nn.Module | Mapping[str, Tensor], params: PixArtParams, dtype) -> dict[str, Tensor]:
    """The tensors under native names, checked against the parameters and cast."""
    native = to_native(model.state_dict() if isinstance(model, nn.Module) else model)
    native.pop(POS_EMBED, None)
    if Y_EMBEDDING not in native:
        raise ValueError(f"{Y_EMBEDDING} is missing: a saved model carries its null caption.")
    check_tensors(native, params)
    return {name: tensor.to(dtype) for name, tensor in native.items()}
