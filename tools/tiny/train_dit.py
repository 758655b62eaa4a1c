"""Train the tiny transformer in PixArt-alpha's three stages in miniature.

1. pixel dependency: single objects under class captions; 2. text-image alignment: dense captions of one to three
objects; 3. aesthetics: tidy scenes (nothing off its place), larger and in several aspect ratios.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from pixart_nodes.model import PixArtParams, PixArtTransformer
from pixart_nodes.training.config import TrainConfig
from pixart_nodes.training.initialise import initialise
from pixart_nodes.training.loop import Batch
from pixart_nodes.training.loop import train as train_stage

from . import text, vae
from .captions import caption
from .scenes import render, sample_scene

PARAMS = PixArtParams(
    depth=6, hidden_size=192, num_heads=6, in_channels=4, patch_size=2, mlp_ratio=4.0,
    caption_channels=128, caption_tokens=text.MAX_TOKENS, base_size=8, pe_interpolation=1.0,
    micro_condition=False, qk_norm=False, kv_compress=None, learned_variance=True,
)  # fmt: skip
LENGTH = 48  # tokens per caption while training; the few longer ones are drawn again
EMPTY = 0.03  # share of empty captions, so that an empty negative prompt means "any picture"


@dataclass(frozen=True)
class Stage:
    name: str
    config: TrainConfig
    sizes: tuple[tuple[int, int], ...]  # (width, height) in px
    class_captions: bool = False
    tidy: bool = False


MUON = {"optimizer": "muon", "learning_rate": 2e-3, "warmup_steps": 30, "min_snr_gamma": 5.0, "compile": True}
STAGES = (
    Stage("pixel", TrainConfig(steps=150, batch_size=64, final_learning_rate=2e-3, **MUON), sizes=((128, 128),),
          class_captions=True),
    Stage("alignment", TrainConfig(steps=1800, batch_size=64, final_learning_rate=2e-4, **MUON), sizes=((128, 128),)),
    Stage("aesthetics", TrainConfig(steps=3000, batch_size=32, final_learning_rate=5e-5,
                                    **{**MUON, "learning_rate": 1.5e-3}),
          sizes=((192, 192), (192, 192), (224, 160), (160, 224)), tidy=True),
)  # fmt: skip


class Still:
    """Stands in for a random generator where a tidy scene wants no jitter."""

    @staticmethod
    def uniform(low: float, high: float, shape) -> np.ndarray:
        return np.full(shape, (low + high) / 2)


class SceneBatches:
    """Latents and T5 features of freshly drawn scenes; a batch depends on (seed, stage, step, rank) alone."""

    def __init__(self, folder: Path, stage: Stage):
        self.stage = stage
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = T5EncoderModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, step: int, rank: int) -> Batch:
        stage = self.stage
        name = int.from_bytes(stage.name.encode()[:4], "big")
        rng = np.random.default_rng((stage.config.seed, name, step, rank))
        width, height = stage.sizes[rng.integers(len(stage.sizes))]
        images, captions = [], []
        while len(images) < stage.config.batch_size:
            scene, words = self.sample(rng, width, height)
            if len(self.tokenizer(words)["input_ids"]) > LENGTH:
                continue
            images.append(render(scene, Still() if stage.tidy else rng))
            captions.append("" if rng.random() < EMPTY else words)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        ids, mask = text.tokenize(self.tokenizer, captions, LENGTH)
        context = self.encoder(ids, attention_mask=mask).last_hidden_state
        return Batch(vae.encode(pixels), context, mask)

    def sample(self, rng, width: int, height: int):
        if self.stage.class_captions:
            scene = sample_scene(rng, max_objects=1, width=width, height=height)
            return scene, caption(scene, rng, style="dense" if rng.random() < 0.5 else "class")
        return text.sample_caption(rng, width=width, height=height)


def train(work: Path, *, seed: int = 0, report=print) -> None:
    """Run the stages that are not done yet, each from the averaged weights of the one before."""
    torch.manual_seed(seed)
    model = PixArtTransformer(PARAMS)
    initialise(model, embedder_std=None)
    for stage in STAGES:
        run = work / f"dit-{stage.name}"
        done = run / "ema.safetensors"
        if not done.exists():
            report({"stage": stage.name, "steps": stage.config.steps})
            ema = train_stage(stage.config, model, SceneBatches(work / "text", stage), run, report)
            model.load_state_dict(ema.weights, strict=False)
            save_file(model.state_dict(), done)
            (run / "stage.json").write_text(json.dumps({"name": stage.name, "steps": stage.config.steps}))
        else:
            model.load_state_dict(load_file(done))
