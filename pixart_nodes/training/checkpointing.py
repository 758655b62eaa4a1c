"""Save and resume: everything a run needs to go on as if it had never stopped, in one file written atomically."""

import os
from pathlib import Path

import torch


def save(path: Path, **state) -> None:
    """Write `state` (tensors, numbers, nested dicts) next to `path`, flush, then rename over it.

    Raises OSError that names the file when the disk is full; the previous checkpoint stays.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"Cannot write the checkpoint {path}: {error}. Free some space, then run again.") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def load(path: Path) -> dict | None:
    """The last complete checkpoint, or None if there is none yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
