"""How much memory and time a run will take, roughly: arithmetic, nothing is measured. Where the config says "auto",
the caller has put what it stands for."""

from ..model.params import PixArtParams
from .config import ADAPTERS, RunConfig

GB = 1e9
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "came": 4, "prodigy": 16}  # of the optimizer, for each trained weight
FROZEN_BYTES = {"int8": 1.0, "nf4": 0.55}  # of quantised weights; others are as wide as the precision


def count_weights(params: PixArtParams) -> int:
    """Weights of the transformer; what is left out is below one percent."""
    C, mlp = params.hidden_size, params.mlp_ratio
    block = int((4 + 4 + 2 * mlp) * C * C)  # qkv and proj, q, kv and proj, both layers of the MLP
    return params.depth * block + 6 * C * C + (C + params.caption_channels) * C


def count_adapter(config: RunConfig, params: PixArtParams) -> int:
    """Weights of a LoRA on attention and MLP: rank times inputs plus outputs of each layer."""
    C, wide = params.hidden_size, int(params.hidden_size * params.mlp_ratio)
    attention = (C + 3 * C) + 2 * C + 2 * C + (C + 2 * C) + 2 * C
    mlp = 2 * (C + wide) if config.targets != "attn" else 0
    return config.rank * params.depth * (attention + mlp)


def memory_bytes(config: RunConfig, params: PixArtParams, pixels: int) -> int:
    """Weights, gradients, optimizer and activations of one process at this many pixels per picture."""
    width = 4 if config.precision == "fp32" else 2
    weights, adapter = count_weights(params), config.recipe in ADAPTERS
    if adapter:
        trained, frozen = count_adapter(config, params), weights
    elif config.recipe == "controlnet":
        trained, frozen = weights * config.controlnet.blocks // params.depth, weights
    else:
        trained, frozen = weights, weights if config.recipe == "lcm" else 0
    bytes_each = 8 + STATE_BYTES[config.optimizer] + (4 if config.ema_decay or config.recipe == "lcm" else 0)
    tokens = pixels // (8 * params.patch_size) ** 2 * config.batch_size
    kept = 2 if config.gradient_checkpointing else 34  # tensors of (tokens, C) for each block
    activations = tokens * params.hidden_size * width * (kept * params.depth + 40)
    return int(trained * bytes_each + frozen * FROZEN_BYTES.get(config.base_quantization, width) + activations)


def operations(config: RunConfig, params: PixArtParams, pixels: int) -> float:
    """Multiplications and additions of one update: three forwards' worth, more for recomputation and teachers.
    DreamBooth's pictures of the class double it, and what the base says about them is one forward more."""
    tokens = pixels // (8 * params.patch_size) ** 2
    forward = 2 * tokens * count_weights(params) + 4 * tokens**2 * params.hidden_size * params.depth
    passes = 3 + config.gradient_checkpointing + (3 if config.recipe.startswith("lcm") else 0)
    if config.recipe == "dreambooth" and config.prior_loss_weight:
        passes = 2 * passes + 1
    return passes * forward * config.batch_size * config.gradient_accumulation_steps


def report(config: RunConfig, params: PixArtParams, pixels: int) -> str:
    work = operations(config, params, pixels) * config.steps
    return (
        f"about {memory_bytes(config, params, pixels) / GB:.1f} GB of memory per process and {work / 1e15:.0f} PFLOP "
        f"of work ({work / 50e12 / 3600:.1f} hours on a GPU that sustains 50 TFLOP/s); estimated, not measured"
    )
