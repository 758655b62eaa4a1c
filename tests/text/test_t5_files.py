"""Finding T5 encoders on disk."""

import json

import pytest

from pixart_nodes.text import t5_files


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with the config.json of a T5 and empty files of the given names."""

    def make(name, *files, model_type="t5"):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
        for file in files:
            (path / file).touch()
        return path

    return make


def names(files):
    return [path.replace("\\", "/").rsplit("/", 1)[1] for path in files.weights]


def test_folders_and_files_are_listed_without_the_files_inside_the_folders(folder, tmp_path):
    folder("t5-xxl", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    folder("sorted/pixart/text_encoder", "model.safetensors")
    folder("clip/text_encoder", "model.safetensors", model_type="clip_text_model")
    folder(".cache/t5", "model.safetensors")
    files = [
        "clip_l.safetensors", "t5xxl_fp16.safetensors", "t5-xxl/pytorch_model-00001-of-00002.bin", "t5-xxl/notes.txt",
        "sorted/pixart/text_encoder/model.safetensors", "loose-00001-of-00002.bin", "loose-00002-of-00002.bin",
    ]  # fmt: skip
    assert t5_files.list_encoders([tmp_path], files) == [
        "sorted/pixart/text_encoder", "t5-xxl", "clip_l.safetensors", "t5xxl_fp16.safetensors",
        "loose-00001-of-00002.bin",
    ]  # fmt: skip


def test_the_text_encoder_of_a_pipeline_among_other_models_is_listed(folder, tmp_path):
    folder("diffusers/PixArt-Sigma/text_encoder", "model.safetensors")
    folder("diffusers/some-t5", "model.safetensors")
    folder("text_encoders/mine", "model.safetensors")
    found = t5_files.list_encoders([tmp_path / "text_encoders"], [], [tmp_path / "diffusers"])
    assert found == ["PixArt-Sigma/text_encoder", "mine"]
    path = t5_files.find("PixArt-Sigma/text_encoder", [tmp_path / "text_encoders", tmp_path / "diffusers"])
    assert names(t5_files.locate(path)) == ["model.safetensors"]


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_names_the_shards(folder, index):
    path = folder("t5", "b.safetensors", "a.safetensors", "other.safetensors", "pytorch_model.bin")
    (path / index).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}))
    assert names(t5_files.locate(str(path))) == ["a.safetensors", "b.safetensors"]


def test_shards_are_found_without_an_index_and_from_one_of_them(folder):
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    path = folder("t5", *shards)
    assert names(t5_files.locate(str(path))) == names(t5_files.locate(str(path / shards[1]))) == shards


def test_safetensors_are_preferred_to_bin_and_full_precision_to_a_variant(folder):
    path = folder("t5", "pytorch_model.bin", "model.fp16.safetensors", "model.safetensors")
    assert names(t5_files.locate(str(path))) == ["model.safetensors"]


def test_a_missing_shard_is_named(folder):
    path = folder("t5", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing.*2 of 3"):
        t5_files.locate(str(path))


def test_a_folder_without_weights_says_what_belongs_there(folder):
    with pytest.raises(FileNotFoundError, match="safetensors or .bin"):
        t5_files.locate(str(folder("t5")))


def test_tokenizers_are_found_in_the_folder_and_beside_it(folder):
    path = folder("pipeline/text_encoder", "model.safetensors", "spiece.model")
    folder("pipeline/tokenizer", "tokenizer.json", "spiece.model")
    found = [name.replace("\\", "/").split("/pipeline/")[1] for name in t5_files.locate(str(path)).tokenizers]
    assert found == ["text_encoder/spiece.model", "tokenizer/tokenizer.json", "tokenizer/spiece.model"]


def test_a_name_cannot_leave_its_root(folder, tmp_path):
    folder("secret", "model.safetensors")
    (tmp_path / "root").mkdir()
    with pytest.raises(FileNotFoundError, match="Reload"):
        t5_files.find("../secret", [tmp_path / "root"])
