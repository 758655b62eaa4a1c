"""The trained tiny family as the files that the pack ships (half precision, native names, metadata), and back."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from pixart_nodes.checkpoints import load_transformer, save_native
from pixart_nodes.checkpoints.files import save_atomic

from .train_dit import PARAMS, STAGES

ORIGIN = "PixArt Nodes tiny family: trained from scratch on generated scenes (tools/build_tiny.py); GPL-3.0"


def restore(work: Path, assets: Path, *, report=print) -> None:
    """Fill `work` from the shipped files, so that the transformer's last stage goes on from them.

    Raises FileExistsError when `work` already holds a run.
    """
    if any(work.glob("dit-*")):
        raise FileExistsError(f"{work} already holds a run: give an empty folder to start from the shipped files.")
    model, detection = load_transformer(assets / "diffusion_models" / "pixart-tiny-alpha.safetensors")
    for stage in STAGES[:-1]:
        done = work / f"dit-{stage.name}" / "ema.safetensors"
        done.parent.mkdir(parents=True)
        save_file(model.float().state_dict(), done)
    folder = assets / "text_encoders" / "pixart-tiny-t5"
    T5EncoderModel.from_pretrained(folder).float().save_pretrained(work / "text")
    AutoTokenizer.from_pretrained(folder).save_pretrained(work / "text")
    vae = load_file(assets / "vae" / "pixart-tiny-vae.safetensors")
    save_file({key: value.float() for key, value in vae.items()}, work / "vae.safetensors")
    report({"stage": "restore", "params": str(detection.params)})


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
