"""Tensors under content keys, in a folder of safetensors shards that several processes may fill at once.

A key says what a tensor was made from, so an entry is never wrong, only there or not. Every shard is complete or
absent, and belongs to its one writer; the folder's listing is the only index. Checksums are in each shard's header.
"""

import hashlib
import json
import logging
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.files import save_atomic

logger = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "F16": torch.float16}
SHARD_BYTES = 256 * 2**20
FLUSH_SECONDS = 30.0  # of work that a crash may cost
STALE_SECONDS = 3600.0  # after which an unfinished file belongs to nobody


def content_key(*parts) -> str:
    """128 bits of BLAKE2b over JSON-able parts: the same key only for the same parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def checksum(data) -> int:
    return zlib.crc32(data) & 0xFFFFFFFF


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    shard: str  # file name in the store's folder
    offset: int  # bytes from the start of the file
    checksum: int
    dtype: str
    shape: tuple[int, ...]


class Damaged(ValueError):
    """A shard that is cut off or whose bytes are not those that were written."""


class Store:
    """A folder of shards. `with Store(...) as store:` also writes what is still in memory when an error ends it."""

    def __init__(self, folder, rank: int = 0):
        self.folder, self.rank = Path(folder), rank
        self.places: dict[str, Place] = {}
        self.set_aside: list[str] = []  # damaged shards that were found
        self._shards: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._since = 0, 0.0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self._pending

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.flush()

    def refresh(self):
        """Takes up the shards that other writers finished; puts damaged ones aside, under another name."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._shards or path.name.startswith("."):
                continue
            try:
                places, _ = read_shard(path)
            except Damaged as error:
                self.put_aside(path, error)
                continue
            self._shards.add(path.name)
            for key, place in places:
                self.places.setdefault(key, place)

    def put(self, key: str, tensor: Tensor):
        """Keeps a tensor (float32 or float16) in memory until there are enough for a shard."""
        if not self._pending:
            self._pending_bytes, self._since = 0, time.monotonic()
        self._pending[key] = tensor.detach().cpu()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._since >= FLUSH_SECONDS:
            self.flush()

    def flush(self):
        """Writes what is in memory as one shard."""
        if not self._pending:
            return
        path = self.folder / f"{self.rank:05}-{uuid.uuid4().hex[:12]}.safetensors"
        write_shard(path, self._pending, {"pixart.format": "features"})
        self._pending = {}
        self.refresh()

    def read(self, key: str) -> Tensor:
        """Raises KeyError for a key that is not there, Damaged for bytes that are not those that were written."""
        return self._pending[key] if key in self._pending else read_tensor(self.folder, self.places[key])

    def verify(self) -> list[str]:
        """Reads every byte, puts damaged shards aside and returns their names."""
        by_shard: dict[str, list[Place]] = {}
        for place in self.places.values():
            by_shard.setdefault(place.shard, []).append(place)
        damaged = []
        for shard, places in by_shard.items():
            try:
                for place in sorted(places, key=lambda place: place.offset):
                    read_tensor(self.folder, place)
            except Damaged as error:
                self.put_aside(self.folder / shard, error)
                damaged.append(shard)
        self.places = {key: place for key, place in self.places.items() if place.shard not in damaged}
        self._shards -= set(damaged)
        return damaged

    def put_aside(self, path: Path, error: Damaged):
        try:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        except FileNotFoundError:  # another process was faster
            return
        logger.warning("%s Its content is made again; the file is kept as %s.damaged.", error, path.name)
        self.set_aside.append(path.name)

    def sweep(self):
        """Deletes unfinished files that a killed writer left behind, once they are an hour old."""
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)


def read_shard(path: Path) -> tuple[list[tuple[str, Place]], dict[str, str]]:
    """The entries of a shard and its metadata, from its header alone. Raises Damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        sums = json.loads(metadata["crc32"])
        start = 8 + length
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if start + end != size:
            raise ValueError(f"it has {size} bytes and should have {start + end}")
        return [
            (key, Place(path.name, start + entry["data_offsets"][0], sums[key], entry["dtype"], tuple(entry["shape"])))
            for key, entry in header.items()
        ], metadata
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is damaged or none of the cache's files: {error}.") from error


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """A safetensors file with the checksum of every tensor, all or nothing. Raises OSError."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    sums = {key: checksum(tensor.numpy()) for key, tensor in tensors.items()}
    save_atomic(tensors, path, {**metadata, "crc32": json.dumps(sums)})


def read_tensor(folder: Path, place: Place) -> Tensor:
    """Raises Damaged for bytes that are not those that were written, or a shard that is gone."""
    dtype = DTYPES[place.dtype]
    count = 1
    for side in place.shape:
        count *= side
    return torch.frombuffer(
        read_bytes(folder / place.shard, place.offset, count * dtype.itemsize, place.checksum), dtype=dtype
    ).view(place.shape)


def read_bytes(path: Path, offset: int, length: int, expected: int) -> bytearray:
    """`length` bytes of a file whose checksum is `expected`. Raises Damaged."""
    data = bytearray(length)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            got, view = 0, memoryview(data)
            while got < length and (read := file.readinto(view[got:])):
                got += read
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error}). Run PixArtCacheFeatures again.") from error
    if got < length or checksum(data) != expected:
        raise Damaged(
            f"{path} is damaged: the bytes at {offset} are not those that were written. Run PixArtCacheFeatures with "
            "verify on; it makes again what is lost."
        )
    return data


def folder_bytes(folders: Iterable[Path]) -> int:
    """Size on disk of the shards in some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
