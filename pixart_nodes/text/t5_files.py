"""Where a T5 encoder lies on disk: a Hugging Face folder, a pipeline's text_encoder folder, or one file."""

import json
import os
import re
from dataclasses import dataclass

WEIGHT_FILES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)$")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SCAN_DEPTH = 3  # <root>/<pipeline>/text_encoder, and one folder above for those who sort their models


@dataclass(frozen=True)
class T5Files:
    """Absolute paths: the weights (all shards, in order), config.json if any, tokenizers beside the weights.

    is_folder: a Hugging Face folder, whose files belong together; beside a single file may lie another model's.
    """

    weights: tuple[str, ...]
    config: str | None
    tokenizers: tuple[str, ...]
    is_folder: bool = True


def list_encoders(roots, file_names, other_roots=()) -> list[str]:
    """Names to choose from: single files and T5 folders under `roots`, T5 folders of pipelines under `other_roots`.

    `file_names` are paths relative to a root. Files inside a folder that is listed, and second and later shards, are
    left out.
    """
    folders = dict.fromkeys(name for root in roots for name in t5_folders(root))
    folders.update(dict.fromkeys(name for root in other_roots for name in t5_folders(root) if "text_encoder" in name))
    files = [
        name
        for name in file_names
        if os.path.dirname(name).replace("\\", "/") not in folders
        and name.lower().endswith(WEIGHT_FILES)
        and not ((shard := SHARD.match(name)) and int(shard[2]) > 1)
    ]
    return [*sorted(folders), *files]


def find(name: str, roots) -> str:
    """The path behind a name of `list_encoders`. Raises FileNotFoundError when no root has it."""
    for root in roots:
        path = os.path.abspath(os.path.join(root, name))
        inside = os.path.commonpath([path, os.path.abspath(root)]) == os.path.abspath(root)
        if inside and os.path.exists(path):
            return path
    raise FileNotFoundError(f"There is no text encoder {name!r} any more. Reload the page (R) to see the current list.")


def locate(path: str) -> T5Files:
    """The files of the encoder at `path`, a folder or a file. Raises FileNotFoundError for missing shards."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    config = os.path.join(folder, "config.json")
    return T5Files(
        weights=folder_weights(path) if path == folder else file_weights(path),
        config=config if is_t5_config(config) else None,
        tokenizers=tuple(
            os.path.join(place, name)
            for place in (folder, os.path.join(os.path.dirname(folder), "tokenizer"))
            for name in TOKENIZER_FILES
            if os.path.isfile(os.path.join(place, name))
        ),
        is_folder=path == folder,
    )


def t5_folders(root):
    """Paths, relative to `root` and with forward slashes, of the folders below it with the config.json of a T5."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(folder, root).replace("\\", "/")
        if relative.count("/") >= SCAN_DEPTH - 1:
            subfolders.clear()
        if relative != "." and "config.json" in names and is_t5_config(os.path.join(folder, "config.json")):
            found.append(relative)
    return found


def is_t5_config(path):
    """Whether `path` is the config.json of a T5 kind; model_type tells, umt5 included so that loading can name it."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):  # not there, or another program's file: simply not one of ours
        return False
    return isinstance(config, dict) and config.get("model_type") in ("t5", "mt5", "umt5")


def read_config(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def folder_weights(folder):
    """Weight files of a Hugging Face folder: by its index, else its only set of files; safetensors before .bin."""
    names = sorted(os.listdir(folder), key=lambda name: (len(name), name))  # model.x before model.fp16.x
    for ending in WEIGHT_FILES:
        index = next((name for name in names if re.search(rf"{re.escape(ending)}\.index.*\.json$", name)), None)
        if index:
            return indexed_weights(folder, index)
        files = [name for name in names if name.endswith(ending)]
        if files:
            return file_weights(os.path.join(folder, files[0]))
    raise FileNotFoundError(f"{folder} has no weights: a .safetensors or .bin file belongs beside its config.json.")


def indexed_weights(folder, index):
    path = os.path.join(folder, index)
    try:
        with open(path, encoding="utf-8") as file:
            names = {os.path.basename(name) for name in json.load(file)["weight_map"].values()}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards: download it again, or remove it.") from error
    return require(folder, sorted(names))


def file_weights(path):
    """`path` itself, or all of its siblings when it is one of several shards."""
    folder, name = os.path.split(path)
    shard = SHARD.match(name)
    if not shard:
        return (path,)
    stem, _, count, ending = shard.groups()
    return require(folder, [f"{stem}-{n:05}-of-{count}{ending}" for n in range(1, int(count) + 1)])


def require(folder, names):
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise FileNotFoundError(
            f"{folder} is incomplete: {missing[0]} is missing ({len(names) - len(missing)} of {len(names)} shards are "
            "there). Download it into this folder."
        )
    return tuple(os.path.join(folder, name) for name in names)
