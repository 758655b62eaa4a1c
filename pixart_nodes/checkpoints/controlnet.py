"""ControlNet files: what is in them, whom they fit, loading and saving.

The original's `.pth` holds the base as well (`base_model.*` and `controlnet.*`), diffusers' and SimpleTuner's adapter
only the copies (`controlnet_blocks.*`). The names are in `keys.py`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.attention import sdpa
from ..model.controlnet import ControlNetTransformer
from ..model.params import ControlParams, KVCompress, PixArtParams
from . import files
from .configs import CONTROL_CLASS, from_config, from_metadata, is_control_config, params_of
from .detect import HEAD_DIM, Detection, detect
from .foreign import LOOKALIKES, OTHERS, describe
from .keys import control_to_diffusers, control_to_native, find_control, find_layout, shortened
from .measure import spelled
from .save import metadata_of


@dataclass(frozen=True)
class ControlDetection:
    """What a ControlNet file turned out to be."""

    params: ControlParams
    base: PixArtParams | None    # of the transformer it was trained on, where the file says
    family: str | None           # "alpha" or "sigma", where the file says
    layout: str                  # "native" or "diffusers"
    notes: tuple[str, ...]       # sentences for the user


def load_controlnet(
    path_or_state_dict, *, config=None, operations=nn, attention=sdpa, dtype: torch.dtype | None = None, device=None
) -> tuple[ControlNetTransformer, ControlDetection]:
    """Loads the control half of a file, a diffusers folder or a state dict; the base in it is left alone.

    config: as in `detect`, for files that do not tell their number of heads. dtype None keeps what is stored. Raises
    ValueError and FileNotFoundError that say what the file is instead, or what is wrong with it.
    """
    if isinstance(path_or_state_dict, Mapping):
        native, detection = control_weights(path_or_state_dict, None, config)
    else:
        native, detection = load_control_weights(path_or_state_dict, config)
    model = ControlNetTransformer(detection.params, operations=operations, attention=attention, device="meta")
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in native.items()}, assign=True)
    return model, detection


def load_control_weights(path, config=None) -> tuple[dict[str, Tensor], ControlDetection]:
    """The state dict of a ControlNetTransformer, as stored, from a file or folder; errors as `load_controlnet`."""
    path = Path(path)
    loaded = files.load(path, ema=None if path.is_file() else False, is_ours=is_control_config)
    try:
        return control_weights(loaded.tensors, loaded.metadata, config or loaded.config)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def control_weights(state_dict, metadata=None, config=None) -> tuple[dict[str, Tensor], ControlDetection]:
    """Any PixArt ControlNet's state dict -> exactly the tensors of its ControlNetTransformer, and what it is."""
    _, layout = find_controlnet(state_dict)
    native = control_to_native(state_dict)
    measured, notes = _measure(native, layout), []
    if from_config(config).get("hidden_size", measured["hidden_size"]) != measured["hidden_size"]:
        notes.append("The config.json beside the file is of another model: ignored.")
        config = None
    said = from_config(config) | from_metadata(metadata)
    base = _bundled_base(state_dict, config, notes)
    known = params_of(metadata) or (base and base.params)
    heads = known.num_heads if known else said.get("num_heads")
    measured["num_heads"] = _num_heads(measured["hidden_size"], heads)
    measured["kv_compress"] = known.kv_compress if known else said.get("kv_compress", measured["kv_compress"])
    params = ControlParams(**measured)
    _check_tensors(native, params, layout)
    family = said.get("family") or (base and base.family)
    return native, ControlDetection(params, known, family, layout, tuple(notes))


def find_controlnet(state_dict: Mapping[str, Tensor]) -> tuple[str, str]:
    """(prefix, layout) of the PixArt ControlNet; ValueError that names what else the tensors are."""
    found = find_control(state_dict)
    if found is None:
        foreign = "a PixArt transformer: load it with PixArtLoadModel" if find_layout(state_dict) else None
        foreign = foreign or describe(state_dict, LOOKALIKES + OTHERS)
        what = foreign or (f"a file with tensors named {shortened(state_dict)}" if state_dict else "an empty file")
        raise ValueError(f"This is not a PixArt ControlNet but {what}.")
    return found


def base_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base in a ControlNet's file, under their names there. ValueError when there is none."""
    (control, _), base = find_controlnet(state_dict), find_layout(state_dict)
    if base is None:
        raise ValueError("There is no base model in this ControlNet's file: take one from PixArtLoadModel.")
    copies = (f"{control}controlnet.", f"{control}controlnet_blocks.")
    return {name: t for name, t in state_dict.items() if name.startswith(base[0]) and not name.startswith(copies)}


def misfit(found: ControlDetection, base: PixArtParams, family: str) -> str:
    """Why a ControlNet does not fit a base, "" if it does: "the width of its blocks is 48, of the model's 1152"."""
    reasons = []
    if found.family not in (None, family):
        reasons.append(f"it was trained on PixArt-{found.family}, the model is PixArt-{family}")
    for what, of in (
        ("width", lambda p: p.hidden_size),
        ("number of heads", lambda p: p.num_heads),
        ("MLP width", lambda p: int(p.hidden_size * p.mlp_ratio)),
    ):
        if of(found.params) != of(base):
            reasons.append(f"the {what} of its blocks is {of(found.params)}, of the model's {of(base)}")
    if found.params.qk_norm != base.qk_norm:
        reasons.append(f"QK normalisation is in {'its' if found.params.qk_norm else 'the model'}'s blocks only")
    if found.base is not None and found.base.depth != base.depth:
        reasons.append(f"it was trained on {found.base.depth} blocks, the model has {base.depth}")
    elif found.params.num_blocks >= base.depth:
        reasons.append(f"it steers {found.params.num_blocks + 1} blocks, the model has {base.depth}")
    return ", ".join(reasons)


def save_controlnet(net, path, base: PixArtParams, family: str, origin: str, dtype: torch.dtype | None = None):
    """Writes a ControlNetTransformer or its state dict as one safetensors file under native names, atomically.

    base: of the transformer it was trained on. dtype None keeps each tensor's. Raises ValueError for tensors that are
    not those of a ControlNet of that base, OSError when writing fails.
    """
    native = _complete(net, base, dtype)
    files.save_atomic(native, path, control_metadata(base, family, origin, "native"))


def save_diffusers_controlnet(
    net, folder, base: PixArtParams, family: str, origin: str, dtype: torch.dtype | None = None
):
    """Writes the folder of diffusers' PixArtControlNetAdapterModel; its class has the width of XL/2 built in.

    Raises ValueError for what diffusers' blocks cannot express (KV compression, QK norm, an MLP ratio other than 4),
    otherwise as `save_controlnet`.
    """
    native, folder = _complete(net, base, dtype), Path(folder)
    if any(".q_norm." in name or ".attn.sr." in name for name in native) or base.mlp_ratio != 4:
        raise ValueError("Diffusers' ControlNet has no KV compression, no QK normalisation and an MLP ratio of 4: "
                         "save this one in the native layout.")  # fmt: skip
    config = {"_class_name": CONTROL_CLASS, "num_layers": len({name.split(".")[1] for name in native})}
    metadata = control_metadata(base, family, origin, "diffusers")
    files.save_atomic(control_to_diffusers(native), folder / "diffusion_pytorch_model.safetensors", metadata)
    with files.replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def control_metadata(base: PixArtParams, family: str, origin: str, layout: str) -> dict[str, str]:
    """The header entries of our ControlNet files: those of the base, under an architecture of its own."""
    return metadata_of(base, family, origin, layout) | {"modelspec.architecture": f"pixart-{family}/controlnet"}


def _complete(net, base: PixArtParams, dtype) -> dict[str, Tensor]:
    native = control_to_native(net.state_dict() if isinstance(net, nn.Module) else net)
    _check_tensors(native, ControlParams.of(base, _measure(native, "native")["num_blocks"]), "native")
    return {name: tensor.to(dtype) for name, tensor in native.items()}


def _bundled_base(state_dict, config, notes: list[str]) -> Detection | None:
    """What the base in the same file is. One that is damaged or ambiguous is left out, with a remark."""
    if find_layout(state_dict) is None:
        return None
    try:
        return detect(base_of(state_dict), config=config)
    except ValueError as error:
        notes.append(f"The base model in the same file cannot be used ({error})")
        return None


def _measure(native: Mapping[str, Tensor], layout: str) -> dict:
    """Fields of ControlParams that the tensors prove."""
    indices = sorted({int(name.split(".")[1]) for name in native})
    needed = ("controlnet.0.after_proj.weight", "controlnet.0.copied_block.mlp.fc1.weight")
    for name in needed:
        if name not in native:
            raise ValueError(f"Incomplete PixArt ControlNet: {spelled([name], layout)} is missing.")
        if native[name].ndim != 2 or 0 in native[name].shape:
            raise ValueError(f"Wrong shape: {spelled([name], layout)} is {tuple(native[name].shape)}.")
    if indices != list(range(len(indices))):
        raise ValueError(f"Incomplete PixArt ControlNet: it has the blocks {shortened(map(str, indices), 20)} only.")
    (hidden, _), (mlp, _) = (native[name].shape for name in needed)
    compressed = {int(name.split(".")[1]): t.shape[-1] for name, t in native.items() if name.endswith("attn.sr.weight")}
    kv = KVCompress("conv", max(compressed.values()), tuple(sorted(compressed))) if compressed else None
    qk_norm = any(".attn.q_norm." in name for name in native)
    ratio = mlp / hidden
    ratio = ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf)
    return {"num_blocks": len(indices), "hidden_size": hidden, "mlp_ratio": ratio, "qk_norm": qk_norm,
            "kv_compress": kv}  # fmt: skip


def _num_heads(hidden: int, heads: int | None) -> int:
    if heads is None and hidden % HEAD_DIM:
        raise ValueError(f"No tensor tells how many heads a width of {hidden} has: put config.json beside the file.")
    heads = heads or hidden // HEAD_DIM
    if hidden % heads:
        raise ValueError(f"The configuration is another model's: {heads} heads do not divide a width of {hidden}.")
    return heads


def _check_tensors(native: Mapping[str, Tensor], params: ControlParams, layout: str):
    """Raises ValueError unless the tensors are exactly those of the parameters."""
    expected = ControlNetTransformer(params, device="meta").state_dict()
    if missing := [name for name in expected if name not in native]:
        raise ValueError(f"Incomplete PixArt ControlNet: {spelled(missing, layout)} missing.")
    if unknown := [name for name in native if name not in expected]:
        raise ValueError(f"Not a known PixArt ControlNet: it also holds {spelled(unknown, layout)}.")
    wrong = [
        f"{spelled([name], layout)} is {tuple(native[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected if native[name].shape != expected[name].shape
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"Wrong shape: {shortened(wrong, 3)}.")
