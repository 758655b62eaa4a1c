import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from pixart_nodes.checkpoints import load_controlnet, load_lora, load_transformer
from pixart_nodes.checkpoints.files import load_file_tensors, save_atomic
from pixart_nodes.checkpoints.keys import Y_EMBEDDING
from pixart_nodes.diffusion.consistency import consistency_function
from pixart_nodes.diffusion.schedule import alphas_cumprod
from pixart_nodes.training.__main__ import DONE, make_accelerator, train
from pixart_nodes.training.config import RECIPES
from pixart_nodes.training.trainer import Trainer

from .conftest import PARAMS, events_of, losses, random, read_status, write_base, write_cache


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_halves_its_loss_on_two_pictures_within_fifty_steps(make_run, recipe):
    rate, family = 3e-3 if recipe == "lcm" else 1e-2, "sigma" if recipe == "weak-to-strong" else "alpha"
    fields = {"controlnet": {"blocks": 1}} if recipe == "controlnet" else {}
    folder = make_run(recipe, family=family, batch_size=8, targets="all", learning_rate=rate, **fields)
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    curve = torch.tensor(losses(folder))
    assert len(curve) == 50 and curve[-10:].mean() < 0.5 * curve[:5].mean()


@pytest.mark.slow
def test_an_lcm_lora_makes_one_step_better_than_the_bases(make_run):
    """The base learns the two pictures first; then both draw them from pure noise in one step."""
    taught = make_run("full", name="taught", steps=150, batch_size=8)
    assert train(taught.path / "run.json") == DONE
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = make_run("lcm-lora", base={"path": read_status(taught)["output"]}, batch_size=8, targets="all", rank=32,
                      alpha=32.0, learning_rate=3e-3, lcm={"guidance": 1.0})  # fmt: skip
    trainer = Trainer(folder.config(), folder, make_accelerator("fp32"))
    trainer.run()
    network, alphas, noise = trainer.recipe.network, alphas_cumprod(), random(16, 4, 8, 8, seed=7)
    errors = []
    for adapter in (nullcontext(), network.disable_adapter()):
        with adapter, torch.no_grad():
            for row in range(2):
                context = trainer.index.caption(row).float().expand(16, -1, -1)
                t = torch.full((16,), 999)
                drawn = consistency_function(noise, network(noise, t, context), t, alphas)
                picture = trainer.index.latent(row) * trainer.index.meta["latent_scale"]
                errors.append((drawn - picture).square().mean().item())
    assert max(errors[:2]) < 0.5 * min(errors[2:]), errors


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
    ("lora", {"cache": "/nowhere"}, "/nowhere"),
    ("lora", {"base": {"path": "/nowhere.safetensors"}}, "/nowhere.safetensors"),
    ("controlnet", {"controlnet": {"blocks": 9}}, "controlnet.blocks is 9"),
    ("weak-to-strong", {}, "family sigma"),
    ("lora", {"family": "sigma"}, "Run PixArtCacheFeatures with family alpha"),
    ("lcm", {"lcm": {"num_ddim_timesteps": 7}}, "must divide 1000"),
])  # fmt: skip
def test_what_cannot_work_fails_with_a_sentence(make_run, recipe, fields, words):
    folder = make_run(recipe, **fields)
    assert train(folder.path / "run.json") == 1
    status = read_status(folder)
    assert status["state"] == "failed" and words in status["error"]


def test_an_alpha_cache_is_refused_by_a_sigma_model_with_what_to_do(make_run, tmp_path):
    params = replace(PARAMS, caption_tokens=300)
    base = write_base(tmp_path / "sigma.safetensors", params, "sigma")
    folder = make_run("lora", base={"path": str(base)})
    assert train(folder.path / "run.json") == 1
    error = read_status(folder)["error"]
    assert "made for PixArt alpha" in error and "Run PixArtCacheFeatures with family sigma" in error


def test_one_picture_is_enough_to_train_on(make_run, tmp_path):
    write_cache(tmp_path / "cache-alpha", roles=("train",), control=False)
    folder = make_run("lora", steps=3, batch_size=2, gradient_accumulation_steps=2, sample_every=3)
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    assert len(losses(folder)) == 3 and not load_lora(read_status(folder)["output"]).unmatched


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_one_pass_of_the_teacher_gives_what_two_would(make_run, tmp_path, family):
    base = write_base(tmp_path / "teacher.safetensors", replace(PARAMS, caption_tokens=300), family)
    folder = make_run("lcm", family=family, base={"path": str(base), "family": family})
    recipe = (trainer := Trainer(folder.config(), folder, make_accelerator("fp32"))).recipe
    batch, x, t = trainer.batches.batch(0), random(2, 4, 8, 8, seed=3), torch.tensor([19, 959])
    with torch.no_grad():
        cond, uncond = recipe.guided_pair(x, t, batch, {})
        torch.testing.assert_close(cond, recipe.teacher(x, t, batch.context, batch.mask))
        torch.testing.assert_close(uncond, recipe.teacher(x, t, *recipe.null(batch)))
    assert (recipe.null(batch)[0].shape[1] == 1) == (family == "sigma")


def without_null_caption(path, family):
    """A base as diffusers saves it: without the buffer of the null caption."""
    write_base(path, replace(PARAMS, caption_tokens={"alpha": 120, "sigma": 300}[family]), family)
    tensors, metadata = load_file_tensors(path)
    del tensors[Y_EMBEDDING]
    save_atomic(tensors, path, metadata)
    return {"path": str(path)}


@pytest.mark.parametrize("recipe", ["lora", "full", "controlnet", "lcm-lora"])
@pytest.mark.parametrize("has_one", [True, False], ids=["in the file", "not in the file"])
def test_sigmas_null_caption_is_the_caches_whatever_the_base_has(make_run, tmp_path, recipe, has_one):
    base = without_null_caption(tmp_path / "sigma.safetensors", "sigma")
    if has_one:
        write_base(tmp_path / "sigma.safetensors", replace(PARAMS, caption_tokens=300), "sigma")
    folder = make_run(recipe, family="sigma", base=base, controlnet={"blocks": 1})
    trainer = Trainer(folder.config(), folder, make_accelerator("fp32"))
    rows = trainer.recipe.null_caption(batch := trainer.batches.batch(0))
    torch.testing.assert_close(rows, trainer.index.null_caption()[: batch.context.shape[1]].to(rows))


def test_alphas_null_caption_is_that_of_its_file_though_the_cache_has_another(make_run, tmp_path):
    write_cache(tmp_path / "cache-alpha", null=True)
    folder = make_run("lcm")
    recipe = (trainer := Trainer(folder.config(), folder, make_accelerator("fp32"))).recipe
    stored, _ = load_file_tensors(tmp_path / "base.safetensors")
    batch = trainer.batches.batch(0)
    null, mask = recipe.null(batch)
    torch.testing.assert_close(null[0], stored[Y_EMBEDDING][: null.shape[1]].to(null))
    assert torch.equal(mask, batch.mask)


def test_an_alpha_without_a_null_caption_takes_the_caches_or_is_refused(make_run, tmp_path):
    base = without_null_caption(tmp_path / "alpha.safetensors", "alpha")
    folder = make_run("lora", base=base)
    with pytest.raises(ValueError, match="Neither the base model .* nor the cache .* has a null caption"):
        Trainer(folder.config(), folder, make_accelerator("fp32"))
    shutil.rmtree(tmp_path / "cache-alpha")
    write_cache(tmp_path / "cache-alpha", null=True)
    trainer = Trainer(folder.config(), folder, make_accelerator("fp32"))
    rows = trainer.recipe.null_caption(trainer.batches.batch(0))
    torch.testing.assert_close(rows, trainer.index.null_caption()[: len(rows)].to(rows))


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
