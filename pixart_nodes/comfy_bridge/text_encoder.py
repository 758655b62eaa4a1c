"""A T5 encoder of any size as a native ComfyUI CLIP: ComfyUI's own T5 and tokenizer classes, our sizes and files."""

import inspect
import json
import logging
import os
from functools import partial
from pathlib import Path

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import torch

from ..checkpoints.files import load_file_tensors
from ..checkpoints.foreign import LOOKALIKES, OTHERS, describe
from ..text import t5, t5_files
from ..text.tokenizer import choose_tokenizer
from . import quantize
from .text_cache import T5Clip, digest, file_state

log = logging.getLogger(__name__)

DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    **dict.fromkeys(quantize.KINDS),  # of the linear layers; the rest in 16 or 32 bit
}
AFTER_ENCODING = ("keep", "leave")
KEEP_FP32_BELOW = 4 * 2**30  # bytes; T5-XXL in fp32 has 19 GB, which nobody wants to keep by default
NAME = "t5xxl"  # ComfyUI's name for a T5 in tokens, LoRA keys and state dicts, whatever its size
PIXART = (
    (r"(^|\.)(t_block\.1|adaln_single\.linear)\.weight$", "a PixArt transformer", "load it with PixArtLoadModel"),
    (r"(^|\.)enc\.blk\.\d", "a GGUF text encoder", "choose a safetensors or .bin file"),
    (r"(^|\.)model\.layers\.\d+\.(self_attn|mlp)\.", "a language model", "PixArt reads prompts with T5"),
)


class T5Encoder(comfy.sd1_clip.SDClipModel):
    """ComfyUI's text-encoder wrapper around a T5 of `params`. Weights of any dtype; always computes in fp32."""

    def __init__(self, device, dtype, model_options, *, params):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options, textmodel_json_config=t5_config(params),
            special_tokens={"end": params.eos, "pad": params.pad}, model_class=partial(build_t5, params=params),
        )  # fmt: skip

    def gen_empty_tokens(self, special_tokens, length):
        """What prompt weights move away from: pads only, as ComfyUI's PixArt has it."""
        return [special_tokens["pad"]] * length

    def load_sd(self, sd):
        """Takes the tensors themselves, so that each keeps its own dtype and none is in memory twice."""
        result = self.transformer.load_state_dict(sd, strict=False, assign=True)
        for module in self.transformer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if hasattr(module, f"{name}_comfy_model_dtype"):  # what DynamicVRAM casts to (0.16)
                    setattr(module, f"{name}_comfy_model_dtype", parameter.dtype)
        return result


class T5Tokenizer(comfy.sd1_clip.SDTokenizer):
    """ComfyUI's tokenizer (weights, embeddings) over a T5 vocabulary: no padding, no limit, `</s>` at the end."""

    def __init__(self, embedding_directory, tokenizer_data, *, pieces, params):
        super().__init__(
            pieces.path, tokenizer_class=pieces, embedding_directory=embedding_directory, tokenizer_data=tokenizer_data,
            embedding_size=params.d_model, embedding_key=NAME, end_token=params.eos, pad_token=params.pad,
            has_start_token=False, pad_with_end=False, pad_to_max_length=False, max_length=99999999, min_length=1,
        )  # fmt: skip


def t5_config(params):
    return {
        "model_type": "t5",
        "vocab_size": params.vocab_size,
        "d_model": params.d_model,
        "num_layers": params.num_layers,
        "num_heads": params.num_heads,
        "d_kv": params.d_kv,
        "d_ff": params.d_ff,
        "is_gated_act": params.gated,
        "dense_act_fn": "gelu_pytorch_tanh" if params.gated else "relu",
    }


def build_t5(config, dtype, device, operations, *, params):
    """ComfyUI's T5, with the three numbers that it has as constants set to those of `params`."""
    model = comfy.text_encoders.t5.T5(config, dtype, device, operations)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_num_buckets = params.num_buckets
    attention.relative_attention_max_distance = params.max_distance
    attention.relative_attention_bias = operations.Embedding(
        params.num_buckets, params.num_heads, dtype=dtype, device=device
    )
    for module in model.modules():
        if isinstance(module, comfy.text_encoders.t5.T5LayerNorm):
            module.variance_epsilon = params.layer_norm_eps
    return model


def load_t5(
    path: str, dtype: str = "auto", device: str = "default", embedding_directory=None, after_encoding: str = "keep"
) -> T5Clip:
    """A Hugging Face folder or one file -> CLIP.

    dtype is a key of DTYPES (auto: as in the file, but 16 bit for fp32 files beyond 4 GiB), device "default" or "cpu".
    after_encoding "leave": the weights are read when the first prompt needs them and dropped when sampling starts.
    Raises ValueError, FileNotFoundError or, for a dtype that needs bitsandbytes, ImportError: with the file's name for
    what is damaged, incomplete or no T5 v1.1.
    """
    files = t5_files.locate(path)
    where = os.path.basename(path)
    _, params = read_encoder(files, where)
    if dtype in quantize.KINDS:
        quantize.library(dtype)
    pieces = tokenizer_pieces(files, params, where)
    tokenizer = partial(
        comfy.sd1_clip.SD1Tokenizer, name=NAME, tokenizer=partial(T5Tokenizer, pieces=pieces, params=params)
    )
    load = partial(load_clip, path, dtype, device, embedding_directory)
    identify = partial(identity, path, dtype, device)
    log.info("%s: T5 encoder, %d x %d, tokenizer %s", where, params.num_layers, params.d_model, pieces.path)
    return T5Clip(load, tokenizer(embedding_directory=embedding_directory), identify, after_encoding == "leave")


def identity(path: str, dtype: str, device: str) -> str:
    """What an encoding depends on besides the prompt: the files at `path` as they are now, and how they are kept."""
    files = t5_files.locate(path)
    config = (files.config,) if files.config else ()
    return digest(file_state((*files.weights, *files.tokenizers, *config)), dtype, device)


def load_clip(path, dtype, device, embedding_directory, disable_dynamic=False) -> comfy.sd.CLIP:
    """ComfyUI's own CLIP with the weights in it, in the chosen dtype."""
    files = t5_files.locate(path)
    where = os.path.basename(path)
    weights, params = read_encoder(files, where)
    pieces = tokenizer_pieces(files, params, where)
    model_options = {"initial_device": torch.device("cpu")}
    if device == "cpu":
        model_options["load_device"] = model_options["offload_device"] = torch.device("cpu")
    if dtype in quantize.KINDS:
        weights = quantized(weights, dtype, model_options, where)
        disable_dynamic = True  # DynamicVRAM would add a LoRA to packed bytes
    else:
        weights = t5.cast(weights, DTYPES[dtype] or automatic_dtype(weights, params), where)
        model_options["dtype"] = t5.weight_dtype(weights)
        weights = scaled_fp8(weights, model_options)

    target = comfy.supported_models_base.ClipTarget(
        tokenizer=partial(
            comfy.sd1_clip.SD1Tokenizer, name=NAME, tokenizer=partial(T5Tokenizer, pieces=pieces, params=params)
        ),
        clip=partial(comfy.sd1_clip.SD1ClipModel, name=NAME, clip_model=partial(T5Encoder, params=params)),
    )
    clip = make_clip(target, weights, params.num_parameters, embedding_directory, model_options, disable_dynamic)
    if dtype in quantize.KINDS:
        clip.patcher.__class__ = quantize.Patcher  # comfy.sd.CLIP makes its patcher itself
    clip.patcher.cached_patcher_init = (load_patcher, (path, dtype, device, embedding_directory))
    return clip


def load_patcher(path, dtype, device, embedding_directory, disable_dynamic=False):
    """How ComfyUI loads the encoder a second time, for LoRA schedules and other devices."""
    return load_clip(path, dtype, device, embedding_directory, disable_dynamic).patcher


def tokenizer_pieces(files: t5_files.T5Files, params, where: str):
    default = os.path.join(os.path.dirname(comfy.text_encoders.t5.__file__), "t5_tokenizer", "tokenizer.json")
    return choose_tokenizer(files.tokenizers, default, params.vocab_size, params.eos, where)


def read_encoder(files: t5_files.T5Files, where: str):
    """(tensors under Hugging Face's names, memory-mapped where the format allows it; T5Params)."""
    tensors = {}
    for path in files.weights:
        tensors.update(load_file_tensors(Path(path))[0])
    prefix = t5.encoder_prefix(tensors)
    if prefix is None:
        raise ValueError(f"{where} is no complete T5 encoder. {diagnosis(tensors)}")
    weights = t5.encoder_weights(tensors, prefix, where)
    config = t5_files.read_config(files.config) if files.config else None
    try:
        return weights, t5.params_from(weights, config, where)
    except t5.ForeignConfig:
        if files.is_folder:
            raise
        log.warning("%s: the config.json beside it is of another model: ignored.", where)
        return weights, t5.params_from(weights, None, where)


def diagnosis(names):
    if any(".SelfAttention.relative_attention_bias." in name or name.startswith("encoder.block.") for name in names):
        return "A part of its tensors is missing: download it again, with all of its shards."
    found = describe(names, (*LOOKALIKES, *PIXART, *OTHERS))
    return f"It looks like {found}." if found else f"Its first tensor is called {next(iter(names))}."


def automatic_dtype(weights, params):
    """None (as in the file), unless that would keep many gigabytes of fp32; then what ComfyUI was started with."""
    if t5.weight_dtype(weights) != torch.float32 or params.num_parameters * 4 < KEEP_FP32_BELOW:
        return None
    return mm.text_encoder_dtype(mm.text_encoder_device())


def quantized(weights, kind, model_options, where):
    """The weights with the linear layers packed by bitsandbytes; says in `model_options` what they are.

    T5's `wo` is among them: what has outliers are the activations that it multiplies, and those stay in fp32. The
    embedding, norms and position table stay: they are looked up or multiplied element by element, and are 3 %.
    """
    rest = t5.unquantized(weights)
    layers = [name for name in weights if name not in rest and not name.endswith(".scale_weight")]
    weights = quantize.quantize(weights | rest, layers, kind, where)
    model_options["dtype"] = weights["shared.weight"].dtype
    model_options["custom_operations"] = quantize.operations(kind)
    return weights


def scaled_fp8(weights, model_options):
    """The weights in this ComfyUI's layout of scaled fp8; says in `model_options` that they are in it."""
    scaled = [key.removesuffix(".scale_weight") for key in weights if key.endswith(".scale_weight")]
    if not scaled:
        return weights
    dtype = model_options["dtype"]
    # Everything but the linear layers: ComfyUI builds those in fp8 by itself.
    model_options["dtype"] = weights["shared.weight"].dtype
    if hasattr(comfy.ops, "scaled_fp8_ops"):  # removed after 0.3.75
        model_options["scaled_fp8"] = dtype
        return weights
    model_options["quantization_metadata"] = {"mixed_ops": True}
    layout = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
    for layer in scaled:
        weights[f"{layer}.weight_scale"] = weights.pop(f"{layer}.scale_weight")
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(layout), dtype=torch.uint8)
    return weights


def make_clip(target, weights, parameters, embedding_directory, model_options, disable_dynamic):
    """comfy.sd.CLIP with its weights; versions after 0.3.75 take them in the constructor."""
    options = {"embedding_directory": embedding_directory, "parameters": parameters, "model_options": model_options}
    known = inspect.signature(comfy.sd.CLIP.__init__).parameters
    if "state_dict" in known:
        return comfy.sd.CLIP(target, state_dict=[weights], disable_dynamic=disable_dynamic, **options)
    clip = comfy.sd.CLIP(target, **options)
    clip.load_sd(weights)
    return clip
