"""Linear layers whose weights bitsandbytes quantised to int8, NF4 or FP4, as ComfyUI operations.

A quantised weight is one parameter of bytes, its scales followed by its codes. So whatever ComfyUI does with a weight
(count, pin, move, back up, restore) it does to the whole of it. Only weights are quantised: they are restored to the
dtype of the input layer by layer, and the matrix product is an ordinary one. LLM.int8's own product would quantise the
activations as well, in fp16, whose range T5 exceeds.
"""

from functools import lru_cache

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

KINDS = ("int8", "nf4", "fp4")
BLOCK = 64  # 4-bit weights that share a scale, bitsandbytes' default
INT8_MAX = 127  # LLM.int8: one scale for each row, absolute maximum -> 127


def library(kind: str):
    """bitsandbytes.functional. Raises ImportError with the remedy where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError(
            f"{kind} weights need bitsandbytes: run `pip install bitsandbytes` in ComfyUI's Python environment and "
            "restart ComfyUI, or choose fp8_e4m3fn, which needs no package."
        ) from error
    return bitsandbytes.functional


def pack(weight: Tensor, kind: str) -> Tensor:
    """A matrix (out, in) -> bytes: float32 scales (one per row for int8, per BLOCK weights for nf4 and fp4), codes."""
    functional, weight = library(kind), weight.float()
    if kind == "int8":
        peak = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        codes, scales, _ = functional.int8_vectorwise_quant((weight / peak).half())  # fp16 is all that it takes
        scales = scales * peak[:, 0]
    else:
        codes, state = functional.quantize_4bit(whole_blocks(weight), blocksize=BLOCK, quant_type=kind)
        scales = state.absmax.float()
    return torch.cat([scales.view(torch.uint8), codes.reshape(-1).view(torch.uint8)])


def unpack(packed: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix of `shape` that `pack` made `packed` of, on its device, in `dtype`."""
    functional, numel = library(kind), shape[0] * shape[1]
    count = shape[0] if kind == "int8" else -(-numel // BLOCK)
    scales, codes = packed[: 4 * count].view(torch.float32), packed[4 * count :]
    if kind == "int8":  # what bitsandbytes' int8_vectorwise_dequant computes, in one matrix instead of three
        return codes.view(torch.int8).view(shape).float().mul_((scales * (1 / INT8_MAX))[:, None]).to(dtype)
    # One long row: bitsandbytes' CPU kernel misreads blocks that reach over the end of a row.
    row = torch.Size((count * BLOCK,))
    state = functional.QuantState(scales, shape=row, dtype=dtype, blocksize=BLOCK, quant_type=kind)
    return functional.dequantize_4bit(codes[:, None], state).reshape(-1)[:numel].view(shape)


def whole_blocks(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))


def packed_bytes(shape: tuple[int, int], kind: str) -> int:
    """Size in bytes of `pack`'s result for a matrix of `shape`."""
    if kind == "int8":
        return shape[0] * (shape[1] + 4)
    blocks = -(-shape[0] * shape[1] // BLOCK)
    return blocks * (BLOCK // 2 + 4)


def quantize(weights: dict[str, Tensor], names, kind: str, where: str) -> dict[str, Tensor]:
    """The weights with those of `names` packed, consuming the dict so that two copies never coexist.

    Computed where ComfyUI computes, kept in system memory. A scaled-fp8 weight is multiplied by its `.scale_weight`.
    Raises ImportError without bitsandbytes, and ValueError for a weight that is not finite.
    """
    library(kind)
    names, device, result = set(names), mm.get_torch_device(), {}
    scale_of = {name: f"{name.removesuffix('weight')}scale_weight" for name in names}
    scales = {name: weights.pop(scale) for name, scale in scale_of.items() if scale in weights}
    for name in list(weights):
        value = weights.pop(name)
        if name in names:
            value = value.to(device).float() * scales.get(name, torch.ones(())).to(device)
            if not torch.isfinite(value).all():
                raise ValueError(f"{where}: {name} has values that are not finite. The file is damaged.")
            value = pack(value, kind).cpu()
        result[name] = value
    return result


@lru_cache(maxsize=len(KINDS))
def operations(kind: str):
    """ComfyUI's operations with a Linear that also takes packed weights: every other layer stays as it is."""

    class Operations(comfy.ops.manual_cast):
        class Linear(QuantizedLinear, comfy.ops.manual_cast.Linear):
            quantization = kind

    return Operations


class QuantizedLinear:
    """What a Linear of ComfyUI needs to hold its weight packed (1-D) or plain (out, in), and to be patched.

    ComfyUI's patcher gives a LoRA to `convert_weight` and takes it back with `set_weight`. A patched weight is kept
    plain as long as the patch lasts: most LoRA updates are smaller than half a quantisation step and would be rounded
    away. The packed bytes come back when ComfyUI restores its backup. Schedules of LoRAs (hooks) restore in place, so
    theirs is kept beside the bytes, until the Patcher drops it.
    """

    quantization: str
    plain_dtype = torch.float32
    scheduled: Tensor | None = None  # (out, in)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.ndim == 1:
            self.plain_dtype = self.plain_dtype if is_packed(self.weight) else self.weight.dtype
            empty = torch.empty_like(weight, device=self.weight.device)
            self.weight = torch.nn.Parameter(empty, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:  # x (..., in)
        if not is_packed(self.weight):
            return super().forward(x)
        comfy.ops.run_every_op()
        if self.scheduled is None:
            weight = self.plain(mm.cast_to_device(self.weight, x.device, None), x.dtype)  # (out, in)
        else:
            weight = mm.cast_to_device(self.scheduled, x.device, x.dtype, copy=bool(self.weight_function))
        for function in self.weight_function:
            weight = function(weight)
        bias = self.bias
        if bias is not None:
            bias = mm.cast_to_device(bias, x.device, x.dtype, copy=bool(self.bias_function))
            for function in self.bias_function:
                bias = function(bias)
        return torch.nn.functional.linear(x, weight, bias)

    def plain(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        return unpack(packed, self.quantization, (self.out_features, self.in_features), dtype)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """The plain weight of what the patcher holds: packed bytes, maybe cast to a float dtype, or plain already."""
        return self.plain(weight.to(torch.uint8), torch.float32) if weight.ndim == 1 else weight

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed=None, return_weight: bool = False, **kwargs
    ):
        """Takes the patched plain weight, or returns it. In place: from a schedule of LoRAs."""
        if return_weight:
            return weight
        if not inplace_update:
            plain_dtype = self.plain_dtype if is_packed(self.weight) else self.weight.dtype
            self.weight = torch.nn.Parameter(weight.to(plain_dtype), requires_grad=False)
        elif is_packed(self.weight):
            self.scheduled = weight.to(self.plain_dtype)
        else:
            self.weight.data.copy_(weight)


class Patcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher, which also takes back what a schedule of LoRAs (hooks) keeps beside packed weights.

    Not the dynamic one, which would add a LoRA to packed bytes.
    """

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None):
        super().unpatch_hooks(whitelist_keys_set)
        for name, layer in self.model.named_modules():
            if isinstance(layer, QuantizedLinear) and f"{name}.weight" not in self.hook_backup:
                layer.scheduled = None


def is_packed(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype == torch.uint8


def plain_state_dict(state_dict: dict[str, Tensor], module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A copy of `state_dict` to save: the packed weights of `module` (whose names start with `prefix`) plain again."""
    result = dict(state_dict)
    for name, layer in module.named_modules(prefix=prefix.removesuffix(".")):
        key = f"{name}.weight"
        if isinstance(layer, QuantizedLinear) and key in result:
            weight = result[key].to("cpu")  # a lazy value of ComfyUI's comes out plain, its patches applied
            result[key] = layer.plain(weight, layer.plain_dtype) if is_packed(weight) else weight
    return result
