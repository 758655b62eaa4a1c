"""A PixArt checkpoint as a ComfyUI MODEL: the network with ComfyUI's hooks, its BaseModel, and the loader."""

import os

import comfy.controlnet
import comfy.ldm.modules.attention as comfy_attention
import comfy.model_base
import comfy.model_management as mm
import comfy.supported_models
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.hooks import EnumHookMode
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from ..checkpoints import load_weights
from ..checkpoints.keys import POS_EMBED
from ..model.params import PixArtParams
from ..model.position import position_table
from ..model.transformer import PixArtTransformer
from . import compat, quantize
from .conds import CONDCaption, CONDCaptionMask, CONDSteady, caption_and_mask
from .kv_compress import check_grid
from .memo import add_memo, has_function_wrapper
from .sampling import PixArtModelSampling

CONFIGS = {"alpha": comfy.supported_models.PixArtAlpha, "sigma": comfy.supported_models.PixArtSigma}
WEIGHT_DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    **dict.fromkeys(quantize.KINDS),  # of the blocks; the rest as with auto
}
PREFIX = "model.diffusion_model."  # of the network in ComfyUI's saved checkpoints
WEIGHTS = {"ema if present": None, "model": False, "ema": True}

# Peak of one forward, in (B, N, C) tensors of the compute dtype with N image and caption tokens: 12.2 measured at
# 1024 px in fp32 (the MLP's hidden layer makes 8 of them), the rest for attention's own workspace.
LIVE_TENSORS = 14


def attention(q, k, v, heads, mask, transformer_options):
    """ComfyUI's attention of choice on (B, N, C) tensors; mask as in `model.attention.sdpa`.

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
        if not torch.compiler.is_compiling():
            grid = tuple(-(-side // self.params.patch_size) for side in x.shape[-2:])
            check_grid(grid, self.params.kv_compress, options)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self.predict, self, wrappers)
        return executor.execute(x, timesteps, context, context_mask, c_size, c_ar, control, options)

    def predict(self, x, timesteps, context, context_mask, c_size, c_ar, control, transformer_options):
        """`forward` inside the wrappers. ComfyUI repeats its noise level for every condition: one timestep will do."""
        levels, conditions = (transformer_options.get(key, ()) for key in ("sigmas", "cond_or_uncond"))
        if len(levels) == 1 and len(conditions) == len(x):
            timesteps = timesteps[:1]
        return super().forward(x, timesteps, context, context_mask, c_size, c_ar, control, transformer_options)


class PixArtModel(comfy.model_base.PixArt):
    """ComfyUI's PixArt model (so its LoRA key map applies) around our network."""

    def __init__(self, model_config, detection, source: str, device=None):
        comfy.model_base.BaseModel.__init__(self, model_config, device=device, unet_model=ComfyPixArtTransformer)
        self.model_sampling = PixArtModelSampling(model_config)
        self.params = detection.params
        self.detection = detection
        self.source = source  # the file's name, for messages
        self.loaded_with = {}  # path and options of load_pixart

    def extra_conds(self, **kwargs):
        """What the network gets besides latent and timestep. Raises ValueError for conditioning made for others."""
        caption = kwargs.get("cross_attn")
        self.check_inputs(kwargs["noise"], caption)
        self.check_control(kwargs.get("control"))
        caption = caption.to(kwargs["device"], self.inference_dtype())
        caption, mask = caption_and_mask(caption, kwargs.get("attention_mask"))
        keep = self.current_patcher is None or not has_function_wrapper(self.current_patcher.model_options)
        conds = {"c_crossattn": CONDCaption(caption, keep), "context_mask": CONDCaptionMask(mask, keep)}
        if self.params.micro_condition:
            width, height = kwargs["width"], kwargs["height"]
            ratio = kwargs.get("aspect_ratio") or height / max(width, 1)
            size = torch.tensor([[height, width]], device=caption.device)
            conds["c_size"] = CONDSteady(size, keep)
            conds["c_ar"] = CONDSteady(torch.tensor([[float(ratio)]]).to(caption), keep)
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

    def check_control(self, control):
        """A chain of ComfyUI's CONTROL_NETs, or None."""
        while control is not None:
            if isinstance(control, (comfy.controlnet.ControlNet, comfy.controlnet.T2IAdapter)):
                raise ValueError(
                    f"{self.source} got a ControlNet for another kind of model. Take one for PixArt, and load it with "
                    "PixArt Load ControlNet instead of ComfyUI's own loader."
                )
            control = control.previous_controlnet

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that one forward needs above the weights, for a latent of (B, 4, H, W)."""
        p = self.params
        tokens = input_shape[2] * input_shape[3] / p.patch_size**2 + p.caption_tokens
        remembered = 2 * p.depth * p.caption_tokens  # keys and values of the caption, for the whole run
        token = p.hidden_size * mm.dtype_size(self.inference_dtype())
        return input_shape[0] * (LIVE_TENSORS * tokens + remembered) * token

    def state_dict_for_saving(self, *args, **kwargs):
        """What ComfyUI's save nodes write: quantised weights as plain ones, and the positions that tell the training
        size, so that every loader reads the file."""
        saved, p = super().state_dict_for_saving(*args, **kwargs), self.params
        saved = quantize.plain_state_dict(saved, self.diffusion_model, PREFIX)
        table = position_table(p.base_size, p.base_size, p.hidden_size, p.base_size, p.pe_interpolation)
        return {**saved, PREFIX + POS_EMBED: table}

    def inference_dtype(self):
        return self.manual_cast_dtype or self.get_dtype()


def load_pixart(
    path: str, family: str | None = None, base_size: int | None = None, weight_dtype: str = "auto",
    weights: str = "ema if present", beside_control: bool = False, disable_dynamic: bool = False,
):  # fmt: skip
    """Loads a checkpoint file or diffusers folder -> ModelPatcher around a PixArtModel.

    family "alpha", "sigma" or None (detect); base_size in pixels or None; weight_dtype a key of WEIGHT_DTYPES;
    weights a key of WEIGHTS. beside_control=True loads the base out of a ControlNet's file. Raises ValueError and
    FileNotFoundError as `checkpoints.load_weights` does.
    """
    state_dict, detection = load_weights(
        path, family=family, base_size=base_size, ema=WEIGHTS[weights], beside_control=beside_control
    )
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    config = CONFIGS[detection.family](vars(detection.params))
    config.set_inference_dtype(*choose_dtypes(WEIGHT_DTYPES[weight_dtype], state_dict, config, load_device))
    quantized = weight_dtype in quantize.KINDS
    if quantized:
        config.custom_operations = quantize.operations(weight_dtype)
        state_dict = quantize.quantize(state_dict, block_matrices(state_dict), weight_dtype, os.path.basename(path))

    model = PixArtModel(config, detection, os.path.basename(path)).eval()
    patcher_class = quantize.Patcher if quantized else compat.model_patcher_class(disable_dynamic)
    patcher = patcher_class(model, load_device, offload_device)
    patcher.hook_mode = EnumHookMode.MinVram if quantized else patcher.hook_mode  # the other caches plain weights
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    compat.load_model_weights(model, state_dict, patcher)
    add_memo(patcher)
    # ComfyUI loads the model a second time through this: LoRA training, schedules of LoRAs, other devices.
    patcher.cached_patcher_init = (load_pixart, (path, family, base_size, weight_dtype, weights, beside_control))
    model.loaded_with = {"path": path, "base_size": base_size, "weight_dtype": weight_dtype, "weights": weights}
    return patcher


def block_matrices(names_to_tensors) -> list[str]:
    """The weights worth quantising: the matrices of the blocks, 97 % of the model.

    Embedders, t_block and final layer stay: every token and step goes through them, so their error is in all of the
    picture, and they are small. So do tables, biases, norms and the convolutions of KV compression.
    """
    return [
        name
        for name, tensor in names_to_tensors.items()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2
    ]


def pixart_model(model, node: str) -> PixArtModel:
    """The PixArtModel inside a MODEL. Raises ValueError, in the name of `node`, for models of other loaders."""
    if not isinstance(model.model, PixArtModel):
        raise ValueError(
            f"{node} works on models from PixArt Load Model, but got a {type(model.model).__name__} of another loader. "
            "Load the checkpoint with PixArt Load Model."
        )
    return model.model


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
    """Whether this CPU multiplies bf16 matrices in hardware (AMX, AVX512_BF16); others are slower than in fp32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
