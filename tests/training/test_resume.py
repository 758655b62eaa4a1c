"""What a run may go on with after its run.json was changed, and what a kill leaves of its checkpoints."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart_nodes.training.__main__ import DONE, FAILED, make_accelerator, train
from pixart_nodes.training.run_dir import COMPLETE, RunFolder, fingerprint, is_whole, write_json
from pixart_nodes.training.snapshot import STATE
from pixart_nodes.training.trainer import Trainer

from .conftest import PARAMS, events_of, read_status, write_base


def run_on(folder, **changes):
    """Trains to step 2, then to 4 with the changes."""
    config = folder.config()
    folder.write_config(replace(config, steps=2))
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        change = {group: replace(getattr(config, group), **{field: value})} if group else {name: value}
        config = replace(config, **change)
    folder.write_config(config)
    return train(folder.path / "run.json")


@pytest.mark.parametrize("recipe, changes, said", [
    ("lora", {"recipe": "lcm-lora"}, "recipe was 'lora' and is 'lcm-lora'"),
    ("full", {"recipe": "lcm"}, "recipe was 'full' and is 'lcm'"),
    ("lora", {"alpha": 64.0}, "alpha was 8.0 and is 64.0"),
    ("lora", {"rank": 4, "targets": "attn"}, "rank was 8 and is 4, targets was 'attn-mlp' and is 'attn'"),
    ("lora", {"dora": True}, "dora was False and is True"),
    ("lcm", {"lcm__guidance": 3.0}, "lcm.guidance was 5.5 and is 3.0"),
    ("weak-to-strong", {"weak_to_strong__base_size": 128}, "weak_to_strong.base_size was None and is 128"),
    ("full", {"ema_decay": 0.9}, "ema_decay was switched on or off"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_what_would_change_its_weights_meaning(make_run, recipe, changes, said):
    folder = make_run(recipe, steps=4, family="sigma" if recipe == "weak-to-strong" else "alpha")
    assert run_on(folder, **changes) == FAILED
    assert f"with other settings: {said}. Set them back" in read_status(folder)["error"]


def test_a_run_does_not_go_on_with_another_base_but_with_the_same_one_elsewhere(make_run, tmp_path):
    folder = make_run("lora", steps=4)
    (tmp_path / "base.safetensors").rename(moved := tmp_path / "moved.safetensors")
    write_base(tmp_path / "base.safetensors")  # the same numbers, for the first two steps
    assert run_on(folder, base__path=str(moved)) == DONE
    folder = make_run("lora", name="foreign", steps=4)
    foreign = write_base(tmp_path / "foreign.safetensors", replace(PARAMS, mlp_ratio=4.0))
    assert run_on(folder, base__path=str(foreign)) == FAILED
    assert "the base model is another" in read_status(folder)["error"]


@pytest.mark.parametrize("changes", [
    {"learning_rate": 1e-3}, {"batch_size": 1, "gradient_accumulation_steps": 2}, {"caption_dropout": 0.5},
], ids=str)  # fmt: skip
def test_a_run_goes_on_with_another_pace(make_run, changes):
    folder = make_run("lora", steps=4)
    assert run_on(folder, **changes) == DONE, read_status(folder)["error"]
    assert [event["step"] for event in events_of(folder, "step")] == [1, 2, 3, 4]


@pytest.mark.parametrize("before, after", [("adamw", "came"), ("came", "adamw"), ("adamw", "prodigy")])
def test_another_optimizer_starts_afresh(make_run, before, after):
    rate = {"learning_rate": 1.0} if after == "prodigy" else {}
    folder = make_run("lora", steps=4, optimizer=before)
    assert run_on(folder, optimizer=after, **rate) == DONE, read_status(folder)["error"]


@pytest.mark.parametrize("after", ["adamw", "came"])
def test_a_checkpoint_that_says_nothing_of_its_settings_goes_on(make_run, after):
    folder = make_run("lora", steps=2, optimizer="adamw")
    assert train(folder.path / "run.json") == DONE
    (whole,) = folder.complete_checkpoints()
    state = torch.load(whole / STATE, weights_only=True)
    del state["terms"], state["optimizer_kind"]
    torch.save(state, whole / STATE)
    write_json(whole / COMPLETE, {path.name: fingerprint(path) for path in whole.iterdir() if path.name != COMPLETE})
    assert run_on(folder, steps=4, optimizer=after) == DONE, read_status(folder)["error"]
    assert [event["step"] for event in events_of(folder, "step")] == [1, 2, 3, 4]


def test_a_new_weight_decay_holds_from_then_on(make_run):
    folder = make_run("lora", steps=2)
    assert train(folder.path / "run.json") == DONE
    folder.write_config(config := replace(folder.config(), weight_decay=0.5))
    trainer = Trainer(config, folder, make_accelerator("fp32"))
    assert trainer.step == 2 and {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_step_is_saved_once_more_leaves_a_whole_checkpoint_of_it(tmp_path, monkeypatch, renames):
    class Killed(BaseException):
        pass

    folder, done = RunFolder(tmp_path), []
    with folder.new_checkpoint(2) as path:
        (path / "weights").write_bytes(b"first")
    honest = os.replace

    def killed(source, target):
        if Path(target).name != COMPLETE:
            if len(done) == renames:
                raise Killed
            done.append(target)
        return honest(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Killed) if renames < 2 else nullcontext(), folder.new_checkpoint(2) as path:
        (path / "weights").write_bytes(b"again")
    monkeypatch.undo()
    (found,) = folder.complete_checkpoints()
    assert is_whole(found) and (found / "weights").read_bytes() == (b"again" if renames == 2 else b"first")
    folder.prune(keep=1, step=2)
    assert [path.name for path in folder.checkpoints.iterdir()] == [found.name]
