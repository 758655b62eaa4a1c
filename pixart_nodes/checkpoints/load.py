"""From a file to a transformer."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.attention import sdpa
from ..model.params import PixArtParams
from ..model.transformer import PixArtTransformer
from . import files
from .configs import from_config, from_metadata, from_name
from .controlnet import base_of
from .detect import Detection, contradictions, detect, find_transformer, idle_tensors, native_shapes
from .keys import POS_EMBED, Y_EMBEDDING, to_native
from .measure import measure

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What ComfyUI puts beside a quantised layer's weight, in its first and its second layout, and for the whole model.
SCALES = ("scale_weight", "weight_scale")
QUANTISED = (*SCALES, "scale_input", "input_scale", "comfy_quant", "scaled_fp8")


def load_transformer(
    path_or_state_dict, *, family: str | None = None, base_size: int | None = None,
    ema: bool | None = False, config=None, operations=nn, attention=sdpa, dtype: torch.dtype | None = None, device=None,
) -> tuple[PixArtTransformer, Detection]:  # fmt: skip
    """Loads a PixArt transformer from a file, a diffusers folder or a state dict in any layout.

    family, base_size (training size in pixels) and config as in `detect.detect`. ema=True takes the averaged weights
    of a training checkpoint, None takes them if there are any. dtype None keeps what is stored (fp8 too). The model
    is complete or an error is raised: ValueError or FileNotFoundError with the file's name, what is wrong, and what
    to do.
    """
    if isinstance(path_or_state_dict, Mapping):
        if ema:
            raise ValueError("ema=True chooses inside a checkpoint file; a state dict holds one set of weights.")
        native, detection = native_weights(path_or_state_dict, None, config, family, base_size)
    else:
        native, detection = load_weights(path_or_state_dict, family=family, base_size=base_size, ema=ema, config=config)
    model = PixArtTransformer(
        detection.params, operations=operations, attention=attention, dtype=dtype or _main_dtype(native), device="meta"
    )
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in native.items()}, assign=True)
    return model, detection


def load_weights(
    path, *, family: str | None = None, base_size: int | None = None, ema: bool | None = False, config=None,
    beside_control: bool = False,
) -> tuple[dict[str, Tensor], Detection]:  # fmt: skip
    """The complete state dict of a PixArtTransformer, as stored, from a file or folder; errors as load_transformer.

    beside_control=True takes the base out of a ControlNet's file.
    """
    path = Path(path)
    loaded = files.load(path, ema=ema)
    try:
        notes = []
        if beside_control:
            loaded = loaded._replace(tensors=base_of(loaded.tensors))
        if config is None:
            config = _config_of(path, loaded, notes)
        native, detection = native_weights(loaded.tensors, loaded.metadata, config, family, base_size, notes)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    for note in detection.notes:
        logger.info("%s: %s", path.name, note)
    return native, detection


def native_weights(state_dict, metadata, config, family, base_size, notes=()) -> tuple[dict[str, Tensor], Detection]:
    """Any PixArt state dict -> exactly the tensors of its PixArtTransformer, and what it is."""
    state_dict = dequantised(state_dict, metadata)
    detection = detect(state_dict, metadata, config, family, base_size)
    native = to_native(state_dict)
    for name in {POS_EMBED, *idle_tensors(native, detection.params)}:
        native.pop(name, None)
    notes = (*notes, *detection.notes)
    if not (has_null_caption := Y_EMBEDDING in native):
        native[Y_EMBEDDING] = null_caption(detection.params).to(_main_dtype(native))
        notes += ("The file has no null caption: random rows take its place. Encode an empty prompt instead.",)
    return native, replace(detection, notes=notes, has_null_caption=has_null_caption)


def dequantised(state_dict: Mapping[str, Tensor], metadata) -> Mapping[str, Tensor]:
    """ComfyUI's scaled fp8 with the scales multiplied in; any other state dict as it is.

    A weight comes out in the dtype of its layer's bias, which is what it had before. Raises ValueError for ComfyUI's
    other formats, and for files of other models before anything is computed.
    """
    marks = [name for name in state_dict if name.rpartition(".")[2] in QUANTISED]
    if not marks:
        return state_dict
    prefix, _ = find_transformer(state_dict)
    result = dict(state_dict)
    for mark in marks:
        layer, _, kind = mark.rpartition(".")
        weight, scale = state_dict.get(f"{layer}.weight"), result.pop(mark)
        if weight is None or not mark.startswith(prefix) or kind not in (*SCALES, "comfy_quant"):
            continue
        if weight.dtype not in FP8 or (kind in SCALES and scale.numel() != 1):
            raise ValueError(
                f"{layer} is quantised as {_format_of(layer, state_dict, metadata)}. Of ComfyUI's formats only fp8 "
                "with one scale for each matrix is read here: take ComfyUI's own Load Diffusion Model node for this "
                "file."
            )
        if kind in SCALES:
            bias = state_dict.get(f"{layer}.bias")
            dtype = torch.float32 if bias is None or bias.dtype in FP8 else bias.dtype
            result[f"{layer}.weight"] = (weight.float() * scale.float().reshape(())).to(dtype)
    return result


def _format_of(layer: str, state_dict, metadata) -> str:
    """ComfyUI's name of a layer's format: it stands beside the layer or in the file's header."""
    try:
        if f"{layer}.comfy_quant" in state_dict:
            return json.loads(bytes(state_dict[f"{layer}.comfy_quant"].tolist()))["format"]
        return json.loads((metadata or {})["_quantization_metadata"])["layers"][layer]["format"]
    except (ValueError, LookupError, TypeError, NotImplementedError):  # it only serves to name the format
        return "an unknown format"


def null_caption(params: PixArtParams) -> Tensor:
    """Rows (L, D) like those the original starts with, N(0, 1 / D) (PixArt_blocks.py:386), always the same ones."""
    shape = (params.caption_tokens, params.caption_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / params.caption_channels**0.5


def _main_dtype(native: Mapping[str, Tensor]) -> torch.dtype:
    return native["t_block.1.weight"].dtype


def _config_of(path: Path, loaded: files.Loaded, notes: list[str]) -> dict:
    """The config.json found with the file, if it can be of the same model, over what a published name says."""
    config, name = loaded.config, from_name(str(path.absolute()))
    _, layout = find_transformer(loaded.tensors)
    if config and not path.is_dir():
        if wrong := contradictions(from_config(config), measure(native_shapes(loaded.tensors), layout)):
            notes.append(f"The config.json beside the file is of another model ({wrong}): ignored.")
            config = {}
    if name and layout == "diffusers" and not from_metadata(loaded.metadata):
        notes.append(f"By its name this is PixArt-{name['family']} at {name['image_size']} px.")
    return {**name, **config}
