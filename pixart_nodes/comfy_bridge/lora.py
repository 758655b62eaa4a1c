"""LoRA files as patches of a ComfyUI MODEL."""

import logging
import os
from itertools import accumulate
from pathlib import Path

import comfy.model_base
import comfy.weight_adapter as weight_adapter
import folder_paths
import torch

from ..checkpoints.keys import shortened
from ..checkpoints.lora_files import CONFIG, FOLDER_WEIGHTS, Adapter, Lora, load_lora, update_shape
from ..model.transformer import PixArtTransformer
from .model import PixArtModel
from .model_files import folders_below

logger = logging.getLogger(__name__)


class DoRA(weight_adapter.WeightAdapterBase):
    """W + D, its rows (or columns) rescaled to the given lengths; D is another adapter's update (arXiv 2402.09353).

    ComfyUI's own decomposition divides by the length of W's rows instead of (W + D)'s. As in PEFT, the length is that
    of the model's own W, but what earlier LoRAs have added to it is rescaled as well.
    """

    name = "dora"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights  # (magnitude, adapter, what Length measured): ComfyUI moves the tensors in this tuple

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        plain, changed = weight.float(), self.updated(weight, key, function)
        length = self.weights[2].pop("length", None)
        length = self.length(changed) if length is None else length
        changed *= self.weights[0].to(changed) / length.clamp(min=torch.finfo(changed.dtype).tiny)
        return weight.add_(((changed - plain) * strength).to(weight))

    def updated(self, weight, key, function):
        plain = weight.float()
        update = self.weights[1].calculate_weight(torch.zeros_like(plain), key, 1.0, 1.0, None, unchanged)
        return plain + function(update)

    def length(self, changed):
        axes = [axis for axis, size in enumerate(self.weights[0].shape) if size == 1]
        return torch.linalg.vector_norm(changed, dim=axes, keepdim=True)


class Length(DoRA):
    """Changes nothing: measures for the DoRA of the same weights before other LoRAs have changed W."""

    name = "dora_length"

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        self.weights[2]["length"] = self.length(self.updated(weight, key, function))
        return weight


class Replacement(weight_adapter.WeightAdapterBase):
    """The trained weight in place of the model's; a strength between 0 and 1 mixes them."""

    name = "replacement"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):  # fmt: skip
        return weight.lerp_(self.weights[0].to(weight), strength)


def unchanged(x):
    return x


def apply_lora(model, path: str, strength: float = 1.0, alpha: float | None = None):
    """A MODEL with a LoRA on it -> (model, text for the user). Strength 0 gives the model back as it is.

    alpha: see load_lora. Raises ValueError when the LoRA does not fit, naming it and what it is.
    """
    name = os.path.basename(path)
    if not isinstance(model.model, comfy.model_base.PixArt):
        raise ValueError(f"PixArt Load LoRA works on PixArt models, but got a {type(model.model).__name__}.")
    if strength == 0:
        return model, "Strength 0: the model is unchanged."
    lora = load_lora(path, alpha)
    tables, unmatched = patches_of(lora, shapes_of(model.model), name)
    patched = model.clone()
    for table in (*tables, lengths(tables, model.patches)):
        patched.add_patches(table, strength)
    patched.patches = {key: in_order(patches) for key, patches in patched.patches.items()}
    said = report(lora, unmatched, model.model)
    logger.info("%s: %s", name, said)
    if unmatched:
        logger.warning("%s: not used: %s", name, ", ".join(unmatched))
    return patched, said


def shapes_of(model) -> dict[str, torch.Size]:
    """Shapes of a PixArt model's tensors by native name. Quantised weights have other shapes than they stand for."""
    if isinstance(model, PixArtModel):
        tensors = PixArtTransformer(model.params, device="meta").state_dict()
    else:
        tensors = model.diffusion_model.state_dict()
    return {name: tensor.shape for name, tensor in tensors.items()}


def patches_of(lora: Lora, shapes, name: str) -> tuple[list[dict], list[str]]:
    """ComfyUI's patch tables, and the names that the model has no place for.

    Raises ValueError when nothing fits, or when something has the wrong shape: it is for another model then.
    """
    patches, unmatched = [], list(lora.unmatched)
    for adapter in lora.adapters:
        found = adapter_patches(adapter, shapes, name)
        patches += [(target(key, part, shapes), patch) for key, part, patch in found]
        unmatched += [] if found else adapter.keys
    if not patches:
        raise ValueError(f"{name} has nothing for this PixArt model: it changes {shortened(unmatched)}.")
    return in_tables(patches), unmatched


def in_tables(patches: list[tuple]) -> list[dict]:
    """Tables of (name, patch): one has one patch for a name, so a second for the same goes into a second table."""
    tables = []
    for name, patch in patches:
        table = next((table for table in tables if name not in table), None)
        if table is None:
            tables.append(table := {})
        table[name] = patch
    return tables


def lengths(tables: list[dict], before: dict) -> dict:
    """What measures for the DoRAs among the patches, where the model has patches of other LoRAs before them."""
    return {
        name: Length(set(), patch.weights) for table in tables for name, patch in table.items()
        if isinstance(patch, DoRA) and (name if isinstance(name, str) else name[0]) in before
    }  # fmt: skip


def in_order(patches: list[tuple]) -> list[tuple]:
    """A tensor's patches in ComfyUI's form: what is replaced, what is measured, and then what is changed.

    No patch passes a merge of models, a list or a factor for the model: that makes the weight for what follows it.
    """
    merges = [isinstance(value, list) or factor != 1.0 for _, value, factor, *_ in patches]
    stages = list(accumulate(merges))

    def place(i):
        value = patches[i][1]
        return stages[i], not merges[i], not isinstance(value, Replacement), not isinstance(value, Length)

    return [patches[i] for i in sorted(range(len(patches)), key=place)]


def adapter_patches(adapter: Adapter, shapes, name: str) -> list[tuple]:
    """(name of a tensor, part, patch) of each change; none when the model has no such module.

    And for scale_shift_table: ComfyUI does not patch parameters of modules that have modules inside.
    """
    module, part = adapter.target
    weight, bias = f"{module}.weight", f"{module}.bias" if f"{module}.bias" in shapes else None
    if weight not in shapes:
        return []
    tensors, found = adapter.tensors, []
    if adapter.kind != "direct":
        check_shape(update_shape(adapter), weight, part, shapes, name)
        check_magnitude(tensors.get("magnitude"), weight, part, shapes, name)
        found.append((weight, part, factors(adapter)))
    for leaf, key in (("diff", weight), ("weight", weight), ("diff_b", bias), ("bias", bias), ("up_bias", bias)):
        if leaf in tensors and key is not None:
            tensor = torch.atleast_1d(tensors[leaf])
            check_shape((tensor.shape[0], tensor[0].numel()), key, part, shapes, name)
            tensor = tensor.reshape(-1, *shapes[key][1:])
            tensor = tensor.float() * adapter.strength.scale if leaf == "up_bias" else tensor
            patch = Replacement(set(), (tensor,)) if leaf in ("weight", "bias") else ("diff", (tensor,))
            found.append((key, part, patch))
    return found


def check_shape(found, key: str, part, shapes, name: str):
    rows, *columns = shapes[key]
    expected = (rows // part[1], torch.Size(columns).numel())
    if found != expected:
        raise ValueError(
            f"{name} is for another model: it changes {key} by {found or 'factors that do not fit each other'}, "
            f"and this model needs {expected}."
        )


def check_magnitude(magnitude, key: str, part, shapes, name: str):
    rows, columns, *kernel = shapes[key]
    ones = [1] * len(kernel)
    if magnitude is not None and list(magnitude.shape) not in ([rows // part[1], 1, *ones], [1, columns, *ones]):
        raise ValueError(f"{name} is for another model: its DoRA magnitudes for {key} are {tuple(magnitude.shape)}.")


def factors(adapter: Adapter) -> weight_adapter.WeightAdapterBase:
    """ComfyUI's adapter of low-rank factors, with our scale: it multiplies by alpha / rank where there is a rank."""
    t, scale = adapter.tensors.get, adapter.strength.scale
    alpha = scale * adapter.rank if adapter.rank else None
    if adapter.kind == "lora":
        made = weight_adapter.LoRAAdapter(set(), (t("up"), t("down"), alpha, t("mid"), None, None))
    elif adapter.kind == "loha":
        matrices = (t("hada_w1_a"), t("hada_w1_b"), alpha, t("hada_w2_a"), t("hada_w2_b"), t("hada_t1"), t("hada_t2"))
        made = weight_adapter.LoHaAdapter(set(), (*matrices, None))
    elif alpha is None or "lokr_t2" in adapter.tensors:
        matrices = (t("lokr_w1"), scaled_w2(t, scale), None, t("lokr_w1_a"), t("lokr_w1_b"))
        made = weight_adapter.LoKrAdapter(set(), (*matrices, None, None, None, None))
    else:
        matrices = (t("lokr_w1"), t("lokr_w2"), alpha, t("lokr_w1_a"), t("lokr_w1_b"), t("lokr_w2_a"), t("lokr_w2_b"))
        made = weight_adapter.LoKrAdapter(set(), (*matrices, None, None))
    magnitude = t("magnitude")
    return made if magnitude is None else DoRA(set(), (magnitude, made, {}))


def scaled_w2(t, scale: float) -> torch.Tensor:
    """LoKr's second matrix, multiplied out of its Tucker core, whose strides make ComfyUI's own product fail."""
    w2 = t("lokr_w2")
    if t("lokr_t2") is not None:
        core, left, right = (t(f"lokr_{name}").float() for name in ("t2", "w2_a", "w2_b"))
        w2 = torch.einsum("ijkl,ip,jr->prkl", core, left, right).contiguous()  # (rows, columns, kernel, kernel)
    return w2.float() * scale


def target(key: str, part, shapes):
    """ComfyUI's name for a tensor, or for a slice of its rows: (name, (axis, start, length))."""
    name, (i, n) = f"diffusion_model.{key}", part
    rows = shapes[key][0] // n
    return name if n == 1 else (name, (0, i * rows, rows))


def report(lora: Lora, unmatched: list[str], model) -> str:
    """What the node shows: how much matched, how strong it is and why."""
    total = len(lora.unmatched) + sum(len(adapter.keys) for adapter in lora.adapters)
    matched = f"All {total} keys matched." if not unmatched else (
        f"{total - len(unmatched)} of {total} keys matched. Not used: {shortened(unmatched)}."
    )  # fmt: skip
    notes = [*lora.notes]
    trained_on = lora.metadata.get("pixart.family")
    family = model.detection.family if isinstance(model, PixArtModel) else None
    if trained_on and family and trained_on != family:
        notes.append(f"It was trained on PixArt-{trained_on}, and this is PixArt-{family}: expect little of it.")
    return "\n".join([matched, *([lora.summary()] if lora.summary() else []), *notes])


def lora_names() -> list[str]:
    """What the loader offers: files and PEFT folders below models/loras."""
    return list(dict.fromkeys((*folder_paths.get_filename_list("loras"), *peft_folders())))


def lora_path(name: str) -> str:
    """The file or folder behind a name of `lora_names`. Raises FileNotFoundError for any other."""
    path = folder_paths.get_full_path("loras", name) or peft_folders().get(name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths("loras"))
        raise FileNotFoundError(f"{name} is in none of ComfyUI's LoRA folders ({searched}). Put it into one of them.")
    return path


def peft_folders() -> dict[str, str]:
    return folders_below("loras", holds_peft)


def holds_peft(path: str, folders: list[str], files: list[str]) -> bool:
    return CONFIG in files and any((Path(path) / name).is_file() for name in FOLDER_WEIGHTS)
