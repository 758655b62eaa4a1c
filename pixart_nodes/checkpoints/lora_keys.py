"""Names in LoRA files -> modules of the network under native names, whoever wrote the file.

A name is prefixes, a module and a leaf: "unet.base_model.model." + "transformer_blocks.3.attn1.to_q" +
".lora_A.weight". Modules are spelled natively or as diffusers does, with dots or, by kohya, OneTrainer and LyCORIS,
with underscores; the rows of keys.py serve them all.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from .keys import BLOCK_KEYS, OUTER_KEYS, WHOLE, diffusers_to_native, native_to_diffusers, shortened

Part = tuple[int, int]  # (i, n): the i-th of n equal slices of the native tensor's rows

PREFIXES = (
    "base_model.model.", "base_model.", "unet.", "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip

# What the leaves of PEFT, diffusers, kohya and LyCORIS are called here.
LEAVES = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_linear_layer.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "lora_linear_layer.up": "up", "lora_mid": "mid",
    "lora_magnitude_vector": "row_magnitude", "dora_scale": "magnitude", "alpha": "alpha",
    **{name: name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b",
    )},
}  # fmt: skip
_LEAF = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>" + "|".join(map(re.escape, sorted(LEAVES, key=len, reverse=True))) + r")"
    r"(\.(?!weight$|bias$)[^.]+)?"  # the adapter's name, which PEFT keeps in its own state dicts
    r"(\.(?P<what>weight|bias))?$"
)
_PLAIN = re.compile(r"(?P<module>.+?)(\.modules_to_save\.[^.]+|\.base_layer(?=\.bias))?\.(?P<what>weight|bias)$")

# Tensors of adapters that are not read, and what they are called; LyCORIS' OFT has the names of its BOFT.
_OTHER_KINDS = (
    (r"\.(oft_(blocks|diag|R|r)|boft_[RrSs])(\.|$)", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_E(\.|$)", "AdaLoRA"),
    (r"\.ia3_l(\.|$)", "IA3"),
    (r"\.vera_lambda_[bd](\.|$)", "VeRA"),
)
# Diffusers' attention processors of 2023: "attn1.processor.to_q_lora.down.weight".
_PROCESSOR = re.compile(r"(\.processor)?\.(?P<layer>\w+)_lora\.(?P<leaf>down|up)(?=\.weight$)")

_DOTTED = {
    table: {name.replace(".", "_"): name for row in rows for name in row[:2]}
    for table, rows in (("block", BLOCK_KEYS), ("outer", OUTER_KEYS))
}
_UNDERSCORED_BLOCK = re.compile(r"(transformer_blocks|blocks)_(\d+)_(.+)")
_SLICE = re.compile(r"(.+)\.(\d)")  # OneTrainer: "blocks.3.attn.qkv.1" is the k of that module


class Target(NamedTuple):
    module: str                  # native, "blocks.3.attn.qkv"
    part: Part


class Entry(NamedTuple):
    name: str                    # the module as the file spells it, without prefixes
    leaves: dict[str, Tensor]    # by the names on the right of LEAVES; "weight" and "bias" replace the model's
    keys: list[str]              # the tensors' names in the file


def native_module(name: str) -> tuple[Target, str] | None:
    """What a module name means, and that name without its prefixes; None for a module that PixArt does not have."""
    while True:
        target = _dotted(name) or _underscored(name)
        if target:
            return target, name
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name[len(prefix) :]


def _dotted(name: str) -> Target | None:
    if found := diffusers_to_native(name):
        return Target(*found)
    if native_to_diffusers(name):
        return Target(name, WHOLE)
    if sliced := _SLICE.fullmatch(name):
        parts = native_to_diffusers(sliced[1])
        if len(parts) > 1 and int(sliced[2]) < len(parts):
            return Target(sliced[1], (int(sliced[2]), len(parts)))
    return None


def _underscored(name: str) -> Target | None:
    block = _UNDERSCORED_BLOCK.fullmatch(name)
    inner = _DOTTED["block" if block else "outer"].get(block[3] if block else name)
    return _dotted(f"{block[1]}.{block[2]}.{inner}" if block else inner) if inner else None


def split(name: str) -> tuple[str, str] | None:
    """"<module>.lora_B.weight" -> ("<module>", "up"); None for a name that belongs to no adapter."""
    name = _of_today(name)
    if found := _LEAF.fullmatch(name):
        leaf = LEAVES[found["leaf"]]
        if found["what"] == "bias":
            return (found["module"], "up_bias") if leaf == "up" else None
        return found["module"], leaf
    if found := _PLAIN.fullmatch(name):
        return found["module"], found["what"]
    return None


def holds_adapters(names: Iterable[str]) -> bool:
    """Whether any of the names is a part of a LoRA, LoHa, LoKr or difference of weights."""
    return any(_LEAF.fullmatch(_of_today(name)) for name in names)


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """What an adapter is called that is not read, and a tensor that shows it."""
    return next(
        ((kind, name) for name in names for pattern, kind in _OTHER_KINDS if re.search(pattern, name)), None
    )


def _of_today(name: str) -> str:
    """"attn1.processor.to_out_lora.up.weight" -> "attn1.to_out.0.lora.up.weight"."""
    found = _PROCESSOR.search(name)
    if found is None:
        return name
    layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
    return f"{name[: found.start()]}.{layer}.lora.{found['leaf']}{name[found.end() :]}"


def sort_by_module(state_dict: Mapping[str, Tensor]) -> tuple[dict[Target, Entry], list[str]]:
    """The file's tensors by the module that they change, and the names that mean nothing to PixArt.

    Raises ValueError when two tensors claim the same place: a file of several adapters.
    """
    found, unmatched = {}, []
    for name, tensor in state_dict.items():
        pieces = split(name)
        meaning = native_module(pieces[0]) if pieces else None
        if meaning is None:
            unmatched.append(name)
            continue
        (target, module), leaf = meaning, pieces[1]
        entry = found.setdefault(target, Entry(module, {}, []))
        entry.keys.append(name)
        if leaf in entry.leaves:
            raise ValueError(f"{shortened(entry.keys)} overlap: the file holds several LoRAs. Keep one per file.")
        entry.leaves[leaf] = tensor
    return found, unmatched
