"""The feature cache: keyed by content, whole or absent, checked, resumable."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart_nodes.data import cache
from pixart_nodes.data.cache import Damaged, Store, content_key
from pixart_nodes.data.encode import fill, stores, weights_id
from pixart_nodes.data.index import Index, index_of
from pixart_nodes.data.manifest import ScanOptions, scan
from pixart_nodes.data.pictures import load_pixels

from .conftest import FakeEncoders, build_cache, picture

ROOT = Path(__file__).resolve().parents[2]


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def flip(path, offset=-8):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_filling_twice_encodes_nothing_and_touches_no_file(pictures, tmp_path):
    encoders = FakeEncoders()
    first = build_cache(pictures, tmp_path / "cache", encoders, prompts=["a fox"])
    before = tree(tmp_path / "cache")
    assert encoders.images == 7
    assert sorted(encoders.texts) == ["a fox", *(f"picture number {n}" for n in range(7))]
    second = build_cache(pictures, tmp_path / "cache", encoders, prompts=["a fox"])
    assert encoders.images == 7 and len(encoders.texts) == 8
    assert tree(tmp_path / "cache") == before and first.path == second.path


def test_a_changed_caption_picture_or_name_costs_only_what_changed(pictures, tmp_path):
    encoders = FakeEncoders()
    build_cache(pictures, tmp_path / "cache", encoders)
    (pictures / "p0.txt").write_text("another caption")
    picture(77).save(pictures / "p1.png")
    (pictures / "p2.png").rename(pictures / "renamed.png")
    (pictures / "p2.txt").rename(pictures / "renamed.txt")
    build_cache(pictures, tmp_path / "cache", encoders)
    assert encoders.images == 8 and encoders.texts[7:] == ["another caption"]


@pytest.mark.parametrize("change", [{"vae": "other"}, {"t5": "other"}, {"limit": 7}])
def test_another_vae_t5_or_limit_shares_nothing_that_depends_on_it(pictures, tmp_path, change):
    build_cache(pictures, tmp_path / "cache")
    other = FakeEncoders(**change)
    build_cache(pictures, tmp_path / "cache", other)
    assert (other.images, len(other.texts)) == ((7, 0) if "vae" in change else (0, 7))


def test_another_size_makes_other_latents_and_keeps_the_captions(pictures, tmp_path):
    build_cache(pictures, tmp_path / "cache")
    larger = FakeEncoders()
    index = build_cache(pictures, tmp_path / "cache", larger, ScanOptions(size="512", max_enlargement=4))
    assert (larger.images, larger.texts) == (7, []) and index.latent(0).shape == (8, 64, 64)


def test_cached_features_are_those_that_the_encoders_made(pictures, tmp_path):
    encoders = FakeEncoders()
    index = build_cache(pictures, tmp_path / "cache", encoders, batch_size=3, prompts=["a fox in snow"])
    for row, sample in enumerate(scan(pictures, ScanOptions(size="256")).samples):
        pixels = load_pixels(sample.path, sample.digest, *sample.bucket[1:])
        assert torch.equal(index.latent(row), encoders.encode_images(pixels[None])[0])
        assert torch.equal(index.caption(row).float(), encoders.features(sample.caption))
        assert index.name(row) == sample.name
    ((text, features),) = index.prompts()
    assert text == "a fox in snow" and torch.equal(features.float(), encoders.features(text))
    assert index.null_caption().shape == (120, 16)


def test_an_alpha_cache_never_feeds_a_sigma_model(pictures, tmp_path):
    index = build_cache(pictures, tmp_path / "cache", FakeEncoders("alpha"))
    with pytest.raises(ValueError, match="was made for PixArt alpha, but the model is sigma.*family sigma"):
        index.require("sigma")
    with pytest.raises(ValueError, match="captions of width 16, but the model takes 4096"):
        index.require("alpha", 4096)
    index.require("alpha", 16)


def test_one_vae_is_not_taken_for_both_families_in_one_cache(pictures, tmp_path):
    build_cache(pictures, tmp_path / "cache", FakeEncoders("alpha", vae="sd"))
    with pytest.raises(ValueError, match="used for PixArt alpha in .*, and now for sigma"):
        build_cache(pictures, tmp_path / "cache", FakeEncoders("sigma", vae="sd"))


def test_a_torn_shard_is_put_aside_and_its_content_made_again(pictures, tmp_path):
    build_cache(pictures, tmp_path / "cache")
    (shard,) = shards(tmp_path / "cache" / "latents")
    shard.write_bytes(shard.read_bytes()[:-100])
    encoders = FakeEncoders()
    index = build_cache(pictures, tmp_path / "cache", encoders)
    assert (encoders.images, encoders.texts) == (7, [])
    assert shard.with_name(shard.name + ".damaged").exists() and torch.isfinite(index.latent(6)).all()


def test_a_shard_that_another_process_put_aside_first_is_no_error(pictures, tmp_path):
    build_cache(pictures, tmp_path / "cache")
    (shard,) = shards(tmp_path / "cache" / "latents")
    store = Store(shard.parent)
    shard.unlink()
    store.put_aside(shard, Damaged("torn."))
    assert not store.set_aside and len(store.verify()) == 1


def test_a_flipped_bit_is_noticed_when_it_is_read_and_found_by_verify(pictures, tmp_path):
    index = build_cache(pictures, tmp_path / "cache")
    (shard,) = shards(tmp_path / "cache" / "latents")
    flip(shard)
    with pytest.raises(Damaged, match=f"{shard.name} is damaged.*verify on"):
        [index.latent(row) for row in range(7)]
    store = Store(shard.parent)
    assert store.verify() == [shard.name] and not store.places
    encoders = FakeEncoders()
    index = build_cache(pictures, tmp_path / "cache", encoders)
    assert encoders.images == 7 and [index.latent(row).shape for row in range(7)]


@pytest.mark.parametrize("content", [b"", b"\x05", b"<html>", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_foreign_files_in_the_folder_do_no_harm(pictures, tmp_path, content):
    index = build_cache(pictures, tmp_path / "cache")
    stranger = shards(tmp_path / "cache" / "captions")[0].with_name("stranger.safetensors")
    stranger.write_bytes(content)
    encoders = FakeEncoders()
    again = build_cache(pictures, tmp_path / "cache", encoders)
    assert encoders.images == 0 and again.path == index.path and not stranger.exists()


def test_a_shard_that_is_gone_is_named(pictures, tmp_path):
    index = build_cache(pictures, tmp_path / "cache")
    shards(tmp_path / "cache" / "captions")[0].unlink()
    with pytest.raises(Damaged, match="cannot be read.*Run PixArtCacheFeatures again"):
        index.caption(0)


def test_a_cache_can_be_moved(pictures, tmp_path):
    index = build_cache(pictures, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    moved = Index(tmp_path / "moved" / index.path.relative_to(tmp_path / "cache"))
    assert moved.latent(3).shape == (8, 32, 32) and moved.caption(3).shape == (3, 16)


def test_no_training_set_and_a_broken_one_are_named(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="Run PixArtCacheFeatures again"):
        Index(tmp_path / "sets" / "none.safetensors")
    index = build_cache(pictures, tmp_path / "cache")
    with pytest.raises(Damaged, match="is no training set"):
        Index(shards(tmp_path / "cache" / "latents")[0])
    index.path.write_bytes(index.path.read_bytes()[:-9])
    with pytest.raises(Damaged, match="is damaged"):
        Index(index.path)


def test_a_picture_that_changed_since_the_scan_stops_with_its_name_and_keeps_the_others(pictures, tmp_path):
    manifest = scan(pictures, ScanOptions(size="256"))
    picture(123).save(pictures / "p3.png")
    record = FakeEncoders().record()
    latents, captions = stores(tmp_path / "cache", record)
    with pytest.raises(ValueError, match="p3.png has changed since"):
        fill(manifest, record, latents, captions)
    assert len(Store(latents.folder).places) == 3
    with pytest.raises(ValueError, match="are missing from"):
        index_of(tmp_path / "cache", manifest, record, latents, captions)


@pytest.mark.parametrize("part", ["encode_images", "encode_captions"])
def test_features_with_nan_are_refused_with_their_source(pictures, tmp_path, part):
    encoders = FakeEncoders()
    broken = {
        "encode_images": lambda pixels: torch.full((len(pixels), 8, 32, 32), torch.nan),
        "encode_captions": lambda texts: [torch.full((3, 16), 1e6) for _ in texts],  # beyond fp16
    }
    setattr(encoders, part, broken[part])
    source = "p0.png" if part == "encode_images" else "picture number 0"
    with pytest.raises(ValueError, match=f"NaN or infinity of .*{source}"):
        build_cache(pictures, tmp_path / "cache", encoders)


def test_cancelling_keeps_what_was_encoded(pictures, tmp_path):
    class Cancel(BaseException):
        pass

    def cancel(done, total):
        if done == 4:
            raise Cancel

    with pytest.raises(Cancel):
        build_cache(pictures, tmp_path / "cache", progress=cancel)
    rest = FakeEncoders()
    build_cache(pictures, tmp_path / "cache", rest)
    assert rest.images == 3


def test_processes_share_the_work_without_overlap_and_see_each_others_shards(pictures, tmp_path):
    manifest, parts = scan(pictures, ScanOptions(size="256")), [FakeEncoders() for _ in range(3)]
    for rank, part in enumerate(parts):
        fill(manifest, part.record(), *stores(tmp_path / "cache", part.record(), rank), rank=rank, world=3)
    assert sum(part.images for part in parts) == 7 and min(part.images for part in parts) >= 2
    record = FakeEncoders().record()
    index = index_of(tmp_path / "cache", manifest, record, *stores(tmp_path / "cache", record))
    assert len(index) == 7


WRITER = """
import sys, torch
from pixart_nodes.data import cache
cache.SHARD_BYTES = 40_000
store = cache.Store(sys.argv[1])
for number in range(10_000):
    key = cache.content_key("n", number)
    if key not in store:
        store.put(key, torch.full((100, 100), float(number)))
    if number % 10 == 0:
        print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_only_whole_shards_and_the_next_one_goes_on(tmp_path):
    for least in (30, 60):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        for line in process.stdout:
            if int(line) >= least:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
        store = Store(tmp_path)
        assert not store.set_aside and len(store.places) >= least - 10
        for number in range(len(store.places)):
            assert (store.read(content_key("n", number)) == number).all()
        assert not store.verify()


def test_unfinished_files_are_removed_once_they_are_old(tmp_path):
    fresh, old = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    Store(tmp_path).sweep()
    assert fresh.exists() and not old.exists()


def test_a_full_shard_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1000)
    store = Store(tmp_path)
    for number in range(5):
        store.put(content_key(number), torch.zeros(100))
    assert len(shards(tmp_path)) == 1
    store.flush()
    assert len(shards(tmp_path)) == 2 and len(Store(tmp_path).places) == 5


def test_an_id_follows_the_weights_and_neither_their_order_nor_bf16():
    weights = [torch.randn(64, 64), torch.randn(7), torch.tensor(3.0), torch.zeros(0)]
    same = weights_id(weights)
    assert weights_id(reversed(weights)) == same == weights_id([w.bfloat16() for w in weights])
    assert weights_id([weights[0].view(64, 64, 1, 1), *weights[1:]]) == same
    assert weights_id([weights[0] * 1.1, *weights[1:]]) != same != weights_id(weights, "tokenizer")
    assert weights_id(weights[:2]) != same


def test_a_set_without_pictures_is_refused(pictures, tmp_path):
    manifest = replace(scan(pictures, ScanOptions(size="256")), samples=())
    record = FakeEncoders().record()
    both = stores(tmp_path / "cache", record)
    fill(manifest, record, *both)
    with pytest.raises(ValueError, match="no usable picture"):
        index_of(tmp_path / "cache", manifest, record, *both)


def test_comfyuis_process_does_not_load_what_only_the_shell_command_needs():
    """The nodes import these; transformers' models, diffusers and accelerate take seconds."""
    modules = "buckets cache captions dataset encode imports index manifest pictures sources".split()
    code = f"import sys\nfrom pixart_nodes.data import {', '.join(modules)}\n"
    code += "sys.exit(' '.join({'transformers', 'diffusers', 'accelerate'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
