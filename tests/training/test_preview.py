from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pixart_nodes
from pixart_nodes.training.__main__ import DONE, train
from tools.tiny.vae import make_decoder

from .conftest import events_of

TINY_VAE = Path(pixart_nodes.__file__).parent / "assets" / "tiny" / "vae" / "pixart-tiny-vae.safetensors"


def drawn(folder, step):
    return np.asarray(Image.open(folder.samples / f"step-{step:06}_0.png"))


def test_samples_are_what_the_vae_makes_of_their_latents(make_run):
    folder = make_run("lora", steps=1, sample_every=1, vae=str(TINY_VAE))
    assert train(folder.path / "run.json") == DONE
    decoder = make_decoder()
    weights = load_file(TINY_VAE)
    prefix = "taesd_decoder."
    decoder.load_state_dict({k.removeprefix(prefix): w.float() for k, w in weights.items() if k.startswith(prefix)})
    latent = load_file(folder.samples / "step-000001.safetensors")["latent_0"]
    with torch.no_grad():
        pixels = decoder(latent)[0].clamp(0, 1).movedim(0, -1) * 255
    assert drawn(folder, 1).shape == (64, 64, 3)
    assert np.abs(drawn(folder, 1) - pixels.numpy()).max() < 1


@pytest.mark.parametrize("vae", ["/nowhere.safetensors", "base"])
def test_a_vae_that_cannot_be_used_is_a_warning_and_samples_are_rough_colours(make_run, tmp_path, vae):
    plain = make_run("lora", name="plain", steps=1, sample_every=1)
    vae = str(tmp_path / "base.safetensors") if vae == "base" else vae
    folder = make_run("lora", steps=1, sample_every=1, vae=vae)
    assert [train(run.path / "run.json") for run in (plain, folder)] == [DONE, DONE]
    (warning,) = events_of(folder, "warning")
    assert "rough colours" in warning["text"] and Path(vae).name in warning["text"]
    assert np.array_equal(drawn(folder, 1), drawn(plain, 1))
