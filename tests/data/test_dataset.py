"""Batches: one bucket each, every picture, the same order for any number of processes, resumable."""

from collections import Counter
from itertools import islice

import pytest
import torch

from pixart_nodes.data.dataset import Batches
from pixart_nodes.data.encode import fill, stores
from pixart_nodes.data.index import index_of
from pixart_nodes.data.manifest import ScanOptions, scan

from .conftest import FakeEncoders, build_cache, picture, write_pictures


@pytest.fixture
def index(tmp_path):
    """11 square pictures, 6 wide ones and 1 tall one."""
    write_pictures(tmp_path / "pictures", [(256, 256)] * 11 + [(320, 192)] * 6 + [(128, 512)])
    return build_cache(tmp_path / "pictures", tmp_path / "cache")


def epoch(batches):
    return [batches.rows(step) for step in range(batches.per_epoch)]


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


def test_an_epoch_shows_every_picture_and_every_batch_is_of_one_bucket(index):
    batches = Batches(index, "alpha", 4)
    rows = epoch(batches)
    assert all(len({index.bucket(row) for row in batch}) == 1 for batch in rows)
    counts = Counter(row for batch in rows for row in batch)
    assert set(counts) == set(range(18)) and sum(counts.values()) == 12 + 8 + 4
    square = [counts[row] for row in range(18) if index.bucket(row).ratio == 1.0]
    assert sorted(square) == [1] * 10 + [2]


def test_no_picture_comes_twice_in_a_batch_unless_its_bucket_is_too_small(index):
    batches = Batches(index, "alpha", 4)
    for step in range(3 * batches.per_epoch):
        rows = batches.rows(step)
        if index.bucket(rows[0]).ratio == 1.0:
            assert len(set(rows)) == 4


def test_epochs_and_seeds_differ_and_the_same_seed_does_not(index):
    first, again, other = (Batches(index, "alpha", 4, seed=seed) for seed in (1, 1, 2))
    assert epoch(first) == epoch(again) != epoch(other)
    assert epoch(first) != [first.rows(step + first.per_epoch) for step in range(first.per_epoch)]


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_see_together_what_one_sees(index, world):
    one = Batches(index, "alpha", 4, seed=3)
    parts = [Batches(index, "alpha", 4 // world, rank=rank, world=world, seed=3) for rank in range(world)]
    for step in range(2 * one.per_epoch):
        assert one.rows(step) == [row for part in parts for row in part.rows(step)]
    whole, shares = one.batch(7), [part.batch(7) for part in parts]
    assert torch.equal(whole.latent, torch.cat([share.latent for share in shares]))
    assert [row.tolist() for row in whole.mask.sum(1)] == [n for share in shares for n in share.mask.sum(1).tolist()]


def test_a_resumed_iteration_goes_on_with_the_same_batches(index):
    straight = list(islice(Batches(index, "alpha", 4), 15))
    first = Batches(index, "alpha", 4)
    list(islice(first, 6))
    state = first.state_dict()
    assert state["step"] == 6  # what was handed out, not what was read ahead
    second = Batches(index, "alpha", 2, rank=1, world=2)
    second.load_state_dict(state)
    third = Batches(index, "alpha", 4)
    third.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(straight[6:], islice(third, 9), strict=True))
    assert next(iter(second)).rows == straight[6].rows[2:]


def test_a_smaller_batch_goes_on_after_as_many_pictures(index, caplog):
    first = Batches(index, "alpha", 4)
    list(islice(first, 6))
    second = Batches(index, "alpha", 3)
    second.load_state_dict(first.state_dict())
    assert second.step == 8 and "a batch had 4 pictures and has 3 now" in caplog.text


def test_a_state_of_another_run_is_refused(index, tmp_path):
    state = Batches(index, "alpha", 4, seed=5).state_dict()
    with pytest.raises(ValueError, match="the seed is 6, and was 5"):
        Batches(index, "alpha", 4, seed=6).load_state_dict(state)
    picture(500).save(tmp_path / "pictures" / "new.png")
    (tmp_path / "pictures" / "new.txt").write_text("new")
    with pytest.raises(ValueError, match="the data set has changed"):
        Batches(build_cache(tmp_path / "pictures", tmp_path / "cache"), "alpha", 4, seed=5).load_state_dict(state)


@pytest.mark.parametrize("world", [1, 2])
def test_one_picture_is_enough(tmp_path, world):
    write_pictures(tmp_path / "pictures", [(256, 256)])
    index = build_cache(tmp_path / "pictures", tmp_path / "cache")
    batches = Batches(index, "alpha", 3, rank=world - 1, world=world)
    assert [batch.rows for batch in islice(batches, 4)] == [(0, 0, 0)] * 4
    assert f"{3 * world - 1} repeated to fill a batch" in batches.summary()


def test_a_batch_holds_scaled_latents_padded_captions_and_sizes(tmp_path):
    encoders = FakeEncoders()
    write_pictures(tmp_path / "pictures", [(300, 280)] * 2)
    (tmp_path / "pictures" / "p1.txt").write_text("five words are in here")
    index = build_cache(tmp_path / "pictures", tmp_path / "cache", encoders)
    batch = Batches(index, "alpha", 2, sample_latents=False).batch(0)
    assert batch.latent.shape == (2, 4, *(side // 8 for side in index.buckets[0][1:]))
    for slot, row in enumerate(batch.rows):
        assert torch.allclose(batch.latent[slot], index.latent(row)[:4] * 0.18215)
        length = len(index.caption(row))
        assert torch.equal(batch.context[slot, :length], index.caption(row)) and not batch.context[slot, length:].any()
        assert batch.mask[slot].tolist() == [True] * length + [False] * (5 - length)
    assert batch.img_hw.tolist() == [[280, 300]] * 2 and batch.control is None
    assert batch.aspect_ratio.tolist() == pytest.approx([index.buckets[0].ratio] * 2)


def test_latents_are_drawn_from_the_vaes_distribution_anew_each_time(index):
    batches = Batches(index, "alpha", 4)
    assert same(batches.batch(3), batches.batch(3))
    draws = [batches.batch(step) for step in (0, batches.per_epoch)]
    assert not torch.equal(draws[0].latent, draws[1].latent)
    means = torch.stack([index.latent(row)[:4] for row in draws[0].rows])
    noise = draws[0].latent / 0.18215 - means
    assert abs(noise.std() - 0.5) < 0.01 and abs(noise.mean()) < 0.01


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)])
def test_own_and_vlm_captions_are_mixed_in_the_ratio_that_was_asked_for(tmp_path, ratio, low, high):
    write_pictures(tmp_path / "pictures", [(256, 256)] * 8)
    for number in range(8):
        (tmp_path / "pictures" / f"p{number}.vlm.txt").write_text("a longer text of seven words here")
    options = ScanOptions(size="256", real_caption_ratio=ratio)
    batches = Batches(build_cache(tmp_path / "pictures", tmp_path / "cache", options=options), "alpha", 8)
    lengths = torch.cat([batches.batch(step).mask.sum(1) for step in range(40)])
    own = (lengths == 3).float().mean().item()
    assert set(lengths.tolist()) <= {3, 7} and low <= own <= high


def test_control_latents_come_along(tmp_path):
    write_pictures(tmp_path / "pictures", [(256, 256)] * 2)
    for number in range(2):
        picture(70 + number).save(tmp_path / "pictures" / f"p{number}.control.png")
    index = build_cache(tmp_path / "pictures", tmp_path / "cache")
    batch = Batches(index, "alpha", 2).batch(0)
    assert torch.allclose(batch.control[0], index.latent(batch.rows[0], "control")[:4] * 0.18215)
    assert not torch.allclose(batch.control, batch.latent, atol=0.1)


def test_repeats_and_roles_of_joined_data_sets_are_kept(tmp_path):
    first = write_pictures(tmp_path / "a", [(256, 256)] * 3)
    second = write_pictures(tmp_path / "b", [(256, 256)] * 2, start=10)
    prior = scan(second, ScanOptions(size="256", role="prior"))
    manifest = scan(first, ScanOptions(size="256", repeats=4)).joined(prior)
    record = FakeEncoders().record()
    both = stores(tmp_path / "cache", record)
    fill(manifest, record, *both)
    index = index_of(tmp_path / "cache", manifest, record, *both)
    train, prior = Batches(index, "alpha", 1), Batches(index, "alpha", 1, role="prior")
    assert Counter(row for batch in epoch(train) for row in batch) == {2: 4, 3: 4, 4: 4}
    assert sorted(row for batch in epoch(prior) for row in batch) == [0, 1]
    with pytest.raises(ValueError, match="has no pictures for validation"):
        Batches(index, "alpha", 1, role="validation")


def test_the_other_family_and_impossible_shares_are_refused(index):
    with pytest.raises(ValueError, match="made for PixArt alpha, but the model is sigma"):
        Batches(index, "sigma", 1)
    with pytest.raises(ValueError, match="batch_size 0"):
        Batches(index, "alpha", 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Batches(index, "alpha", 1, rank=2, world=2)


def test_a_damaged_shard_ends_the_iteration_with_its_name(index):
    shard = next((index.root / "latents").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\0\1\2\3"
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        list(islice(Batches(index, "alpha", 1), 30))


def test_what_a_reader_keeps_in_memory_does_not_grow_with_captions_and_latents(tmp_path):
    index = build_cache(write_pictures(tmp_path / "p", [(256, 256)] * 20), tmp_path / "cache")
    longer = ScanOptions(size="256", trigger_word=" ".join(["long"] * 90))
    other = build_cache(tmp_path / "p", tmp_path / "cache", options=longer)
    assert index.state_bytes() == other.state_bytes() < 20 * 80
