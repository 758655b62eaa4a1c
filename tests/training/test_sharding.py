"""What FSDP refuses before anything is trained. What it does is in test_processes.py."""

import sys

import pytest

from pixart_nodes.training import sharding
from pixart_nodes.training.config import RunConfig


@pytest.mark.parametrize("fields, precision, said", [
    ({"optimizer": "came"}, "bf16", "optimizer came does not work with FSDP: take adamw."),
    ({"base_quantization": "nf4"}, "bf16", "base_quantization does not work with FSDP: take none."),
    ({}, "fp16", "precision fp16 does not work with FSDP: take bf16 or fp32."),
])  # fmt: skip
def test_what_fsdp_cannot_do_is_said_with_what_to_take(fields, precision, said):
    assert sharding.problems(RunConfig(**fields), precision) == [said]


def test_an_old_pytorch_is_named_with_the_version_that_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    (said,) = sharding.problems(RunConfig(), "bf16")
    assert said.startswith("FSDP needs PyTorch 2.6 or newer; this is ")


def test_the_optimizer_that_the_trainer_chooses_is_one_that_fsdp_has():
    assert sharding.problems(RunConfig(optimizer="auto"), "bf16") == []


@pytest.mark.parametrize("switch, processes, wanted", [("true", 2, True), ("TRUE", 2, True), ("true", 1, False),
                                                       ("false", 2, False), ("", 2, False)])  # fmt: skip
def test_fsdp_is_for_several_processes_that_accelerate_was_told_to_shard(monkeypatch, switch, processes, wanted):
    monkeypatch.setenv(sharding.SWITCH, switch)
    assert sharding.is_wanted(processes) == wanted
