"""The optimizers of other packages: they train, resume exactly, and are missed with a sentence."""

import sys
from dataclasses import replace

import pytest

from pixart_nodes.training import optimizers
from pixart_nodes.training.__main__ import DONE, FAILED, train
from pixart_nodes.training.config import RunConfig

from .conftest import losses, read_status

PACKAGES = {"adamw8bit": "bitsandbytes", "came": "came_pytorch", "prodigy": "prodigyopt"}
RATE = {"adamw": 1e-2, "adamw8bit": 1e-2, "came": 1e-3, "prodigy": 1.0}


@pytest.mark.parametrize("optimizer", RATE)
def test_an_optimizer_learns_and_a_resumed_run_has_the_weights_of_a_whole_one(make_run, optimizer):
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    fields = {"optimizer": optimizer, "learning_rate": RATE[optimizer], "rank": 64, "alpha": 64.0, "targets": "all"}
    whole, parts = (make_run("lora", name=name, steps=6, save_every=3, **fields) for name in ("whole", "parts"))
    config = parts.config()
    parts.write_config(replace(config, steps=3))
    assert train(parts.path / "run.json") == DONE, read_status(parts)["error"]
    parts.write_config(config)
    assert [train(folder.path / "run.json") for folder in (whole, parts)] == [DONE, DONE]
    assert losses(parts) == losses(whole)
    last = "checkpoints/step-000006/weights.safetensors"
    assert (whole.path / last).read_bytes() == (parts.path / last).read_bytes()


@pytest.mark.parametrize(("fields", "package"), [
    ({"optimizer": "adamw8bit"}, "bitsandbytes"), ({"optimizer": "came"}, "came-pytorch"),
    ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigyopt"), ({"base_quantization": "nf4"}, "bitsandbytes"),
])  # fmt: skip
def test_a_package_that_is_missing_is_named_with_what_to_do(make_run, monkeypatch, fields, package):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    for name in [name for name in sys.modules if name.startswith("bitsandbytes.")]:
        monkeypatch.setitem(sys.modules, name, None)
    folder = make_run("lora", **fields)
    assert train(folder.path / "run.json") == FAILED
    error = read_status(folder)["error"]
    assert f"needs {package}: install it" in error or f"needs the package {package}: install it" in error


@pytest.mark.parametrize("recipe, gpu, packages, expected", [
    ("lora", True, ["bitsandbytes"], "adamw8bit"), ("lora", False, ["bitsandbytes"], "adamw"),
    ("lora", True, [], "adamw"), ("full", False, ["came_pytorch"], "came"),
    ("weak-to-strong", True, ["came_pytorch", "bitsandbytes"], "came"), ("full", True, ["bitsandbytes"], "adamw"),
    ("lcm", True, ["came_pytorch", "bitsandbytes"], "adamw"),
])  # fmt: skip
def test_auto_is_what_the_recipe_and_the_machine_suggest(monkeypatch, recipe, gpu, packages, expected):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name in packages)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert optimizers.chosen(RunConfig(recipe=recipe)) == expected
    assert optimizers.chosen(RunConfig(recipe=recipe), sharded=True) == "adamw"
    assert optimizers.chosen(RunConfig(recipe=recipe, optimizer="prodigy")) == "prodigy"


def test_prodigy_starts_from_a_rate_of_one_and_refuses_another_optimizers():
    given = {"base": {"path": "base"}, "cache": "cache", "output": {"name": "a", "folder": "b"}, "optimizer": "prodigy"}
    assert RunConfig.from_dict(given).learning_rate == 1.0
    (problem,) = RunConfig.from_dict({**given, "learning_rate": 1e-4}).check()
    assert "prodigy" in problem and "learning_rate" in problem
