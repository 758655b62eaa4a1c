"""First-block caching: when steps are reused, what they give then, and that memories do not mix."""

import pytest
import torch
from comfyui.tiny import SIGMA, random_weights

from pixart_nodes.model import PixArtTransformer
from pixart_nodes.model.step_cache import KEY, StepCache


@pytest.fixture(scope="module")
def model():
    model = PixArtTransformer(SIGMA)
    model.load_state_dict(random_weights(SIGMA))
    return model.requires_grad_(False)


def latent(seed, batch=1, height=8, width=8):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


CAPTION = torch.randn(1, 5, SIGMA.caption_channels, generator=torch.Generator().manual_seed(9))


def call(model, cache, x, level=1.0, t=500.0, uuids=("a",), **extra):
    options = {"sigmas": torch.tensor([level]), "uuids": list(uuids), **({KEY: cache} if cache else {})}
    return model(x, torch.tensor([t]), CAPTION.repeat(len(x), 1, 1), transformer_options=options, **extra)


def test_a_step_like_the_last_one_reuses_its_blocks(model):
    cache, x = StepCache(threshold=0.1), latent(0)
    first = call(model, cache, x, level=2.0)
    again = call(model, cache, x, level=1.9)
    assert (cache.calls, cache.skipped) == (2, 1)
    assert torch.allclose(again, first, atol=1e-5)


def test_the_first_block_and_the_input_still_count_at_a_reused_step(model):
    cache, x = StepCache(threshold=10.0), latent(0)
    first = call(model, cache, x, level=2.0)
    other = call(model, cache, latent(1), level=1.9)
    assert cache.skipped == 1
    assert not torch.allclose(other, first) and not torch.equal(other, call(model, None, latent(1)))


def test_a_step_that_changes_more_than_the_threshold_is_computed(model):
    cache = StepCache(threshold=0.1)
    call(model, cache, latent(0), level=2.0)
    out = call(model, cache, latent(1), level=1.9)
    assert cache.skipped == 0
    assert torch.equal(out, call(model, None, latent(1)))


def test_a_threshold_of_zero_changes_nothing(model):
    cache, x = StepCache(threshold=0.0), latent(0)
    for level in (3.0, 2.0, 1.0):
        assert torch.equal(call(model, cache, x, level), call(model, None, x, level))
    assert cache.skipped == 0


def test_drift_is_measured_from_the_last_whole_step(model):
    """Small changes add up: comparing with the last reused step would never notice."""
    cache, base, step = StepCache(threshold=0.05), latent(0), latent(1)
    skipped = []
    for i in range(12):
        call(model, cache, base + 0.04 * i * step, level=12.0 - i)
        skipped.append(cache.skipped)
    assert 0 < skipped[-1] < 11


def test_one_changed_picture_of_a_batch_is_enough_to_compute(model):
    cache, x = StepCache(threshold=0.1), latent(0, batch=2)
    call(model, cache, x, level=2.0)
    x = torch.cat([x[:1], latent(5)])
    assert torch.equal(call(model, cache, x, level=1.9), call(model, None, x))


def test_steps_outside_the_range_are_computed(model):
    cache, x = StepCache(threshold=1.0, start=5.0, end=1.0), latent(0)
    for level, skipped in ((9.0, 0), (8.0, 0), (4.0, 1), (2.0, 2), (0.5, 2)):
        call(model, cache, x, level)
        assert cache.skipped == skipped


def test_prompts_sizes_and_control_have_memories_of_their_own(model):
    cache, x = StepCache(threshold=10.0), latent(0)
    control = {"output": [torch.ones(1, 16, SIGMA.hidden_size)]}
    calls = [
        (x, {}),
        (x, {"uuids": ("b",)}),
        (x, {"uuids": ("b", "a")}),
        (latent(0, height=12), {}),
        (x, {"control": control}),
    ]
    for sample, extra in calls:
        assert torch.equal(call(model, cache, sample, level=2.0, **extra), call(model, None, sample, **extra))
    assert cache.skipped == 0
    for sample, extra in calls:
        assert torch.allclose(
            call(model, cache, sample, level=1.9, **extra), call(model, None, sample, **extra), atol=1e-4
        )
    assert cache.skipped == len(calls)


def test_tiles_of_one_step_do_not_reuse_each_other(model):
    cache, tiles = StepCache(threshold=10.0), [latent(i) for i in range(3)]
    for tile in tiles:
        call(model, cache, tile, level=2.0)
    assert cache.skipped == 0
    for tile in tiles:
        assert torch.allclose(call(model, cache, tile, level=1.9), call(model, None, tile), atol=1e-4)
    assert cache.skipped == 3
