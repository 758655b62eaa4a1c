"""Writes a LoRA in the layouts that others read, with alpha and what it is inside the file."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import replacing, save_atomic
from .keys import WHOLE, native_to_diffusers, shortened
from .lora_alpha import Strength
from .lora_files import CONFIG, FOLDER_WEIGHTS, Adapter, Lora
from .lora_keys import Target

# layout: (prefix, native names?, separator, names of down, up and magnitude, whether alpha is a tensor)
LAYOUTS = {
    "peft": ("base_model.model.", False, ".", ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), False),
    "diffusers": ("transformer.", False, ".", ("lora_A.weight", "lora_B.weight", "dora_scale"), True),
    "comfyui": ("diffusion_model.", True, ".", ("lora_down.weight", "lora_up.weight", "dora_scale"), True),
    "kohya": ("lora_unet_", True, "_", ("lora_down.weight", "lora_up.weight", "dora_scale"), True),
}


def save_lora(lora: Lora, path, layout: str, metadata: Mapping[str, str] | None = None, dtype=None):
    """Writes `path`, a safetensors file, or with layout "peft" a folder for PeftModel.from_pretrained; atomically.

    layout is a key of LAYOUTS: all but "peft" load in ComfyUI's own LoRA loader, "diffusers" and "peft" have
    diffusers' names. dtype None keeps the tensors'. Raises ValueError for what a layout cannot express, OSError when
    writing fails.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no LoRA layout {layout!r}; there are {', '.join(LAYOUTS)}.")
    modules = spelled(lora, layout)
    tensors = {name: t.to(dtype if t.ndim else None) for name, t in tensors_of(modules, layout).items()}  # alpha exact
    config = peft_config(modules)
    header = {
        **{name: value for name, value in lora.metadata.items() if name.startswith(("pixart.", "modelspec."))},
        **(metadata or {}),
    }  # fmt: skip
    if layout == "diffusers":
        header["lora_adapter_metadata"] = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    elif layout == "kohya":
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": f"{config['r']}",
                   "ss_network_alpha": f"{config['lora_alpha']:g}"}  # fmt: skip
    if layout != "peft":
        return save_atomic(tensors, path, header)
    with replacing(Path(path) / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_atomic(tensors, Path(path) / FOLDER_WEIGHTS[0], header)


def spelled(lora: Lora, layout: str) -> dict[str, Adapter]:
    """The adapters by module name of a layout: q, k and v of a fused module joined or taken apart as it needs them."""
    if lora.unmatched:
        raise ValueError(f"{shortened(lora.unmatched)} would be lost: no part of a PixArt transformer is called so.")
    wrong = [adapter.target.module for adapter in lora.adapters if not exportable(adapter)]
    if wrong or not lora.adapters:
        what = f"{shortened(wrong)} is of another kind" if wrong else "there is none"
        raise ValueError(f"Only plain LoRA and DoRA updates can be written as {layout}, but {what}.")
    groups: dict[str, list[Adapter]] = {}
    for adapter in lora.adapters:
        groups.setdefault(adapter.target.module, []).append(adapter)
    modules = {}
    for module, adapters in groups.items():
        if len(adapters) > 1 and any(adapter.target.part == WHOLE for adapter in adapters):
            raise ValueError(f"{module} has an update as a whole and one of a part: they cannot be written together.")
        native = LAYOUTS[layout][1]
        modules |= {module: join(adapters)} if native else take_apart(module, adapters)
    return modules


def exportable(adapter: Adapter) -> bool:
    return adapter.kind == "lora" and adapter.tensors.keys() <= {"down", "up", "magnitude"}


def join(parts: list[Adapter]) -> Adapter:
    """One adapter of a fused module from those of its slices: their factors side by side, zeros between them."""
    (module, (_, n)), first = parts[0].target, parts[0]
    if n == 1:
        return first
    parts = sorted(parts, key=lambda adapter: adapter.target.part)
    scales = {a.strength.scale for a in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0  # different ones go into the factors
    rows, rank = first.tensors["up"].shape[0], sum(a.rank for a in parts)
    up = first.tensors["up"].new_zeros(n * rows, rank, *first.tensors["up"].shape[2:])
    column = 0
    for a in parts:
        row = a.target.part[0] * rows
        factor = 1.0 if a.strength.scale == scale else a.strength.scale
        up[row : row + rows, column : column + a.rank] = a.tensors["up"] * factor
        column += a.rank
    tensors = {"down": torch.cat([a.tensors["down"] for a in parts]), "up": up}
    magnitudes = [by_row(a) for a in parts if "magnitude" in a.tensors]
    if magnitudes and len(magnitudes) < n:
        raise ValueError(f"{module} has DoRA magnitudes for {len(magnitudes)} of its {n} slices: it needs all or none.")
    if magnitudes:
        tensors["magnitude"] = torch.cat(magnitudes)
    return Adapter(Target(module, WHOLE), "lora", tensors, rank, Strength(scale, scale * rank, "joined"))


def take_apart(module: str, adapters: list[Adapter]) -> dict[str, Adapter]:
    """Diffusers' names -> adapters: a fused one's slices share its down factor."""
    names = native_to_diffusers(module)
    if adapters[0].target.part != WHOLE or len(names) == 1:
        by_part = {a.target.part: a for a in adapters}
        return {name: by_part[part] for name, part in names if part in by_part}
    (a,) = adapters
    result = {}
    for name, (i, n) in names:
        tensors = {"down": a.tensors["down"], "up": a.tensors["up"].chunk(n)[i]}
        if "magnitude" in a.tensors:
            tensors["magnitude"] = by_row(a).chunk(n)[i]
        result[name] = Adapter(Target(module, (i, n)), "lora", tensors, a.rank, a.strength)
    return result


def by_row(adapter: Adapter) -> Tensor:
    """DoRA magnitudes (out, 1, ...). Raises ValueError for those by column, which slices of a module do not share."""
    magnitude = adapter.tensors["magnitude"]
    if magnitude.shape[0] != adapter.tensors["up"].shape[0]:
        raise ValueError(f"{adapter.target.module} has DoRA magnitudes by column, which this layout has no place for.")
    return magnitude


def tensors_of(modules: Mapping[str, Adapter], layout: str) -> dict[str, Tensor]:
    prefix, _, separator, leaves, with_alpha = LAYOUTS[layout]
    tensors = {}
    for module, adapter in modules.items():
        name = prefix + module.replace(".", separator)
        for ours, theirs in zip(("down", "up", "magnitude"), leaves, strict=True):
            if ours in adapter.tensors:
                tensors[f"{name}.{theirs}"] = adapter.tensors[ours]
        if "magnitude" in adapter.tensors:
            magnitude = by_row(adapter)
            if layout == "peft":  # (out) for matrices, (1, out, 1, 1) for convolutions
                magnitude = magnitude[:, 0] if magnitude.ndim == 2 else magnitude.transpose(0, 1)
            tensors[f"{name}.{leaves[2]}"] = magnitude
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha_of(adapter))
    return tensors


def alpha_of(adapter: Adapter) -> float:
    """The alpha that makes alpha / rank the adapter's scale, whatever rule it came from."""
    return adapter.strength.scale * adapter.rank


def peft_config(modules: Mapping[str, Adapter]) -> dict:
    """adapter_config.json: the commonest rank and alpha, and the modules that differ from them."""
    dora = {"magnitude" in adapter.tensors for adapter in modules.values()}
    if len(dora) > 1:
        raise ValueError("Some modules are DoRA and some are not: PEFT has one switch for all.")
    rank = Counter(adapter.rank for adapter in modules.values()).most_common(1)[0][0]
    alpha = Counter(alpha_of(adapter) for adapter in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": dora.pop(), "inference_mode": True, "target_modules": list(modules),
        "rank_pattern": {name: a.rank for name, a in modules.items() if a.rank != rank},
        "alpha_pattern": {name: alpha_of(a) for name, a in modules.items() if alpha_of(a) != alpha},
    }  # fmt: skip
