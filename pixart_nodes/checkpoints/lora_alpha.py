"""How strong a LoRA is: its alpha, from the first place that knows it."""

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

PEFT_DEFAULT = 8.0  # peft LoraConfig.lora_alpha; PixArt's own LoRA scripts never set it and do not store it
_ALPHA_FIELDS = ("lora_alpha", "alpha", "ss_network_alpha", "network_alpha")
# PEFT's initialisations (LoraConfig.init_lora_weights) that take the first factors out of the model's own weights.
_CHANGING_INITS = ("pissa", "corda", "olora", "lora_ga", "loftq")
_LIBRARY_PREFIXES = ("transformer.", "unet.")  # diffusers puts the part of its pipeline before every field


class LoraConfig(NamedTuple):
    """The fields of PEFT's adapter_config.json that decide about strength."""

    alpha: float | None
    rank: int | None
    alpha_pattern: dict[str, float]
    rank_pattern: dict[str, int]
    rank_stabilised: bool        # scale alpha / sqrt(rank) instead of alpha / rank
    targets: list[str] | str     # endings of module names, or one regular expression; empty if it does not say
    init: str                    # how the factors were initialised

    def alpha_of(self, module: str) -> float | None:
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def rank_of(self, module: str) -> int | None:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def may_target(self, module: str) -> bool:
        """PEFT's rule (tuners/tuners_utils.py check_target_module_exists), for names with underscores as well."""
        dot = "." if "." in module else "_"
        if not self.targets or self.targets == "all-linear":
            return True
        if isinstance(self.targets, str):
            return dot == "_" or re.fullmatch(_checked(self.targets), module) is not None
        return any(f"{dot}{module}".endswith(dot + target.replace(".", dot)) for target in self.targets)

    def check_init(self, place: str):
        """Raises ValueError where PEFT changed the model's own weights before the training: PixArt's do not fit."""
        if self.init.startswith(_CHANGING_INITS):
            remedy = "Merge it into the model that it was trained on." if self.init == "loftq" else (
                "Convert it with PEFT: save_pretrained with path_initial_model_for_weight_conversion."
            )  # fmt: skip
            raise ValueError(
                f"{place} says init_lora_weights {self.init!r}: it was trained on weights that PEFT had changed, not "
                f"on the model's own. {remedy}"
            )


class Strength(NamedTuple):
    scale: float
    alpha: float | None
    source: str                  # where alpha was found, for the user


def read_config(fields: Mapping) -> LoraConfig | None:
    """From adapter_config.json, or from a safetensors header (diffusers' or kohya's); None if it says nothing."""
    if "lora_adapter_metadata" in fields:
        fields = _json(fields["lora_adapter_metadata"])
    for prefix in _LIBRARY_PREFIXES:
        fields = {name.removeprefix(prefix): value for name, value in fields.items()}
    alpha = next((number for name in _ALPHA_FIELDS if (number := _number(fields.get(name))) is not None), None)
    rank = next((number for name in ("r", "rank", "ss_network_dim") if (number := _number(fields.get(name)))), None)
    alphas, ranks = _pattern(fields.get("alpha_pattern")), _pattern(fields.get("rank_pattern"))
    if alpha is None and rank is None and not alphas:
        return None
    stabilised, init = fields.get("use_rslora") in (True, "True", "true"), fields.get("init_lora_weights")
    targets = fields.get("target_modules")
    targets = targets if isinstance(targets, str) else list(targets or ())
    return LoraConfig(alpha, rank, alphas, ranks, stabilised, targets, f"{init}".lower())


def strength_of(module, rank, stored, in_metadata, in_file_beside, by_user, folded: bool) -> Strength:
    """The scale of one adapter.

    stored: its alpha tensor's value; the two configs may be None; by_user: the widget, None for automatic; folded:
    the file's writer multiplied the scale into the tensors. A rank of None (LoKr of two full matrices, which has
    none) means scale 1.
    """
    if stored is not None:
        return Strength(stored / rank if rank else 1.0, stored, "stored in the file")
    for config, source in ((in_metadata, "the file's metadata"), (in_file_beside, "adapter_config.json")):
        alpha = config and config.alpha_of(module)
        if alpha is not None:
            r = rank or config.rank_of(module)
            divisor = math.sqrt(r) if r and config.rank_stabilised else r
            return Strength(alpha / divisor if divisor else 1.0, alpha, source)
    if by_user is not None:
        return Strength(by_user / rank if rank else 1.0, by_user, "set on the node")
    if folded:
        return Strength(1.0, None, "contained in the weights, as OneTrainer writes them")
    return Strength(PEFT_DEFAULT / rank if rank else 1.0, PEFT_DEFAULT, "PEFT's default, as nothing says otherwise")


def folds_alpha(metadata: Mapping[str, str]) -> bool:
    """OneTrainer writes alpha as a tensor or into the weights, and signs its files."""
    return any(name.startswith("ot_") for name in metadata)


def _by_pattern(pattern: dict, module: str, default):
    """PEFT's rule (utils/other.py get_pattern_key): a key is a regular expression for the end of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _checked(expression: str) -> str:
    try:
        re.compile(f"({expression})")
    except re.error as error:
        raise ValueError(
            f"its settings name modules by {expression!r}, which is no regular expression ({error}): "
            "correct it there, or save the LoRA again."
        ) from error
    return expression


def _pattern(value) -> dict[str, float]:
    value = _json(value) if isinstance(value, str) else value
    return {_checked(key): _number(number) for key, number in value.items()} if isinstance(value, dict) else {}


def _number(value) -> float | None:
    """Headers hold text, and kohya writes "None"."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _json(text) -> dict:
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its metadata about the LoRA is no JSON ({error}): save or download it again.") from error
    return content if isinstance(content, dict) else {}
