"""The trainer: one loop for all recipes, over a run folder.

All randomness is a function of numbers (seed, picture's number in the run), so a resumed run ends with the weights of
an uninterrupted one, and four micro-batches of one picture are one batch of four.
"""

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.checkpoint import checkpoint

from ..data.dataset import Batches
from ..model.transformer import PixArtBlock
from . import sharding
from .config import RunConfig
from .ema import EMA
from .failures import NotFinite, broke_down, is_out_of_memory, out_of_memory
from .inspection import fit_problems
from .optimizers import chosen, run_optimizer
from .preview import draw_samples, make_painter
from .recipes import RECIPES, Draws
from .recipes.base import on_device
from .run_dir import RunFolder
from .snapshot import load_snapshot, save_snapshot, snapshot_of
from .start import DTYPES, load_start, open_cache, precision_of
from .validation import Validation, has_validation

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks for commands while paused


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then constant, or falling to 0 behind the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * factors[config.lr_schedule]


def checkpoint_blocks(network):
    """Blocks keep only their input for the backward pass and run again there. Nothing in them is random."""
    options = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    for module in network.modules():
        if isinstance(module, PixArtBlock):
            module.forward = partial(checkpoint, module.forward, **options)


class Trainer:
    """Prepares everything, and raises ValueError or OSError with one sentence for what is wrong.

    Goes on from the newest checkpoint, or from the one that is given.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, accelerator: Accelerator, checkpoint: Path | None = None):
        self.sharded = sharding.is_wanted(accelerator.num_processes)
        config = replace(config, optimizer=chosen(config, self.sharded))
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.main, self.device = accelerator.is_main_process, accelerator.device
        rank, world = accelerator.process_index, accelerator.num_processes
        self.index = open_cache(config.cache)
        start = load_start(config, self.device, DTYPES[precision_of(config)])
        problems = fit_problems(config, self.index, start)
        if self.sharded:
            problems += sharding.problems(config, precision_of(config))
        if problems:
            raise ValueError(" ".join(problems))
        self.recipe = recipe = RECIPES[config.recipe](config, start)
        self.batches = Batches(
            self.index, start.family, config.batch_size, rank=rank, world=world, seed=config.seed,
            caption_dim=start.params.caption_channels,
        )  # fmt: skip
        recipe.take_null_caption(self.index)
        recipe.open_data(self.index, config.batch_size, rank, world)
        measured = config.validate_every and has_validation(self.index)
        self.validation = Validation(recipe, self.index, rank, world) if measured else None
        self.validated: tuple[int, float] = (-1, math.nan)  # step and loss of the last measurement
        self.paint = None
        if config.gradient_checkpointing:
            checkpoint_blocks(recipe.network)
        make_optimizer = partial(
            run_optimizer, config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        optimizer = make_optimizer(list(recipe.trained().values()))
        self.ema = EMA(recipe.network, config.ema_decay) if config.ema_decay else None
        parts = (recipe, optimizer, self.ema, self.batches, accelerator.scaler)
        self.step = load_snapshot(folder, *parts, path=checkpoint)
        if len(steps := set(self.gathered(self.step))) > 1:
            raise ValueError(f"The processes see checkpoints of different steps {sorted(steps)}: the run's folder must "
                             "be on a disk that all machines share.")  # fmt: skip
        if self.sharded:
            optimizer = sharding.shard(recipe, optimizer, self.ema, make_optimizer)
            self.network, self.optimizer = recipe.network, accelerator.prepare(optimizer)
        else:
            self.network, self.optimizer = accelerator.prepare(recipe.network, optimizer)
        self.trained = recipe.trained()
        self.stream = iter(self.batches)
        self.stopping = ""  # why, once somebody has asked
        self.rows: list[int] = []
        self.shape: tuple[int, ...] = ()

    @property
    def global_batch(self) -> int:
        return self.batches.global_batch * self.config.gradient_accumulation_steps

    def run(self) -> str:
        """Trains until the last step or a stop; "done" or "stopped"."""
        config = self.config
        self.tell(state="running", step=self.step, steps=config.steps, global_batch=self.global_batch,
                  effective_learning_rate=config.learning_rate, error=None, output=None)  # fmt: skip
        logger.info("%s", self.batches.summary())
        rate = config.learning_rate
        logger.info("learning rate %g, global batch %d, from step %d", rate, self.global_batch, self.step)
        if self.step == 0:
            self.validate_if_due(True)
            self.sample_if_due(True)
        saved = self.step
        while self.step < config.steps and not self.obey():
            record = self.update()
            if self.main:
                self.folder.add_event("step", **record)
                self.folder.write_status(step=self.step)
            last = self.step == config.steps
            saving = last or self.step % config.save_every == 0
            self.validate_if_due(saving)  # first, so that the checkpoint knows how good it is
            if saving:
                self.save()
                saved = self.step
            self.sample_if_due(last)
        if self.step < config.steps:
            self.tell(state="stopping")
            if saved != self.step:
                self.save()
            return "stopped"
        return "done"

    def validate_if_due(self, surely: bool):
        if self.validation and (surely or self.step % self.config.validate_every == 0):
            self.validate()

    def sample_if_due(self, surely: bool):
        if self.config.sample_every and (surely or self.step % self.config.sample_every == 0):
            self.sample()

    def update(self) -> dict:
        """One update of the weights; what the monitor shows about it. Raises NotFinite before any weight is touched."""
        config, began = self.config, time.monotonic()
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = self.gradients()
        norm = self.accelerator.clip_grad_norm_(list(self.trained.values()), config.max_grad_norm)
        parts = {name: self.accelerator.reduce(value, "mean").item() for name, value in parts.items()}
        loss, norm = sum(parts.values()), float(sharding.whole(norm))
        # fp16's scaler looks for a scale at first, and leaves out updates that overflow
        if not math.isfinite(loss) or not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NotFinite(f"loss {loss}, gradient {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recipe.after_update()
        if self.ema:
            self.ema.update(self.recipe.network)
        self.step += 1
        found = self.optimizer.param_groups[0].get("d", 1.0)  # Prodigy's own part of the rate
        seconds = time.monotonic() - began
        return {"step": self.step, "loss": loss, "losses": parts, "lr": rate * found, "grad_norm": norm,
                "seconds_per_step": seconds, "memory_bytes": memory(self.device),
                "eta_s": seconds * (config.steps - self.step)}  # fmt: skip

    def gradients(self) -> dict[str, torch.Tensor]:
        """Adds up the gradients of an update's micro-batches; the parts of the mean loss."""
        config, count, totals = self.config, self.config.gradient_accumulation_steps, {}
        self.rows = []
        for micro in range(count):
            number = self.batches.step
            batch = on_device(next(self.stream), self.device)
            self.rows, self.shape = [*self.rows, *batch.rows], tuple(batch.latent.shape)
            first = number * self.batches.global_batch + self.batches.rank * config.batch_size
            draws = Draws(config.seed, list(range(first, first + len(batch.latent))))
            with self.joined(last=micro == count - 1):
                with self.accelerator.autocast():
                    losses = self.recipe.losses(self.network, batch, draws, number)
                self.accelerator.backward(sum(losses.values()) / count)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / count
        return totals

    def joined(self, last: bool):
        """The context of a micro-batch: the processes' gradients are joined behind the last one of an update."""
        if not self.sharded:
            return nullcontext() if last else self.accelerator.no_sync(self.network)
        self.network.set_requires_gradient_sync(last)
        return nullcontext()

    def obey(self) -> bool:
        """Does what was commanded; True when the run shall stop. All processes do the same."""
        paused = False
        while True:
            commands = [("", "stop")] if self.stopping else self.folder.waiting()
            commands = self.shared(commands)
            for path, command in commands:
                if command == "save":
                    self.save()
                elif command == "sample":
                    self.sample()
                elif command in ("pause", "resume"):
                    paused = command == "pause"
                    self.tell(state="paused" if paused else "running")
                elif command != "stop":
                    self.warn(f"The command file {Path(path).name} says nothing that the trainer knows; ignored.")
                if self.main and path:
                    path.unlink(missing_ok=True)
                if command == "stop":
                    return True
            if not paused:
                return False
            time.sleep(POLL)

    def gathered(self, value) -> list:
        """The values of all processes."""
        return gather_object([value]) if self.accelerator.num_processes > 1 else [value]

    def shared(self, value):
        """The main process's value, in all processes."""
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def validate(self):
        with self.accelerator.autocast():
            loss = self.accelerator.reduce(self.validation.share(), "sum").item()
        if not math.isfinite(loss):
            return self.warn(f"The validation loss at step {self.step} is no number.")
        self.validated = (self.step, loss)
        if self.main:
            self.folder.add_event("validation", step=self.step, loss=loss)

    def save(self):
        if self.main or self.sharded:
            parts = self.recipe, self.optimizer, self.ema, self.batches, self.accelerator.scaler
            weights, state = sharding.whole(snapshot_of(self.step, *parts))
        if self.main:
            step, loss = self.validated
            path = save_snapshot(self.folder, weights, state, loss if step == self.step else None)
            self.folder.prune(self.config.keep, self.step)
            self.folder.add_event("checkpoint", step=self.step, path=str(path.relative_to(self.folder.path)))
        self.accelerator.wait_for_everyone()

    def sample(self):
        """Draws the validation prompts; a failure is a warning and never ends the run."""
        if self.main and self.paint is None:
            self.paint, problem = make_painter(self.config.vae, self.recipe.start)
            if problem:
                self.warn(problem)
        if self.main or self.sharded:  # then every process has a part of the weights
            try:
                with self.accelerator.autocast():
                    files = draw_samples(self.recipe, self.index, self.folder.samples, self.step, self.paint)
                if files:
                    self.folder.add_event("sample", step=self.step, files=files)
            except (RuntimeError, ValueError, OSError) as error:
                logger.exception("samples at step %d", self.step)
                self.warn(f"No samples at step {self.step}: {error}")
        self.accelerator.wait_for_everyone()

    def export(self) -> Path | None:
        """Writes the result, averaged where there is an average."""
        if self.ema:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(self.ema.weights[name])
        if self.sharded:
            sharding.join(self.recipe.network)
        if not self.main:
            return None
        output = self.config.output
        folder = Path(output.folder)
        folder.mkdir(parents=True, exist_ok=True)
        return self.recipe.export(folder / output.name, self.recipe.metadata(self.step))

    def tell(self, **fields):
        if self.main:
            self.folder.write_status(**fields)

    def warn(self, text: str):
        logger.warning("%s", text)
        if self.main:
            self.folder.add_event("warning", text=text)

    def sentence(self, error: BaseException) -> str:
        """What went wrong while training, and what to do."""
        if isinstance(error, NotFinite):
            return broke_down(error, self.step + 1, {self.index.name(row) for row in self.rows})
        if is_out_of_memory(error):
            return out_of_memory(self.config, self.step + 1, self.shape)
        return str(error) or repr(error)


def memory(device: torch.device) -> int:
    """Peak of the GPU's memory in bytes; on a CPU, what the process has now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
