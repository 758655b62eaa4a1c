"""What a tiled decode takes of memory, against what is said of it before it starts."""

import pytest

from benchmarks.live_tensors import LiveTensors
from pixart_nodes.vae import decode, decoder_layers, fast_tiles
from pixart_nodes.vae import plan as planning

from .autoencoders import noise, random_vae

SIDE = 20  # of the latent: a picture of 160 px


def peak(vae, tile: int, **options) -> int:
    latent = noise(1, 4, SIDE, SIDE)
    with LiveTensors() as live:
        decode(vae, latent, tile=tile, **options)
    return live.peak


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("tile", [32, 64])
def test_tensors_stay_within_the_estimate(tile, fast, monkeypatch):
    monkeypatch.setattr(fast_tiles, "REFERENCE", 10)
    vae = random_vae()
    plan = planning.steps(decoder_layers(vae), SIDE, SIDE)
    values = fast_tiles.fast_stored_elements(plan) if fast else planning.stored_elements(plan)
    picture = 3 * (8 * SIDE) ** 2
    said = 4 * (values + picture) + planning.working_bytes(plan, tile, 4, on_cpu=True)
    assert 0.3 * said < peak(vae, tile, fast=fast) < said


def test_on_a_cpu_a_large_tile_takes_no_more_than_the_fastest_one(monkeypatch):
    vae = random_vae()
    monkeypatch.setattr(planning, "CPU_ELEMENTS", 64 * 64 * 32)
    assert peak(vae, 1000) == peak(vae, 64)
    monkeypatch.setattr(planning, "CPU_ELEMENTS", 10**9)
    assert peak(vae, 1000) > 1.5 * peak(vae, 64)
