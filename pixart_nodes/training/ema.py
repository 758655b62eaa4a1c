"""Exponential moving average of the weights; what gets shipped."""

import torch

from .sharding import local


class EMA:
    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Early on the average forgets faster, so that it does not carry the initial weights along."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(model.named_parameters())
        now = local(parameters[name] for name in self.weights)
        torch._foreach_lerp_(local(self.weights.values()), now, 1 - decay)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.weights = state["weights"]
