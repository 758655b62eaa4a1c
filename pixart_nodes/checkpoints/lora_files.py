"""Reads LoRA files: PEFT folders, and files of PEFT, diffusers, kohya, OneTrainer, SimpleTuner and LyCORIS."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import foreign
from .files import load_file_tensors, read_json
from .keys import find_layout, shortened
from .lora_alpha import LoraConfig, Strength, folds_alpha, read_config, strength_of
from .lora_keys import Entry, Target, holds_adapters, other_kind, sort_by_module

CONFIG = "adapter_config.json"
FOLDER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")

# Which leaves an adapter of a kind needs, and by which one knows it.
_KINDS = {"lora": ("up", "down"), "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
_KIND_BY_LEAF = {"hada": "loha", "lokr": "lokr", "up": "lora", "down": "lora", "mid": "lora"}
_DIRECT = ("diff", "diff_b", "weight", "bias")  # changes without factors

# Rows as in foreign.py: what a LoRA is that has nothing for PixArt.
_OTHER_LORAS = (
    *foreign.LOOKALIKES[:1],
    (
        r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d",
        "a LoRA for a Flux-like model", "it does not fit PixArt",
    ),
    (
        r"joint_blocks[._]\d|[._]add_[qkv]_proj|transformer_blocks[._]\d+[._]attn[._]to_",
        "a LoRA for Stable Diffusion 3 or a model like it", "it does not fit PixArt",
    ),
    (
        r"^(lora_te\d?_|t5\.|text_encoder)",
        "a LoRA for a text encoder only", "PixArt Load LoRA changes the transformer",
    ),
    (r"", "a LoRA for another model", "it does not fit PixArt"),
)  # fmt: skip


class Adapter(NamedTuple):
    """The change of one module, or of one slice of it."""

    target: Target
    kind: str                    # "lora", "loha", "lokr", or "direct" for tensors without factors
    tensors: dict[str, Tensor]   # by the names of lora_keys.LEAVES, without alpha
    rank: int | None
    strength: Strength
    keys: tuple[str, ...] = ()   # the tensors' names in the file


class Lora(NamedTuple):
    adapters: list[Adapter]
    unmatched: list[str]         # names in the file that mean nothing to PixArt
    metadata: dict[str, str]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """How strong it is and why: "alpha 16 (stored in the file), rank 32: scale 0.5"."""
        lines = Counter(
            (a.strength.source, a.strength.alpha, a.rank, a.strength.scale) for a in self.adapters if a.kind != "direct"
        )
        said = [_said(*line) for line, _ in lines.most_common(3)]
        return "; ".join(said) + (f"; and {len(lines) - 3} other combinations" if len(lines) > 3 else "")


def load_lora(path, alpha: float | None = None) -> Lora:
    """Reads a LoRA file, or a PEFT folder with adapter_config.json.

    alpha counts where the file and its adapter_config.json say nothing; None there means PEFT's default. Raises
    ValueError, with the file's name, for anything that is no LoRA for PixArt, and FileNotFoundError.
    """
    path = Path(path)
    file = next((path / name for name in FOLDER_WEIGHTS if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"{path} is no PEFT folder: it has no {FOLDER_WEIGHTS[0]}.")
    tensors, metadata = load_file_tensors(file)
    beside = file.with_name(CONFIG)
    try:
        return _read(tensors, metadata, lambda: read_json(beside) if beside.is_file() else None, alpha, path.is_dir())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def read_lora(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, config: Mapping | None = None,
    alpha: float | None = None,
) -> Lora:  # fmt: skip
    """A LoRA's state dict in any layout -> its adapters under native names; config: PEFT's, as a mapping.

    Raises ValueError when nothing in it belongs to PixArt, when it is incomplete, or when it holds NaN.
    """
    return _read(state_dict, dict(metadata or {}), lambda: config, alpha, own=True)


def _read(state_dict, metadata, get_config, alpha, own: bool) -> Lora:
    """read_lora; own: the config is this LoRA's for certain, not only in the same folder."""
    check_is_lora(state_dict)
    entries, unmatched = sort_by_module(state_dict)
    if not entries:
        raise ValueError(f"this is {foreign.describe(state_dict, _OTHER_LORAS)}.")
    kinds = {target: kind_of(entry) for target, entry in entries.items()}
    ranks = {target: rank_of(kinds[target], entry.leaves) for target, entry in entries.items()}
    stored = {target: stored_alpha(entry) for target, entry in entries.items()}
    in_header, folded = read_config(metadata), folds_alpha(metadata)
    if in_header:
        in_header.check_init("its metadata")
    factored = {entry.name: target for target, entry in entries.items() if kinds[target] != "direct"}
    unknown = [name for name, target in factored.items() if stored[target] is None and not states(in_header, name)]
    beside, notes = None, ()
    if own or unknown:
        of_modules = {name: ranks[target] for name, target in factored.items()}
        beside, notes = usable_config(get_config, of_modules, own, alpha)
    adapters = []
    for target, entry in entries.items():
        check_finite(entry)
        tensors = with_magnitude_shaped({leaf: t for leaf, t in entry.leaves.items() if leaf != "alpha"})
        strength = strength_of(entry.name, ranks[target], stored[target], in_header, beside, alpha, folded)
        adapters.append(Adapter(target, kinds[target], tensors, ranks[target], strength, tuple(entry.keys)))
    return Lora(adapters, unmatched, metadata, notes)


def check_is_lora(state_dict):
    """Raises ValueError that says what the file is instead."""
    if other := other_kind(state_dict):
        raise ValueError(
            f"this is {other[0]} ({other[1]}), and PixArt Load LoRA reads LoRA, DoRA, LoHa and LoKr. Merge it into the "
            "model with the program that trained it, or try ComfyUI's own Load LoRA."
        )
    if holds_adapters(state_dict):
        return
    if find_layout(state_dict):
        what = "a PixArt transformer: load it with PixArt Load Model"
    else:
        what = foreign.describe(state_dict, (*foreign.LOOKALIKES, *foreign.OTHERS))
    raise ValueError(f"this is no LoRA but {what}." if what else f"this is no LoRA: it holds {shortened(state_dict)}.")


def kind_of(entry: Entry) -> str:
    """Raises ValueError when a part of an adapter is missing, as in a file that was cut."""
    leaves = entry.leaves
    kind = next((kind for name in leaves for start, kind in _KIND_BY_LEAF.items() if name.startswith(start)), "direct")
    missing = [name for name in _KINDS.get(kind, ()) if name not in leaves]
    if kind == "lokr":
        missing = [w for w in ("lokr_w1", "lokr_w2") if w not in leaves and not {f"{w}_a", f"{w}_b"} <= leaves.keys()]
    if kind == "direct" and leaves.keys().isdisjoint(_DIRECT):
        missing = ["weights"]
    if missing:
        raise ValueError(f"{entry.name} is incomplete: {' and '.join(missing)} missing. Save or download it again.")
    return kind


def rank_of(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The inner size of the factors; None where there is none."""
    names = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b")}.get(kind, ())
    return next((tensors[name].shape[0] for name in names if name in tensors), None)


def update_shape(adapter: Adapter) -> tuple[int, int] | None:
    """(rows, columns) of the matrix that an adapter adds; None for factors that do not fit each other."""
    t = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if any(len(shape) < 2 for name, shape in t.items() if name not in (*_DIRECT, "up_bias")):
        return None
    if adapter.kind == "lora":
        kernel = _count(t["mid"][2:]) if "mid" in t else 1
        fits = t["up"][1] == (t["mid"][0] if "mid" in t else adapter.rank)
        return (t["up"][0], _count(t["down"][1:]) * kernel) if fits else None
    if adapter.kind == "loha":
        rows, columns = _factored(t, "hada_w1_a", "hada_w1_b", "hada_t1")
        return (rows, columns) if (rows, columns) == _factored(t, "hada_w2_a", "hada_w2_b", "hada_t2") else None
    (a, c), (b, d) = (
        (t[w][0], _count(t[w][1:])) if w in t else _factored(t, f"{w}_a", f"{w}_b", "lokr_t2" if w[-1] == "2" else "")
        for w in ("lokr_w1", "lokr_w2")
    )
    return a * b, c * d


def states(config: LoraConfig | None, module: str) -> bool:
    return config is not None and config.alpha_of(module) is not None


def usable_config(get_config, ranks, own: bool, by_user) -> tuple[LoraConfig | None, tuple[str, ...]]:
    """adapter_config.json, and notes; None if it belongs to another LoRA of the same folder.

    ranks: by module. Raises ValueError for a config that cannot be used, unless it may be of another LoRA and the user
    has set an alpha.
    """
    try:
        found = config_of(get_config())
        stranger = of_another(found, ranks, own) if found else ""
    except ValueError as error:
        if own or by_user is None:
            raise
        return None, (f"The {CONFIG} beside it is ignored: {error}",)
    if stranger:
        return None, (f"The {CONFIG} beside it is of another LoRA ({stranger}): ignored.",)
    if found:
        found.check_init(f"its {CONFIG}")
    return found, ()


def config_of(fields: Mapping | None) -> LoraConfig | None:
    """Raises ValueError for a method of PEFT that is no LoRA."""
    peft_type = str((fields or {}).get("peft_type", "LORA")).upper().rpartition(".")[2]  # PEFT's own is an enumeration
    if peft_type not in _PEFT_TYPES:
        raise ValueError(f"its {CONFIG} says {peft_type}; PixArt Load LoRA reads {', '.join(_PEFT_TYPES)}.")
    return read_config(fields) if fields else None


def of_another(config: LoraConfig, ranks, own: bool) -> str:
    """What says that a config belongs to another LoRA than the modules with these ranks; empty if nothing does."""
    for module, rank in ranks.items():
        said = config.rank_of(module)
        if said and rank and said != rank:
            return f"rank {said:g} there, {rank} here"
    if own or any(config.may_target(module) for module in ranks):
        return ""
    targets = [config.targets] if isinstance(config.targets, str) else config.targets
    return f"of {shortened(targets)}, which this one does not change"


def stored_alpha(entry: Entry) -> float | None:
    alpha = entry.leaves.get("alpha")
    if alpha is None:
        return None
    if alpha.numel() != 1:
        key = entry.keys[list(entry.leaves).index("alpha")]
        raise ValueError(f"{key} holds {alpha.numel()} numbers, and alpha is one. Save or download it again.")
    return alpha.float().item()


def check_finite(entry: Entry):
    for key, tensor in zip(entry.keys, entry.leaves.values(), strict=True):
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key} holds NaN or infinity: the training that wrote it failed.")


def with_magnitude_shaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's lengths so that they broadcast over the weight: by row (out, 1, ...), or by column (1, in, ...).

    PEFT writes rows, as (out) or (1, out, 1, 1); LyCORIS and OneTrainer write what broadcasts.
    """
    rows = tensors.pop("row_magnitude", None)
    if rows is None and "magnitude" in tensors and tensors["magnitude"].ndim < 2:
        rows = tensors["magnitude"]
    if rows is not None:
        kernel = tensors["down"].ndim - 1 if "down" in tensors else 1
        tensors["magnitude"] = rows.reshape(-1, *[1] * kernel)
    return tensors


def _factored(shapes, a: str, b: str, core: str) -> tuple[int, int]:
    """(rows, columns) of a @ b, or of a and b around a Tucker core."""
    if core in shapes:
        return shapes[a][1], shapes[b][1] * _count(shapes[core][2:])
    return shapes[a][0], _count(shapes[b][1:])


def _count(shape) -> int:
    return torch.Size(shape).numel()


def _said(source: str, alpha: float | None, rank: int | None, scale: float) -> str:
    value = "alpha " + (f"{alpha:g} " if alpha is not None else "") + f"({source})"
    return value + (f", rank {rank}" if rank else "") + f": scale {scale:.4g}"
