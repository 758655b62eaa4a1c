"""The rest of the tiny family, each made from the base by the pack's own data and training commands.

A member is a training set (datasets.py), a feature cache (pixart_nodes.data, with the encoder's closed form, which is
thirty times as fast) and a run (`python -m pixart_nodes.training run.json`). All three go on where they were stopped.
"""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.torch import load_file

from pixart_nodes.checkpoints.files import load_file_tensors, save_atomic
from pixart_nodes.data.encode import fill, stores
from pixart_nodes.data.index import index_of
from pixart_nodes.data.loading import load_encoders
from pixart_nodes.data.manifest import ScanOptions, scan

from . import vae
from .datasets import make_set
from .export import ORIGIN

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a large red circle at the top left and a small blue star in the center, on a beige background",
           "a small yellow square on the left and a large purple ring at the bottom right")  # fmt: skip


@dataclass(frozen=True)
class Member:
    """What makes one file of the family. `run` has the fields of run.json that differ from the recipe's defaults."""

    pictures: str  # of datasets.SETS
    count: int
    recipe: str
    folder: str  # below assets/tiny
    run: dict
    size: str = "192"  # of the pictures' sides, px
    family: str = "alpha"
    base: str = "pixart-tiny-alpha"
    vae: str = "pixart-tiny-vae"
    prompts: tuple[str, ...] = field(default=PROMPTS)


COMMON = {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "precision": "fp32", "seed": 0, "keep": 1,
          "lr_schedule": "cosine", "optimizer": "adamw"}  # fmt: skip
STRONG = {"learning_rate": 1e-3, "warmup_steps": 30, "max_grad_norm": 1.0, "ema_decay": 0.995, "min_snr_gamma": 5.0,
          "save_every": 100, "sample_every": 0}  # fmt: skip
SIGMA = {"family": "sigma", "vae": "pixart-tiny-sigma-vae"}
MEMBERS = {
    "pixart-tiny-zorb": Member(
        "concept", 3000, "lora", "loras",
        {"steps": 2000, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 20, "min_snr_gamma": 5.0, "rank": 8,
         "alpha": 8.0, "trigger_word": "zorb", "save_every": 100, "sample_every": 0},
        prompts=("a large red zorb at the top left on a gray background", *PROMPTS),
    ),
    "pixart-tiny-controlnet": Member(
        "edges", 5000, "controlnet", "controlnet",
        {"steps": 7500, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 50, "max_grad_norm": 1.0,
         "caption_dropout": 0.2, "min_snr_gamma": 5.0, "save_every": 200, "sample_every": 0,
         "controlnet": {"blocks": 3}},
    ),
    "pixart-tiny-lcm": Member(
        "scenes", 6000, "lcm", "diffusion_models",
        {"steps": 1400, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 100, "max_grad_norm": 1.0,
         "save_every": 200, "sample_every": 0, "lcm": {"guidance": 4.5, "ema_decay": 0.95}},
    ),
    # Weak-to-strong in the paper's order: another VAE and longer captions, a larger size, KV compression.
    "sigma-vae": Member(
        "long", 4000, "weak-to-strong", "diffusion_models",
        {**STRONG, "steps": 500, "batch_size": 16, "weak_to_strong": {"base_size": 128}}, **SIGMA,
    ),
    "sigma-256": Member(
        "long", 4000, "weak-to-strong", "diffusion_models",
        {**STRONG, "steps": 3000, "batch_size": 8, "learning_rate": 7e-4, "weak_to_strong": {"base_size": 256}},
        base="sigma-vae", size="256", **SIGMA,
    ),
    "pixart-tiny-sigma": Member(
        "long", 4000, "weak-to-strong", "diffusion_models",
        {**STRONG, "steps": 3000, "batch_size": 8, "learning_rate": 7e-4,
         "weak_to_strong": {"base_size": 256, "kv_sampling": "conv", "kv_layers": [3, 4, 5]}},
        base="sigma-256", size="256", **SIGMA,
    ),
}  # fmt: skip


def build(name: str, work: Path, assets: Path, *, report=print) -> Path:
    """Makes a member in work/family/<name> and returns its file."""
    member, folder = MEMBERS[name], work / "family"
    scale = int(member.size) / 192
    pictures = make_set(member.pictures, folder / f"set-{member.pictures}-{member.size}", member.count, scale=scale)
    t5 = assets / "text_encoders" / "pixart-tiny-t5"
    if member.vae == SIGMA["vae"]:
        make_sigma_vae(work / "family" / member.vae, assets)
    index = make_cache(folder / f"cache-{member.family}", pictures, member, find(member.vae, "vae", work, assets), t5)
    report({"member": name, "pictures": str(pictures), "cache": str(index)})
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    base = {"path": str(find(member.base, "diffusion_models", work, assets))}
    output = {"name": name, "folder": str(run)}
    config = {"recipe": member.recipe, "base": base, "cache": str(index), "output": output, **COMMON, **member.run}
    (run / "run.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pixart_nodes.training", run / "run.json"], cwd=ROOT, check=True)
    return run / f"{name}.safetensors"


def make_cache(cache: Path, pictures: Path, member: Member, vae_file: Path, t5: Path) -> Path:
    """Encodes what the cache lacks; the training set's file."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    manifest = scan(pictures, ScanOptions(size=member.size, validation_percent=0.0))
    raw = load_file(vae_file)["vae_scale"].item()
    encode = vae.encode if member.family == "alpha" else vae.encode_sigma
    encoders = replace(
        load_encoders(member.family, str(vae_file), str(t5), "cpu"),
        encode_images=lambda pixels: encode(pixels.movedim(-1, 1)) / raw,
    )  # fmt: skip
    latents, captions = stores(cache, encoders)
    fill(manifest, encoders, latents, captions, prompts=member.prompts, batch_size=64)
    latents.refresh()
    captions.refresh()
    return index_of(cache, manifest, encoders, latents, captions, member.prompts).path


def make_sigma_vae(folder: Path, assets: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    alpha = load_file(assets / "vae" / "pixart-tiny-vae.safetensors")
    save_atomic(vae.sigma_vae(alpha), folder / f"{folder.name}.safetensors",
                {"modelspec.architecture": "taesd", "pixart.origin": ORIGIN})  # fmt: skip


def ship(work: Path, assets: Path, *, report=print) -> None:
    """Copies what is made of the family into the pack, in half precision."""
    kinds = {name: member.folder for name, member in MEMBERS.items()} | {SIGMA["vae"]: "vae"}
    for name, kind in kinds.items():
        made = work / "family" / name / f"{name}.safetensors"
        if not name.startswith("pixart-tiny") or not made.is_file():
            continue
        tensors, metadata = load_file_tensors(made)
        (assets / kind).mkdir(parents=True, exist_ok=True)
        shipped = assets / kind / made.name
        save_atomic({n: t.half() for n, t in tensors.items()}, shipped, {**metadata, "pixart.origin": ORIGIN})
        report({shipped.name: shipped.stat().st_size})


def find(name: str, kind: str, work: Path, assets: Path) -> Path:
    """A file of the family: as just made, or as shipped."""
    made, shipped = work / "family" / name / f"{name}.safetensors", assets / kind / f"{name}.safetensors"
    return made if made.is_file() else shipped
