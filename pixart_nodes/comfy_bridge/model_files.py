"""The checkpoints a user can pick: files and diffusers folders below ComfyUI's model folders."""

import json
import os
from pathlib import Path

import folder_paths

from ..checkpoints.configs import CONTROL_CLASS, is_pixart_config

FOLDERS = ("diffusion_models", "checkpoints")
BUNDLED = Path(__file__).parents[1] / "assets" / "tiny"


def register_bundled_models():
    """Adds the tiny model family that ships with the pack to ComfyUI's search paths, after the user's own."""
    for folder in ("diffusion_models", "text_encoders", "vae", "controlnet", "loras"):
        folder_paths.add_model_folder_path(folder, str(BUNDLED / folder), is_default=False)


def model_names() -> list[str]:
    """What the loader offers. A name that exists in both folders means the one in diffusion_models."""
    names = [
        name
        for folder in FOLDERS
        for name in (*folder_paths.get_filename_list(folder), *diffusers_folders(folder))
    ]
    return list(dict.fromkeys(names))


def model_path(name: str) -> str:
    """The file or folder behind a name of `model_names`. Raises FileNotFoundError for any other."""
    for folder in FOLDERS:
        path = folder_paths.get_full_path(folder, name) or diffusers_folders(folder).get(name)
        if path is not None:
            return path
    searched = ", ".join(path for folder in FOLDERS for path in folder_paths.get_folder_paths(folder))
    raise FileNotFoundError(f"{name} is in none of ComfyUI's model folders ({searched}). Put it into one of them.")


def control_names() -> list[str]:
    """What the ControlNet loader offers: files and diffusers folders below models/controlnet."""
    return [*folder_paths.get_filename_list("controlnet"), *folders_below("controlnet", holds_control)]


def control_path(name: str) -> str:
    """The file or folder behind a name of `control_names`. Raises FileNotFoundError for any other."""
    path = folder_paths.get_full_path("controlnet", name) or folders_below("controlnet", holds_control).get(name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths("controlnet"))
        raise FileNotFoundError(f"{name} is not in ComfyUI's ControlNet folders ({searched}). Put it into one of them.")
    return path


def diffusers_folders(folder: str) -> dict[str, str]:
    """Name -> path of the diffusers PixArt models (a transformer, or a whole pipeline) below a model folder."""
    return folders_below(folder, holds_pixart)


def folders_below(folder: str, holds) -> dict[str, str]:
    """Name -> path of the folders below one of ComfyUI's model folders for which holds(path, folders, files) is true.

    ComfyUI itself lists files only.
    """
    found = {}
    for root in folder_paths.get_folder_paths(folder):
        for path, folders, files in os.walk(root, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if path != root and holds(path, folders, files):
                found.setdefault(os.path.relpath(path, root), path)
                folders.clear()
    return found


def holds_pixart(path: str, folders: list[str], files: list[str]) -> bool:
    if "model_index.json" in files and "transformer" in folders:
        config = read_config(os.path.join(path, "transformer"))
    else:
        config = read_config(path) if "config.json" in files else {}
    return is_pixart_config(config)


def holds_control(path: str, folders: list[str], files: list[str]) -> bool:
    return "config.json" in files and read_config(path).get("_class_name") == CONTROL_CLASS


def read_config(path: str) -> dict:
    """The config.json of a folder; empty where there is none that can be read, because that is nothing to offer."""
    try:
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
