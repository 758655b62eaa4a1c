"""Models with int8, NF4 and FP4 weights inside a real ComfyUI."""

from dataclasses import replace

import pytest
import torch

from ..drive import noise, predict, prompt
from ..tiny import SIGMA

# Relative error of random Gaussian weights, with a margin: int8 0.8 %, NF4 9 %, FP4 12 %.
TOLERANCE = {"int8": 0.012, "nf4": 0.11, "fp4": 0.14}
every_kind = pytest.mark.parametrize("kind", TOLERANCE)
QKV = "diffusion_model.blocks.0.attn.qkv.weight"
WIDE = replace(SIGMA, hidden_size=144, num_heads=4)  # rows that are no multiple of a 4-bit block


@pytest.fixture
def quantize(comfy):
    return comfy.pack("comfy_bridge.quantize")


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def lora(rank=2, seed=0, strength=0.5):
    """A patch as LoRA loaders make it, on the values (last third) of a fused qkv."""
    generator = torch.Generator().manual_seed(seed)
    update = strength * torch.randn(48, rank, generator=generator) @ torch.randn(rank, 48, generator=generator) / 7
    return {(QKV, (0, 96, 48)): ("diff", (update,))}, update


def denoised(model):
    return predict(model, [prompt(7, 1), prompt(3, 2)], noise())[0]


def offload(model):
    """What ComfyUI does when a model does not fit: layers stay in system memory and are fetched for each call."""
    model.detach()
    model.patch_model(model.load_device, lowvram_model_memory=1)
    assert model.model.model_lowvram


@torch.inference_mode()
def forward(model):
    """The network's output on the weights as they are right now."""
    return model.model.diffusion_model(noise(), torch.tensor([500.0]), prompt(7, 1)[0][0])


def hooks(strength, seed=0):
    """A schedule of LoRAs (hooks) that has all of its strength from the start."""
    import comfy.hooks

    hook = comfy.hooks.WeightHook(strength_model=strength)
    hook.weights, hook.need_weight_init = lora(strength=0.05, seed=seed)[0], False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def apply_hooks(patcher, group, patches, strength):
    patcher.add_hook_patches(group.hooks[0], patches, strength)
    patcher.patch_hooks(group)
