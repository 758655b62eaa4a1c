"""The folder of all runs: names, what goes on with what, what is shown."""

import json
import os
import time
from dataclasses import replace

import pytest

from pixart_nodes.jobs import runs
from pixart_nodes.training.config import RunConfig
from pixart_nodes.training.run_dir import seal

OUTPUT = {"name": "fox", "folder": "c"}
CONFIG = RunConfig.from_dict({"base": {"path": "a"}, "cache": "b", "output": OUTPUT, "steps": 9})


def finish(folder, step, output):
    folder.write_status(state="done", step=step, steps=step, output=str(output), pid=1, started=0.0)


def test_two_runs_of_one_minute_have_two_folders_and_the_newest_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "1123_1200")  # a minute that does not end meanwhile
    first = runs.create(tmp_path, CONFIG, node="7", workflow={"nodes": []})
    time.sleep(0.01)
    second = runs.create(tmp_path, CONFIG)
    assert second.path.name == f"{first.path.name}_2" and first.path.name.startswith("fox_")
    (tmp_path / "no run").mkdir()
    assert runs.run_folders(tmp_path) == [second.path, first.path]
    assert json.loads((first.path / "workflow.json").read_text()) == {"nodes": []}
    assert "workflow" not in json.loads((first.path / "origin.json").read_text())
    assert set(json.loads((first.path / "run.json").read_text())) == set(CONFIG.to_dict())
    assert runs.run_folders(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("change", "same"),
    [({"steps": 20}, True), ({"save_every": 7, "sample_every": 0, "warmup_steps": 3}, True), ({"seed": 1}, False),
     ({"learning_rate": 1.0}, False), ({"cache": "other"}, False), ({"rank": 3}, False)],
)  # fmt: skip
def test_a_config_goes_on_with_a_run_that_trained_the_same(tmp_path, change, same):
    folder = runs.create(tmp_path, CONFIG)
    found = runs.find(tmp_path, replace(CONFIG, **change))
    assert (found.path == folder.path) if same else found is None


def test_a_run_that_went_further_than_wanted_is_not_gone_on_with(tmp_path):
    folder = runs.create(tmp_path, CONFIG)
    with folder.new_checkpoint(8):
        pass
    assert runs.find(tmp_path, replace(CONFIG, steps=8)) is not None
    assert runs.find(tmp_path, replace(CONFIG, steps=7)) is None


def test_a_foreign_run_json_is_passed_over_and_still_listed(tmp_path):
    folder = runs.create(tmp_path, CONFIG)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text('{"recpe": "lora"}')
    assert runs.find(tmp_path, CONFIG).path == folder.path
    assert {runs.summary(run)["id"] for run in runs.run_folders(tmp_path)} == {"broken", folder.path.name}
    assert runs.details(broken)["config"] == {"recpe": "lora"}


def test_a_run_is_done_only_while_its_result_is_there(tmp_path):
    folder, result = runs.create(tmp_path, CONFIG), tmp_path / "fox.safetensors"
    assert not runs.is_done(folder.path, 9)
    finish(folder, 9, result)
    assert not runs.is_done(folder.path, 9)
    result.touch()
    assert runs.is_done(folder.path, 9) and not runs.is_done(folder.path, 12)


def test_a_run_is_not_done_once_another_one_has_written_its_file_anew(tmp_path):
    folder, result = runs.create(tmp_path, CONFIG), tmp_path / "fox.safetensors"
    result.write_text("mine")
    finish(folder, 9, result)
    folder.write_status(output_seal=seal(result))
    assert runs.is_done(folder.path, 9)
    result.write_text("hers")
    os.utime(result, ns=(1, 1))
    assert not runs.is_done(folder.path, 9)


def test_a_summary_tells_a_run_that_can_be_resumed(tmp_path):
    folder = runs.create(tmp_path, CONFIG)
    folder.write_status(state="running", step=3, pid=2**30, started=0.0)
    (folder.path / "events.jsonl").write_text('{"type": "step", "step": 3, "loss": 0.5}\n')
    shown = runs.summary(folder.path)
    assert (shown["name"], shown["recipe"], shown["alive"], shown["resumable"]) == ("fox", "lora", False, True)
    assert shown["last"]["loss"] == 0.5
    finish(folder, 9, tmp_path)
    assert not runs.summary(folder.path)["resumable"]


def test_samples_are_listed_by_step(tmp_path):
    folder = runs.create(tmp_path, CONFIG)
    folder.samples.mkdir()
    first, *second = ("step-000000_0.png", "step-000250_0.png", "step-000250_1.png")
    for name in (*second[::-1], first, "step-000250.safetensors", "step-x_0.png"):
        (folder.samples / name).touch()
    assert runs.samples(folder.path) == [{"step": 0, "files": [first]}, {"step": 250, "files": second}]


def test_a_note_leaves_the_rest_of_the_origin_alone(tmp_path):
    folder = runs.create(tmp_path, CONFIG, node="7")
    before = runs.created(folder.path)
    runs.note(folder.path, delivered=True)
    origin = json.loads((folder.path / "origin.json").read_text())
    assert (origin["node"], origin["delivered"], runs.created(folder.path)) == ("7", True, before)
    runs.note(folder.path, workflow={"nodes": [1]})
    assert json.loads((folder.path / "origin.json").read_text()) == origin
    assert json.loads((folder.path / "workflow.json").read_text()) == {"nodes": [1]}
