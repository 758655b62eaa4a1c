"""A MODEL as a checkpoint file: its weights with LoRAs merged in, and the KV compression of its patches."""

import zlib
from dataclasses import replace
from pathlib import Path

import comfy.float
import comfy.lora
import folder_paths
import torch
from torch import Tensor

from ..checkpoints import save_native
from ..model.kv_compress import untrained_tensors
from .kv_compress import as_kv_compress, as_plan, plan_of
from .model import pixart_model

NODE = "PixArt Save Model"
DTYPES = {"as loaded": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FOLDERS = ("output", "models")
PREFIX = "diffusion_model."


def save_model(model, name: str, folder: str, dtype: str) -> Path:
    """Writes a MODEL under native names, never over another file -> where it was written.

    folder "output" is ComfyUI's output/diffusion_models, "models" the first folder of diffusion models; both are
    searched by PixArt Load Model. Raises ValueError for models that cannot be saved, OSError when writing fails.
    """
    pixart = pixart_model(model, NODE)
    path = free_path(destination(folder), name)
    own, added = as_plan(pixart.params.kv_compress), plan_of(model.model_options["transformer_options"])
    params = replace(pixart.params, kv_compress=as_kv_compress(own | added))
    weights = merged_weights(model, DTYPES[dtype])
    if added:
        kept = weights["t_block.1.weight"].dtype
        start = untrained_tensors(params, as_kv_compress(added))
        weights |= {key: tensor.to(kept) for key, tensor in start.items()}
    try:
        save_native(weights, params, path, pixart.detection.family, origin_of(model, pixart, params), DTYPES[dtype])
    except ValueError as error:
        raise ValueError(f"{NODE}: {pixart.source} cannot be saved. {error}") from error
    return path


def destination(folder: str) -> Path:
    if folder == "output":
        return Path(folder_paths.get_output_directory(), "diffusion_models")
    return Path(folder_paths.get_folder_paths("diffusion_models")[0])


def free_path(folder: Path, name: str) -> Path:
    """A path for `name` below the folder at which there is nothing yet: name, name_2, name_3 ...

    Raises ValueError for an empty name and for one that leads out of the folder.
    """
    name = name.strip().removesuffix(".safetensors")
    path = (folder / f"{name}.safetensors").resolve()
    if not name or name.endswith(("/", "\\")) or not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{NODE}: {name!r} is no file name below {folder}. Write a name such as pixart_kv.")
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


def merged_weights(model, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The network's tensors under native names on the CPU, with the patches of LoRA loaders and merges applied.

    In `dtype`, or with None as loaded, where quantised weights get the dtype of the layers beside them. Patched ones
    are rounded as ComfyUI rounds them to sample: in fp8 at random, by its seed, which keeps the mean of small updates.
    The MODEL stays as it is, loaded or not.
    """
    stored = model.get_key_patches(PREFIX)  # {name: [(tensor, how to make it plain), patch, ...]}
    beside = stored[f"{PREFIX}t_block.1.weight"][0][0].dtype
    merged = {}
    for key, ((tensor, plain), *patches) in stored.items():
        kept = dtype or (tensor.dtype if tensor.is_floating_point() else beside)
        weight = plain(tensor.cpu())
        if patches:
            weight = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)
            weight = comfy.float.stochastic_rounding(weight, kept, seed=zlib.crc32(key.encode()))
        merged[key.removeprefix(PREFIX)] = weight.to(kept)
    return merged


def origin_of(model, pixart, params) -> str:
    """A sentence for the file's header: from which file, and what was done to it."""
    changes = [f"{len(model.patches)} weights patched"] if model.patches else []
    if params.kv_compress != pixart.params.kv_compress:
        changes.append("KV compression added, untrained")
    return "; ".join([f"PixArt Save Model from {pixart.source}", *changes])
