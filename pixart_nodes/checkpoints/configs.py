"""Reads what config files say about a PixArt transformer, whoever wrote them, in the words of PixArtParams."""

import json
import re
from collections.abc import Mapping

from ..model.params import KVCompress, PixArtParams

FAMILIES = ("alpha", "sigma")
LATENT_SCALE = {"alpha": 0.18215, "sigma": 0.13025}  # sd-vae-ft-ema; the SDXL VAE
CAPTION_TOKENS = {"alpha": 120, "sigma": 300}
VAE_FACTOR = 8

# The names under which the models were published (huggingface.co/PixArt-alpha).
_PUBLISHED = re.compile(r"pixart-(sigma-|lcm-|alpha-dmd-)?xl-2-(?:sam-)?(256|512|1024|2k)", re.IGNORECASE)
_DIFFUSERS_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
CONTROL_CLASS = "PixArtControlNetAdapterModel"  # diffusers examples/research_projects/pixart
_PIPELINES = {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}


def is_pixart_config(config: Mapping) -> bool:
    """Whether a config.json can belong to a PixArt transformer at all. Language models state their heads, too."""
    if "num_attention_heads" not in config:
        return "hidden_size" in config and "caption_channels" in config
    named = config.get("_class_name") in _DIFFUSERS_CLASSES
    return (named or "_class_name" not in config and "caption_channels" in config) and (
        config.get("norm_type", "ada_norm_single") == "ada_norm_single"
    )


def is_control_config(config: Mapping) -> bool:
    """Whether a config.json can belong to a PixArt ControlNet, or to the model that it was trained on."""
    return config.get("_class_name") == CONTROL_CLASS or is_pixart_config(config)


def interpolation_for(family: str, pixels: int) -> float:
    """The pe_interpolation a model of this size was trained with: positions run over [0, 32) at every size.

    Except alpha at 256 px, which runs over [0, 16) (PixArt-alpha configs/PixArt_xl2_internal.py:13).
    """
    return 1.0 if (family, pixels) == ("alpha", 256) else pixels / 512


def from_config(config: Mapping | None) -> dict:
    """What a config says, under the names of PixArtParams plus "family" and "image_size" (pixels).

    Three dialects: diffusers' config.json, the original code's configuration, and PixArtParams itself.
    Only what is stated comes back, except that diffusers' own defaults for absent entries are applied.
    """
    if not config:
        return {}
    declared = _from_diffusers(config) if "num_attention_heads" in config else _from_original(config)
    words = str(config.get("family") or config.get("model") or "").lower()
    declared["family"] = next((family for family in FAMILIES if words.startswith(family)), None)
    if "image_size" in config:
        declared["image_size"] = config["image_size"]
    return {name: value for name, value in declared.items() if value is not None or name == "kv_compress"}


def _from_diffusers(config: Mapping) -> dict:
    heads, patch, sample = config["num_attention_heads"], config.get("patch_size", 2), config.get("sample_size")
    declared = {
        "depth": config.get("num_layers"),
        "num_heads": heads,
        "hidden_size": heads * config["attention_head_dim"] if "attention_head_dim" in config else None,
        "in_channels": config.get("in_channels"),
        "patch_size": config.get("patch_size"),
        "caption_channels": config.get("caption_channels"),
    }
    if sample is not None:
        scale = config.get("interpolation_scale")
        declared["base_size"] = sample // patch
        declared["pe_interpolation"] = float(max(sample // 64, 1) if scale is None else scale)
    return declared


def _from_original(config: Mapping) -> dict:
    same = ("depth", "hidden_size", "num_heads", "in_channels", "patch_size", "caption_channels", "base_size")
    declared = {name: config.get(name) for name in same}
    if declared["base_size"] is None and config.get("input_size") is not None:
        declared["base_size"] = config["input_size"] // config.get("patch_size", 2)
    scale = config.get("pe_interpolation", config.get("lewei_scale"))
    declared["pe_interpolation"] = None if scale is None else float(scale)
    declared["caption_tokens"] = config.get("caption_tokens", config.get("model_max_length"))
    for name in ("kv_compress", "kv_compress_config"):
        if name in config:
            declared["kv_compress"] = _kv_compress(config[name])
    return declared


def _kv_compress(config: Mapping | None) -> KVCompress | None:
    """KV compression in the original's words or ours; None where it changes nothing."""
    config = config or {}
    layers = tuple(config.get("layers", config.get("kv_compress_layer", ())))
    sampling, factor = config.get("sampling"), config.get("scale_factor", 1)
    return KVCompress(sampling, factor, layers) if sampling and factor > 1 and layers else None


def from_metadata(metadata: Mapping[str, str] | None) -> dict:
    """What the header of a safetensors file says: our own files say everything, others perhaps the family."""
    metadata = metadata or {}
    if "pixart.params" in metadata:
        try:
            return from_config({**json.loads(metadata["pixart.params"]), "family": metadata.get("pixart.family")})
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged(metadata) from error
    architecture = metadata.get("modelspec.architecture", "").lower()
    found = re.search(r"pixart[-_ ]?(alpha|sigma)", architecture)
    return {"family": found[1]} if found else {}


def params_of(metadata: Mapping[str, str] | None) -> PixArtParams | None:
    """The parameters that the header of one of our own files states, None for others. ValueError for a damaged one."""
    if "pixart.params" not in (metadata or {}):
        return None
    try:
        stated = json.loads(metadata["pixart.params"])
        return PixArtParams(**{**stated, "kv_compress": _kv_compress(stated["kv_compress"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(metadata) from error


def _damaged(metadata: Mapping[str, str]) -> ValueError:
    said = metadata["pixart.params"]
    return ValueError(f"The file's header is damaged: pixart.params {said:.80}. Download or save the file again.")


def from_name(path: str) -> dict:
    """Family and size by a published name anywhere in a path: "PixArt-Sigma-XL-2-1024-MS/transformer"."""
    found = _PUBLISHED.findall(str(path))
    if not found:
        return {}
    kind, size = found[-1]
    family = "sigma" if kind.lower() == "sigma-" else "alpha"
    return {"family": family, "image_size": 2048 if size.lower() == "2k" else int(size)}


def from_pipeline(model_index: Mapping) -> dict:
    """Family by the pipeline class in a diffusers model_index.json."""
    family = _PIPELINES.get(model_index.get("_class_name"))
    return {"family": family} if family else {}


def to_diffusers_config(params: PixArtParams) -> dict:
    """The config.json with which diffusers' PixArtTransformer2DModel builds the same network.

    Raises ValueError for what diffusers cannot express: KV compression, QK norm, an MLP ratio other than 4.
    """
    lacking = [
        name for name, present in (
            ("KV compression", params.kv_compress is not None),
            ("QK normalisation", params.qk_norm),
            (f"an MLP ratio of {params.mlp_ratio}", params.mlp_ratio != 4),
        ) if present
    ]  # fmt: skip
    if lacking:
        raise ValueError(f"Diffusers' PixArt has no {' and no '.join(lacking)}: save this model in the native layout.")
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": params.num_heads,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "num_layers": params.depth,
        "cross_attention_dim": params.hidden_size,
        "attention_bias": True,
        "sample_size": params.base_size * params.patch_size,
        "patch_size": params.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": params.pe_interpolation,
        "use_additional_conditions": params.micro_condition,
        "caption_channels": params.caption_channels,
    }
