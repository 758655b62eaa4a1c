"""Batches of a training set: from one bucket each, in a seeded order that any number of processes shares.

A batch is a function of its number. So a run can be resumed at any batch, and two processes with half the batch size
see together what one process sees.
"""

import hashlib
import logging
import math
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .index import Index
from .manifest import ROLES

logger = logging.getLogger(__name__)

ORDER, CONTENT = 0, 1  # what a random stream decides


class Batch(NamedTuple):
    latent: Tensor  # (B, 4, H, W) fp32, scaled: drawn from the VAE's distribution
    context: Tensor  # (B, L, D) fp16, T5 features, zeros after the caption's end
    mask: Tensor  # (B, L), True = a token of the caption
    img_hw: Tensor  # (B, 2), height and width of the pictures themselves, in pixels
    aspect_ratio: Tensor  # (B,), height / width of the bucket, as PixArt's table rounds it
    control: Tensor | None  # (B, 4, H, W) fp32, scaled
    rows: tuple[int, ...]  # which pictures these are; Index.name tells their names


class Batches:
    """Endless batches of one process's share. Iterating reads ahead; `state_dict` is about what has been handed out.

    index: an opened training set; family: the model's, "alpha" or "sigma"; batch_size: of this process.
    Raises ValueError when the features are for the other family or there are no pictures of this role.
    """

    def __init__(
        self, index: Index, family: str, batch_size: int, *, rank: int = 0, world: int = 1, seed: int = 0,
        role: str = "train", caption_dim: int | None = None, sample_latents: bool = True, read_ahead: int = 2,
    ):  # fmt: skip
        index.require(family, caption_dim)
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}: there must be at least one of each.")
        self.index, self.rank, self.batch_size, self.seed = index, rank, batch_size, seed
        self.global_batch = batch_size * world
        self.sample_latents, self.read_ahead = sample_latents, read_ahead
        self.groups = rows_by_bucket(index, role)
        if not self.groups:
            raise ValueError(f"{index.meta['source']} has no pictures for {role}.")
        self.per_epoch = sum(math.ceil(len(rows) / self.global_batch) for rows in self.groups)
        self.step = 0
        self._plan = (-1, None)

    def plan(self, epoch: int) -> Tensor:
        """The rows of all global batches of an epoch, (batches, global batch): every picture as often as it repeats.

        What a bucket lacks to fill its last batch comes from its first one, so twice in an epoch.
        """
        if self._plan[0] != epoch:
            batches = []
            for number, rows in enumerate(self.groups):
                order = torch.randperm(len(rows), generator=seeded(ORDER, self.seed, epoch, number))
                slots = torch.arange(math.ceil(len(rows) / self.global_batch) * self.global_batch)
                batches.append(rows[order[slots % len(rows)]].view(-1, self.global_batch))
            batches = torch.cat(batches)
            self._plan = (epoch, batches[torch.randperm(len(batches), generator=seeded(ORDER, self.seed, epoch, -1))])
        return self._plan[1]

    def rows(self, step: int) -> list[int]:
        """This process's part of global batch number `step`."""
        epoch, number = divmod(step, self.per_epoch)
        start = self.rank * self.batch_size
        return self.plan(epoch)[number, start : start + self.batch_size].tolist()

    def batch(self, step: int) -> Batch:
        return self._load(self.rows(step), step)

    def _load(self, rows: list[int], step: int) -> Batch:
        latents, captions, controls = [], [], []
        for slot, row in enumerate(rows, self.rank * self.batch_size):
            generator = seeded(CONTENT, self.seed, step, slot)  # the same wherever this picture is loaded
            latents.append(self._draw(self.index.latent(row), generator))
            captions.append(self.index.caption(row, self._which_caption(row, generator)))
            if self.index.has(row, "control"):
                controls.append(self._draw(self.index.latent(row, "control")))
        lengths = torch.tensor([len(caption) for caption in captions])
        buckets = [self.index.bucket(row) for row in rows]
        return Batch(
            torch.stack(latents),
            torch.nn.utils.rnn.pad_sequence(captions, batch_first=True),
            torch.arange(int(lengths.max())) < lengths[:, None],
            torch.from_numpy(self.index.columns["size"][rows].astype(np.float32)),
            torch.tensor([bucket.ratio for bucket in buckets]),
            torch.stack(controls) if len(controls) == len(rows) else None,
            tuple(rows),
        )

    def _draw(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(4 or 8, H, W) -> scaled latent (4, H, W): mean + std * noise where there is a std and a generator."""
        mean, std = moments[:4], moments[4:]
        if self.sample_latents and len(std) and generator is not None:
            mean = mean + std * torch.randn(std.shape, generator=generator)
        return mean * self.index.meta["latent_scale"]

    def _which_caption(self, row: int, generator: torch.Generator) -> str:
        own, vlm = self.index.has(row, "caption"), self.index.has(row, "vlm_caption")
        if own and vlm:
            own = torch.rand((), generator=generator).item() < self.index.meta["real_caption_ratio"]
        return "caption" if own else "vlm_caption"

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as reader:
            ahead, asked = deque(), self.step
            while True:
                while len(ahead) <= self.read_ahead:
                    ahead.append(reader.submit(self._load, self.rows(asked), asked))
                    asked += 1
                batch = ahead.popleft().result()
                self.step += 1
                yield batch

    def state_dict(self) -> dict:
        return {"step": self.step, "seed": self.seed, "global_batch": self.global_batch, "pictures": self._pictures()}

    def load_state_dict(self, state: dict):
        """Goes on after the last batch that was handed out; the number of processes may have changed.

        With another global batch it goes on after as many pictures, in another order. Raises ValueError when seed or
        content are not the same.
        """
        now = self.state_dict()
        reasons = {
            "seed": "the seed is {now}, and was {before}: set it back",
            "pictures": "the data set has changed: start a new run, or bring back the cache of the old one",
        }
        for name, reason in reasons.items():
            if state[name] != now[name]:
                raise ValueError("This run cannot continue: " + reason.format(now=now[name], before=state[name]) + ".")
        self.step = state["step"]
        if state["global_batch"] != self.global_batch:
            self.step = math.ceil(state["step"] * state["global_batch"] / self.global_batch)
            logger.warning("a batch had %d pictures and has %d now: the order of the pictures changes",
                           state["global_batch"], self.global_batch)  # fmt: skip

    def _pictures(self) -> str:
        """A fingerprint of what the order depends on, wherever in the shards the features lie."""
        content = hashlib.blake2b(repr(self.index.buckets).encode(), digest_size=16)
        for name in ("names", "bucket", "role", "repeats"):
            content.update(self.index.columns[name])
        return content.hexdigest()

    def summary(self) -> str:
        """What a person wants to know before training: batches per epoch, and who is repeated to fill them."""
        lines = [f"{self.per_epoch} batches of {self.global_batch} per epoch"]
        for rows in self.groups:
            bucket, missing = self.index.bucket(int(rows[0])), -len(rows) % self.global_batch
            repeated = f", {missing} repeated to fill a batch" if missing else ""
            lines.append(f"  {bucket.width} x {bucket.height}: {len(rows)}{repeated}")
        return "\n".join(lines)


def rows_by_bucket(index: Index, role: str) -> list[Tensor]:
    """The rows of a role, each as often as it repeats per epoch, one int32 tensor per bucket."""
    rows = np.flatnonzero(index.columns["role"] == ROLES.index(role)).astype(np.int32)
    rows = np.repeat(rows, index.columns["repeats"][rows])
    buckets = index.columns["bucket"][rows]
    return [torch.from_numpy(rows[buckets == bucket]) for bucket in np.unique(buckets)]


def seeded(*numbers: int) -> torch.Generator:
    seed = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "little", signed=True))
