"""Features that PixArt's own scripts extracted, as both repositories write and name them."""

import json
import shutil

import numpy as np
import pytest
import torch

from pixart_nodes.data.dataset import Batches
from pixart_nodes.data.imports import import_features

FOLDERS = {
    "sigma": ("img_sdxl_vae_features_512resolution_ms_new", "caption_features_new", 300, np.float16),
    "alpha": ("img_vae_fatures_512_multiscale/ms", "caption_feature_wmask", 120, np.float32),
}
SHAPES = {"cats/a.png": (64, 64), "cats/b.b.jpg": (56, 72), "c.png": (64, 64)}


def write_features(root, family, joined_names=True):
    """What tools/extract_features.py leaves -> {name: (latent, features of the caption's tokens)}."""
    latents, captions, limit, dtype = FOLDERS[family]
    generator, written = np.random.default_rng(0), {}
    records = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        path = name.rsplit(".", 1)[0]
        stem = path.replace("/", "_") if joined_names else path.split("/")[-1]
        latent = generator.standard_normal((8, *shape)).astype(np.float32)
        features = generator.standard_normal((1, limit, 32)).astype(dtype)
        tokens = 5 + number
        mask = (np.arange(limit) < tokens).astype(np.int16)[None]
        for folder in (latents, captions):
            (root / folder).mkdir(parents=True, exist_ok=True)
        np.save(root / latents / f"{stem}.npy", latent)
        np.savez_compressed(root / captions / f"{stem}.npz", caption_feature=features, attention_mask=mask)
        if family == "sigma":
            (root / "sharegpt4v_caption_features_new").mkdir(exist_ok=True)
            np.savez_compressed(
                root / "sharegpt4v_caption_features_new" / f"{stem}.npz", caption_feature=features * 2,
                attention_mask=mask,
            )  # fmt: skip
        records.append({"path": name, "prompt": "own", "sharegpt4v": "vlm", "height": 700, "width": 800, "ratio": 1.0})
        written[name] = torch.from_numpy(latent), torch.from_numpy(features[0, :tokens]).half()
    (root / "data_info.json").write_text(json.dumps(records))
    return written


@pytest.mark.parametrize("joined_names", [True, False])
@pytest.mark.parametrize("family", list(FOLDERS))
def test_features_arrive_as_they_were_under_the_right_family(tmp_path, family, joined_names):
    written = write_features(tmp_path / "data", family, joined_names)
    index, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert not problems and index.family == family and len(index) == 3
    for row in range(3):
        latent, features = written[index.name(row)]
        assert torch.equal(index.latent(row), latent) and torch.equal(index.caption(row), features)
        if family == "sigma":
            assert torch.equal(index.caption(row, "vlm_caption"), features * 2)
    batch = Batches(index, family, 1, caption_dim=32).batch(0)
    assert batch.img_hw.tolist() == [[700, 800]] and index.meta["size"] == "512"
    with pytest.raises(ValueError, match=f"made for PixArt {family}"):
        index.require("alpha" if family == "sigma" else "sigma")


def test_importing_twice_changes_nothing(tmp_path):
    write_features(tmp_path / "data", "sigma")
    first, _ = import_features(tmp_path / "data", tmp_path / "cache")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    second, _ = import_features(tmp_path / "data", tmp_path / "cache")
    assert first.path == second.path
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


def test_each_bad_feature_is_listed_and_the_rest_is_taken(tmp_path):
    write_features(tmp_path / "data", "sigma")
    latents, captions = (tmp_path / "data" / name for name in FOLDERS["sigma"][:2])
    np.save(latents / "cats_a.npy", np.full((8, 64, 64), np.nan, np.float32))
    torn = (captions / "cats_b.b.npz").read_bytes()
    (captions / "cats_b.b.npz").write_bytes(torn[: len(torn) // 2])
    index, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert [index.name(row) for row in range(len(index))] == ["c.png"]
    assert [problem.name for problem in problems] == ["cats/a.png", "cats/b.b.jpg"]
    assert "NaN" in problems[0].detail
    (latents / "c.npy").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="no picture whose features can be used"):
        import_features(tmp_path / "data", tmp_path / "other")


def flip_bytes(path):
    data = bytearray(path.read_bytes())
    for at in range(300, 340):
        data[at] ^= 0x5A
    path.write_bytes(data)


def save_captions(path, features, mask=None):
    np.savez_compressed(path, caption_feature=features, attention_mask=np.eye(1, 300) if mask is None else mask)


def other(path, folder):
    return path.parents[1] / FOLDERS["sigma"][folder]


WORDS = np.array([["x"]])
SPOILT = {
    "flipped bytes": (1, flip_bytes, "cats_a.npz cannot be read"),
    "words as latent": (0, lambda path: np.save(path, WORDS), "cats_a.npy cannot be read (it holds <U1 instead of num"),
    "complex latent": (0, lambda path: np.save(path, np.zeros((8, 64, 64), complex)), "complex128 instead of numbers"),
    "an archive as latent": (0, lambda path: shutil.copy(other(path, 1) / "c.npz", path), "cats_a.npy cannot be read"),
    "an array as captions": (1, lambda path: shutil.copy(other(path, 0) / "c.npy", path), "cats_a.npz cannot be read"),
    "words as mask": (1, lambda path: save_captions(path, np.ones((1, 300, 32)), WORDS), "cats_a.npz cannot be read"),
    "scalar captions": (1, lambda path: save_captions(path, np.float32(1)), "no T5 feature: its shape is ()"),
    "empty captions": (1, lambda path: save_captions(path, np.ones((1, 300, 0))), "its shape is (1, 300, 0)"),
    "wider captions": (1, lambda path: save_captions(path, np.ones((1, 300, 64))), "width 32 and 64, but most"),
    "narrow latent": (0, lambda path: np.save(path, np.zeros((4, 64, 64))), "it has 4 latent channels"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_feature_is_the_problem_of_its_picture_alone(tmp_path, fault):
    folder, spoil, message = SPOILT[fault]
    write_features(tmp_path / "data", "sigma")
    spoil(tmp_path / "data" / FOLDERS["sigma"][folder] / ("cats_a.npz" if folder else "cats_a.npy"))
    index, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert [index.name(row) for row in range(len(index))] == ["cats/b.b.jpg", "c.png"]
    assert [problem.name for problem in problems] == ["cats/a.png"] and message in problems[0].detail


@pytest.mark.parametrize(("field", "value", "message"), [
    ("height", [512], "its height in the list is [512] instead of a number of pixels"), ("width", "x", "'x' instead"),
    ("height", -5, "is -5 instead"), ("width", 2**40, "instead of a number"), ("height", 1e999, "is inf instead"),
    ("path", 5, "record 0, has 5 where text belongs"), ("path", "n" * 300, "nnn"), ("prompt", [1], "has [1]"),
])  # fmt: skip
def test_a_wrong_record_is_the_problem_of_its_picture_alone(tmp_path, field, value, message):
    write_features(tmp_path / "data", "sigma")
    records = json.loads((tmp_path / "data" / "data_info.json").read_text())
    records[0][field] = value
    (tmp_path / "data" / "data_info.json").write_text(json.dumps(records))
    index, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert [index.name(row) for row in range(len(index))] == ["cats/b.b.jpg", "c.png"]
    assert len(problems) == 1 and message in problems[0].detail


def test_names_that_the_extractor_cut_at_their_first_dot_are_not_mixed_up(tmp_path):
    write_features(tmp_path / "data", "sigma", joined_names=False)
    for name in FOLDERS["sigma"][:2]:
        (file,) = (tmp_path / "data" / name).glob("b.b.*")
        file.rename(file.with_name(f"b{file.suffix}"))
    _, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert [problem.name for problem in problems] == ["cats/b.b.jpg"] and "first dot" in problems[0].detail


def test_latents_of_a_size_that_is_in_no_table_are_listed(tmp_path):
    write_features(tmp_path / "data", "alpha")
    np.save(tmp_path / "data" / FOLDERS["alpha"][0] / "c.npy", np.zeros((8, 61, 67), np.float32))
    _, problems = import_features(tmp_path / "data", tmp_path / "cache")
    assert "536 x 488 pixels, which is in none of PixArt's tables" in problems[0].detail


def test_a_folder_without_features_or_list_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no features of PixArt's"):
        import_features(tmp_path, tmp_path / "cache")
    write_features(tmp_path / "data", "sigma")
    (tmp_path / "data" / "data_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="no data_info.json"):
        import_features(tmp_path / "data", tmp_path / "cache")
