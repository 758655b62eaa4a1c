"""What a checkpoint of a run holds: trained weights, optimizer, averages, and the place in the data."""

import json
import logging
import shutil

import torch

from ..checkpoints.files import load_file_tensors, save_atomic
from .config import ADAPTERS, GROUPS
from .run_dir import VALIDATION, RunFolder, is_whole

logger = logging.getLogger(__name__)

BASE = "base model"
WEIGHTS, STATE = "weights.safetensors", "state.pt"


def snapshot_of(step: int, recipe, optimizer, ema, batches, scaler=None) -> tuple[dict, dict]:
    """(trained weights, everything else) for `save_snapshot`."""
    weights = {name: p.detach() for name, p in recipe.trained().items()}
    return weights, {
        "step": step, "terms": terms(recipe), "batches": batches.state_dict(), "recipe": recipe.state(),
        "optimizer": optimizer.state_dict(), "optimizer_kind": recipe.config.optimizer,
        "ema": ema.state_dict() if ema else None, "scaler": scaler.state_dict() if scaler else None,
    }  # fmt: skip


def terms(recipe) -> dict:
    """What a run cannot go on with changed, by name: the weights would mean something else."""
    config = recipe.config.to_dict()
    names = ["recipe", *(["rank", "alpha", "targets", "dora"] if config["recipe"] in ADAPTERS else [])]
    groups = [name for name in GROUPS if config["recipe"].replace("-", "_").startswith(name)]
    parts = {f"{group}.{name}": value for group in groups for name, value in config[group].items()}
    return {**{name: config[name] for name in names}, **parts, BASE: recipe.start.fingerprint}


def changes(before: dict, now: dict) -> list[str]:
    found = [name for name, value in now.items() if name in before and before[name] != value]
    return ["the base model is another" if name == BASE else f"{name} was {before[name]!r} and is {now[name]!r}"
            for name in found]  # fmt: skip


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

    An optimizer of another kind than the checkpoint's starts afresh. Raises ValueError when run.json has changed so
    that the checkpoint does not fit, or when that one is not whole.
    """
    if path is not None and not is_whole(path):
        raise ValueError(f"{path} is no whole checkpoint: those are in checkpoints/step-... of a run's folder.")
    path = path or next(folder.complete_checkpoints(), None)
    if path is None:
        return 0
    weights, _ = load_file_tensors(path / WEIGHTS)
    trained = recipe.trained()
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    changed = changes(state.get("terms", {}), terms(recipe))
    if {n: tuple(w.shape) for n, w in weights.items()} != {n: tuple(p.shape) for n, p in trained.items()}:
        changed = changed or ["the trained weights have other shapes"]
    if (state["ema"] is None) != (ema is None):
        changed.append("ema_decay was switched on or off")
    if changed:
        raise ValueError(f"{path} is of a run with other settings: {', '.join(changed)}. Set them back, or use a new "
                         "run folder.")  # fmt: skip
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    take_up(optimizer, state, recipe.config.optimizer)
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


def take_up(optimizer, state: dict, kind: str):
    """The optimizer's state of a checkpoint, under the settings of today."""
    (settings, *_), (today, *_) = state["optimizer"]["param_groups"], optimizer.param_groups
    before = state.get("optimizer_kind", kind if settings.keys() == today.keys() else "another optimizer")
    if before != kind:
        logger.warning("the checkpoint has the state of %s: %s starts afresh", before, kind)
        return
    decays = [group.get("weight_decay") for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay is not None:
            group["weight_decay"] = decay


def bytes_of(content) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(bytes_of, content.values()))
    return sum(map(bytes_of, content)) if isinstance(content, (list, tuple)) else 0
