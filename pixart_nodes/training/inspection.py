"""What is wrong with a run before it starts: every problem at once, of its run.json and of all that it points at."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..checkpoints import load_weights
from ..data.dataset import Batches, rows_by_bucket
from ..data.index import LATENT_FACTOR
from . import sharding
from .config import DEFAULT, GROUPS, RunConfig, wrong_keys
from .estimate import report
from .optimizers import chosen, run_optimizer
from .quantise import library
from .recipes import RECIPES
from .recipes.base import no_null_caption
from .run_dir import RunFolder
from .start import EMA_CHOICE, open_cache, precision_of


def inspect(folder: RunFolder) -> tuple[list[str], str]:
    """(problems, what the run will take when there are none). Raises ValueError for a run.json that is no JSON."""
    path = folder.path / "run.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = RunConfig.from_dict(without_wrong_keys(RunConfig, given))
    wrong = config.wrong_values()
    usable = without_wrong_values(config, wrong)
    index, found, seen = opened(usable)
    seen += machine_problems(usable) + vae_problems(usable, found.family if found else None)
    if index and found:
        seen += fit_problems(usable, index, found)
    problems = wrong_keys(RunConfig, given) + config.check()
    problems += [problem for problem in seen if problem.partition(" ")[0] not in wrong]  # of a value put in its place
    return problems, "" if problems else plan(config, index, found)


def without_wrong_keys(kind, given) -> dict:
    """What from_dict takes of `given`."""
    if not isinstance(given, dict):
        return {}
    known, groups = {entry.name for entry in fields(kind)} - {"version"}, GROUPS if kind is RunConfig else {}
    return {
        name: without_wrong_keys(groups[name], value) if name in groups else value
        for name, value in given.items() if name in known
    }  # fmt: skip


def without_wrong_values(config: RunConfig, wrong) -> RunConfig:
    """With the default for each of the wrong fields."""
    for name in wrong:
        group, _, leaf = name.rpartition(".")
        change = {leaf: DEFAULT.value(name)}
        config = replace(config, **({group: replace(config.value(group), **change)} if group else change))
    return config


def opened(config: RunConfig) -> tuple:
    """(training set, what the base model is, problems); None for what cannot be read or is not given."""
    index = found = None
    problems = []
    try:
        index = open_cache(config.cache) if config.cache else None
    except (ValueError, OSError) as error:
        problems.append(str(error))
    base = config.base
    family = None if base.family == "auto" else base.family
    try:
        if base.path:
            found = load_weights(base.path, family=family, base_size=base.base_size, ema=EMA_CHOICE[base.weights])[1]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return index, found, problems


def fit_problems(config: RunConfig, index, found) -> list[str]:
    """Where recipe, training set and base model do not fit each other."""
    problems = RECIPES[config.recipe].problems(config, index, found.params)
    if not found.has_null_caption and index.null_caption() is None:
        problems.append(no_null_caption(config, index))
    if not rows_by_bucket(index, "train"):
        problems.append(f"{index.meta['source']} has no pictures for train.")
    try:
        index.require(family_of(config, found, index), found.params.caption_channels)
    except ValueError as error:
        return [*problems, str(error)]
    return problems + caption_problems(config, index, found.params) + compression_problems(config, index, found.params)


def family_of(config: RunConfig, found, index) -> str:
    """What the features have to be made for; weak-to-strong says itself that it ends at Sigma."""
    return index.family if config.recipe == "weak-to-strong" else found.family


def caption_problems(config: RunConfig, index, params) -> list[str]:
    longest = longest_caption(index)
    if config.recipe == "weak-to-strong":
        limit = config.weak_to_strong.caption_tokens
        said = f"weak_to_strong.caption_tokens is {limit}, but the cache has captions of {longest} tokens: raise it."
    else:
        limit = params.caption_tokens
        said = f"The cache has captions of {longest} tokens, but the model takes {limit} at most."
    return [said] if longest > limit else []


def longest_caption(index) -> int:
    """Tokens of the longest caption of any picture."""
    longest = 0
    for name in ("caption", "vlm_caption"):
        if name in index.columns:
            place, length = index.columns[name].T
            longest = max(longest, int((length[place >= 0] & 0xFFFFFF).max()))
    return longest


def compression_problems(config: RunConfig, index, params) -> list[str]:
    wanted = config.weak_to_strong
    if config.recipe != "weak-to-strong" or wanted.kv_sampling != "conv" or not wanted.kv_layers:
        return []
    side = min(min(bucket.width, bucket.height) for bucket in index.buckets) // (LATENT_FACTOR * params.patch_size)
    if wanted.kv_scale_factor <= side:
        return []
    return [f"weak_to_strong.kv_scale_factor is {wanted.kv_scale_factor}, but the smallest pictures of the cache have "
            f"{side} tokens on a side: set it to that or less."]  # fmt: skip


def vae_problems(config: RunConfig, family: str | None) -> list[str]:
    """family: the base model's, None where that is unknown."""
    if not config.vae:
        return []
    if not Path(config.vae).exists():
        return [f"vae {config.vae} does not exist."]
    if family is None:
        return []
    try:
        from ..data.loading import read_vae

        read_vae(Path(config.vae), "sigma" if config.recipe == "weak-to-strong" else family)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return [f"vae: {error}"]
    return []


def machine_problems(config: RunConfig) -> list[str]:
    """What this computer lacks: packages, a GPU, a place for the result."""
    problems = []
    try:
        run_optimizer(chosen(config), [torch.nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=0.0)
    except ValueError as error:
        problems.append(str(error))
    if config.base_quantization != "none":
        try:
            library(config.base_quantization)
        except ValueError as error:
            problems.append(str(error))
    if config.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("precision fp16 needs a GPU: take bf16 or fp32.")
    # only launchers say how many processes there are; without one the switch alone is the wish
    if sharding.is_wanted(int(os.environ.get("WORLD_SIZE", 2))):
        problems += sharding.problems(config, precision_of(config))
    return problems + output_problems(config)


def output_problems(config: RunConfig) -> list[str]:
    """Whether the result can be written: tried, and nothing is left of it."""
    if not config.output.folder:
        return []
    path = Path(config.output.folder)
    made = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return [f"output.folder {path} cannot be written to ({error.strerror}): choose another one."]
    finally:
        for folder in made:
            with suppress(OSError):  # it could not be made, or is in use meanwhile
                folder.rmdir()
    return []


def plan(config: RunConfig, index, found) -> str:
    """What a run without problems will take."""
    batches = Batches(index, family_of(config, found, index), config.batch_size)
    pixels = max(bucket.width * bucket.height for bucket in index.buckets)
    updates = f"{config.steps} updates of {config.batch_size * config.gradient_accumulation_steps} pictures per process"
    rate = f"learning rate {config.learning_rate:g}, optimizer {chosen(config)}"
    exact = replace(config, precision=precision_of(config), optimizer=chosen(config))
    return "\n".join((batches.summary(), f"{updates}, {rate}", report(exact, found.params, pixels)))
