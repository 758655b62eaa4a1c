"""Several processes of one command, started by accelerate or torchrun: that they are joined, and how they end."""

import logging
import os
import sys


def launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_joined(accelerator):
    """Raises ValueError when accelerate did not join the processes that were launched."""
    if accelerator.num_processes != launched():
        raise ValueError(f"{launched()} processes were launched, but accelerate joined {accelerator.num_processes}.")


def leave(status: int):
    """Ends this process with its exit status.

    One of several does not wind down the threads that talk to the others: that may end in an abort of PyTorch's in
    place of the status. Those that have done their work have waited for each other before (`wait_for_everyone`).
    """
    if launched() > 1:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
