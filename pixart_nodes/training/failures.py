"""What goes wrong while training, as a sentence with a remedy."""

import errno
from pathlib import Path

import torch

from .config import RunConfig


class NotFinite(ArithmeticError):
    """The loss or the gradient is not a number."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def is_disk_full(error: BaseException) -> bool:
    """Of the system's own errors; one that says what was written has a sentence already."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(error: OSError, folder: Path) -> str:
    """folder: what was written to, where the error does not say."""
    place = Path(error.filename).parent if isinstance(error.filename, str) else folder
    return (
        f"The disk of {place} is full ({error.strerror}). Free some space there, then run again: the run goes on from "
        "its last checkpoint."
    )


def broke_down(error: NotFinite, step: int, names: set[str]) -> str:
    """names: of the pictures of that step."""
    return (
        f"Training broke down at step {step} ({error}) with the pictures {', '.join(sorted(names)[:8])}. Try a lower "
        "learning rate or precision fp32; or leave these pictures out, in a new run. If it breaks down again at once, "
        "the last checkpoint has gone astray too: delete it to go on from an older one, or begin a new run."
    )


def out_of_memory(config: RunConfig, step: int, shape: tuple[int, ...]) -> str:
    """shape: of the latents; empty before the first batch."""
    height, width = (8 * side for side in shape[-2:]) if shape else (0, 0)
    advice = ["gradient checkpointing"] * (not config.gradient_checkpointing)
    advice += [f"batch_size 1 with {config.batch_size} times the accumulation"] * (config.batch_size > 1)
    advice += ["an 8-bit or nf4 base"] * (config.base_quantization == "none")
    advice += ["optimizer adamw8bit", "a smaller size of the pictures"]
    return (
        f"Out of memory at step {step} (batch {config.batch_size}, {width} x {height} px). "
        f"Try {', or '.join(advice)}."
    )
