"""PixArt's two spellings of a state dict, native (the original code's) and diffusers', in one table.

Rows are (native module, diffusers module, part). Part (i, n) says that the diffusers tensor is the i-th of n equal
slices of the native one along its first axis: q, k, v are thirds of `qkv`, k and v of a caption are halves of
`kv_linear`. Checked against PixArt-sigma tools/convert_pixart_to_diffusers.py. Everything here only renames, slices
and joins, so it works on meta tensors too; LoRA and ControlNet files use the same rows.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WHOLE = (0, 1)

BLOCK_KEYS = (
    ("scale_shift_table", "scale_shift_table", WHOLE),
    ("attn.qkv", "attn1.to_q", (0, 3)),
    ("attn.qkv", "attn1.to_k", (1, 3)),
    ("attn.qkv", "attn1.to_v", (2, 3)),
    ("attn.proj", "attn1.to_out.0", WHOLE),
    ("attn.q_norm", "attn1.q_norm", WHOLE),  # written by the official converter; diffusers has no such module
    ("attn.k_norm", "attn1.k_norm", WHOLE),
    ("attn.sr", "attn1.sr", WHOLE),  # KV compression exists in no diffusers file: these two names are ours
    ("attn.norm", "attn1.norm", WHOLE),
    ("cross_attn.q_linear", "attn2.to_q", WHOLE),
    ("cross_attn.kv_linear", "attn2.to_k", (0, 2)),
    ("cross_attn.kv_linear", "attn2.to_v", (1, 2)),
    ("cross_attn.proj", "attn2.to_out.0", WHOLE),
    ("mlp.fc1", "ff.net.0.proj", WHOLE),
    ("mlp.fc2", "ff.net.2", WHOLE),
)

OUTER_KEYS = (
    ("x_embedder.proj", "pos_embed.proj", WHOLE),
    ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1", WHOLE),
    ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2", WHOLE),
    ("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1", WHOLE),
    ("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2", WHOLE),
    ("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1", WHOLE),
    ("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2", WHOLE),
    ("t_block.1", "adaln_single.linear", WHOLE),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1", WHOLE),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2", WHOLE),
    ("y_embedder.y_embedding", "caption_projection.y_embedding", WHOLE),  # alpha files of late 2023 only
    ("final_layer.linear", "proj_out", WHOLE),
    ("final_layer.scale_shift_table", "scale_shift_table", WHOLE),
)

CONTROL_KEYS = (
    ("before_proj", "before_proj", WHOLE),  # of block 0 only
    ("after_proj", "after_proj", WHOLE),
)

# What stands before those names, with the block's index at *: (native, diffusers, rows). A ControlNet has copies of
# a transformer's first blocks. Of two that fit the first counts.
CONTAINERS = (
    ("controlnet.*.copied_block.", "controlnet_blocks.*.transformer_block.", BLOCK_KEYS),
    ("controlnet.*.", "controlnet_blocks.*.", CONTROL_KEYS),
    ("blocks.*.", "transformer_blocks.*.", BLOCK_KEYS),
    ("", "", OUTER_KEYS),
)

POS_EMBED = "pos_embed"  # a buffer that is computed, never read from a file
Y_EMBEDDING = "y_embedder.y_embedding"  # the null caption, a buffer that diffusers files do not carry

# Only a PixArt transformer of that layout has one of these (LTXV and others share the second pair: see detect.py).
NATIVE_ANCHORS = ("t_block.1.weight", "y_embedder.y_proj.fc1.weight")
DIFFUSERS_ANCHORS = ("adaln_single.linear.weight", "caption_projection.linear_1.weight")

_CONTROL = {
    "native": re.compile(r"(|.*\.)controlnet\.\d+\.(?:copied_block|before_proj|after_proj)\..+"),
    "diffusers": re.compile(r"(|.*\.)controlnet_blocks\.\d+\.(?:transformer_block|before_proj|after_proj)\..+"),
}


def _pattern(container: str) -> re.Pattern:
    return re.compile(re.escape(container).replace(r"\*", r"(\d+)") + "(.*)", re.DOTALL)


_NATIVE = [(_pattern(ours), theirs, rows) for ours, theirs, rows in CONTAINERS]
_DIFFUSERS = [
    (_pattern(theirs), ours, {row[1]: (row[0], row[2]) for row in rows}) for ours, theirs, rows in CONTAINERS
]


def _split(name: str, containers):
    """The other layout's container with the index filled in, the module, ".weight" or ".bias" or nothing, the rows."""
    found, other, rows = next((m, other, rows) for p, other, rows in containers if (m := p.fullmatch(name)))
    *index, inner = found.groups()
    module, _, leaf = inner.rpartition(".")
    module, leaf = (module, f".{leaf}") if leaf in ("weight", "bias") else (inner, "")
    return other.replace("*", *index) if index else other, module, leaf, rows


def diffusers_to_native(name: str) -> tuple[str, tuple[int, int]] | None:
    """Native name of a diffusers parameter or module and which part of it that is; None for an unknown name."""
    container, module, leaf, rows = _split(name, _DIFFUSERS)
    row = rows.get(module)
    return row and (container + row[0] + leaf, row[1])


def native_to_diffusers(name: str) -> list[tuple[str, tuple[int, int]]]:
    """Diffusers names of a native parameter or module with their parts, in order; empty for an unknown name."""
    container, module, leaf, rows = _split(name, _NATIVE)
    return [(container + theirs + leaf, part) for ours, theirs, part in rows if ours == module]


def find_layout(names) -> tuple[str, str] | None:
    """(prefix, "native" | "diffusers") of the one PixArt transformer among the names; None when there is none.

    The prefix is whatever stands before a name that only PixArt has: "model.diffusion_model.", "transformer.",
    "module." and so on. Raises ValueError when a file holds several transformers.
    """
    found = {
        (name[: -len(anchor)], layout)
        for layout, anchors in (("native", NATIVE_ANCHORS), ("diffusers", DIFFUSERS_ANCHORS))
        for anchor in anchors
        for name in names
        if name == anchor or name.endswith("." + anchor)
    }
    if len(found) > 1:
        prefixes = ", ".join(sorted(repr(prefix) for prefix, _ in found))
        raise ValueError(f"The file holds several PixArt transformers, under {prefixes}: keep one of them.")
    return found.pop() if found else None


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any PixArt state dict -> native names without prefix.

    Tensors outside the transformer's prefix (a VAE in the same file) are left out, unknown names stay as they are.
    Raises ValueError when there is no PixArt transformer, or when some slices of a fused tensor are missing.
    """
    layout = find_layout(state_dict)
    if layout is None:
        raise ValueError("No PixArt transformer among these tensors.")
    prefix, spelling = layout
    inner = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    return inner if spelling == "native" else _fuse(inner, "transformer")


def find_control(names) -> tuple[str, str] | None:
    """(prefix, "native" | "diffusers") of the one PixArt ControlNet among the names; None when there is none.

    Raises ValueError when there are several.
    """
    matches = ((pattern.fullmatch(name), layout) for layout, pattern in _CONTROL.items() for name in names)
    found = {(match[1], layout) for match, layout in matches if match}
    if len(found) > 1:
        prefixes = ", ".join(sorted(repr(prefix) for prefix, _ in found))
        raise ValueError(f"The file holds several PixArt ControlNets, under {prefixes}: keep one of them.")
    return found.pop() if found else None


def control_to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A PixArt ControlNet in any layout -> native names without prefix: "controlnet.0.copied_block.attn.qkv.weight".

    Tensors that are not under `controlnet` (the base in the same file) are left out. Raises ValueError when there is
    no PixArt ControlNet, or when some slices of a fused tensor are missing.
    """
    layout = find_control(state_dict)
    if layout is None:
        raise ValueError("No PixArt ControlNet among these tensors.")
    prefix, spelling = layout
    blocks = prefix + ("controlnet." if spelling == "native" else "controlnet_blocks.")
    inner = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(blocks)}
    return inner if spelling == "native" else _fuse(inner, "ControlNet")


def _fuse(state_dict: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in state_dict.items():
        native, part = diffusers_to_native(name) or (name, WHOLE)
        parts.setdefault(native, {})[part] = tensor
    missing = [
        theirs for native, found in parts.items() if WHOLE not in found
        for theirs, part in native_to_diffusers(native) if part not in found
    ]  # fmt: skip
    if missing:
        raise ValueError(f"Incomplete PixArt {what}: {shortened(missing)} missing.")
    return {native: _join(native, [found[part] for part in sorted(found)]) for native, found in parts.items()}


def _join(native: str, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1:
        names = "/".join(theirs for theirs, _ in native_to_diffusers(native))
        raise ValueError(f"Wrong shape: {names} should have one shape, but have {shapes}.")
    if all(part.dtype == parts[0].dtype and part.element_size() == 1 for part in parts):  # fp8 has no cat everywhere
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native names (any prefix) -> diffusers names, without the two buffers that diffusers does not keep.

    The slices are views of the given tensors. Raises ValueError for a name that no row covers.
    """
    native = to_native(state_dict)
    return _spell_diffusers({name: t for name, t in native.items() if name not in (POS_EMBED, Y_EMBEDDING)})


def control_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A PixArt ControlNet in any layout -> the names of diffusers' PixArtControlNetAdapterModel, as `to_diffusers`."""
    return _spell_diffusers(control_to_native(state_dict))


def _spell_diffusers(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown = [name for name in native if not native_to_diffusers(name)]
    if unknown:
        raise ValueError(f"No diffusers name for {shortened(unknown)}.")
    return {
        theirs: tensor.chunk(part[1])[part[0]]
        for name, tensor in native.items()
        for theirs, part in native_to_diffusers(name)
    }


def shortened(names, limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
