"""Latent consistency distillation: all weights against their moving average, or a LoRA against itself.

PixArt-alpha train_scripts/train_pixart_lcm.py and train_pixart_lcm_lora.py; the guidance is fixed and gets baked in.
"""

import copy
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...data.dataset import Batch
from ...diffusion.consistency import DDIMSolver, consistency_function, lcm_target
from ...diffusion.losses import pseudo_huber
from ..sharding import local
from .base import Draws, Recipe
from .finetune import FullFineTune
from .lora import Lora


class Distillation(Recipe):
    """The loss; subclasses say who teacher and target are."""

    consistency = True

    def __init__(self, config, start):
        super().__init__(config, start)
        self.solver = DDIMSolver(config.lcm.num_ddim_timesteps, start.device)
        self.sigma_null: Tensor | None = None  # T5("") without pads

    @classmethod
    def problems(cls, config, index, start_params) -> list[str]:
        steps = config.lcm.num_ddim_timesteps
        return [] if 1000 % steps == 0 else [f"lcm.num_ddim_timesteps is {steps}; it must divide 1000."]

    def open_data(self, index, batch_size, rank, world):
        null = index.null_caption() if self.start.family == "sigma" else None
        self.sigma_null = None if null is None else null[:1]

    @abstractmethod
    def teacher(self, *arguments, **extras) -> Tensor:
        """The frozen base's noise estimate."""

    @abstractmethod
    def target(self, *arguments, **extras) -> Tensor:
        """The noise estimate of the network that the student is to agree with."""

    def picture_losses(self, network, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        solver, extras, latent = self.solver, self.extras(batch), batch.latent
        index = draws.integers(len(solver.timesteps), latent.device)
        t = solver.timesteps[index]
        x = self.posterior.add_noise(latent, draws.normal(latent), t)
        student = network(x, t, self.context(batch, draws), batch.mask, **extras).float()
        with torch.no_grad():
            cond, uncond = self.guided_pair(x, t, batch, extras)
            target = lcm_target(
                solver, lambda x, t: self.target(x, t, batch.context, batch.mask, **extras).float(),
                x, cond, uncond, index, self.config.lcm.guidance,
            )  # fmt: skip
        prediction = consistency_function(x, student, t, solver.alphas)
        return {"consistency": pseudo_huber(prediction, target, self.config.lcm.huber_c).mean()}

    def guided_pair(self, x: Tensor, t: Tensor, batch: Batch, extras: dict) -> tuple[Tensor, Tensor]:
        """The teacher's noise for the captions and for the null caption, in one pass."""
        null, null_mask = self.null(batch)
        missing = batch.mask.shape[1] - null_mask.shape[1]  # Sigma's null caption is one token
        contexts = torch.cat([batch.context.to(x), pad(null, (0, 0, 0, missing)).to(x)])
        masks = torch.cat([batch.mask, pad(null_mask, (0, missing))])
        twice = {name: torch.cat([value, value]) for name, value in extras.items()}
        return self.teacher(torch.cat([x, x]), torch.cat([t, t]), contexts, masks, **twice).float().chunk(2)

    def null(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sigma's null caption is T5("") under its own mask; alpha's has none and takes the caption's."""
        rows = len(batch.context)
        if self.sigma_null is None:
            return self.null_caption(batch).expand(rows, -1, -1), batch.mask
        context = self.sigma_null.to(batch.context).expand(rows, -1, -1)
        return context, torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)


class ConsistencyDistillation(Distillation, FullFineTune):
    def build(self) -> nn.Module:
        self.frozen = copy.deepcopy(self.start.model).to(self.start.device, self.start.dtype).requires_grad_(False)
        network = super().build()
        self.average = copy.deepcopy(network).requires_grad_(False)
        return network

    def teacher(self, *arguments, **extras):
        return self.frozen(*arguments, **extras)

    def target(self, *arguments, **extras):
        return self.average(*arguments, **extras)

    @torch.no_grad()
    def after_update(self):
        average, now = local(self.average.parameters()), local(self.network.parameters())
        torch._foreach_lerp_(average, now, 1 - self.config.lcm.ema_decay)

    def networks(self):
        return [self.network, self.average, self.frozen]

    def state(self):
        return dict(self.average.named_parameters())

    def load_state(self, state):
        self.average.load_state_dict(state, strict=False)  # all but the null caption, a buffer that never changes


class ConsistencyLora(Distillation, Lora):
    def teacher(self, *arguments, **extras):
        with self.network.disable_adapter():
            return self.network(*arguments, **extras)

    def target(self, *arguments, **extras):
        return self.network(*arguments, **extras)
