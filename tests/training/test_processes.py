"""`accelerate launch -m pixart_nodes.training`: several processes, kills, signals and a parent that goes away."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixart_nodes.checkpoints.files import load_file_tensors
from pixart_nodes.training.__main__ import DONE, FAILED, STOPPED, train

from .conftest import losses

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def start(folder, *launcher, **others):
    words = [sys.executable, *launcher, "-m", "pixart_nodes.training", str(folder.path / "run.json")]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, **alone, **others.pop("env", {})}, **others,
    )  # fmt: skip


def two_processes(kind="--multi_gpu"):
    """accelerate has no switch for several processes on CPUs; with --multi_gpu and no GPU to see, it does just that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "accelerate.commands.launch", kind, "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port))  # fmt: skip


def wait_for(something, process):
    deadline = time.monotonic() + 120
    while not something() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def weights(folder, step):
    return load_file_tensors(folder.checkpoints / f"step-{step:06}" / "weights.safetensors")[0]


@pytest.mark.parametrize("recipe", ["full", "dreambooth", "lcm-lora"])
def test_two_processes_have_the_loss_of_one_at_the_same_global_batch(make_run, recipe):
    one = make_run(recipe, name="one", steps=3, batch_size=2)
    two = make_run(recipe, name="two", steps=3, batch_size=1)
    assert train(one.path / "run.json") == DONE
    process = start(two, *two_processes())
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_machines_that_do_not_share_the_folder_say_so_instead_of_waiting_for_each_other(make_run):
    first, second = (make_run("full", name=name, steps=2, batch_size=2) for name in ("first", "second"))
    assert train(first.path / "run.json") == DONE
    first.write_config(replace(first.config(), steps=4))
    port = two_processes()[-1]
    joined = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [start(folder, env=joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank, folder in enumerate((first, second))]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == FAILED and "the run's folder must be on a disk that all machines share" in output


SAMPLED = {"sample_every": 2, "validate_every": 2, "ema_decay": 0.9}
SHARDED = {
    "full": SAMPLED, "full, checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "lora": {}, "lora, half": {"precision": "bf16", "sample_every": 2}, "lcm": {"gradient_checkpointing": True},
    "controlnet": SAMPLED | {"controlnet": {"blocks": 1}},
}  # fmt: skip


def without_keys(name, tensor):
    """Without the bias of keys, whose gradient is nothing but rounding."""
    if name.endswith("qkv.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor.chunk(2)[1] if name.endswith("kv_linear.bias") else tensor


@pytest.mark.parametrize("what", SHARDED)
def test_sharded_weights_train_as_whole_ones_and_go_on_as_either(make_run, what):
    """FSDP, started as `accelerate config` would; resumed by one process, and the other way round."""
    recipe, fields = what.split(",")[0], SHARDED[what]
    one = make_run(recipe, name="one", steps=2, batch_size=2, **fields)
    two = make_run(recipe, name="two", steps=2, batch_size=1, **fields)
    runs = {"one": one, "two": two}

    def train_both(first, second):
        assert train(first.path / "run.json") == DONE
        output, _ = (process := start(second, *two_processes("--use_fsdp"))).communicate(timeout=300)
        assert process.returncode == 0, output
        held, every = map(int, re.search(r"this process holds (\d+) of (\d+) trained", output).groups())
        assert held == pytest.approx(every / 2, rel=0.02)
        assert losses(two) == pytest.approx(losses(one), rel=0.02 if "half" in what else 1e-4)
        if "half" in what:
            return
        first, second = (load_file_tensors(Path(folder.status()["output"]))[0] for folder in (one, two))
        for name, tensor in first.items():
            apart = (without_keys(name, tensor) - without_keys(name, second[name])).abs() > 1e-4
            # Adam makes whole steps out of gradients that are next to nothing, whose sign is rounding
            assert apart.sum() <= max(1, 0.005 * apart.numel()), name

    train_both(one, two)
    for name, other in (("one", 1), ("two", 2)):
        runs[name].write_config(replace(runs[name].config(), steps=4, batch_size=other))
    train_both(two, one)


def test_what_fsdp_cannot_do_is_said_at_once(make_run):
    folder = make_run("lora", steps=2, optimizer="came", batch_size=1)
    output, _ = (process := start(folder, *two_processes("--use_fsdp"))).communicate(timeout=300)
    assert process.returncode != 0
    assert "optimizer came does not work with FSDP: take adamw." in output
    assert folder.status()["error"] == "optimizer came does not work with FSDP: take adamw."


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_weights(make_run):
    killed = make_run("full", name="killed", steps=400, save_every=5)
    process = start(killed)
    wait_for(lambda: list(killed.checkpoints.glob("step-*")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = killed.status()["step"]
    assert 5 <= reached < 400
    whole = make_run("full", name="whole", steps=reached + 5, save_every=5)
    killed.write_config(replace(killed.config(), steps=reached + 5))
    assert [train(folder.path / "run.json") for folder in (killed, whole)] == [DONE, DONE]
    first, second = (weights(folder, reached + 5) for folder in (killed, whole))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


HALF_A_CHECKPOINT = """
import os, signal, sys, torch
from pixart_nodes.training.__main__ import main

write = torch.save
def save(state, path):
    write(state, path)
    if state["step"] == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(make_run):
    fields = {"steps": 6, "save_every": 2, "caption_dropout": 0.5, "ema_decay": 0.9}
    killed, whole = (make_run("full", name=name, **fields) for name in ("killed", "whole"))
    words = [sys.executable, "-c", HALF_A_CHECKPOINT, str(killed.path / "run.json")]
    assert subprocess.run(words, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode == -signal.SIGKILL
    assert [path.name for path in killed.complete_checkpoints()] == ["step-000002"]
    assert list(killed.checkpoints.glob(".step-000004.tmp"))
    assert [train(folder.path / "run.json") for folder in (killed, whole)] == [DONE, DONE]
    first, second = (weights(folder, 6) for folder in (killed, whole))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not list(killed.checkpoints.glob(".*"))


@pytest.mark.parametrize("how", ["signal", "pipe", "parent"])
def test_a_signal_or_a_lost_parent_stops_the_run_with_a_checkpoint(make_run, how):
    folder = make_run("full", steps=100_000, save_every=100_000)
    reader, writer = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    env = {"pipe": {"PIXART_PARENT_FD": str(reader)}, "parent": {"PIXART_PARENT_PID": str(parent.pid)}}.get(how, {})
    process = start(folder, env=env, pass_fds=(reader,) if how == "pipe" else ())
    os.close(reader)
    wait_for(lambda: folder.status().get("step"), process)
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    os.close(writer)
    if how == "parent":
        parent.communicate(b"\n")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == STOPPED, output
    assert next(folder.complete_checkpoints(), None) is not None
    if how != "parent":
        parent.communicate(b"\n")
