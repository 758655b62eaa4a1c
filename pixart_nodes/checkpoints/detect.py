"""Finds out which PixArt transformer a state dict holds. This is the only place that guesses.

What the caller chose goes first, then what our own file header states, then what the tensors prove, then what a
config file says. Works on meta tensors; only the values of `pos_embed` are read, where there are any.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..model.params import PixArtParams
from ..model.transformer import PixArtTransformer
from .configs import CAPTION_TOKENS, FAMILIES, LATENT_SCALE, VAE_FACTOR, from_config, from_metadata, interpolation_for
from .foreign import LOOKALIKES, OTHERS, describe
from .keys import POS_EMBED, Y_EMBEDDING, find_layout, shortened, to_native
from .measure import measure, measure_positions, spelled

HEAD_DIM = 72  # of every published model
PUBLISHED = {"alpha": (256, 512), "Sigma": (256, 512, 1024, 2048)}  # sizes without micro-conditioning, in pixels
STRUCTURE = ("depth", "hidden_size", "in_channels", "patch_size", "caption_channels")


@dataclass(frozen=True)
class Detection:
    """What a file turned out to be."""

    params: PixArtParams
    family: str                  # "alpha" or "sigma": which VAE, how many caption tokens
    latent_scale: float          # scaled latent = latent * latent_scale
    layout: str                  # "native" or "diffusers"
    notes: tuple[str, ...]       # sentences for the user
    has_null_caption: bool = True  # whether the file has its rows; else they are a placeholder


def detect(
    state_dict: Mapping[str, Tensor], metadata=None, config=None, family: str | None = None,
    base_size: int | None = None,
) -> Detection:  # fmt: skip
    """Detects the transformer in any PixArt state dict.

    metadata: the safetensors header's. config: a dict in diffusers' words, the original's or those of PixArtParams;
    one entry is enough, such as {"num_heads": 4}. family ("alpha" or "sigma") and base_size (the training size in
    pixels: 256, 512, 1024 or 2048) decide where several models look the same, and overrule the file; base_size px
    are base_size / 16 tokens per side, with the pe_interpolation of `configs.interpolation_for`.
    Raises ValueError, saying what the file is and what to choose, for foreign, incomplete, wrongly shaped and
    ambiguous files.
    """
    _check_choice(family, base_size)
    prefix, layout = find_transformer(state_dict)
    native = native_shapes(state_dict)
    measured = measure(native, layout)
    positions, notes = measure_positions(state_dict.get(prefix + POS_EMBED), Y_EMBEDDING in native)
    own, declared = from_metadata(metadata), from_config(config)
    for said in (own, declared):
        if wrong := contradictions(said, measured):
            raise ValueError(f"The configuration belongs to another model: {wrong}.")
    if family and measured.get("family", family) != family:
        notes.append(f"The tensors look like PixArt-{measured['family']}; taken as {family} because that was chosen.")

    kv = {name: declared[name] for name in ("kv_compress",) if name in declared}  # most kinds leave no tensors
    facts = ChainMap({"family": family} if family else {}, own, kv, measured | positions, declared)
    params, family = _settle(facts, base_size, notes)
    check_tensors(native, params, layout)
    if idle := idle_tensors(native, params):
        notes.append(f"Ignored, because the configuration says {params.kv_compress}: {shortened(sorted(idle), 2)}.")
    return Detection(params, family, LATENT_SCALE[family], layout, tuple(notes))


def _check_choice(family, base_size):
    if family not in (None, *FAMILIES):
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}.")
    if base_size is not None and (base_size <= 0 or base_size % 16):
        raise ValueError(f"base_size {base_size} is no training size in pixels: choose 256, 512, 1024 or 2048.")


def find_transformer(state_dict: Mapping[str, Tensor]) -> tuple[str, str]:
    """(prefix, layout) of the PixArt transformer; ValueError that names what else the tensors are."""
    if not state_dict:
        raise ValueError("There are no tensors in it.")
    foreign = describe(state_dict, LOOKALIKES)
    found = None if foreign else find_layout(state_dict)
    if found is None:
        foreign = foreign or describe(state_dict, OTHERS)
        what = foreign or f"a file with tensors named {shortened(state_dict)}"
        raise ValueError(f"This is not a PixArt transformer but {what}.")
    return found


def native_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under native names on the meta device, so that joining q, k and v costs nothing."""
    return to_native({name: torch.empty_like(tensor, device="meta") for name, tensor in state_dict.items()})


def contradictions(declared: Mapping, measured: Mapping) -> str:
    """Where a configuration and the tensors cannot be of one model: "depth 28, but the tensors have 4"."""
    return ", ".join(
        f"{name} {declared[name]}, but the tensors have {measured[name]}"
        for name in STRUCTURE
        if declared.get(name, measured[name]) != measured[name]
    )


def _settle(facts: ChainMap, pixels: int | None, notes: list[str]) -> tuple[PixArtParams, str]:
    """Completes the facts to the parameters and the family, by what was published; ValueError if that is not enough."""
    unit, chosen = VAE_FACTOR * facts["patch_size"], {}
    if pixels is not None:
        chosen["base_size"] = pixels // unit
    elif "base_size" in facts:
        pixels = facts["base_size"] * unit
    else:
        pixels = facts.get("image_size")
    family, pixels = _by_publication(facts, facts.get("family"), pixels, notes)
    if family is None or pixels is None:
        raise ValueError(_choices(family, pixels))

    if "base_size" in chosen or "pe_interpolation" not in facts:
        chosen["pe_interpolation"] = interpolation_for(family, pixels)
    chosen["base_size"] = pixels // unit
    chosen["num_heads"] = _num_heads(facts)
    chosen["caption_tokens"] = facts.get("caption_tokens", CAPTION_TOKENS[family])
    merged = facts.new_child(chosen)
    return PixArtParams(**{field.name: merged[field.name] for field in fields(PixArtParams)}), family


def _by_publication(facts, family, pixels, notes) -> tuple[str | None, int | None]:
    """Fills in what only one published model can be."""
    if pixels is None and facts["micro_condition"]:
        pixels = 1024
        notes.append("Micro-conditioned: taken as a 1024 px model, the only size published that way.")
    if pixels is None and facts["depth"] == 42:
        pixels = 1024
        notes.append("42 blocks: taken as the 1024 px model PixArt-900M.")
    if family is None and pixels is not None:
        if (pixels >= 1024 and not facts["micro_condition"]) or (pixels, facts.get("pe_interpolation")) == (256, 0.5):
            family = "sigma"
            notes.append(f"No PixArt-alpha was published at {pixels} px in this form: taken as PixArt-Sigma.")
    return family, pixels


def _choices(family, pixels) -> str:
    """What the file may be, and how to say which."""
    models = [
        f"PixArt-{name} {size}" for name, sizes in PUBLISHED.items() for size in sizes
        if family in (None, name.lower()) and pixels in (None, size)
    ]  # fmt: skip
    models = models or ["PixArt-alpha", "PixArt-Sigma"]
    ways = []
    if family is None:
        ways.append('family ("alpha" or "sigma")')
    if pixels is None:
        sizes = sorted({size for name, sizes in PUBLISHED.items() if family in (None, name.lower()) for size in sizes})
        ways.append(f"base_size ({', '.join(map(str, sizes))}: the training size in pixels)")
    return (
        f"This PixArt transformer may be {', '.join(models[:-1])} or {models[-1]}: their tensors look the same here. "
        f"Choose {' and '.join(ways)}, or put the model's config.json beside the file."
    )


def _num_heads(facts) -> int:
    heads, hidden = facts.get("num_heads"), facts["hidden_size"]
    if heads is None and hidden % HEAD_DIM == 0:
        return hidden // HEAD_DIM
    if heads is None:
        raise ValueError(
            f"No tensor tells how many attention heads a width of {hidden} has: put the model's config.json, which "
            "says num_attention_heads, beside the file."
        )
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ValueError(
            f"{heads} attention heads do not divide the width of {hidden}: the file's header, or the config.json "
            "beside it, is wrong. Download them again."
        )
    return heads


def check_tensors(native: Mapping[str, Tensor], params: PixArtParams, layout: str = "native"):
    """Raises ValueError unless the tensors are exactly those of the parameters, the two buffers aside."""
    expected = PixArtTransformer(params, device="meta").state_dict()
    missing = [name for name in expected if name not in native and name != Y_EMBEDDING]
    if missing:
        raise ValueError(f"Incomplete PixArt transformer: {spelled(missing, layout)} missing. Download it again.")
    idle = idle_tensors(native, params)
    unknown = [name for name in native if name not in expected and name != POS_EMBED and name not in idle]
    if unknown:
        raise ValueError(
            f"Not a known PixArt transformer: it also holds {spelled(unknown, layout)}. It is one that somebody has "
            "extended: take a published one, or the files that it is made of."
        )
    wrong = [
        f"{spelled([name], layout)} is {tuple(native[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in native and native[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"Wrong shape: {shortened(wrong, 3)}. Download it again, or a model of one size throughout.")


def idle_tensors(native: Mapping[str, Tensor], params: PixArtParams) -> set[str]:
    """KV compression tensors that the declared sampling does not use (all but "conv" ignore them)."""
    kv = params.kv_compress
    active = kv.layers if kv is not None and kv.sampling == "conv" else ()
    return {
        name for name in native
        if (".attn.sr." in name or ".attn.norm." in name) and int(name.split(".")[1]) not in active
    }  # fmt: skip
