"""What a trainer takes from ComfyUI and gives back to it: the file of a MODEL, and the folders of results."""

import os
from pathlib import Path

import comfy.model_management
import folder_paths

from .control import load_control
from .lora import apply_lora
from .model import load_pixart, pixart_model

NODE = "PixArt Train"
SUBFOLDER = "pixart"
WEIGHTS = {"ema if present": "auto", "model": "raw", "ema": "ema"}  # the loader's words -> run.json's


def base_of(model) -> dict:
    """The fields of run.json's `base` for a MODEL of PixArt Load Model. Raises ValueError for any other."""
    pixart = pixart_model(model, NODE)
    if model.patches:
        raise ValueError(
            f"{NODE}: this MODEL has a LoRA on it, and training starts from the file {pixart.source}, without it. "
            "Connect PixArt Load Model itself; to train on top of a LoRA, save the model with PixArt Save Model first."
        )
    loaded = pixart.loaded_with
    return {"path": os.path.abspath(loaded["path"]), "family": pixart.detection.family,
            "base_size": loaded["base_size"], "weights": WEIGHTS[loaded["weights"]]}  # fmt: skip


def depth_of(model) -> int:
    return pixart_model(model, NODE).params.depth


def result_kind(recipe: str) -> str:
    """ComfyUI's name for the folder that a recipe's file belongs to."""
    if recipe == "controlnet":
        return "controlnet"
    return "loras" if recipe in ("lora", "dreambooth", "lcm-lora") else "diffusion_models"


def result_folder(recipe: str) -> str:
    """Where a recipe's file goes: pixart/ in the first of ComfyUI's folders that is the user's own."""
    kind = result_kind(recipe)
    places = folder_paths.get_folder_paths(kind)
    usual = os.path.join(folder_paths.models_dir, kind)
    return os.path.join(usual if usual in places else places[0], SUBFOLDER)


def loader_name(path: str, recipe: str) -> str:
    """A result as the loaders list it, which from now on do."""
    kind = result_kind(recipe)
    folder_paths.filename_list_cache.pop(kind, None)
    parent = next(place for place in folder_paths.get_folder_paths(kind) if Path(path).is_relative_to(place))
    return os.path.relpath(path, parent)


def apply_result(model, path: str, recipe: str):
    """(MODEL, CONTROL_NET or None) with what was trained."""
    kind = result_kind(recipe)
    if kind == "loras":
        return apply_lora(model, path)[0], None
    if kind == "controlnet":
        return model, load_control(path, "auto")
    return load_pixart(path, weight_dtype=pixart_model(model, NODE).loaded_with["weight_dtype"]), None


def runs_on_cpu() -> bool:
    """Whether ComfyUI uses no GPU, so that a trainer shall not either."""
    return comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())
