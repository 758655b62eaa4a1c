"""What the rest of the tiny family is made and measured with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_nodes.training.config import RunConfig
from tools.evaluate_family import SMALL
from tools.tiny import edges, family, vae
from tools.tiny.datasets import make_set, sizeless, with_concept
from tools.tiny.oracle import score, summarise
from tools.tiny.scenes import place, render, render_at, sample_scene

ASSETS = family.ROOT / "pixart_nodes" / "assets" / "tiny"


def scenes(count, seed=3):
    rng = np.random.default_rng(seed)
    return rng, [sample_scene(rng, width=192, height=192, split="held_out") for _ in range(count)]


def test_the_oracle_reads_every_rendered_concept():
    rng, found = scenes(40)
    scores = [score(render(with_concept(scene), rng), with_concept(scene)) for scene in found]
    assert summarise(scores)["object_accuracy"] == 1.0


def test_the_oracle_sees_no_concept_in_other_pictures():
    rng, found = scenes(40)
    scores = [score(render(scene, rng), with_concept(scene)) for scene in found]
    assert sum(entry["objects"][0]["colour"] for entry in scores) == 0


def test_objects_anywhere_in_their_cells_are_still_read_and_their_outlines_agree_fully():
    rng, found = scenes(30)
    for scene in found:
        places = edges.loose_places(scene, rng)
        image = render_at(scene, places)
        assert all(row["all"] for row in score(image, scene)["objects"])
        assert edges.agreement(image, edges.outline(scene, places, 1.0)) > 0.99


def test_pictures_drawn_without_looking_at_the_outlines_agree_little():
    rng, found = scenes(60)
    found = [sizeless(scene) for scene in found]
    kept = [
        edges.agreement(
            render_at(scene, [place(item, 192, 192) for item in scene.objects]),
            edges.outline(scene, edges.loose_places(scene, rng, SMALL), 1.0),
        )
        for scene in found
    ]
    assert np.mean(kept) < 0.3


def test_an_empty_picture_agrees_with_no_outline():
    _, (scene, *_) = scenes(1)
    lines = edges.outline(scene, [place(item, 192, 192) for item in scene.objects], 1.0)
    assert edges.agreement(np.zeros((192, 192, 3), np.uint8), lines) == 0.0


def test_a_set_has_a_caption_and_a_hint_for_each_picture_and_is_made_once(tmp_path):
    folder = make_set("edges", tmp_path / "set", 5)
    records = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all(record["text"] for record in records)
    for record in records:
        picture, hint = Image.open(folder / record["file_name"]), Image.open(folder / record["control"])
        assert picture.size == hint.size and hint.getextrema()[1] == 255
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_set("edges", folder, 5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_half_a_set_is_thrown_away(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00009.png").write_bytes(b"half")
    assert len(list(make_set("scenes", tmp_path / "set", 2).glob("*.png"))) == 2


@pytest.mark.parametrize("name", family.MEMBERS)
def test_every_member_is_a_run_that_the_trainer_accepts(name):
    member = family.MEMBERS[name]
    config = {"recipe": member.recipe, "base": {"path": "a"}, "cache": "b", "output": {"name": name, "folder": "c"}}
    assert RunConfig.from_dict({**config, **family.COMMON, **member.run}).check() == []


def test_the_sigma_vae_decodes_its_own_latents_to_the_same_pixels():
    alpha = {n: t.float() for n, t in load_file(ASSETS / "vae" / "pixart-tiny-vae.safetensors").items()}
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (latent, picture), (other, same) = (run_vae(tensors, pixels) for tensors in (alpha, vae.sigma_vae(alpha)))
    assert torch.allclose(picture, same, atol=1e-4)
    assert torch.allclose(other, vae.encode_sigma(pixels), atol=2e-3)
    assert not torch.allclose(latent, other, atol=0.1)


@torch.no_grad()
def run_vae(tensors, pixels):
    encoder, decoder = vae.make_encoder(), vae.make_decoder()
    for module, prefix in ((encoder, "taesd_encoder."), (decoder, "taesd_decoder.")):
        module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    latent = encoder(pixels)
    return latent, decoder(latent)
