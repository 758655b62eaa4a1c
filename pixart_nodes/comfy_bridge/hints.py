"""The picture that a ControlNet follows: checked, fitted to the latent's size, encoded by the VAE; and HED edges.

Pictures here are (K, channels, H, W) with values in 0..1, as ComfyUI hands them to ControlNets.
"""

import logging
import math

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import DiagonalGaussianRegularizer, EmptyRegularizer
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..checkpoints.hed import load_hed
from . import compat

logger = logging.getLogger(__name__)

FITS = ("crop", "pad", "original")
SMALLEST = 16  # pixels: one token
HED_LIVE_CHANNELS = 64 * 4  # of a tile at full size: HED's first block, twice, with its workspace


def as_rgb(image: Tensor, what: str) -> tuple[Tensor, str]:
    """A picture of 1 to 4 channels -> ((K, 3, H, W) within 0..1, remark for the user).

    Grey becomes RGB, transparent parts become black, as a map without edges is. Raises ValueError in the name of
    `what` for NaN, other shapes, and pictures too small to show anything.
    """
    if image.ndim != 4 or not 1 <= image.shape[1] <= 4 or not image.shape[0]:
        raise ValueError(
            f"{what} got an image of shape {tuple(image.shape)} (pictures, channels, height, width), but it needs "
            "pictures with 1 to 4 channels. Connect an IMAGE, such as an edge map."
        )
    height, width = image.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"{what} got an image of {width} x {height} pixels, which shows no shape to follow. Connect one of at "
            f"least {SMALLEST} x {SMALLEST} pixels, best in the size of the picture to draw."
        )
    if not image.isfinite().all():
        raise ValueError(
            f"{what} got an image with values that are no numbers (NaN or infinite). Look at what the node that makes "
            "it shows; a VAE in fp16 does this to some pictures."
        )
    image, remark = image.float().clamp(0, 1), ""
    if image.shape[1] in (2, 4):
        image, alpha = image[:, :-1], image[:, -1:]
        image, remark = image * alpha, "The image has an alpha channel: its transparent parts count as black."
    return image.expand(-1, 3, -1, -1), remark


def fit(image: Tensor, height: int, width: int, how: str) -> Tensor:
    """(K, 3, h, w) -> (K, 3, height, width), centred.

    "crop": as large as to cover it all, as in training. "pad": as large as fits in, the rest black. "original": the
    shorter side becomes the target's shorter side, then cut and filled with black as needed (PixArt-alpha
    app/app_controlnet.py:179-206, torchvision's Resize and CenterCrop).
    """
    h, w = image.shape[-2:]
    scale = {
        "crop": max(height / h, width / w),
        "pad": min(height / h, width / w),
        "original": min(height, width) / min(h, w),
    }[how]
    size = [max(1, math.floor(side * scale + 1e-6)) for side in (h, w)]
    if how == "crop":  # rounded down, a side could fall short of the target
        size = [max(size[0], height), max(size[1], width)]
    image = interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    rows, cols = max(height - size[0], 0), max(width - size[1], 0)
    image = pad(image, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
    top, left = round((image.shape[2] - height) / 2), round((image.shape[3] - width) / 2)
    return image[:, :, top : top + height, left : left + width]


def encode(vae, image: Tensor, seed: int | None) -> Tensor:
    """(K, 3, H, W) in 0..1 -> unscaled latent: the mode of the VAE's posterior or, with a seed, one sample of it.

    The seed gives the same sample on every device. Raises ValueError for VAEs without a posterior.
    """
    image = image.movedim(1, -1)
    if seed is None:
        return vae.encode(image)
    network = vae.first_stage_model
    posterior = getattr(network, "regularization", None)
    if not isinstance(posterior, DiagonalGaussianRegularizer):
        raise ValueError("This VAE gives one latent and no distribution to sample from: set `posterior` to mode.")
    channels = vae.latent_channels
    network.regularization = EmptyRegularizer()
    vae.latent_channels = 2 * channels  # ComfyUI makes room for so many when memory is short and it goes to tiles
    try:
        mean, log_variance = vae.encode(image).chunk(2, dim=1)
    finally:
        network.regularization, vae.latent_channels = posterior, channels
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    return mean + noise * (log_variance.clamp(-30, 20) / 2).exp()


def hed_edges(path: str, image: Tensor, what: str) -> tuple[Tensor, str]:
    """HED edges (K, 3, H, W), white on black, one picture after the other; and a remark for the user.

    Raises ValueError as `as_rgb` and `load_hed`.
    """
    image, remark = as_rgb(image, what)
    device = mm.get_torch_device()
    net = load_hed(path, device=mm.unet_offload_device())
    patcher = compat.model_patcher_class(disable_dynamic=True)(net, device, mm.unet_offload_device())
    pixels = min(image.shape[2] * image.shape[3], 1248**2)
    mm.load_models_gpu([patcher], memory_required=4 * HED_LIVE_CHANNELS * pixels, force_full_load=True)
    progress, edges = comfy.utils.ProgressBar(len(image)), []
    for one in image:
        compat.check_interrupt()
        edges.append(net(one[None].to(device)).to(mm.intermediate_device()))
        progress.update(1)
    return torch.cat(edges).expand(-1, 3, -1, -1), remark
