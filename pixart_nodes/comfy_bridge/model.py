"""A PixArt checkpoint as a ComfyUI MODEL: the network with ComfyUI's hooks, its BaseModel, and the loader."""

import os

import comfy.conds
import comfy.ldm.modules.attention as comfy_attention
import comfy.model_base
import comfy.model_management as mm
import comfy.supported_models
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..checkpoints import load_weights
from ..model.params import PixArtParams
from ..model.transformer import PixArtTransformer
from . import compat
from .conds import CONDCaption, CONDCaptionMask, caption_and_mask
from .sampling import PixArtModelSampling

CONFIGS = {"alpha": comfy.supported_models.PixArtAlpha, "sigma": comfy.supported_models.PixArtSigma}
WEIGHT_DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
WEIGHTS = {"ema if present": None, "model": False, "ema": True}

# Peak of one forward, in (B, N, C) tensors of the compute dtype with N image and caption tokens: 12.2 measured at
# 1024 px in fp32 (the MLP's hidden layer makes 8 of them), the rest for attention's own workspace.
LIVE_TENSORS = 14


def attention(q, k, v, heads, mask, transformer_options):
    """ComfyUI's attention of choice on (B, N, C) tensors; mask boolean, True = attend.

    PyTorch's own takes the masked calls, because not every backend knows masks, and the calls on a CPU where ComfyUI
    fell back to sub-quadratic attention unasked, which is 2.5 to 30 times slower there. Overrides see every call.
    """
    run = comfy_attention.optimized_attention
    unasked = run is comfy_attention.attention_sub_quad and not args.use_quad_cross_attention
    if mask is not None or (unasked and q.device.type == "cpu"):
        run = comfy_attention.attention_pytorch
    return run(q, k, v, heads, mask=mask, transformer_options=transformer_options)


def patched(name):
    """`attention` followed by the model patches registered under `name`."""

    def attend(q, k, v, heads, mask=None, *, transformer_options):
        if not torch.compiler.is_compiling():
            compat.check_interrupt()
        out = attention(q, k, v, heads, mask, transformer_options)
        for patch in transformer_options.get("patches", {}).get(name, ()):
            out = patch(out, transformer_options)
        return out

    return attend


class ComfyPixArtTransformer(PixArtTransformer):
    """The transformer as ComfyUI builds and calls it: from a flat config, under the wrappers that nodes add."""

    def __init__(self, dtype=None, device=None, operations=None, **params):
        eight_bit = dtype == torch.float8_e4m3fn
        other_dtype = torch.float16 if eight_bit else dtype
        super().__init__(PixArtParams(**params), operations=operations, dtype=other_dtype, device=device)
        self.dtype = dtype
        for block in self.blocks:
            block.attn.attention = patched("attn1_output_patch")
            block.cross_attn.attention = patched("attn2_output_patch")
        if eight_bit:
            self.store_blocks_in(dtype)

    def store_blocks_in(self, dtype):
        """Only the blocks' matrices go to 8 bits: embedders, tables and biases are 3 % of the weights."""
        for module in self.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight_comfy_model_dtype = dtype  # DynamicVRAM creates the weight when it loads the file
                if module.weight is not None:
                    module.weight.data = module.weight.data.to(dtype)

    def forward(
        self, x, timesteps, context, context_mask=None, c_size=None, c_ar=None, control=None, transformer_options=None
    ):
        """x (B, 4, H, W), timesteps (B,), context (B, L, D), c_size (B, 2) pixels, c_ar (B, 1) -> noise like x."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        return executor.execute(x, timesteps, context, context_mask, c_size, c_ar, control, options)


class PixArtModel(comfy.model_base.PixArt):
    """ComfyUI's PixArt model (so its LoRA key map applies) around our network."""

    def __init__(self, model_config, detection, source: str, device=None):
        comfy.model_base.BaseModel.__init__(self, model_config, device=device, unet_model=ComfyPixArtTransformer)
        self.model_sampling = PixArtModelSampling(model_config)
        self.params = detection.params
        self.detection = detection
        self.source = source  # the file's name, for messages

    def extra_conds(self, **kwargs):
        """What the network gets besides latent and timestep. Raises ValueError for conditioning made for others."""
        caption = kwargs.get("cross_attn")
        self.check_inputs(kwargs["noise"], caption)
        caption, mask = caption_and_mask(caption, kwargs.get("attention_mask"))
        conds = {"c_crossattn": CONDCaption(caption), "context_mask": CONDCaptionMask(mask)}
        if self.params.micro_condition:
            width, height = kwargs["width"], kwargs["height"]
            ratio = kwargs.get("aspect_ratio") or height / max(width, 1)
            conds["c_size"] = comfy.conds.CONDRegular(torch.tensor([[height, width]], dtype=torch.int64))
            conds["c_ar"] = comfy.conds.CONDRegular(torch.tensor([[float(ratio)]]))
        return conds

    def check_inputs(self, noise, caption):
        channels, width = self.params.in_channels, self.params.caption_channels
        if noise.ndim != 4 or noise.shape[1] != channels:
            raise ValueError(
                f"{self.source} works on image latents of {channels} channels, but got a latent of shape "
                f"{tuple(noise.shape)}. It was made by another model's VAE: encode the picture with PixArt's VAE, "
                "or start from PixArt Resolution or Empty Latent Image."
            )
        if caption is None or caption.ndim != 3 or caption.shape[-1] != width:
            found = "no prompt" if caption is None else f"a prompt of width {caption.shape[-1]}"
            raise ValueError(
                f"{self.source} reads T5 prompts of width {width}, but got {found}. Encode the prompt with the T5 "
                "that belongs to this model (PixArt Load T5, or Load CLIP with type pixart), not with CLIP or "
                "another model's text encoder."
            )

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that one forward needs above the weights, for a latent of (B, 4, H, W)."""
        tokens = input_shape[2] * input_shape[3] / self.params.patch_size**2 + self.params.caption_tokens
        tensor = input_shape[0] * tokens * self.params.hidden_size * mm.dtype_size(self.inference_dtype())
        return LIVE_TENSORS * tensor

    def inference_dtype(self):
        return self.manual_cast_dtype or self.get_dtype()


def load_pixart(
    path: str, family: str | None = None, base_size: int | None = None, weight_dtype: str = "auto",
    weights: str = "ema if present", disable_dynamic: bool = False,
):  # fmt: skip
    """Loads a checkpoint file or diffusers folder -> ModelPatcher around a PixArtModel.

    family "alpha", "sigma" or None (detect); base_size in pixels or None; weight_dtype a key of WEIGHT_DTYPES;
    weights a key of WEIGHTS. Raises ValueError and FileNotFoundError as `checkpoints.load_weights` does.
    """
    state_dict, detection = load_weights(path, family=family, base_size=base_size, ema=WEIGHTS[weights])
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    config = CONFIGS[detection.family](vars(detection.params))
    config.set_inference_dtype(*choose_dtypes(WEIGHT_DTYPES[weight_dtype], state_dict, config, load_device))

    model = PixArtModel(config, detection, os.path.basename(path)).eval()
    patcher = compat.model_patcher_class(disable_dynamic)(model, load_device, offload_device)
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    compat.load_model_weights(model, state_dict, patcher)
    # ComfyUI loads the model a second time through this: LoRA training, schedules of LoRAs, other devices.
    patcher.cached_patcher_init = (load_pixart, (path, family, base_size, weight_dtype, weights))
    return patcher


def choose_dtypes(weight_dtype, state_dict, config, device):
    """(dtype of the weights, dtype to compute in or None for the same)."""
    supported = config.supported_inference_dtypes
    if weight_dtype is None:
        parameters = comfy.utils.calculate_parameters(state_dict)
        in_file = comfy.utils.weight_dtype(state_dict)
        weight_dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=in_file)
    if weight_dtype == torch.bfloat16 and mm.is_device_cpu(device) and cpu_is_fast_in_bf16():
        return weight_dtype, None
    return weight_dtype, mm.unet_manual_cast(weight_dtype, device, supported)


def cpu_is_fast_in_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX); others are slower than in fp32."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
