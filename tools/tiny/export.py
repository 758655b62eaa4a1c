"""Write the trained tiny family as the files that the pack ships: half precision, native names, metadata inside."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from pixart_nodes.checkpoints import save_native
from pixart_nodes.checkpoints.files import save_atomic

from .train_dit import PARAMS, STAGES

ORIGIN = "PixArt Nodes tiny family: trained from scratch on generated scenes (tools/build_tiny.py); GPL-3.0"


def export(work: Path, assets: Path, *, report=print) -> None:
    """Read the results of all stages from `work`, write `assets`/{diffusion_models,text_encoders,vae}."""
    for folder in ("diffusion_models", "text_encoders/pixart-tiny-t5", "vae"):
        (assets / folder).mkdir(parents=True, exist_ok=True)
    tensors = load_file(work / f"dit-{STAGES[-1].name}" / "ema.safetensors")
    save_native(tensors, PARAMS, assets / "diffusion_models" / "pixart-tiny-alpha.safetensors",
                family="alpha", origin=ORIGIN, dtype=torch.float16)  # fmt: skip
    T5EncoderModel.from_pretrained(work / "text").half().save_pretrained(assets / "text_encoders" / "pixart-tiny-t5")
    AutoTokenizer.from_pretrained(work / "text").save_pretrained(assets / "text_encoders" / "pixart-tiny-t5")
    vae = {key: value.half() for key, value in load_file(work / "vae.safetensors").items()}
    save_atomic(vae, assets / "vae" / "pixart-tiny-vae.safetensors",
                {"modelspec.architecture": "taesd", "pixart.origin": ORIGIN})  # fmt: skip
    report({file.name: file.stat().st_size for file in sorted(assets.rglob("*")) if file.is_file()})
