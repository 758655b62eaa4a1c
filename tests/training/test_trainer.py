import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pixart_nodes.checkpoints import load_transformer
from pixart_nodes.data.dataset import Batches
from pixart_nodes.data.index import Index
from pixart_nodes.training import trainer as module
from pixart_nodes.training.__main__ import DONE, FAILED, STOPPED, main, make_accelerator, train
from pixart_nodes.training.trainer import Trainer, learning_rate

from .conftest import events_of, losses, read_status, write_cache


def weights_of(folder):
    return load_transformer(read_status(folder)["output"])[0].state_dict()


def same(first, second):
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


def gradients(folder, batches):
    """What a trainer adds up over the micro-batches, with the rows of `batches`."""
    trainer = Trainer(folder.config(), folder, make_accelerator("fp32"))
    trainer.batches, trainer.stream = batches, iter(batches)
    trainer.gradients()
    return {name: p.grad.clone() for name, p in trainer.trained.items()}


def test_four_micro_batches_of_one_are_one_batch_of_four(make_run, tmp_path):
    class Rows(Batches):  # the same pictures in the same order, however they are cut
        def rows(self, step):
            first = step * self.batch_size
            return [i % 2 for i in range(first, first + self.batch_size)]

    index = write_cache(tmp_path / "cache", roles=("train", "train"))
    index.meta["latent_scale"] = 1.0
    cut = make_run("full", name="cut", batch_size=1, gradient_accumulation_steps=4, caption_dropout=0.5)
    whole = make_run("full", name="whole", batch_size=4, gradient_accumulation_steps=1, caption_dropout=0.5)
    first = gradients(cut, Rows(index, "alpha", 1, sample_latents=False))
    second = gradients(whole, Rows(index, "alpha", 4, sample_latents=False))
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recipe", ["full", "lcm", "lora"])
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(make_run, recipe):
    fields = {"steps": 6, "ema_decay": 0.9 if recipe == "full" else 0.0, "caption_dropout": 0.5, "save_every": 2}
    whole = make_run(recipe, name="whole", **fields)
    assert train(whole.path / "run.json") == DONE
    parts = make_run(recipe, name="parts", **fields)
    config = parts.config()
    parts.write_config(replace(config, steps=3))
    assert train(parts.path / "run.json") == DONE
    parts.write_config(config)
    assert train(parts.path / "run.json") == DONE
    assert losses(parts) == losses(whole)
    last = "checkpoints/step-000006/weights.safetensors"
    assert (whole.path / last).read_bytes() == (parts.path / last).read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make_run):
    folder = make_run("full", steps=4, save_every=2)
    assert train(folder.path / "run.json") == DONE
    before = weights_of(folder)
    damaged = folder.path / "checkpoints/step-000004/weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert [path.name for path in folder.complete_checkpoints()] == ["step-000002"]
    assert train(folder.path / "run.json") == DONE
    assert same(before, weights_of(folder))


def test_commands_are_obeyed_and_deleted(make_run):
    folder = make_run("full", steps=20)
    folder.write_status(pid=os.getppid(), started=time.time() - 1)  # as a launcher does
    for command in ("save", "sample", "pause", "resume", "stop"):
        assert main([command, str(folder.path)]) == DONE
    assert train(folder.path / "run.json") == STOPPED
    assert read_status(folder)["state"] == "stopped"
    assert list(folder.commands.iterdir()) == []
    assert len(events_of(folder, "checkpoint")) >= 1 and len(events_of(folder, "sample")) == 1
    assert events_of(folder, "end")[-1]["state"] == "stopped"


def test_samples_are_drawn_before_the_first_step_and_are_the_same_for_the_same_weights(make_run):
    folder = make_run("lora", steps=2, sample_every=2, learning_rate=1e-9)
    assert train(folder.path / "run.json") == DONE
    assert [event["step"] for event in events_of(folder, "sample")] == [0, 2]
    first, last = ((folder.samples / f"step-{step:06}_0.png").read_bytes() for step in (0, 2))
    assert first == last


def test_a_loss_that_is_no_number_stops_with_step_and_pictures_and_keeps_the_checkpoint(make_run, monkeypatch):
    folder = make_run("full", steps=5, save_every=1)
    honest = Batches._load

    def poisoned(self, rows, step):
        batch = honest(self, rows, step)
        return batch._replace(latent=batch.latent * float("nan")) if step == 2 else batch

    monkeypatch.setattr(Batches, "_load", poisoned)
    assert train(folder.path / "run.json") == FAILED
    error = read_status(folder)["error"]
    assert "step 3" in error and "p0.png" in error and "p1.png" in error
    assert next(folder.complete_checkpoints()).name == "step-000002"


def test_a_full_disk_and_too_little_memory_end_with_advice(make_run, monkeypatch):
    folder = make_run("lora", steps=2, save_every=1, batch_size=2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert train(folder.path / "run.json") == FAILED
    assert "Free some space" in read_status(folder)["error"]
    monkeypatch.undo()

    def greedy(self, rows, step):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Batches, "_load", greedy)
    assert train(folder.path / "run.json") == FAILED
    error = read_status(folder)["error"]
    assert "Out of memory at step 1 (batch 2" in error and "gradient checkpointing" in error


def test_gradient_checkpointing_changes_no_gradient(make_run):
    plain, saved = (make_run("full", name=name, steps=2, gradient_checkpointing=name == "saved", save_every=2)
                    for name in ("plain", "saved"))  # fmt: skip
    assert [train(folder.path / "run.json") for folder in (plain, saved)] == [DONE, DONE]
    assert losses(plain) == pytest.approx(losses(saved), rel=1e-5)


def test_a_dry_run_takes_two_steps_and_leaves_no_result(make_run):
    folder = make_run("lora")
    assert main([str(folder.path / "run.json"), "--dry-run"]) == DONE
    assert len(losses(type(folder)(folder.path / "dry-run"))) == 2
    assert not Path(folder.config().output.folder).exists()


def test_check_lists_every_problem_and_says_what_a_good_run_takes(make_run, capsys):
    folder = make_run("lora")
    assert main(["check", str(folder.path / "run.json")]) == DONE
    assert "GB of memory" in capsys.readouterr().out
    folder.write_config(replace(folder.config(), cache="/nowhere", base=replace(folder.config().base, path="/none")))
    assert main(["check", str(folder.path / "run.json")]) == FAILED
    said = capsys.readouterr().out
    assert "/nowhere" in said and "/none" in said


def test_the_learning_rate_is_the_one_that_was_set(make_run):
    config = replace(make_run("lora").config(), steps=100, warmup_steps=10, learning_rate=1e-3)
    assert learning_rate(config, 0) == pytest.approx(1e-4)
    assert learning_rate(config, 99) == 1e-3
    assert learning_rate(replace(config, lr_schedule="cosine"), 55) == pytest.approx(5e-4)


def test_a_cache_folder_with_several_sets_must_name_one(tmp_path):
    index = write_cache(tmp_path)
    assert module.open_cache(tmp_path).path == Index(index.path).path
    write_cache(tmp_path, roles=("train",))
    with pytest.raises(ValueError, match="name one"):
        module.open_cache(tmp_path)


def test_a_checkpoint_can_be_exported_and_is_what_a_run_of_that_length_ends_with(make_run, capsys):
    fields = {"save_every": 2, "ema_decay": 0.9}
    short, long = (make_run("full", name=f"run{steps}", steps=steps, **fields) for steps in (2, 4))
    assert [train(folder.path / "run.json") for folder in (short, long)] == [DONE, DONE]
    events = long.read_events()
    assert main(["export", str(long.checkpoints / "step-000002")]) == DONE
    written = capsys.readouterr().out.strip()
    assert Path(written).name == "run4-step-000002.safetensors"
    assert same(weights_of(short), load_transformer(written)[0].state_dict())
    assert long.read_events() == events and read_status(long)["state"] == "done"
    assert main(["export", str(long.checkpoints / "step-000003")]) == FAILED


def test_what_accelerate_is_told_to_accumulate_changes_no_gradient(make_run, monkeypatch):
    folder = make_run("full")
    plain = gradients(folder, Batches(module.open_cache(folder.config().cache), "alpha", 2))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = gradients(folder, Batches(module.open_cache(folder.config().cache), "alpha", 2))
    assert all(torch.equal(gradient, told[name]) for name, gradient in plain.items())


def test_a_rate_that_spoils_the_last_checkpoint_too_is_answered_with_a_way_back(make_run):
    folder = make_run("lora", steps=6, save_every=1)
    config = folder.config()
    folder.write_config(replace(config, steps=2))
    assert train(folder.path / "run.json") == DONE
    folder.write_config(replace(config, learning_rate=1e30))
    assert [train(folder.path / "run.json") for _ in range(2)] == [FAILED, FAILED]  # the second one at once
    error = read_status(folder)["error"]
    assert "is good" not in error and "lower learning rate" in error and "delete it to go on from an older one" in error
    shutil.rmtree(next(folder.complete_checkpoints()))
    folder.write_config(config)
    assert train(folder.path / "run.json") == DONE
