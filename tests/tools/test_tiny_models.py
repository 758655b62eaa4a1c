"""The parts that tools/build_tiny.py trains: that they are what the file formats and the training assume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tools.tiny import export, train_dit, vae
from tools.tiny.captions import BACKGROUND, NOBODY, owned_caption
from tools.tiny.scenes import POSITIONS, render, sample_scene

ROOT = Path(__file__).resolve().parents[2]


def pictures(count, seed=0, size=64):
    rng = np.random.default_rng(seed)
    images = [render(sample_scene(rng, width=size, height=size), rng) for _ in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_the_taesd_encoder_computes_what_training_computes_by_pooling():
    encoder = vae.make_encoder()
    vae.set_encoder(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pictures(4)), vae.encode(pictures(4)), atol=2e-5, rtol=0)


def test_latents_of_scenes_are_about_standard_normal_per_channel():
    latents = vae.encode(pictures(64, size=128))
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_the_untrained_decoder_is_the_blow_up_of_the_mean_colours():
    torch.manual_seed(0)
    decoder = vae.make_decoder()
    vae.prepare_decoder(decoder)
    with torch.no_grad():
        error = decoder(vae.encode(pictures(8))) - pictures(8)
    assert -10 * (error**2).mean().log10() > 18  # dB


def test_every_character_of_a_caption_belongs_to_the_object_that_it_speaks_of():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = sample_scene(rng)
        text, owners = owned_caption(scene, rng)
        assert len(text) == len(owners)
        assert set(owners) <= {POSITIONS.index(item.position) for item in scene.objects} | {BACKGROUND, NOBODY}
        assert {POSITIONS.index(item.position) for item in scene.objects} <= set(owners)


def test_the_text_encoder_learns_to_tell_single_objects_apart():
    from tools.tiny import text

    tokenizer = text.train_tokenizer(captions=2000)
    log = []
    encoder = text.train_encoder(tokenizer, steps=12, batch=8, report=log.append)
    assert log[-1]["by_token"] < log[0]["by_token"]
    assert encoder(torch.tensor([[1]])).last_hidden_state.isfinite().all()


def test_the_shipped_files_are_taken_up_again_for_the_last_stage_and_come_back_the_same(tmp_path):
    work, assets = tmp_path / "work", ROOT / "pixart_nodes" / "assets" / "tiny"
    export.restore(work, assets, report=lambda record: None)
    *before, last = train_dit.STAGES
    assert all((work / f"dit-{stage.name}" / "ema.safetensors").exists() for stage in before)
    assert not (work / f"dit-{last.name}").exists()
    with pytest.raises(FileExistsError, match="already holds a run"):
        export.restore(work, assets)
    (work / f"dit-{before[-1].name}").rename(work / f"dit-{last.name}")
    export.export(work, tmp_path / "assets", report=lambda record: None)
    for name in ("diffusion_models/pixart-tiny-alpha.safetensors", "vae/pixart-tiny-vae.safetensors"):
        shipped, again = load_file(assets / name), load_file(tmp_path / "assets" / name)
        assert shipped.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in shipped.items())
