"""Reads and writes checkpoint files: safetensors, PyTorch pickles (tensors only) and diffusers folders.

A file is read completely or not at all; whatever is wrong with it comes as one ValueError with the file's name.
"""

import glob
import json
import logging
import os
import pickle
import re
import struct
import time
import uuid
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configs import from_pipeline, is_pixart_config

logger = logging.getLogger(__name__)

# https://github.com/huggingface/safetensors: 8 bytes of header length, JSON header, tensors.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_MAX_HEADER = 100_000_000
_ABANDONED = 300.0  # seconds without a write after which an unfinished file is nobody's
_WEIGHTS = ("state_dict", "model", "module")  # entries of training checkpoints: the original's, DiT's, DeepSpeed's
_EMA_WEIGHTS = ("state_dict_ema", "ema", "model_ema")
_FOLDER_WEIGHTS = tuple(
    f"diffusion_pytorch_model{name}"
    for name in (
        ".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json",
        ".bin", ".bin.index.json", ".fp16.bin",
    )
)  # fmt: skip
NULL_CAPTION_FILE = "null_caption.safetensors"  # ours, beside a diffusers model: the buffer that diffusers drops


class Header(NamedTuple):
    tensors: dict[str, Tensor]   # on the meta device: names, shapes and dtypes
    metadata: dict[str, str]


class Loaded(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict                 # of the config.json beside it, with "family" if the pipeline says so; else empty


def read_header(path) -> Header:
    """Names, shapes, dtypes and metadata of a safetensors file, without its tensors.

    Raises ValueError for a file that is not a complete safetensors file.
    """
    path = Path(path)
    _check_kind(path, ("safetensors",))
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise _broken(path, "its header is cut off", "download or copy it again")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            tensors = {
                name: torch.empty(entry["shape"], dtype=getattr(torch, _DTYPES[entry["dtype"]]), device="meta")
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise _broken(path, f"its header is damaged ({error!r})", "download or copy it again") from error
    if 8 + length + end != size:
        raise _broken(path, f"it has {size} bytes and should have {8 + length + end}", "download or copy it again")
    return Header(tensors, metadata)


def load(path, *, ema: bool | None = False, is_ours=is_pixart_config) -> Loaded:
    """All tensors of a checkpoint file or a diffusers folder, on the CPU (memory-mapped where the format allows).

    ema=True takes the averaged weights of a training checkpoint, None takes them if there are any. `.pth` files are
    read with weights_only=True: nothing in them is executed. is_ours(config) says whether a config.json can belong to
    what is looked for. Raises ValueError (missing entry, damaged, not a checkpoint) and FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, ema, is_ours)
    tensors, metadata = load_file_tensors(path, ema=ema)
    return Loaded(tensors, metadata, _config_beside(path, is_ours))


def load_file_tensors(path: Path, *, ema: bool | None = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file, whatever its extension says."""
    kind = _check_kind(path, ("safetensors", "zip", "pickle"))
    if kind != "safetensors":
        return _weights_of(_read_pickle(path, kind), ema, path), {}
    metadata = read_header(path).metadata
    try:
        return _weights_of(load_file(path), ema, path), metadata
    except SafetensorError as error:
        raise _broken(path, f"it is damaged ({error})", "download or copy it again") from error


def _broken(path: Path, what: str, remedy: str) -> ValueError:
    return ValueError(f"{path.name} cannot be read: {what}. Please {remedy}. ({path})")


def _check_kind(path: Path, allowed) -> str:
    """What the first bytes say the file is; ValueError if that is not allowed."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    with path.open("rb") as file:
        head = file.read(512)
    kind = _kind(head)
    if kind in allowed:
        return kind
    reasons = {
        "empty": ("it is empty", "download it again"),
        "lfs": ("it is a Git LFS pointer, not the file itself", "run `git lfs pull` or download the file"),
        "html": ("it is a web page", "download the file itself, not the page about it"),
    }
    raise _broken(path, *reasons.get(kind, (f"it is no {' or '.join(allowed)} file", "check what was downloaded")))


def _kind(head: bytes) -> str:
    if not head:
        return "empty"
    if head[8:9] == b"{" and b"\0" in head[:8]:  # first: a header's length may look like the start of anything
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "lfs"
    if head.lstrip()[:1] == b"<":
        return "html"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    return "unknown"


def _read_pickle(path: Path, kind: str):
    if kind == "zip" and not zipfile.is_zipfile(path):  # its table of contents stands at the end
        raise _broken(path, "it is cut off", "download or copy it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds more than tensors ({asked[1]})" if asked else "it holds more than tensors, or is damaged,"
        raise _broken(path, f"{what} and was not executed", "use a safetensors version of it") from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise _broken(path, f"it is damaged ({error!r:.300})", "download or copy it again") from error


def _weights_of(content, ema: bool | None, path: Path) -> dict[str, Tensor]:
    """The flat state dict inside whatever a training script saved."""
    if not isinstance(content, Mapping):
        raise _broken(path, f"it holds a {type(content).__name__}, not named tensors", "check what was downloaded")
    if ema is None:
        ema = any(isinstance(content.get(name), Mapping) for name in _EMA_WEIGHTS)
    names = _EMA_WEIGHTS if ema else _WEIGHTS
    inner = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
    if ema and inner is None:
        held = " or ".join(_EMA_WEIGHTS)
        raise ValueError(f"{path.name} has no EMA weights ({held}): set `weights` to model.")
    tensors = content if inner is None else inner
    tensors = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and isinstance(name, str)}
    if not tensors:
        held = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise _broken(path, f"it holds no tensors but {held}", "check what was downloaded")
    return tensors


def _load_folder(path: Path, ema: bool | None, is_ours) -> Loaded:
    """A diffusers model folder, or the pipeline folder above it."""
    folder = path if (path / "config.json").is_file() or not (path / "transformer").is_dir() else path / "transformer"
    if ema:
        raise ValueError(f"{folder.name} is a diffusers folder, which has no EMA weights: set `weights` to model.")
    weights = next((folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} is no diffusers model folder: it has no {_FOLDER_WEIGHTS[0]}.")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config and not is_ours(config):
        raise ValueError(f"{folder} holds a {config.get('_class_name', 'model')}: this is not the folder to load here.")
    tensors, metadata = _load_shards(weights) if weights.suffix == ".json" else load_file_tensors(weights)
    if (folder / NULL_CAPTION_FILE).is_file():
        tensors |= load_file_tensors(folder / NULL_CAPTION_FILE)[0]
    return Loaded(tensors, metadata, _with_family(config, folder))


def _load_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _broken(index, "it has no weight_map", "download it again")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise _broken(index, f"it points outside its folder, to {name}", "download it again")
        tensors |= load_file_tensors(index.with_name(name))[0]
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise _broken(index, f"its shards lack {missing[0]} (of {len(missing)})", "download them again")
    return tensors, {}


def _config_beside(path: Path, is_ours) -> dict:
    """The config.json in the folder of a single file, where there is one that can belong to it."""
    beside = path.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    return _with_family(config if is_ours(config) else {}, path.parent)


def _with_family(config: dict, folder: Path) -> dict:
    model_index = folder.parent / "model_index.json"
    if folder.name == "transformer" and model_index.is_file():
        return {**from_pipeline(read_json(model_index)), **config}
    return config


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, f"it is no JSON ({error})", "download it again or remove it") from error
    if not isinstance(content, dict):
        raise _broken(path, "it is no JSON object", "download it again or remove it")
    return content


@contextmanager
def replacing(path):
    """Yields a temporary path in the same folder; afterwards that file takes the place of `path`, all or nothing.

    Raises OSError, saying what to do, when the disk is full or the place is not writable; nothing is left behind, nor
    what a killed process left of an earlier one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's umask; safetensors would make it 0600
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}). Is there room on the disk, and write access?") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path):
    """Removes unfinished files for `path` that nobody has written to for a while."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def save_atomic(tensors: Mapping[str, Tensor], path, metadata: Mapping[str, str] | None = None):
    """Writes a safetensors file so that `path` is either complete or untouched. Raises OSError (see `replacing`)."""
    with replacing(path) as temporary:
        save_file(_separate(tensors), temporary, metadata={"format": "pt", **(metadata or {})})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as the format wants them."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        separate[name] = tensor.clone() if storage in seen or not whole else tensor
        seen.add(storage)
    return separate
