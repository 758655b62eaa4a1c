"""T5 encoder weights: what size they are, whether they are complete, in which dtype they are kept.

Every T5 v1.1 (and v1.0) encoder is accepted, not only the XXL that PixArt uses; sizes come from the tensor shapes, and
from config.json only what shapes cannot tell. Names follow Hugging Face's T5EncoderModel: `shared.weight`,
`encoder.block.N.layer.{0,1}...`, `encoder.final_layer_norm.weight`.
"""

import re
from dataclasses import dataclass

import torch

LAST_KEY = "encoder.final_layer_norm.weight"
EMBEDDING_KEYS = ("shared.weight", "encoder.embed_tokens.weight")  # tied: files carry one of them or both
RELATIVE_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")  # ComfyUI's first and second scaled-fp8 layout
FP8_MAX = 448.0  # largest float8_e4m3fn
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class T5Params:
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_kv: int
    d_ff: int
    gated: bool  # v1.1: wi_0 (gelu) * wi_1; v1.0: one wi with relu
    num_buckets: int
    max_distance: int
    layer_norm_eps: float
    eos: int
    pad: int

    @property
    def num_parameters(self):
        inner = self.num_heads * self.d_kv
        layer = 4 * self.d_model * inner + (3 if self.gated else 2) * self.d_model * self.d_ff
        return self.vocab_size * self.d_model + self.num_layers * layer


def encoder_prefix(names) -> str | None:
    """What stands before the encoder's names in a file, e.g. `text_encoders.t5xxl.transformer.`; None: no encoder."""
    return next((name[: -len(LAST_KEY)] for name in names if name.endswith(LAST_KEY)), None)


def encoder_weights(state_dict: dict, prefix: str, where: str) -> dict:
    """The encoder's tensors under Hugging Face's names: prefix stripped, decoder and tied copies dropped.

    `where` names the file in errors. Scaled-fp8 tensors come out in the `.scale_weight` layout.
    Raises ValueError for a UMT5 and for quantisation that is not fp8.
    """
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if RELATIVE_BIAS.format(1) in weights:
        raise ValueError(
            f"{where} is a UMT5 text encoder (a position table in every block), as Wan and AuraFlow use. "
            "PixArt needs T5 v1.1, e.g. t5xxl_fp16.safetensors."
        )
    embedding = next((weights[key] for key in EMBEDDING_KEYS if key in weights), None)
    weights = {key: value for key, value in weights.items() if key.startswith(("encoder.", "shared."))}
    weights = {key: value for key, value in weights.items() if key not in EMBEDDING_KEYS}
    if embedding is not None:
        weights["shared.weight"] = embedding
    return unify_scales(weights, where)


def unify_scales(weights, where):
    """Scaled fp8 in one layout: `X.weight` in fp8 and a float32 scalar `X.scale_weight`."""
    result = {}
    for key, value in weights.items():
        layer, dot, name = key.rpartition(".")
        if name in ("comfy_quant", "scale_input", "input_scale"):
            continue  # the format's name follows from the dtype; inputs stay in full precision
        if dot + name in SCALE_SUFFIXES:
            weight = weights.get(f"{layer}.weight", value)
            if value.numel() != 1 or weight.dtype not in FP8 or layer == "shared":
                raise ValueError(
                    f"{where}: {layer} is quantised in a format other than scaled fp8. Load this file with ComfyUI's "
                    "CLIPLoader, type pixart, or choose an fp16 or fp8 file."
                )
            key, value = f"{layer}.scale_weight", value.float().reshape(())
        result[key] = value
    return result


def params_from(weights: dict, config: dict | None, where: str) -> T5Params:
    """Sizes of an encoder from its shapes; `config` (a config.json) is compared and adds what shapes do not tell.

    Raises ValueError for missing tensors, shapes that do not fit each other and kinds of T5 that are not supported.
    """
    config = config or {}
    check_config(config, where)
    blocks = [int(found[1]) for key in weights if (found := re.match(r"encoder\.block\.(\d+)\.", key))]
    num_layers = max(blocks, default=-1) + 1
    first = "encoder.block.0.layer."
    gated = first + "1.DenseReluDense.wi.weight" not in weights
    rows = {
        "d_model": (LAST_KEY, 0),
        "vocab_size": ("shared.weight", 0),
        "num_buckets": (RELATIVE_BIAS.format(0), 0),
        "num_heads": (RELATIVE_BIAS.format(0), 1),
        "inner": (first + "0.SelfAttention.q.weight", 0),
        "d_ff": (first + f"1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 0),
    }
    missing = [key for key, dim in rows.values() if key not in weights or weights[key].ndim <= dim]
    if missing:
        raise ValueError(
            f"{where} is incomplete: {missing[0]} is missing or empty. Download it again, with all of its shards."
        )
    size = {name: weights[key].shape[dim] for name, (key, dim) in rows.items()}
    params = T5Params(
        d_kv=size.pop("inner") // size["num_heads"],
        num_layers=num_layers,
        gated=gated,
        max_distance=config.get("relative_attention_max_distance", 128),
        layer_norm_eps=config.get("layer_norm_epsilon", 1e-6),
        eos=config.get("eos_token_id", 1),
        pad=config.get("pad_token_id", 0),
        **size,
    )
    compare_with_config(params, config, where)
    check_shapes(weights, params, where)
    return params


class ForeignConfig(ValueError):
    """A config.json says something else than the weights."""


def check_config(config, where):
    kind = config.get("model_type", "t5")
    if kind not in ("t5", "mt5"):
        raise ForeignConfig(f"{where} is a {kind} text encoder. PixArt needs T5 v1.1.")
    activation = config.get("feed_forward_proj", "gated-gelu")
    if activation not in ("gated-gelu", "relu"):
        raise ForeignConfig(f"{where}: feed_forward_proj {activation!r} is not supported, only gated-gelu and relu.")


def compare_with_config(params, config, where):
    for name in ("num_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size"):
        if name in config and config[name] != getattr(params, name):
            raise ForeignConfig(
                f"{where}: config.json says {name} = {config[name]}, but the weights have {getattr(params, name)}. "
                "The folder is incomplete or mixed from two models: download it again."
            )


def expected_shapes(p: T5Params) -> dict:
    """name -> shape of every tensor of an encoder."""
    inner = p.num_heads * p.d_kv
    shapes = {"shared.weight": (p.vocab_size, p.d_model), LAST_KEY: (p.d_model,)}
    shapes[RELATIVE_BIAS.format(0)] = (p.num_buckets, p.num_heads)
    for n in range(p.num_layers):
        attention, dense = f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
        for name in "qkv":
            shapes[f"{attention}.SelfAttention.{name}.weight"] = (inner, p.d_model)
        shapes[f"{attention}.SelfAttention.o.weight"] = (p.d_model, inner)
        for name in ("wi_0", "wi_1") if p.gated else ("wi",):
            shapes[f"{dense}.DenseReluDense.{name}.weight"] = (p.d_ff, p.d_model)
        shapes[f"{dense}.DenseReluDense.wo.weight"] = (p.d_model, p.d_ff)
        shapes[f"{attention}.layer_norm.weight"] = shapes[f"{dense}.layer_norm.weight"] = (p.d_model,)
    return shapes


def check_shapes(weights, params, where):
    expected = expected_shapes(params)
    missing = [key for key in expected if key not in weights]
    if missing:
        raise ValueError(
            f"{where} is incomplete: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}. "
            "Download it again, with all of its shards."
        )
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"{where}: {key} has the shape {tuple(weights[key].shape)}, but {shape} was expected.")
    extra = [key for key in weights if key not in expected and not key.endswith(".scale_weight")]
    if extra:
        raise ValueError(f"{where}: {extra[0]} is not a part of a T5 encoder ({len(extra)} such tensors).")


def weight_dtype(weights: dict) -> torch.dtype:
    """dtype of the linear layers, which are nearly all of the file."""
    return weights["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype


def cast(weights: dict, dtype: torch.dtype | None, where: str, copy: bool = True) -> dict:
    """The weights in `dtype` (None: as they are), consuming the dict so that two copies never coexist.

    float8_e4m3fn becomes scaled fp8 (one float32 scale per layer, absolute maximum -> 448), because T5's small weights
    would be flushed to zero otherwise; embedding, norms and position table then stay in 16 or 32 bit.
    Raises ValueError when a weight does not fit fp16.
    """
    keep = dtype is None or dtype == weight_dtype(weights)
    result = {}
    for key in list(weights):
        if key not in weights or key.endswith(".scale_weight") and not keep:
            continue  # folded into its weight
        value = weights.pop(key)
        if keep:
            result[key] = value.clone() if copy else value
            continue
        scale = weights.get(key.removesuffix("weight") + "scale_weight")
        if dtype in FP8:
            result.update(to_fp8(key, value, scale, dtype))
            continue
        if scale is not None:
            value = value.float() * scale
        result[key] = value.to(dtype, copy=copy)
        if dtype == torch.float16 and not torch.isfinite(result[key]).all():
            raise ValueError(f"{where}: {key} has values beyond the range of fp16. Choose bf16 or fp32.")
    return result


def unquantized(weights: dict) -> dict:
    """What stays in 16 or 32 bit when linear layers are quantised: embedding (16), norms and position table."""
    result = {}
    for key, value in weights.items():
        if key == "shared.weight":
            result[key] = value.to(torch.bfloat16 if value.dtype in (torch.float32, *FP8) else value.dtype, copy=True)
        elif key.endswith(("norm.weight", "relative_attention_bias.weight")):
            result[key] = value.clone()
    return result


def to_fp8(key, value, scale, dtype):
    """{key: weight} in fp8 with its scale beside it; the embedding in 16 bit, norms and position table as they are."""
    if key == "shared.weight":
        return {key: value.to(torch.bfloat16) if value.dtype == torch.float32 else value}
    if key.endswith(("norm.weight", "relative_attention_bias.weight")):
        return {key: value}
    value = value.float() if scale is None else value.float() * scale
    scale = (value.abs().max() / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    quantised = (value / scale).clamp(-FP8_MAX, FP8_MAX).to(dtype)
    return {key: quantised, key.removesuffix("weight") + "scale_weight": scale}
