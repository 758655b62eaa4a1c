"""FSDP: weights, gradients and optimizer state spread over the processes, where `accelerate config` asks for it.

PyTorch's fully_shard does it. accelerate's own wrapper would shard whole blocks, but all blocks' modulation tables are
read at one time (model.transformer.modulations), so here they belong to the network and only layers to a block.
"""

import logging
import os
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.transformer import PixArtBlock

logger = logging.getLogger(__name__)

SWITCH = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets


@contextmanager
def hidden_from_accelerate():
    """While accelerate starts: it only joins the processes."""
    wish = os.environ.pop(SWITCH, None)
    try:
        yield
    finally:
        if wish is not None:
            os.environ[SWITCH] = wish


def is_wanted(processes: int) -> bool:
    return os.environ.get(SWITCH, "").lower() == "true" and processes > 1


def problems(config, precision: str) -> list[str]:
    """What a run with FSDP cannot do, one sentence each."""
    found = []
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        found.append(f"FSDP needs PyTorch 2.6 or newer; this is {torch.__version__}.")
    if config.optimizer not in ("auto", "adamw"):
        found.append(f"optimizer {config.optimizer} does not work with FSDP: take adamw.")
    if config.base_quantization != "none":
        found.append("base_quantization does not work with FSDP: take none.")
    if precision == "fp16":
        found.append("precision fp16 does not work with FSDP: take bf16 or fp32.")
    return found


def shard(recipe, optimizer: torch.optim.Optimizer, ema, make_optimizer) -> torch.optim.Optimizer:
    """Spreads the recipe's networks, in place, and what belongs to them; the optimizer in place of the given one.

    make_optimizer makes one for a list of parameters. All processes have to have the same weights and state.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = recipe.trained()
    device = next(iter(before.values())).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in recipe.networks():
        for block in [module for module in network.modules() if isinstance(module, PixArtBlock)]:
            fully_shard([block.attn, block.cross_attn, block.mlp], mesh=mesh)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)  # or averages would change what is thrown away
    trained = recipe.trained()
    held = sum(tensor.numel() for tensor in local(trained.values()))
    logger.info("FSDP: this process holds %d of %d trained numbers", held, sum(p.numel() for p in trained.values()))
    spread = make_optimizer(list(trained.values()))
    for name, parameter in before.items():
        state = optimizer.state.get(parameter, {})
        spread.state[trained[name]] = {key: like(trained[name], value) for key, value in state.items()}
    if ema:
        ema.weights = {name: like(trained[name], weight) for name, weight in ema.weights.items()}
    return spread


def in_parts(value) -> bool:
    """Whether it is a DTensor, whose class is not everywhere to be imported."""
    return hasattr(value, "full_tensor")


def like(parameter, value):
    """This process's part of a tensor in the shape of the sharded parameter; anything else as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tree):
    """Nested dicts and lists with every sharded tensor put together, on the CPU. All processes have to call it."""
    if in_parts(tree):
        return tree.detach().full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return type(tree)(map(whole, tree)) if isinstance(tree, (list, tuple)) else tree


def join(network: nn.Module):
    """Puts the network's weights together for good, on the CPU: it can be saved, and trained no more."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if in_parts(parameter):
                module.register_parameter(name, nn.Parameter(whole(parameter), parameter.requires_grad))


def local(tensors) -> list[Tensor]:
    """What this process holds of each."""
    return [tensor.to_local() if in_parts(tensor) else tensor for tensor in tensors]
