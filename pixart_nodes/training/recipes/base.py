"""What every recipe has: a network with trained parameters, a loss, and a file to write."""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...data.dataset import Batch, seeded
from ...data.index import Index
from ...diffusion.losses import GaussianPosterior, diffusion_loss, min_snr_weight
from ...diffusion.schedule import NUM_TIMESTEPS
from ...model import PixArtTransformer
from ..config import RunConfig

NOISE = 2  # what a random stream decides; data.dataset has 0 and 1


@dataclass
class Start:
    """What a run starts from."""

    model: PixArtTransformer
    family: str
    dtype: torch.dtype  # of frozen weights; trained ones are fp32
    device: torch.device
    has_null_caption: bool = True  # else what the model has in its place is random
    fingerprint: int = 0  # of the weights as they were loaded

    @property
    def params(self):
        return self.model.params


class Draws:
    """The random numbers of a batch. Each picture has its own, from its number in the run: they depend neither on the
    batch size, nor on how many processes and micro-batches an update is made of, nor on where a run was resumed."""

    def __init__(self, seed: int, numbers: list[int]):
        self.generators = [seeded(NOISE, seed, number) for number in numbers]

    def normal(self, like: Tensor) -> Tensor:
        """(B, ...) standard normal, in the shape, dtype and place of `like`."""
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in self.generators]).to(like)

    def integers(self, high: int, device) -> Tensor:
        """(B,) in 0 .. high - 1."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators]).to(device)

    def chances(self, probability: float, device) -> Tensor:
        """(B,) booleans."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators]).to(device) < probability


class Recipe(ABC):
    """One way of training. `network` holds what is trained: its parameters that require a gradient, in fp32."""

    preview_guidance: ClassVar[float] = 4.5  # of samples; 1 = off
    consistency: ClassVar[bool] = False  # samples as an LCM

    def __init__(self, config: RunConfig, start: Start):
        self.config, self.start = config, start
        self.posterior = GaussianPosterior(start.device)
        self.network = self.build()

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, on the device, from self.start."""

    @abstractmethod
    def export(self, path: Path, metadata: dict[str, str]) -> Path:
        """Writes what was trained to a path without extension, and returns where it is."""

    @classmethod
    def problems(cls, config: RunConfig, index: Index, start_params) -> list[str]:
        """What the config asks of data or base model and they do not have, one sentence each."""
        return []

    def take_null_caption(self, index: Index):
        """Sigma's null caption is T5(""), whatever the base has (PixArt-Sigma diffusion/utils/checkpoint.py:67), and so
        is that of an alpha whose file has none. Raises ValueError for a base and a cache that both have none."""
        null, buffer = index.null_caption(), self.start.model.y_embedder.y_embedding
        if null is None and not self.start.has_null_caption:
            raise ValueError(no_null_caption(self.config, index))
        if null is not None and (self.start.family == "sigma" or not self.start.has_null_caption):
            rows = null[: len(buffer)]
            buffer.copy_(torch.cat([rows, rows[-1:].expand(len(buffer) - len(rows), -1)]))

    def open_data(self, index: Index, batch_size: int, rank: int, world: int):  # noqa: B027 - an optional hook
        """Called once before training, for recipes that need more than the training pictures."""

    def losses(self, network, batch: Batch, draws: Draws, number: int) -> dict[str, Tensor]:
        """The parts of the loss, scalars to be added. network: self.network as accelerate wraps it; number: of the
        micro-batch."""
        return self.picture_losses(network, batch, draws)

    def after_update(self):  # noqa: B027 - an optional hook
        """Called behind each optimizer update."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the trained parameters."""
        return {}

    def load_state(self, state: dict[str, Tensor]):  # noqa: B027 - an optional hook
        """Takes back what `state` gave."""

    def picture_losses(self, network, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The part that is about these pictures, which is what validation measures. Here noise MSE and, where the
        network predicts one, the variance's bound (PixArt gaussian_diffusion.py:681)."""
        latent = batch.latent
        noise, t = draws.normal(latent), draws.integers(NUM_TIMESTEPS, latent.device)
        x = self.posterior.add_noise(latent, noise, t)
        output = network(x, t, self.context(batch, draws), batch.mask, learned_variance=True, **self.extras(batch))
        output = output.float()
        if self.start.params.learned_variance:
            mse, bound = diffusion_loss(self.posterior, output, latent, noise, x, t)
        else:
            mse, bound = ((output - noise) ** 2).flatten(1).mean(1), None
        if self.config.min_snr_gamma is not None:
            mse = mse * min_snr_weight(self.posterior.tables["snr"][t], self.config.min_snr_gamma)
        losses = {"noise": mse.mean()}
        return losses if bound is None else {**losses, "variance": bound.mean()}

    def context(self, batch: Batch, draws: Draws) -> Tensor:
        """Captions (B, L, D), some replaced by the null caption under their own mask (PixArt_blocks.py:389-398)."""
        dropped = draws.chances(self.config.caption_dropout, batch.context.device)
        return torch.where(dropped[:, None, None], self.null_caption(batch)[None], batch.context)

    def null_caption(self, batch: Batch) -> Tensor:
        """Rows (L, D) of the null caption, as many as the batch's captions have."""
        length, null = batch.context.shape[1], self.start.model.y_embedder.y_embedding
        return null[:length].to(batch.context)

    def extras(self, batch: Batch) -> dict:
        """What micro-conditioned models are told."""
        if not self.start.params.micro_condition:
            return {}
        return {"img_hw": batch.img_hw, "aspect_ratio": batch.aspect_ratio[:, None]}

    def networks(self) -> list[nn.Module]:
        """All that FSDP spreads over the processes."""
        return [self.network]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def preview_extras(self, index: Index, row: int) -> dict:
        """What the network is told when it draws a sample in the shape of a picture of the set."""
        if not self.start.params.micro_condition:
            return {}
        bucket, device = index.bucket(row), self.start.device
        size = torch.tensor([[bucket.height, bucket.width]], device=device, dtype=torch.float32)
        return {"img_hw": size, "aspect_ratio": torch.tensor([[bucket.ratio]], device=device)}

    def metadata(self, step: int) -> dict[str, str]:
        """What the written file says about itself."""
        config = self.config
        said = {
            "pixart.family": self.start.family, "pixart.recipe": config.recipe, "pixart.steps": str(step),
            "pixart.base": Path(config.base.path).name, "pixart.params": json.dumps(asdict(self.start.params)),
        }  # fmt: skip
        return {**said, "pixart.trigger_word": config.trigger_word} if config.trigger_word else said


def no_null_caption(config: RunConfig, index: Index) -> str:
    return (f"Neither the base model {config.base.path} nor the cache {index.path} has a null caption: take the "
            "original checkpoint as the base, or make the cache with PixArt Cache Features.")  # fmt: skip


def on_device(batch: Batch, device) -> Batch:
    return Batch(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in batch))
