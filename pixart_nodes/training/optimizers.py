"""Optimizers by name. AdamW is torch's; Muon learns a small transformer from scratch in about half the steps."""

from importlib.util import find_spec

import torch
from torch import Tensor

from .config import RunConfig


@torch.no_grad()
def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values go to about 1 (Jordan et al. 2024, Muon).

    Newton-Schulz iteration with that text's quintic coefficients; gradient (count, rows, cols).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = gradient.shape[1] <= gradient.shape[2]
    x = gradient if wide else gradient.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices of the blocks; Adam for everything else, at the same learning rate.

    Updates of matrices are scaled to the root mean square that AdamW's have (0.2, Liu et al. 2025), so that one
    learning rate fits both.
    """

    def __init__(self, model, lr: float, weight_decay: float, momentum: float = 0.95, betas=(0.9, 0.99)):
        matrices, others = {}, []  # matrices of one shape are orthogonalised together
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("blocks.") and name.endswith("weight"):
                matrices.setdefault(parameter.shape, []).append(parameter)
            else:
                others.append(parameter)
        groups = [{"params": same_shape, "matrices": True} for same_shape in matrices.values()]
        groups.append({"params": others, "matrices": False})
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["matrices"]:
                updates = orthogonalise(torch.stack([self.nesterov(p, group) for p in parameters]))
                updates = updates * (0.2 * max(updates.shape[1:]) ** 0.5)
            else:
                updates = [self.adam(p, group) for p in parameters]
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def nesterov(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(state["momentum"], group["momentum"])

    def adam(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["first"].lerp_(parameter.grad, 1 - beta1)
        state["second"].lerp_(parameter.grad**2, 1 - beta2)
        first = state["first"] / (1 - beta1 ** state["step"])
        return first / ((state["second"] / (1 - beta2 ** state["step"])).sqrt() + 1e-8)


def make_optimizer(name: str, model, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "muon":
        return Muon(model, lr, weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))


def chosen(config: RunConfig, sharded: bool = False) -> str:
    """ "auto" made concrete for this machine: 8-bit AdamW for a LoRA on a GPU, CAME for all weights as PixArt-sigma's
    configs have it, where their packages are installed; else, and with FSDP, AdamW."""
    if config.optimizer != "auto":
        return config.optimizer
    if config.recipe == "lora" and torch.cuda.is_available() and find_spec("bitsandbytes") and not sharded:
        return "adamw8bit"
    every = config.recipe in ("full", "weak-to-strong")
    return "came" if every and find_spec("came_pytorch") and not sharded else "adamw"


def run_optimizer(name: str, parameters: list, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of a run over a list of parameters, from the library that has it.

    Raises ValueError when that library is not installed, or when the optimizer is not for such a list.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    try:
        if name == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
        if name == "came":  # numbers of PixArt-sigma configs/pixart_sigma_config
            from came_pytorch import CAME

            return CAME(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16))
        if name == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(parameters, lr=lr, weight_decay=weight_decay, safeguard_warmup=True)
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "came": "came-pytorch", "prodigy": "prodigyopt"}[name]
        raise ValueError(f"optimizer {name} needs the package {package}: install it, or use adamw.") from error
    raise ValueError(f"optimizer {name!r} is none of adamw, adamw8bit, came and prodigy.")
