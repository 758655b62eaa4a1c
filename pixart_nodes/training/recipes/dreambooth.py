"""DreamBooth as a LoRA with prior preservation: on pictures of the class, the network shall predict what the base
predicts at the same noise and timestep (OneTrainer's rule; no pictures need to be generated)."""

import torch

from ...data.dataset import Batch, Batches, rows_by_bucket
from ...diffusion.schedule import NUM_TIMESTEPS
from .base import Draws, on_device
from .lora import Lora


class DreamBooth(Lora):
    prior: Batches | None = None

    @classmethod
    def problems(cls, config, index, start_params) -> list[str]:
        if not config.prior_loss_weight or has_role(index, "prior"):
            return []
        return [f"{index.meta['source']} has no pictures of the class (role prior): add some to the data set, or set "
                "prior_loss_weight to 0."]  # fmt: skip

    def open_data(self, index, batch_size, rank, world):
        if self.config.prior_loss_weight:
            self.prior = Batches(
                index, self.start.family, batch_size, rank=rank, world=world, seed=self.config.seed, role="prior"
            )

    def losses(self, network, batch: Batch, draws: Draws, number: int):
        losses = self.picture_losses(network, batch, draws)
        if self.prior is not None:
            prior = on_device(self.prior.batch(number), batch.latent.device)
            losses["prior"] = self.config.prior_loss_weight * self.prior_loss(network, prior, draws)
        return losses

    def prior_loss(self, network, batch: Batch, draws: Draws):
        noise, t = draws.normal(batch.latent), draws.integers(NUM_TIMESTEPS, batch.latent.device)
        arguments = (self.posterior.add_noise(batch.latent, noise, t), t, batch.context, batch.mask)
        with torch.no_grad(), self.network.disable_adapter():
            base = self.network(*arguments, learned_variance=True, **self.extras(batch))
        tuned = network(*arguments, learned_variance=True, **self.extras(batch))
        return ((tuned.float() - base.float()) ** 2).mean()


def has_role(index, role: str) -> bool:
    return bool(rows_by_bucket(index, role))
