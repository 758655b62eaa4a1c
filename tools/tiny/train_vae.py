"""Train the tiny autoencoder's decoder on crops of scenes. The encoder is set (vae.py), so latents never change."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss, mse_loss

from . import vae
from .scenes import place, render, sample_scene

CROP = 48  # px; holds the largest object of a 128 px scene
SIDES = (128, 128, 192, 256)  # px of the scenes; small objects are the hard ones
AT_OBJECT = 0.8  # share of the crops with an object in the middle, more or less
NOISE = 0.06  # deviation added to the latents: sampled latents are never exact


def corner(rng: np.random.Generator, scene) -> tuple[int, int]:
    """Where a crop starts, (left, top) in px on the 8 px lattice."""
    centre = rng.integers(scene.width, size=2)
    if rng.random() < AT_OBJECT:
        item = scene.objects[rng.integers(len(scene.objects))]
        centre = np.array(place(item, scene.width, scene.height)[:2]) + rng.uniform(-8, 8, 2)
    left, top = (np.clip((centre - CROP / 2) / 8, 0, (scene.width - CROP) // 8).astype(int) * 8).tolist()
    return left, top


def crops(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Crops of scenes, mirrored at random: (B, 3, 48, 48) in 0..1."""
    images = np.empty((count, CROP, CROP, 3), dtype=np.uint8)
    for row in range(count):
        side = int(rng.choice(SIDES))
        scene = sample_scene(rng, width=side, height=side)
        left, top = corner(rng, scene)
        images[row] = render(scene, rng)[top : top + CROP, left : left + CROP]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    if rng.random() < 0.5:
        pixels = pixels.flip(3)
    return pixels


def train(path: Path, *, steps: int, batch: int = 8, seed: int = 0, report=print) -> None:
    """Write the whole autoencoder to `path` when done and every 250 steps; a file that is there is trained further."""
    torch.manual_seed(seed)
    encoder, decoder = vae.make_encoder(), vae.make_decoder()
    vae.set_encoder(encoder)
    vae.prepare_decoder(decoder)
    if path.exists():
        seed += 1  # other crops than last time
        prefix = "taesd_decoder."
        decoder.load_state_dict({k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)})
    rng = np.random.default_rng(seed + 2)
    decoder = decoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    losses = []
    for step in range(steps):
        pixels = crops(rng, batch)
        latent = vae.encode(pixels)
        latent = latent + NOISE * torch.randn(latent.shape)
        guess = decoder(latent.to(memory_format=torch.channels_last))
        loss = mse_loss(guess, pixels) * 4 + l1_loss(guess, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(mse_loss(guess, pixels).item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            report({"stage": "vae", "step": step + 1, "psnr": round(-10 * float(np.log10(np.mean(losses))), 2)})
            losses = []
            tensors = {k: v.contiguous() for k, v in vae.state_dict(encoder, decoder).items()}
            save_file(tensors, path, metadata={"format": "pt"})
