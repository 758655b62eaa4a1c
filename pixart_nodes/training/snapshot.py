"""What a checkpoint of a run holds: trained weights, optimizer, averages, and the place in the data."""

import json
import logging
import shutil

import torch

from ..checkpoints.files import load_file_tensors, save_atomic
from .run_dir import VALIDATION, RunFolder, is_whole

logger = logging.getLogger(__name__)

WEIGHTS, STATE = "weights.safetensors", "state.pt"


def snapshot_of(step: int, recipe, optimizer, ema, batches, scaler=None) -> tuple[dict, dict]:
    """(trained weights, everything else) for `save_snapshot`."""
    weights = {name: p.detach() for name, p in recipe.trained().items()}
    return weights, {
        "step": step, "batches": batches.state_dict(), "optimizer": optimizer.state_dict(), "recipe": recipe.state(),
        "ema": ema.state_dict() if ema else None, "scaler": scaler.state_dict() if scaler else None,
    }  # fmt: skip


def save_snapshot(folder: RunFolder, weights: dict, state: dict, validation_loss=None):
    """Writes checkpoints/step-<step>, whole or not at all, and returns it. Raises OSError when there is no room."""
    step = state["step"]
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    size, free = sum(map(bytes_of, (weights, state))), shutil.disk_usage(folder.checkpoints).free
    if free < size * 1.1:
        raise OSError(
            f"The checkpoint of step {step} needs {size / 1e9:.1f} GB, but {folder.checkpoints} has {free / 1e9:.1f} "
            "GB left. Free some space, then run again: the run goes on from its last checkpoint."
        )
    with folder.new_checkpoint(step) as path:
        save_atomic(weights, path / WEIGHTS)
        if validation_loss is not None:
            (path / VALIDATION).write_text(json.dumps({"loss": validation_loss}), encoding="utf-8")
        try:
            torch.save(state, path / STATE)
        except RuntimeError as error:  # torch's archive writer reports a full disk so
            raise OSError(str(error)) from error
    return folder.checkpoints / f"step-{step:06}"


def load_snapshot(folder: RunFolder, recipe, optimizer, ema, batches, scaler=None, path=None) -> int:
    """Takes up the checkpoint at `path`, or else the newest whole one, if any; returns the step to go on with.

    Raises ValueError when run.json has changed so that the checkpoint does not fit, or when that one is not whole.
    """
    if path is not None and not is_whole(path):
        raise ValueError(f"{path} is no whole checkpoint: those are in checkpoints/step-... of a run's folder.")
    path = path or next(folder.complete_checkpoints(), None)
    if path is None:
        return 0
    weights, _ = load_file_tensors(path / WEIGHTS)
    trained = recipe.trained()
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    changed = {n: tuple(w.shape) for n, w in weights.items()} != {n: tuple(p.shape) for n, p in trained.items()}
    if changed or (state["ema"] is None) != (ema is None):
        raise ValueError(f"{path} is of a run with other settings (recipe, rank, targets or average): set them back, "
                         "or use a new run folder.")  # fmt: skip
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(state["optimizer"])
    recipe.load_state(state["recipe"])
    batches.load_state_dict(state["batches"])
    if ema:
        device = next(iter(ema.weights.values())).device
        ema.load_state_dict(state["ema"])
        ema.weights = {name: weight.to(device) for name, weight in ema.weights.items()}
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    logger.info("goes on from %s", path)
    return state["step"]


def bytes_of(content) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(bytes_of, content.values()))
    return sum(map(bytes_of, content)) if isinstance(content, (list, tuple)) else 0
