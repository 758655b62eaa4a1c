import pytest
import torch

from pixart_nodes.checkpoints import load_controlnet, load_lora, load_transformer
from pixart_nodes.checkpoints.files import load_file_tensors
from pixart_nodes.training.__main__ import DONE, train

from .conftest import PARAMS, events_of, losses, read_status


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora", "dreambooth", "full", "weak-to-strong", "controlnet"])
def test_a_recipe_learns_two_pictures_by_heart(make_run, recipe):
    fields = {"weak_to_strong": {"caption_tokens": 300}} if recipe == "weak-to-strong" else {}
    if recipe == "controlnet":
        fields["controlnet"] = {"blocks": 1}
    folder = make_run(recipe, steps=120, family="sigma" if recipe == "weak-to-strong" else "alpha",
                      targets="all", **fields)  # fmt: skip
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    curve = torch.tensor(losses(folder))
    assert curve[-20:].mean() < 0.75 * curve[:10].mean()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lcm", "lcm-lora"])
def test_distillation_brings_the_student_nearer_to_its_target(make_run, recipe):
    rate = 1e-3 if recipe == "lcm" else 1e-2
    folder = make_run(recipe, steps=120, targets="all", learning_rate=rate)
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    curve = torch.tensor(losses(folder))
    assert curve[-30:].mean() < 0.8 * curve[:20].mean()


@pytest.mark.parametrize("recipe", ["lora", "dreambooth", "lcm-lora"])
@pytest.mark.parametrize("export", ["native", "kohya", "diffusers", "peft"])
def test_a_trained_lora_loads_without_an_unmatched_key_and_knows_its_alpha(make_run, recipe, export):
    folder = make_run(recipe, steps=1, targets="all" if export == "native" else "attn-mlp", alpha=4.0, save_every=1)
    config = folder.config().to_dict()
    config["output"]["export"] = export
    folder.write_config(type(folder.config()).from_dict(config))
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    lora = load_lora(read_status(folder)["output"])
    assert not lora.unmatched
    assert {adapter.strength.scale for adapter in lora.adapters} == {0.5}


def test_a_fine_tuned_model_loads_and_has_moved(make_run, tmp_path):
    folder = make_run("full", steps=2)
    assert train(folder.path / "run.json") == DONE
    model, found = load_transformer(read_status(folder)["output"])
    base, _ = load_transformer(folder.config().base.path)
    assert found.params == PARAMS and found.family == "alpha"
    assert not torch.equal(model.blocks[0].attn.qkv.weight, base.blocks[0].attn.qkv.weight)
    assert torch.equal(model.y_embedder.y_embedding, base.y_embedder.y_embedding)


def test_a_trained_controlnet_loads_and_its_base_is_untouched(make_run):
    folder = make_run("controlnet", steps=2, controlnet={"blocks": 1})
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    net, found = load_controlnet(read_status(folder)["output"])
    assert len(net.controlnet) == 1 and found.family == "alpha"
    assert net.controlnet[0].after_proj.weight.abs().sum() > 0


def test_weak_to_strong_changes_size_tokens_and_compression_and_the_file_says_so(make_run):
    wanted = {"base_size": 128, "caption_tokens": 300, "kv_sampling": "conv", "kv_layers": [1]}
    folder = make_run("weak-to-strong", family="sigma", steps=2, weak_to_strong=wanted)
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    model, found = load_transformer(read_status(folder)["output"])
    assert found.family == "sigma" and found.params.caption_tokens == 300
    assert found.params.base_size / found.params.pe_interpolation == PARAMS.base_size / PARAMS.pe_interpolation
    assert model.blocks[1].attn.sr.weight.shape == (48, 1, 2, 2)


@pytest.mark.parametrize(("recipe", "fields", "words"), [
    ("lora", {"optimizer": "prodigy"}, "prodigyopt"),
    ("lora", {"cache": "/nowhere"}, "/nowhere"),
    ("lora", {"base": {"path": "/nowhere.safetensors"}}, "/nowhere.safetensors"),
    ("controlnet", {"controlnet": {"blocks": 9}}, "controlnet.blocks is 9"),
    ("weak-to-strong", {}, "family sigma"),
    ("lora", {"family": "sigma"}, "made for PixArt sigma"),
    ("lcm", {"lcm": {"num_ddim_timesteps": 7}}, "must divide 1000"),
])  # fmt: skip
def test_what_cannot_work_fails_with_a_sentence(make_run, recipe, fields, words):
    folder = make_run(recipe, **fields)
    assert train(folder.path / "run.json") == 1
    status = read_status(folder)
    assert status["state"] == "failed" and words in status["error"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_lora_learns_beside_a_quantised_base(make_run, kind):
    pytest.importorskip("bitsandbytes")
    folder = make_run("lora", steps=3, base_quantization=kind)
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    assert not load_lora(read_status(folder)["output"]).unmatched


@pytest.mark.parametrize("recipe", ["lora", "lcm", "lcm-lora", "controlnet", "full"])
def test_half_precision_trains_weights_that_stay_in_single_precision(make_run, recipe):
    fields = {"controlnet": {"blocks": 1}} if recipe == "controlnet" else {}
    folder = make_run(recipe, steps=2, precision="bf16", save_every=2, gradient_checkpointing=True, sample_every=2,
                      **fields)  # fmt: skip
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    weights, _ = load_file_tensors(folder.checkpoints / "step-000002/weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert [event["step"] for event in events_of(folder, "sample")] == [0, 2]
