"""Decode and encode with an AutoencoderKL tile by tile, with the result of doing it in one piece.

Convolutions see one pixel around a tile, GroupNorm uses statistics of the whole picture and attention sees every
position, so no tile shows: the result differs from the untiled one by rounding only. See docs/DESIGN.md, section 8.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import plan as planning
from .adapters import decoder_layers, encoder_layers
from .fast_tiles import FastSweep, extra_work
from .layers import Layer, channels
from .store import Store
from .sweep import Sweep

DEFAULT_TILE = 512


def decode(decoder: nn.Module, latent: Tensor, *, tile: int = DEFAULT_TILE, **options) -> Tensor:
    """Latents (B, C, H, W), divided by the latent scale, -> pictures (B, 3, 8H, 8W) float32, about -1..1.

    decoder: an AutoencoderKL of ComfyUI or diffusers, or its decoder alone. tile: side in pixels of what is computed at
    one time, on a CPU 128 at most. Options as for `run`. Raises NotDecomposable for other autoencoders, ValueError for
    unusable input.
    """
    return run(decoder_layers(decoder), latent, tile=tile, **options)


def encode(encoder: nn.Module, image: Tensor, *, tile: int = DEFAULT_TILE, **options) -> Tensor:
    """Pictures (B, 3, H, W), -1..1, -> moments (B, 2C, H / 8, W / 8) float32: mean and log variance, not scaled.

    encoder: an AutoencoderKL of ComfyUI or diffusers, or its encoder alone. Otherwise as `decode`.
    """
    return run(encoder_layers(encoder), image, tile=tile, **options)


def own_weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return module.weight, module.bias


@torch.no_grad()
def run(
    layers: list[Layer], x: Tensor, *, tile: int = DEFAULT_TILE, store: torch.dtype | None = None,
    store_device: torch.device | str = "cpu", device: torch.device | None = None, dtype: torch.dtype | None = None,
    recompute: bool = True, merge: bool = True, fast: bool = False, weights: Callable = own_weights,
    progress: Callable[[float, float], None] | None = None,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W) through the layers, one picture at a time -> (B, C', H', W') float32 where x is.

    store: dtype of what is kept between layers (None: the one that computes; torch.float16 halves the memory of a
    float32 decode). store_device: where it is kept. device, dtype: what computes (None: as the weights). recompute: see
    plan.steps. merge: up-sample with merged kernels, 4/9 of the arithmetic, instead of calling the module. fast: see
    fast_tiles; for decoders. weights: reads (weight, bias) of a norm or convolution. progress: called with (done,
    total) after every tile; what it raises ends the run.
    """
    weight = next(layers[0].conv.parameters())
    device, dtype = device or weight.device, dtype or weight.dtype
    check(layers, x, tile)
    plan = planning.steps(layers, *x.shape[2:], recompute)
    elements = planning.tile_elements(plan, tile, device.type == "cpu")
    sweep = (FastSweep if fast else Sweep)(
        device=device, dtype=dtype, elements=elements, store_dtype=store or dtype,
        store_device=torch.device(store_device), weights=weights, merge=merge,
        progress=counted(len(x) * work(plan, fast), progress),
    )  # fmt: skip
    out = torch.empty(len(x), channels(layers[-1])[1], *plan[-1].out_size, device=x.device)
    for index, picture in enumerate(x):
        out[index] = sweep.run(plan, Store.of(picture.float())).values
    return out


def check(layers: list[Layer], x: Tensor, tile: int):
    """Raises ValueError for what cannot be computed."""
    expected = channels(layers[0])[0]
    if x.ndim != 4 or x.shape[1] != expected or 0 in x.shape:
        raise ValueError(f"Expected a tensor of shape (batch, {expected}, height, width), but got {tuple(x.shape)}.")
    if tile < planning.MIN_TILE:
        raise ValueError(f"A tile of {tile} pixels is too small: take {planning.MIN_TILE} or more.")


def work(plan: list[planning.Step], fast: bool) -> int:
    return sum(step.work for step in plan) + (extra_work(plan) if fast else 0)


def counted(total: float, progress: Callable[[float, float], None] | None):
    """Adds up what the tiles report, as (done, total) for `progress`."""
    done = 0.0

    def add(work: float):
        nonlocal done
        done = min(done + work, total)
        if progress is not None:
            progress(done, total)

    return add
