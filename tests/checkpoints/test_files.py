import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import files

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def same(left, right):
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture
def safe(tmp_path):
    path = tmp_path / "model.safetensors"
    files.save_atomic(WEIGHTS, path, {"who": "me"})
    return path


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_a_header_is_read_without_the_tensors(safe):
    header = files.read_header(safe)
    assert {name: (t.shape, t.dtype) for name, t in header.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in WEIGHTS.items()
    }
    assert all(tensor.is_meta for tensor in header.tensors.values())
    assert header.metadata["who"] == "me"


def test_safetensors_are_loaded_with_their_metadata(safe):
    loaded = files.load(safe)
    assert same(loaded.tensors, WEIGHTS) and loaded.metadata["who"] == "me" and loaded.config == {}


@pytest.mark.parametrize("length", [0x280, 0x3C20, 0x20, 0x50])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path, length):
    header = json.dumps({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, separators=(",", ":"))
    if len(header) > length:
        header = "{}"
    content = struct.pack("<Q", length) + header.ljust(length).encode() + struct.pack("<f", 2.0) * (header != "{}")
    path = write(tmp_path / "model.safetensors", content)
    assert set(files.read_header(path).tensors) == ({"a"} if header != "{}" else set())


def test_a_safetensors_file_with_a_wrong_extension_is_loaded(safe):
    path = safe.rename(safe.with_suffix(".pth"))
    assert same(files.load(path).tensors, WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles_of_tensors_are_loaded(tmp_path, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    assert same(files.load(path).tensors, WEIGHTS)


def test_the_user_chooses_between_weights_and_their_average(tmp_path):
    average = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": WEIGHTS, "state_dict_ema": average, "epoch": 3}, tmp_path / "both.pth")
    assert same(files.load(tmp_path / "both.pth").tensors, WEIGHTS)
    assert same(files.load(tmp_path / "both.pth", ema=True).tensors, average)


@pytest.mark.parametrize("content", [{"state_dict": WEIGHTS}, WEIGHTS, {"state_dict": WEIGHTS, "state_dict_ema": None}])
def test_asking_for_an_average_that_is_not_there_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth has no EMA weights.*set `weights` to model"):
        files.load(tmp_path / "plain.pth", ema=True)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, kind):
    trap, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"state_dict": WEIGHTS, "extra": Payload(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Payload(trap)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read.*not executed.*safetensors"):
        files.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "it is a web page"),
        (b"\n  <html>404</html>", "it is a web page"),
        (b"Repository not found", "it is no safetensors"),
        (b"\x00" * 100, "it is no safetensors"),
        (b"x", "it is no safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, suffix, content, complaint):
    path = write(tmp_path / f"model{suffix}", content)
    with pytest.raises(ValueError, match=rf"model\{suffix} cannot be read: {complaint}.*Please"):
        files.load(path)


@pytest.mark.parametrize("keep", [9, 20, 60, -1, -8])
def test_a_truncated_safetensors_file_is_refused(safe, keep):
    write(safe, safe.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*again"):
        files.load(safe)


@pytest.mark.parametrize("length", [0, 3, 2**20, 2**62])
def test_a_wrong_header_length_is_refused(safe, length):
    write(safe, struct.pack("<Q", length) + safe.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*header"):
        files.load(safe)


@pytest.mark.parametrize(
    "header",
    [b"{", b'{"a": 1}', b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1]}}', b'{"\xff": 1}'],
)  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path, header):
    path = write(tmp_path / "model.safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*damaged"):
        files.load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_a_truncated_pickle_is_refused(tmp_path, zipped, fraction):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path, _use_new_zipfile_serialization=zipped)
    write(path, path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(ValueError, match=r"model\.pth cannot be read"):
        files.load(path)


def test_a_zip_with_other_things_in_it_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"model\.pth cannot be read"):
        files.load(tmp_path / "model.pth")


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_to_a_pickle_never_escapes_as_another_error(tmp_path, seed):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=bool(seed % 2))
    content, pick = bytearray(path.read_bytes()), torch.Generator().manual_seed(seed)
    for place in torch.randint(0, len(content), (12,), generator=pick).tolist():
        content[place] = int(torch.randint(0, 256, (1,), generator=pick))
    write(path, bytes(content))
    try:
        assert set(files.load(path).tensors) <= {"a.weight", "b"}
    except ValueError as error:
        assert "model.pth" in str(error)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"epoch": 1}, {"state_dict": {}}, {}])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth cannot be read.*holds"):
        files.load(tmp_path / "model.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        files.load(tmp_path / "nothing.safetensors")


CONFIG = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 12}


@pytest.fixture
def folder(tmp_path):
    """A diffusers pipeline with an empty transformer folder that has a config."""
    transformer = tmp_path / "pipeline" / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    return transformer


def sharded(folder, index="diffusion_pytorch_model.safetensors.index.json"):
    for number, name in enumerate(WEIGHTS):
        save_file({name: WEIGHTS[name]}, folder / f"part-{number}.safetensors")
    weight_map = {name: f"part-{number}.safetensors" for number, name in enumerate(WEIGHTS)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
             "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json",
             "diffusion_pytorch_model.safetensors.index.fp16.json"],
)  # fmt: skip
def test_every_kind_of_diffusers_folder_is_loaded_from_itself_and_from_the_pipeline_above(folder, name):
    if name.endswith(".json"):
        sharded(folder, name)
    elif name.endswith(".bin"):
        torch.save(WEIGHTS, folder / name)
    else:
        save_file(WEIGHTS, folder / name)
    for path in (folder, folder.parent):
        loaded = files.load(path)
        assert same(loaded.tensors, WEIGHTS)
        assert loaded.config == {**CONFIG, "family": "sigma"}


def test_a_config_beside_a_single_file_is_found(folder):
    save_file(WEIGHTS, folder / "diffusion_pytorch_model.safetensors")
    assert files.load(folder / "diffusion_pytorch_model.safetensors").config == {**CONFIG, "family": "sigma"}


@pytest.mark.parametrize(
    "config", [{"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24}, {"d_model": 4}]
)
def test_a_config_of_something_else_beside_a_single_file_is_left_alone(safe, config):
    safe.with_name("config.json").write_text(json.dumps(config))
    assert files.load(safe).config == {}


def test_a_folder_of_another_model_is_called_what_it_is(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "FluxTransformer2DModel"}))
    save_file(WEIGHTS, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="holds a FluxTransformer2DModel"):
        files.load(folder)


def test_a_folder_without_weights_says_what_it_lacks(folder):
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        files.load(folder)


def test_missing_shards_lost_tensors_and_paths_outside_are_refused(folder):
    sharded(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    (folder / "part-0.safetensors").rename(folder / "gone")
    with pytest.raises(FileNotFoundError, match="part-0.safetensors does not exist"):
        files.load(folder)
    (folder / "gone").rename(folder / "part-0.safetensors")
    index.write_text(json.dumps({"weight_map": {"a.weight": "part-0.safetensors", "c": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match="its shards lack c"):
        files.load(folder)
    index.write_text(json.dumps({"weight_map": {"a.weight": "../part-0.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        files.load(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="it is no JSON"):
        files.load(folder)


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"whole": base, "again": base, "row": base[1], "transposed": base.t(), "empty": torch.zeros(0, 3)}
    files.save_atomic(tensors, tmp_path / "views.safetensors")
    assert same(load_file(tmp_path / "views.safetensors"), tensors)


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, existing):
    path = tmp_path / "model.safetensors"
    if existing:
        files.save_atomic(WEIGHTS, path)
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # from here on, writing fails as on a full disk
    try:
        with pytest.raises(OSError, match=r"model\.safetensors could not be written.*room on the disk"):
            files.save_atomic({"big": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == (["model.safetensors"] if existing else [])
    assert not existing or same(load_file(path), WEIGHTS)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_goes_when_the_file_is_written(tmp_path):
    left, written_now, other = (tmp_path / f".{name}.tmp" for name in (
        "a [1].safetensors.0123abcd", "a [1].safetensors.4567cdef", "b.safetensors.0123abcd"))  # fmt: skip
    for path in (left, written_now, other):
        path.write_text("half")
    for path in (left, other):
        os.utime(path, (1, 1))
    files.save_atomic(WEIGHTS, tmp_path / "a [1].safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a [1].safetensors", written_now.name, other.name}


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    files.save_atomic({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
