"""LoRA and DoRA: low-rank updates beside frozen weights, which may be quantised."""

import re
from pathlib import Path

import torch
from torch import nn

from ...checkpoints import read_lora, save_lora
from .base import Recipe

_ATTENTION = r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj))"
_MLP = r"blocks\.\d+\.mlp\.fc[12]"
_CONDITIONING = r"t_block\.1|[a-z]+_embedder\.(mlp\.[02]|y_proj\.fc[12])|final_layer\.linear"
TARGETS = {
    "attn": _ATTENTION, "attn-mlp": f"{_ATTENTION}|{_MLP}", "all": f"{_ATTENTION}|{_MLP}|{_CONDITIONING}",
}  # fmt: skip
LAYOUTS = {"native": "comfyui"}  # the others are called the same


class Lora(Recipe):
    def build(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config, start = self.config, self.start
        start.model.to(start.device, start.dtype).requires_grad_(False)
        modules = target_modules(start.model, config.targets)
        if config.base_quantization != "none":
            from ..quantise import quantise_frozen

            quantise_frozen(start.model, config.base_quantization, start.device, start.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = get_peft_model(start.model, LoraConfig(
                r=config.rank, lora_alpha=config.alpha, target_modules=modules, use_dora=config.dora, lora_dropout=0.0,
            ))  # fmt: skip
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):  # autocast would undo its cast of every input to fp32
                module.cast_input_dtype_enabled = False
        return network

    def export(self, path: Path, metadata: dict[str, str]) -> Path:
        from peft import get_peft_model_state_dict

        layout = self.config.output.export
        layout = LAYOUTS.get(layout, layout)
        if layout != "peft":
            path = path.with_name(path.name + ".safetensors")
        tensors = get_peft_model_state_dict(self.network)
        config = self.network.peft_config["default"].to_dict()
        save_lora(read_lora(tensors, config=config), path, layout, metadata)
        return path


def target_modules(model: nn.Module, targets: str) -> list[str]:
    """The names of the Linear layers that a set of targets stands for."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in names if re.fullmatch(TARGETS[targets], name)]
