"""PixArt-delta's ControlNet: trained copies of the first blocks beside a frozen base."""

from pathlib import Path

import torch
from torch import nn

from ...checkpoints import save_controlnet, save_diffusers_controlnet
from ...model import ControlNetTransformer
from .base import Recipe


class Controlled(nn.Module):
    """Base and ControlNet as one network, which is what several processes can share."""

    def __init__(self, base, control: ControlNetTransformer):
        super().__init__()
        self.base, self.control = base, control

    def forward(self, x, timesteps, context, context_mask=None, *, hint, **others):  # hint (B, 4, H, W)
        control = {"branches": [self.control.branch(hint)]}
        return self.base(x, timesteps, context, context_mask, control=control, **others)


class ControlNetRecipe(Recipe):
    @classmethod
    def problems(cls, config, index, start_params) -> list[str]:
        problems = []
        if not all(index.has(row, "control") for row in range(len(index))):
            problems.append(f"{index.meta['source']} has pictures without a control image: each one needs its own.")
        if not config.controlnet.blocks < start_params.depth:
            problems.append(f"controlnet.blocks is {config.controlnet.blocks}; this model allows 1 to "
                            f"{start_params.depth - 1}.")  # fmt: skip
        return problems

    def build(self) -> nn.Module:
        start = self.start
        control = ControlNetTransformer.from_base(start.model, self.config.controlnet.blocks)
        control.to(start.device, torch.float32).requires_grad_(True)
        start.model.to(start.device, start.dtype).requires_grad_(False)
        if self.config.base_quantization != "none":
            from ..quantise import quantise_frozen

            quantise_frozen(start.model, self.config.base_quantization, start.device, start.dtype)
        return Controlled(start.model, control)

    def extras(self, batch) -> dict:
        return {**super().extras(batch), "hint": batch.control}

    def preview_extras(self, index, row: int) -> dict:
        hint = index.latent(row, "control")[None, :4] * index.meta["latent_scale"]
        return {**super().preview_extras(index, row), "hint": hint.to(self.start.device)}

    def export(self, path: Path, metadata: dict[str, str]) -> Path:
        start, control = self.start, self.network.control
        origin = f"controlnet of {metadata['pixart.base']}, {metadata['pixart.steps']} steps"
        if self.config.output.export == "diffusers":
            save_diffusers_controlnet(control, path, start.params, start.family, origin, start.dtype)
            return path
        path = path.with_name(path.name + ".safetensors")
        save_controlnet(control, path, start.params, start.family, origin, start.dtype)
        return path
