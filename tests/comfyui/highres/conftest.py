"""KV compression, a LoRA of the compressed layer, and models saved and loaded again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..drive import noise, predict, prompt
from ..tiny import SIGMA


def compress(comfy, model, layers="deep half", ratio="2", sampling="conv"):
    return comfy.call("PixArtKVCompress", model=model, layers=layers, ratio=ratio, sampling=sampling)[0]


def denoised(model, height=16, width=16):
    return predict(model, [prompt(7, 1)], noise(height=height, width=width))[0]


def key_counts(model, **size):
    """How many keys each self-attention of one forward gets."""
    seen, clone = [], model.clone()

    def override(attention, q, k, v, heads, **options):
        if options.get("mask") is None and k.shape[1] != 7:
            seen.append(k.shape[1])
        return attention(q, k, v, heads, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    denoised(clone, **size)
    return seen


@pytest.fixture(scope="session")
def native_pixart(comfy):
    """A MODEL around ComfyUI's own PixArt class, as another loader makes it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.PixArtSigma({"image_model": "pixart_sigma", "disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.PixArt(config)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def lora_of_qkv(comfy):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for i in range(SIGMA.depth):
        for part in "qkv":
            base = f"transformer.transformer_blocks.{i}.attn1.to_{part}"
            lora[f"{base}.lora_A.weight"] = torch.randn(4, 48, generator=generator) * 0.2
            lora[f"{base}.lora_B.weight"] = torch.randn(48, 4, generator=generator) * 0.2
    save_file(lora, comfy.folder("loras") / "qkv.safetensors")
    return "qkv.safetensors"


def save(comfy, model, name, folder="output", dtype="as loaded"):
    (path,) = comfy.call("PixArtSaveModel", model=model, name=name, folder=folder, dtype=dtype)
    return Path(path)


def reload(comfy, load_model, path):
    """Through the loader, from the user's own models folder."""
    target = comfy.folder("diffusion_models") / path.name
    if target != path:
        path.replace(target)
    return load_model(target.name)
