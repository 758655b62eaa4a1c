"""PixArt's own extracted features (.npy of the VAE, .npz of T5) as a training set.

Written by tools/extract_features.py of PixArt-alpha and PixArt-sigma; folders and names as their loaders read them.
"""

import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..text.captions import TOKEN_LIMITS
from .buckets import TABLES, nearest
from .cache import Store, content_key
from .index import LATENT_FACTOR, Index, Row, build
from .manifest import Bucket, Problem, Progress
from .pictures import DAMAGED, digest
from .sources import CAPTION_FIELDS, PATH_FIELDS, VLM_FIELDS, records, text_field

# (family, glob below the data's root): InternalData.py and InternalData_ms.py of both repositories, spelling included.
LATENT_FOLDERS = (
    ("sigma", "img_sdxl_vae_features_*resolution_ms_new"), ("sigma", "img_sdxl_vae_features_*resolution_new"),
    ("alpha", "img_vae_fatures_*_multiscale/ms"), ("alpha", "img_vae_features_*_multiscale/ms"),
    ("alpha", "img_vae_features_*resolution/noflip"),
)  # fmt: skip
# What NumPy, zip files and PyTorch raise on damaged arrays.
BROKEN = (*DAMAGED, zipfile.BadZipFile, AttributeError, RuntimeError, MemoryError)
CAPTION_FOLDERS = {"sigma": ("caption_features_new",), "alpha": ("caption_feature_wmask", "caption_features")}
VLM_FOLDERS = {"sigma": ("sharegpt4v_caption_features_new",), "alpha": ()}


class Folders(NamedTuple):
    family: str
    latents: Path
    captions: Path | None
    vlm_captions: Path | None


def import_features(
    root, cache, *, real_caption_ratio: float = 0.5, progress: Progress | None = None
) -> tuple[Index, list[Problem]]:
    """Copies the features of a PixArt data set into a cache -> (training set, problems).

    `root` holds data_info.json and the feature folders. Raises ValueError or FileNotFoundError when it does not, or
    when nothing in it is usable; single files that are missing, damaged or of the wrong size are in `problems`.
    """
    root = Path(root).expanduser()
    folders = find_folders(root)
    listed = list(records(find_list(root)))
    latents = Store(Path(cache) / "latents" / f"imported-{folders.family}")
    captions = Store(Path(cache) / "captions" / f"imported-{folders.family}")
    found, problems = [], []
    with latents, captions:
        for done, (where, record) in enumerate(listed, 1):
            name = ""
            try:
                name = text_field(record, PATH_FIELDS, where)
                found.append(import_one(name, record, where, folders, latents, captions))
            except (OSError, ValueError) as error:
                problems.append(Problem(name or where, "feature", " ".join(str(error).split())))
            if progress:
                progress(done, len(listed))
    if not found:
        first = f" The first: {problems[0].name}: {problems[0].detail}" if problems else ""
        raise ValueError(f"{root} has no picture whose features can be used ({len(problems)} tried).{first}")
    rows = [row(latents.places[latent], *map(captions.places.get, keys)) for row, latent, keys in found]
    rows, others = of_one_width(rows)
    index = build(
        cache, rows, family=folders.family, size=table_of(rows[0].bucket), vae_id=latents.folder.name,
        t5_id=captions.folder.name, source=str(root), token_limit=TOKEN_LIMITS[folders.family], null_caption=None,
        real_caption_ratio=real_caption_ratio,
    )  # fmt: skip
    return index, problems + others


def of_one_width(rows: list[Row]) -> tuple[list[Row], list[Problem]]:
    """The rows whose features are as wide as most are, which is what a model takes; the others as problems."""
    widths = [widths_of(row) for row in rows]
    usual = Counter(widths).most_common(1)[0][0]
    problems = [
        Problem(row.name, "feature", f"it has {width}, but most pictures have {usual}: extract it again")
        for row, width in zip(rows, widths, strict=True)
        if width != usual
    ]
    return [row for row, width in zip(rows, widths, strict=True) if width == usual], problems


def widths_of(row: Row) -> str:
    captions = {place.shape[1] for place in (row.caption, row.vlm_caption) if place}
    return f"{row.latent.shape[0]} latent channels and captions of width {' and '.join(map(str, sorted(captions)))}"


def find_folders(root: Path) -> Folders:
    for family, pattern in LATENT_FOLDERS:
        for latents in sorted(path for path in root.glob(pattern) if path.is_dir()):
            captions, vlm = (
                next((root / name for name in names[family] if (root / name).is_dir()), None)
                for names in (CAPTION_FOLDERS, VLM_FOLDERS)
            )
            if captions or vlm:
                return Folders(family, latents, captions, vlm)
    raise FileNotFoundError(
        f"{root} has no features of PixArt's tools/extract_features.py: a folder like {LATENT_FOLDERS[0][1]} and one "
        f"like {CAPTION_FOLDERS['sigma'][0]} belong there."
    )


def find_list(root: Path) -> Path:
    places = [root / folder / "data_info.json" for folder in ("", "partition_filter", "partition")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{root} has no data_info.json, which lists the pictures of PixArt's features.")
    return found


def import_one(name: str, record: dict, where: str, folders: Folders, latents: Store, captions: Store):
    """Stores one picture's features -> (Row without its places, latent key, caption keys)."""
    if not name:
        raise ValueError("the list names no picture")
    path = feature_file(folders.latents, name, ".npy")
    data = path.read_bytes()
    latent = read_latent(path)
    key = content_key("import", digest(data))
    bucket = bucket_of(latent, path)
    keys = [
        import_caption(folder, name, folders.family, captions) if folder and text_field(record, fields, where) else None
        for folder, fields in ((folders.captions, CAPTION_FIELDS), (folders.vlm_captions, VLM_FIELDS))
    ]
    if not any(keys):
        raise ValueError("it has no caption with features")
    if key not in latents:
        latents.put(key, latent)
    height, width = side(record, "height", bucket.height), side(record, "width", bucket.width)
    return partial(Row, name, bucket, height, width, "train", 1, control=None), key, keys


def side(record: dict, name: str, default: int) -> int:
    """Raises ValueError for what is no number of pixels; nothing is the default."""
    value = record.get(name) or default
    try:
        pixels = int(value)
    except (TypeError, ValueError, OverflowError):
        pixels = 0
    if not 1 <= pixels < 2**31:
        raise ValueError(f"its {name} in the list is {value!r:.40} instead of a number of pixels")
    return pixels


def import_caption(folder: Path, name: str, family: str, captions: Store) -> str:
    path = feature_file(folder, name, ".npz")
    key = content_key("import", digest(path.read_bytes()))
    if key not in captions:
        captions.put(key, read_caption_features(path, TOKEN_LIMITS[family]))
    return key


def feature_file(folder: Path, name: str, kind: str) -> Path:
    """dir/a.png -> dir_a.npz as the multi-scale loaders read it, else a.npz as the extractor writes it.

    The extractor cuts names at their first dot, so that a.b.png and a.c.png share a file: that one is refused.
    """
    path = Path(name)
    names = [f"{'_'.join(path.with_suffix('').parts)}{kind}", f"{path.stem}{kind}"]
    found = next((folder / each for each in names if (folder / each).is_file()), None)
    if found is None:
        cut = folder / f"{path.name.split('.')[0]}{kind}"
        reason = " (only a file with its name cut at the first dot, which may be another picture's)"
        raise FileNotFoundError(f"{folder.name} has no {names[0]}{reason if cut.is_file() else ''}")
    return found


def load_numbers(path: Path, *keys: str) -> list[Tensor]:
    """The array of a .npy file, or those of a .npz file. Raises ValueError when they are damaged or no numbers."""
    try:
        if not keys:
            return [numbers(np.load(path, allow_pickle=False))]
        with np.load(path, allow_pickle=False) as file:
            return [numbers(file[key]) for key in keys]
    except BROKEN as error:
        raise ValueError(f"{path.name} cannot be read ({error}): extract it again") from error


def numbers(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"it holds {array.dtype} instead of numbers")
    return torch.from_numpy(array)


def read_latent(path: Path) -> Tensor:
    """(8, H/8, W/8): mean and std, unscaled. Raises ValueError for anything else."""
    latent = load_numbers(path)[0].float()
    if latent.ndim == 4 and len(latent) == 1:
        latent = latent[0]
    if latent.ndim != 3 or latent.shape[0] not in (4, 8) or not torch.isfinite(latent).all():
        raise ValueError(f"{path.name} is no VAE feature: its shape is {tuple(latent.shape)}, or it has NaN")
    return latent


def read_caption_features(path: Path, limit: int) -> Tensor:
    """The rows of the caption's own tokens, (L, D) fp16. Raises ValueError for anything else."""
    features, mask = load_numbers(path, "caption_feature", "attention_mask")
    if not features.ndim or not features.shape[-1]:
        raise ValueError(f"{path.name} is no T5 feature: its shape is {tuple(features.shape)}")
    features = features.reshape(-1, features.shape[-1])
    tokens = int(mask.sum())
    if mask.numel() != len(features) or not 1 <= tokens <= limit:
        raise ValueError(f"{path.name} has {tokens} tokens in {len(features)} rows; at most {limit} belong there")
    features = features[:tokens].half()
    if not torch.isfinite(features).all():
        raise ValueError(f"{path.name} has NaN or infinity")
    return features


def bucket_of(latent: Tensor, path: Path) -> Bucket:
    """The bucket of this size; PixArt's features were made in one."""
    height, width = (side * LATENT_FACTOR for side in latent.shape[1:])
    for table in TABLES.values():
        bucket = Bucket(*nearest(table, height, width))
        if bucket[1:] == (height, width):
            return bucket
    raise ValueError(f"{path.name} is for {width} x {height} pixels, which is in none of PixArt's tables")


def table_of(bucket: Bucket) -> str:
    return next(size for size, table in TABLES.items() if table.get(bucket.ratio) == bucket[1:])
