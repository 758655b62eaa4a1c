"""A PixArt ControlNet as a ComfyUI CONTROL_NET.

ComfyUI asks control nets for their residuals before it calls the network. This one hands the network a branch
instead, which runs along with it and starts from the state behind its block 0, so that no block is run twice.
"""

import copy
import logging
import os

import comfy.model_management as mm
import comfy.ops
import torch
from comfy.controlnet import ControlBase, broadcast_image_to
from comfy.supported_models import PixArtSigma
from torch import Tensor

from ..checkpoints.controlnet import ControlDetection, load_control_weights, misfit
from ..model.controlnet import ControlNetTransformer
from . import compat, hints
from .model import WEIGHT_DTYPES, PixArtModel, choose_dtypes, patched

logger = logging.getLogger(__name__)

CONTROL_DTYPES = ("auto", "fp32", "bf16", "fp16", "fp8_e4m3fn")
VAE_FACTOR = 8  # pixels per latent pixel
LIVE_TENSORS = 4  # (B, N, C) tensors that a control net keeps besides the ones of the block that runs


class PixArtControl(ControlBase):
    """One ControlNet with its hint, strength and range, in a chain with others."""

    def __init__(self, patcher, detection: ControlDetection, source: str):
        super().__init__()
        self.patcher = patcher       # around a ControlNetTransformer, shared by all copies of this object
        self.detection = detection
        self.source = source         # the file's name, for messages
        self.fit = "crop"
        self.seed = None
        self.block_weights = (1.0,) * detection.params.num_blocks
        self.encoded = {}            # (H, W) of the latent -> unscaled latents of the hint
        self.scale_latent = None     # of the model that is being sampled

    def copy(self):
        c = PixArtControl(self.patcher, self.detection, self.source)
        self.copy_to(c)
        c.fit, c.seed, c.block_weights, c.encoded = self.fit, self.seed, self.block_weights, self.encoded
        return c

    def set_cond_hint(self, cond_hint, strength=1.0, timestep_percent_range=(0.0, 1.0), vae=None, extra_concat=()):
        """cond_hint (K, channels, H, W) in 0..1. Raises ValueError for pictures that cannot be followed."""
        if vae is None:
            raise ValueError(
                f"{self.source} reads its image through the VAE: connect the VAE that belongs to the PixArt model to "
                "the `vae` input of Apply ControlNet."
            )
        cond_hint, remark = hints.as_rgb(cond_hint, self.source)
        if remark:
            logger.warning("%s: %s", self.source, remark)
        super().set_cond_hint(cond_hint, strength, timestep_percent_range, vae, list(extra_concat))
        self.vae, self.encoded = vae, {}
        return self

    def pre_run(self, model, percent_to_timestep_function):
        """Before a sampling run. Raises ValueError for a model that this ControlNet does not fit."""
        super().pre_run(model, percent_to_timestep_function)
        if not isinstance(model, PixArtModel):
            raise ValueError(
                f"{self.source} is a ControlNet for PixArt, but it is used on a {type(model).__name__} model. Load the "
                "PixArt model with PixArt Load Model."
            )
        if reasons := misfit(self.detection, model.params, model.detection.family):
            raise ValueError(
                f"{self.source} does not fit {model.source}: {reasons}. Use the model that it was trained on."
            )
        self.scale_latent = model.process_latent_in

    def cleanup(self):
        super().cleanup()
        self.scale_latent = None

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        """What PixArtTransformer takes as `control`, for a batch x_noisy (B, 4, H, W) at noise levels t (B,)."""
        control = None
        if self.previous_controlnet is not None:
            control = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        weights = [self.strength * weight for weight in self.block_weights]
        first, last = self.timestep_range
        if not first >= t[0] >= last or not any(weights):
            return control
        control = control or {"input": [], "middle": [], "output": []}  # ComfyUI's own merging expects these
        hint = self.scale_latent(self.hint_latent(*x_noisy.shape[1:])).to(x_noisy.device)
        hint = broadcast_image_to(hint, x_noisy.shape[0], batched_number)
        branches = [*control.get("branches", ()), self.patcher.model.branch(hint, weights)]
        return {**control, "branches": branches, "who": (*control.get("who", ()), id(self))}

    def hint_latent(self, channels: int, height: int, width: int) -> Tensor:
        """The hint for a latent of (channels, height, width), fitted and encoded once for each size and kept."""
        if (height, width) not in self.encoded:
            image = hints.fit(self.cond_hint_original, height * VAE_FACTOR, width * VAE_FACTOR, self.fit)
            loaded = mm.loaded_models(only_currently_used=True)
            latent = hints.encode(self.vae, image, self.seed)
            mm.load_models_gpu(loaded)
            if latent.shape[1:] != (channels, height, width):
                raise ValueError(
                    f"{self.source}: the VAE makes latents of shape {tuple(latent.shape[1:])} out of the image, the "
                    f"model works on {(channels, height, width)}. Connect the VAE that belongs to the PixArt model."
                )
            self.encoded[height, width] = latent.float().cpu()
        return self.encoded[height, width]

    def get_models(self):
        return [*super().get_models(), self.patcher]

    def inference_memory_requirements(self, dtype):
        height, width = self.cond_hint_original.shape[-2:]
        tokens = 2 * len(self.cond_hint_original) * height * width / (2 * VAE_FACTOR) ** 2  # cond and uncond
        own = LIVE_TENSORS * tokens * self.detection.params.hidden_size * mm.dtype_size(dtype)
        return own + super().inference_memory_requirements(dtype)

    def deepclone_multigpu(self, load_device, autoregister=False):
        """The same on another device, with weights of its own (ComfyUI 0.23)."""
        clone, net = self.copy(), copy.deepcopy(self.patcher.model)
        clone.patcher = compat.model_patcher_class(disable_dynamic=True)(net, load_device, mm.unet_offload_device())
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def load_control(path: str, weight_dtype: str = "auto") -> PixArtControl:
    """Loads a ControlNet file or folder; weight_dtype is one of CONTROL_DTYPES.

    Raises ValueError and FileNotFoundError as `checkpoints.load_control_weights` does.
    """
    weights, detection = load_control_weights(path)
    device = mm.get_torch_device()
    dtype, _ = choose_dtypes(WEIGHT_DTYPES[weight_dtype], weights, PixArtSigma, device)
    # Cast to the dtype that the base computes in when they are used, whatever that is.
    net = ControlNetTransformer(
        detection.params, operations=comfy.ops.manual_cast, attention=patched("control"), dtype=dtype, device="meta"
    )
    net.requires_grad_(False).load_state_dict(in_dtype(weights, dtype), assign=True)
    net.to(mm.unet_offload_device())
    patcher = compat.model_patcher_class()(net.eval(), device, mm.unet_offload_device())
    return PixArtControl(patcher, detection, os.path.basename(path))


def in_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast; of 8 bits only the matrices, tables and biases stay in 16."""
    eight_bit = dtype == torch.float8_e4m3fn
    small = torch.float16 if eight_bit else dtype
    return {
        name: tensor.to(dtype if eight_bit and name.endswith(".weight") and tensor.ndim == 2 else small)
        for name, tensor in weights.items()
    }


def apply_control(
    conditionings, control_net, image: Tensor, vae, strength: float, timestep_percent_range: tuple[float, float],
    fit: str, seed: int | None, block_weights: str,
):  # fmt: skip
    """CONDITIONINGs with the ControlNet added to every entry: all share one hint, and so one sample of it.

    image (K, H, W, channels). Raises ValueError for a CONTROL_NET of another kind, a range that is empty, weights
    that are no numbers, and pictures that cannot be followed.
    """
    if not isinstance(control_net, PixArtControl):
        raise ValueError("PixArt Apply ControlNet got another model's ControlNet. Load it with PixArt Load ControlNet.")
    start, end = timestep_percent_range
    if start > end:
        raise ValueError(f"start_percent {start:g} is after end_percent {end:g}: nothing would be steered. Swap them.")
    one = control_net.copy()
    one.fit, one.seed = fit, seed
    one.block_weights = parse_weights(block_weights, control_net.detection.params.num_blocks)
    one.set_cond_hint(image.movedim(-1, 1), strength, timestep_percent_range, vae)
    made = {}

    def with_control(cond, settings):
        previous = settings.get("control")
        if previous not in made:
            made[previous] = one.copy().set_previous_controlnet(previous)
        return [cond, {**settings, "control": made[previous], "control_apply_to_uncond": False}]

    return [[with_control(*entry) for entry in conditioning] for conditioning in conditionings]


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """"1, 0.5" -> one weight for each of `count` blocks; the last one goes for all that follow. Empty: 1 for all."""
    try:
        weights = [float(word) for word in text.replace(",", " ").split()] or [1.0]
    except ValueError as error:
        raise ValueError(f"block_weights {text!r} should be numbers, such as 1, 0.8, 0.6.") from error
    if len(weights) > count:
        raise ValueError(f"block_weights has {len(weights)} numbers, but this ControlNet has {count} blocks.")
    if not all(abs(weight) <= 100 for weight in weights):  # not NaN either
        raise ValueError(f"block_weights {text!r} should be numbers of about 0 to 1.")
    return tuple(weights + weights[-1:] * (count - len(weights)))
