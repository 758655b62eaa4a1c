"""A training set as one file: for each picture, where in the shards its latent and captions are.

The trainer's whole knowledge of a data set. The table is mapped, not read, so a process holds a few dozen bytes per
picture, and several processes on a machine share them.
"""

import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.configs import LATENT_SCALE
from .cache import Damaged, Place, Store, content_key, read_bytes, read_shard, write_shard
from .encode import NULL_CAPTION, Encoders
from .manifest import ROLES, Bucket, Manifest
from .pictures import digest

FORMAT = 1
COLUMNS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "U8": np.uint8}
REFERENCES = ("latent", "caption", "vlm_caption", "control")
LATENT_FACTOR = 8  # pixels per latent on each side


class Row(NamedTuple):
    """One picture of a training set."""

    name: str
    bucket: Bucket
    height: int  # of the picture itself, which alpha-1024 is told
    width: int
    role: str
    repeats: int
    latent: Place
    caption: Place | None
    vlm_caption: Place | None
    control: Place | None


def build(
    root, rows: Iterable[Row], *, family: str, size: str, vae_id: str, t5_id: str, source: str, token_limit: int,
    null_caption: Place | None, prompts: Iterable[tuple[str, Place]] = (), real_caption_ratio: float = 0.5,
) -> "Index":  # fmt: skip
    """Writes root/sets/<fingerprint>.safetensors, unless it is there. real_caption_ratio: how often a picture that has
    both captions is shown with its own instead of the VLM's (the original's real_prompt_ratio, 0.5).

    Raises ValueError for a set without pictures and for latents or captions of unequal width.
    """
    table = Table()
    for row in rows:
        table.add(row)
    if not table.names:
        raise ValueError(f"{source} has no usable picture, so there is nothing to train on.")
    said = list(prompts)
    tensors = table.tensors()
    tensors["prompts"] = references([table.reference("caption", place) for _, place in said])
    tensors["null_caption"] = references([table.reference("caption", null_caption)] if null_caption else [])
    meta = {
        "format": FORMAT, "family": family, "size": size, "latent_scale": LATENT_SCALE[family], "vae_id": vae_id,
        "t5_id": t5_id, "token_limit": token_limit, "caption_dim": table.width("caption"),
        "latent_channels": table.width("latent"), "real_caption_ratio": real_caption_ratio, "source": source,
        "buckets": list(table.buckets), "prompts": [text for text, _ in said],
        "shards": {"latent": list(table.shards["latent"]), "caption": list(table.shards["caption"])},
    }  # fmt: skip
    sums = {name: digest(tensor.numpy()) for name, tensor in tensors.items()}
    meta["fingerprint"] = content_key(meta, sums)
    path = Path(root) / "sets" / f"{meta['fingerprint'][:16]}.safetensors"
    if not path.is_file():
        write_shard(path, tensors, {"pixart.format": "training set", "pixart.index": json.dumps(meta)})
    return Index(path)


class Table:
    """Collects rows as columns of numbers."""

    def __init__(self):
        self.columns = {name: array("q") for name in ("bucket", "repeats", "role", "size", *REFERENCES)}
        self.buckets: dict[Bucket, int] = {}
        self.shards = {"latent": {}, "caption": {}}
        self.widths = {"latent": set(), "caption": set()}
        self.names = []

    def add(self, row: Row):
        self.names.append(row.name)
        self.columns["bucket"].append(self.buckets.setdefault(row.bucket, len(self.buckets)))
        self.columns["repeats"].append(row.repeats)
        self.columns["role"].append(ROLES.index(row.role))
        self.columns["size"].extend((row.height, row.width))
        for name in REFERENCES:
            place = getattr(row, name)
            kind = "caption" if name.endswith("caption") else "latent"
            expected = tuple(side // LATENT_FACTOR for side in row.bucket[1:])
            if kind == "latent" and place and place.shape[1:] != expected:
                raise ValueError(f"The latent of {row.name} is {place.shape[1:]}, but its bucket needs {expected}.")
            self.columns[name].extend(self.reference(kind, place) if place else (-1, -1))

    def reference(self, kind: str, place: Place) -> tuple[int, int]:
        """(shard and offset, checksum and rows): 23 + 40 bits, 32 + 24 bits."""
        shard = self.shards[kind].setdefault(place.shard, len(self.shards[kind]))
        self.widths[kind].add(place.shape[0] if kind == "latent" else place.shape[1])
        return shard << 40 | place.offset, place.checksum << 24 | place.shape[0]

    def width(self, kind: str) -> int:
        if len(self.widths[kind]) > 1:
            raise ValueError(f"The cache holds {kind}s of different widths, {sorted(self.widths[kind])}: make it anew.")
        return next(iter(self.widths[kind]), 0)

    def tensors(self) -> dict[str, Tensor]:
        """Columns without any entry are left out; names are one text, and where each of them ends in it."""
        tensors = {
            "bucket": column(self.columns["bucket"], torch.int16), "role": column(self.columns["role"], torch.uint8),
            "repeats": column(self.columns["repeats"], torch.int16),
            "size": column(self.columns["size"], torch.int32).view(-1, 2),
        }  # fmt: skip
        for name in REFERENCES:
            references = column(self.columns[name], torch.int64).view(-1, 2)
            if (references >= 0).any():
                tensors[name] = references
        encoded = [name.encode() for name in self.names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        tensors["name_ends"] = torch.from_numpy(ends)
        tensors["names"] = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        return tensors


def column(values: array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64).to(dtype)


def references(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


class Index:
    """A training set, opened. This is what PIXART_CACHE carries; `path` is all that another process needs."""

    def __init__(self, path):
        """Raises Damaged or FileNotFoundError when this is no complete training set."""
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no feature cache {self.path}. Run PixArtCacheFeatures again.")
        places, metadata = read_shard(self.path)
        if "pixart.index" not in metadata:
            raise Damaged(f"{self.path} is no training set of a feature cache; those are in its folder `sets`.")
        self.meta = json.loads(metadata["pixart.index"])
        self.root = self.path.parents[1]
        self.family, self.fingerprint = self.meta["family"], self.meta["fingerprint"]
        self.buckets = [Bucket(*bucket) for bucket in self.meta["buckets"]]
        self.columns = {name: self._map(place) for name, place in places}

    def _map(self, place: Place) -> np.ndarray:
        if 0 in place.shape:
            return np.empty(place.shape, COLUMNS[place.dtype])
        return np.memmap(self.path, COLUMNS[place.dtype], mode="r", offset=place.offset, shape=place.shape)

    def __len__(self) -> int:
        return len(self.columns["bucket"])

    def require(self, family: str, caption_dim: int | None = None):
        """Raises ValueError when the features are not for a model of this family and caption width."""
        if self.family != family:
            raise ValueError(
                f"The feature cache {self.path} was made for PixArt {self.family}, but the model is {family}: their "
                f"latents and captions differ. Run PixArtCacheFeatures with family {family} and the VAE of {family}."
            )
        if caption_dim not in (None, self.meta["caption_dim"]):
            raise ValueError(
                f"The feature cache {self.path} has captions of width {self.meta['caption_dim']}, but the model takes "
                f"{caption_dim}. Run PixArtCacheFeatures with the T5 that belongs to the model."
            )

    def name(self, row: int) -> str:
        ends = self.columns["name_ends"]
        start = int(ends[row - 1]) if row else 0
        return bytes(self.columns["names"][start : int(ends[row])]).decode()

    def bucket(self, row: int) -> Bucket:
        return self.buckets[self.columns["bucket"][row]]

    def latent(self, row: int, column: str = "latent") -> Tensor:
        """Unscaled mean, or mean and std, of a picture or (column "control") its control: (4 or 8, H/8, W/8) fp32."""
        bucket = self.bucket(row)
        shape = (self.meta["latent_channels"], bucket.height // LATENT_FACTOR, bucket.width // LATENT_FACTOR)
        return self._read("latent", self.columns[column][row], torch.float32, shape)

    def has(self, row: int, column: str) -> bool:
        return column in self.columns and self.columns[column][row, 0] >= 0

    def caption(self, row: int, column: str = "caption") -> Tensor:
        """T5 features of the tokens of a caption, (L, D) fp16."""
        return self._caption(self.columns[column][row])

    def prompts(self) -> list[tuple[str, Tensor]]:
        """The validation prompts with their features (L, D)."""
        return list(zip(self.meta["prompts"], map(self._caption, self.columns["prompts"]), strict=True))

    def null_caption(self) -> Tensor | None:
        """T5("") with its pads, (token_limit, D): Sigma's null caption. alpha's is in the checkpoint."""
        places = self.columns["null_caption"]
        return self._caption(places[0]) if len(places) else None

    def _caption(self, reference) -> Tensor:
        rows = int(reference[1]) & 0xFFFFFF
        return self._read("caption", reference, torch.float16, (rows, self.meta["caption_dim"]))

    def _read(self, kind: str, reference, dtype: torch.dtype, shape) -> Tensor:
        where, check = (int(value) for value in reference)
        folder, owner = ("latents", "vae_id") if kind == "latent" else ("captions", "t5_id")
        path = self.root / folder / self.meta[owner] / self.meta["shards"][kind][where >> 40]
        length = int(np.prod(shape)) * dtype.itemsize
        data = read_bytes(path, where & (1 << 40) - 1, length, check >> 24)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def state_bytes(self) -> int:
        """What reading keeps in memory at most: every column, names included."""
        return sum(column.nbytes for column in self.columns.values())

    def summary(self) -> str:
        roles = np.bincount(self.columns["role"], minlength=len(ROLES))
        counts = ", ".join(f"{count} for {role}" for role, count in zip(ROLES, roles, strict=True) if count)
        return (
            f"PixArt {self.family}, size {self.meta['size']}: {counts}; VAE {self.meta['vae_id']}, T5 "
            f"{self.meta['t5_id']}, {self.meta['token_limit']} tokens\n{self.path}"
        )


def index_of(root, manifest: Manifest, encoders: Encoders, latents: Store, captions: Store, prompts=()) -> Index:
    """The training set of a data set whose features are in the stores. Raises ValueError when some are not."""

    def place(store, key):
        if key not in store.places:
            raise ValueError(f"Features of {manifest.source} are missing from {root}. Run PixArtCacheFeatures again.")
        return store.places[key]

    def said(text):
        return place(captions, encoders.caption_key(text)) if text or text is NULL_CAPTION else None

    rows = (
        Row(
            sample.name, sample.bucket, sample.height, sample.width, sample.role, sample.repeats,
            place(latents, encoders.latent_key(sample.digest, sample.bucket)), said(sample.caption),
            said(sample.vlm_caption),
            place(latents, encoders.latent_key(sample.control_digest, sample.bucket)) if sample.control else None,
        )
        for sample in manifest.samples
    )  # fmt: skip
    return build(
        root, rows, family=encoders.family, size=manifest.size, vae_id=encoders.vae_id, t5_id=encoders.t5_id,
        source=manifest.source, token_limit=encoders.token_limit, null_caption=said(NULL_CAPTION),
        prompts=[(text, said(text)) for text in prompts if text], real_caption_ratio=manifest.real_caption_ratio,
    )  # fmt: skip
