"""`python -m pixart_nodes.training`: which run its words mean, and what it leaves in the run's folder."""

import errno
import json
import os
import sys
import time
from dataclasses import replace

import pytest

from pixart_nodes.training import events
from pixart_nodes.training.__main__ import DONE, FAILED, STOPPED, main
from pixart_nodes.training.config import BaseModel
from pixart_nodes.training.run_dir import COMMANDS, RunFolder
from pixart_nodes.training.trainer import Trainer

from .conftest import losses, read_status, write_cache


@pytest.mark.parametrize("words", [["mine.json"], ["check", "mine.json"], ["stop", "mine.json"]])
def test_a_file_of_another_name_is_refused_and_nothing_is_trained(make_run, caplog, capsys, words):
    folder = make_run("lora", steps=1)
    (folder.path / "mine.json").write_text((folder.path / "run.json").read_text())
    assert main([*words[:-1], str(folder.path / words[-1])]) == FAILED
    assert "mine.json is no run.json" in caplog.text + capsys.readouterr().out
    assert sorted(path.name for path in folder.path.iterdir()) == ["mine.json", "run.json"]


def test_the_folder_of_a_run_stands_for_its_run_json(make_run, capsys):
    folder = make_run("lora", steps=1)
    assert main(["check", str(folder.path)]) == DONE
    assert "1 updates of 2 pictures" in capsys.readouterr().out
    assert main([str(folder.path)]) == DONE
    assert read_status(folder)["state"] == "done"


def test_a_path_that_is_no_run_is_named_and_nothing_is_made_there(tmp_path, caplog):
    assert main([str(tmp_path / "nowhere" / "run.json")]) == FAILED
    assert main(["stop", str(tmp_path)]) == FAILED
    assert "There is no " in caplog.text and "it has no run.json" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [*([word] for word in (*COMMANDS, "check", "export")), ["go", "run.json"],
                                   ["check", "run.json", "run.json"], ["check", "run.json", "--dry-run"]])  # fmt: skip
def test_words_that_are_no_command_print_the_usage_and_train_nothing(make_run, monkeypatch, capsys, words):
    folder = make_run("lora", steps=1)
    monkeypatch.chdir(folder.path)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: pixart_nodes.training" in capsys.readouterr().err
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_a_command_that_no_trainer_heard_is_not_for_the_next_run(make_run):
    folder = make_run("lora", steps=2)
    assert main(["stop", str(folder.path)]) == DONE
    assert main([str(folder.path / "run.json")]) == DONE
    assert len(losses(folder)) == 2 and not list(folder.commands.iterdir())


def test_a_command_that_comes_while_a_launcher_starts_the_trainer_is_heard(make_run):
    folder = make_run("lora", steps=2)
    folder.write_status(state="starting", pid=os.getppid(), started=time.time() - 1)
    folder.send("stop")
    assert main([str(folder.path / "run.json")]) == STOPPED
    assert read_status(folder)["step"] == 0


def files_of(folder):
    files = (path for path in folder.path.rglob("*") if path.is_file() and "dry-run" not in path.parts)
    return {path: path.read_bytes() for path in files}


def test_a_dry_run_changes_nothing_of_a_run_that_has_ended(make_run):
    folder = make_run("lora", steps=2)
    assert main([str(folder.path / "run.json")]) == DONE
    before = files_of(folder)
    assert main([str(folder.path / "run.json"), "--dry-run"]) == DONE
    assert files_of(folder) == before and read_status(folder)["output"]
    tried = RunFolder(folder.path / "dry-run")
    assert read_status(tried)["state"] == "done" and read_status(tried)["output"] is None
    folder.write_config(replace(folder.config(), base=BaseModel("/nowhere")))
    assert main([str(folder.path / "run.json"), "--dry-run"]) == FAILED
    assert "/nowhere" in read_status(tried)["error"] and read_status(folder)["state"] == "done"


def test_each_dry_run_starts_anew(make_run):
    folder = make_run("lora")
    for rank in (8, 4):
        folder.write_config(replace(folder.config(), rank=rank))
        assert main([str(folder.path / "run.json"), "--dry-run"]) == DONE
        assert len(losses(RunFolder(folder.path / "dry-run"))) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"state": "run'])
def test_a_damaged_status_is_as_good_as_none(make_run, content):
    folder = make_run("lora", steps=1)
    (folder.path / "status.json").write_text(content)
    assert main([str(folder.path / "run.json")]) == DONE
    assert read_status(folder)["state"] == "done"


@pytest.fixture
def fill_disk(monkeypatch):
    """fill_disk("status" or "events"): from now on there is no room for these."""

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda what: monkeypatch.setattr(*{"status": (os, "fsync"), "events": (events, "append")}[what], refuse)


def unfinished(folder):
    return list(folder.path.rglob("*.tmp"))


@pytest.mark.parametrize("what", ["status", "events"])
def test_a_disk_that_gets_full_is_named_in_the_status_with_what_to_do(make_run, monkeypatch, fill_disk, what):
    folder, honest = make_run("lora", steps=3), Trainer.update

    def update(self):
        fill_disk(what)
        return honest(self)

    monkeypatch.setattr(Trainer, "update", update)
    assert main([str(folder.path / "run.json")]) == FAILED
    assert read_status(folder)["state"] == "failed" and not unfinished(folder)
    assert f"The disk of {folder.path} is full" in read_status(folder)["error"]
    assert "Free some space" in read_status(folder)["error"]


def test_a_disk_that_is_full_at_the_start_is_named_too(make_run, fill_disk, caplog):
    folder = make_run("lora")
    fill_disk("status")
    for words in ([], ["stop"]):
        caplog.clear()
        assert main([*words, str(folder.path)]) == FAILED
        assert f"The disk of {folder.path} is full" in caplog.text and not unfinished(folder)


@pytest.fixture
def check(make_run, capsys):
    """check(recipe, **fields of run.json) -> what the command says of a run that has problems."""

    def look(recipe, **fields):
        folder = make_run(recipe)
        given = {**folder.config().to_dict(), **fields}
        (folder.path / "run.json").write_text(json.dumps(given))
        before = sorted(folder.path.parent.rglob("*"))
        assert main(["check", str(folder.path)]) == FAILED
        assert sorted(folder.path.parent.rglob("*")) == before
        return capsys.readouterr().out

    return look


def test_check_lists_wrong_keys_values_files_and_packages_together(check, monkeypatch, tmp_path):
    for package in ("came_pytorch", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "file").touch()
    said = check(
        "lora", nonsense=1, version=7, steps=-1, cache="/nowhere", base={"path": "/none", "famly": "alpha"},
        output={"name": "x" * 300, "folder": str(tmp_path / "file" / "below")}, vae="/no vae", optimizer="came",
        base_quantization="nf4",
    )  # fmt: skip
    for problem in ("There is no nonsense", "version is 7", "did you mean base.family?", "steps is -1",
                    "cache /nowhere", "/none does not exist", "vae /no vae does not exist", "needs bitsandbytes",
                    "below cannot be written to", "needs the package came-pytorch", "output.name is long"):  # fmt: skip
        assert problem in said


def test_check_compares_model_and_cache_when_a_value_is_wrong_too(check, tmp_path):
    write_cache(tmp_path / "cache-sigma", "sigma")
    said = check("lora", cache=str(tmp_path / "cache-sigma"), learning_rate=-1, rank=0.5)
    assert "learning_rate is -1" in said and "rank is 0.5" in said and "made for PixArt sigma" in said
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize("wanted, problem", [
    ({"caption_tokens": 2}, "caption_tokens is 2, but the cache has captions of 5 tokens"),
    ({"kv_sampling": "conv", "kv_scale_factor": 8, "kv_layers": [1]}, "kv_scale_factor is 8, but the smallest"),
])  # fmt: skip
def test_check_compares_a_stronger_model_with_the_cache(check, tmp_path, wanted, problem):
    write_cache(tmp_path / "cache-sigma", "sigma")
    said = check("weak-to-strong", cache=str(tmp_path / "cache-sigma"), weak_to_strong=wanted)
    assert problem in said and len(said.splitlines()) == 1


def test_check_knows_what_the_machine_and_fsdp_cannot_do(check, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = check("lora", precision="fp16", optimizer="came")
    assert "fp16 needs a GPU" in said
    assert "fp16 does not work with FSDP" in said and "came does not work with FSDP" in said


def test_a_place_that_cannot_be_written_to_is_known_before_the_first_step(make_run, tmp_path):
    (tmp_path / "file").touch()
    folder = make_run("lora", output={"name": "result", "folder": str(tmp_path / "file" / "below")})
    assert main([str(folder.path / "run.json")]) == FAILED
    assert "cannot be written to" in read_status(folder)["error"] and not losses(folder)
