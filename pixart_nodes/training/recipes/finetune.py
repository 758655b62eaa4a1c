"""Full fine-tuning: every weight, on the original's loss."""

from pathlib import Path

import torch
from torch import nn

from ...checkpoints import save_diffusers, save_native
from .base import Recipe


class FullFineTune(Recipe):
    def build(self) -> nn.Module:
        return self.start.model.to(self.start.device, torch.float32).requires_grad_(True)

    def export(self, path: Path, metadata: dict[str, str]) -> Path:
        start, dtype = self.start, self.start.dtype
        model = {name: tensor.detach() for name, tensor in start.model.state_dict().items()}
        if self.config.output.export == "diffusers":
            save_diffusers(model, start.params, path, start.family, self.origin(metadata), dtype)
            return path
        path = path.with_name(path.name + ".safetensors")
        save_native(model, start.params, path, start.family, self.origin(metadata), dtype)
        return path

    @staticmethod
    def origin(metadata: dict[str, str]) -> str:
        return f"{metadata['pixart.recipe']} of {metadata['pixart.base']}, {metadata['pixart.steps']} steps"
