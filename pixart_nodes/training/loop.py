"""The training loop: noise a latent, predict the noise, average the weights, save, resume.

A batch is a function of its step number, and so are its noise and timesteps: a resumed run continues exactly.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..diffusion.losses import GaussianPosterior, diffusion_loss, min_snr_weight
from ..diffusion.schedule import NUM_TIMESTEPS
from . import checkpointing, events
from .config import TrainConfig
from .ema import EMA
from .optimizers import make_optimizer


class Batch(NamedTuple):
    latent: Tensor  # (B, 4, H, W), scaled
    context: Tensor  # (B, L, D), T5 features
    mask: Tensor  # (B, L), True = a token of the caption


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to final / initial learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    end = config.final_learning_rate / config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def drop_captions(batch: Batch, null_caption: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Context with some captions replaced by the null caption's rows, under the caption's own mask.

    That is the original's rule (PixArt_blocks.py:389-398). null_caption (at least L, D).
    """
    dropped = torch.rand(len(batch.context), generator=generator) < probability
    null = null_caption[: batch.context.shape[1]].to(batch.context)
    return torch.where(dropped[:, None, None].to(batch.context.device), null[None], batch.context)


def step_generator(config: TrainConfig, step: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)


def training_loss(model, null_caption: Tensor, posterior: GaussianPosterior, batch: Batch, config, generator):
    """Noise MSE and learned-variance term of one batch, both scalars."""
    noise = torch.randn(batch.latent.shape, generator=generator).to(batch.latent)
    t = torch.randint(NUM_TIMESTEPS, (len(noise),), generator=generator).to(noise.device)
    x = posterior.add_noise(batch.latent, noise, t)
    context = drop_captions(batch, null_caption, config.caption_dropout, generator)
    output = model(x, t, context, batch.mask, learned_variance=True)
    mse, bound = diffusion_loss(posterior, output, batch.latent, noise, x, t)
    if config.min_snr_gamma is not None:
        mse = mse * min_snr_weight(posterior.tables["snr"][t], config.min_snr_gamma)
    return mse.mean(), bound.mean()


def train(config: TrainConfig, model, make_batch: Callable[[int, int], Batch], run: Path, report=None) -> EMA:
    """Train `model` in place for config.steps updates and return the averaged weights.

    make_batch(step, rank) supplies the data. `run` receives events.jsonl and checkpoint.pt; if a checkpoint is
    there, the run continues from it. Works under `accelerate launch` on several processes.
    """
    problems = config.check()
    if problems:
        raise ValueError("This training cannot start: " + " ".join(problems))
    run.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.weight_decay)
    ema = EMA(model.to(accelerator.device), config.ema_decay)
    first = resume(run / "checkpoint.pt", model, optimizer, ema)
    null_caption = model.y_embedder.y_embedding
    forward = torch.compile(model, dynamic=False) if config.compile else model  # one graph for each picture size
    forward, optimizer = accelerator.prepare(forward, optimizer)
    posterior = GaussianPosterior(accelerator.device)
    clock, spent = time.monotonic(), []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, step)
        rank = accelerator.process_index
        batch = Batch(*(x.to(accelerator.device) for x in make_batch(step, rank)))
        mse, bound = training_loss(forward, null_caption, posterior, batch, config, step_generator(config, step, rank))
        accelerator.backward(mse + bound)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        spent.append(mse.detach())
        if accelerator.is_main_process and (step + 1) % config.log_every == 0:
            seconds, clock = (time.monotonic() - clock) / len(spent), time.monotonic()
            record = {
                "step": step + 1, "mse": torch.stack(spent).mean().item(), "bound": bound.item(),
                "grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"], "seconds_per_step": seconds,
            }  # fmt: skip
            spent = []
            events.append(run / "events.jsonl", record)
            if report:
                report(record)
        if accelerator.is_main_process and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            checkpointing.save(
                run / "checkpoint.pt", step=step + 1, model=model.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
            )  # fmt: skip
    return ema


def resume(path: Path, model, optimizer, ema: EMA) -> int:
    """Load the run's last checkpoint, if any, and return the step to go on with."""
    state = checkpointing.load(path)
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]
