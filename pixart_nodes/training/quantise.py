"""Frozen Linear layers in 8 or 4 bit (QLoRA, Dettmers et al. 2023), for training beside them."""

import torch
from torch import nn

SMALLEST = 1024  # weights of a layer; smaller ones are not worth it


def library(kind: str):
    """bitsandbytes. Raises ValueError when it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"base_quantization {kind} needs bitsandbytes: install it, or set it to none.") from error
    return bitsandbytes


def quantise_frozen(model: nn.Module, kind: str, device, dtype: torch.dtype):
    """Replaces the Linear layers of the blocks by bitsandbytes' ones, in place; kind is "int8" or "nf4".

    Raises ValueError when bitsandbytes is not installed.
    """
    bnb = library(kind)
    for name, module in list(model.blocks.named_modules()):
        if not isinstance(module, nn.Linear) or module.weight.numel() < SMALLEST:
            continue
        shape, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(*shape, bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False, device="meta")
            layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.blocks.get_submodule(parent), leaf, layer.to(device))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # PEFT asks for these
