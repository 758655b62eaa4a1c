"""Trainers as processes: started, stopped, killed, refused twice, and left alone when their parent dies."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pixart_nodes.jobs import launcher, watch
from pixart_nodes.training.__main__ import FAILED, train
from tests.training.conftest import events_of

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"steps": 100_000, "save_every": 100_000}
posix = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture
def start(monkeypatch):
    """start(folder, **options) -> (job, list of its states); whatever still runs at the end is killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def start(folder, **options):
        states = []
        job = launcher.start(folder, cpu=True, on_state=states.append, **options)
        started.append((folder, job))
        return job, states

    yield start
    for folder, job in started:
        launcher.stop(folder, patience=0.5)
        job.thread.join(60)


def wait_for(something, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := something()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def trained(folder, steps=1):
    return wait_for(lambda: folder.status().get("step", 0) >= steps)  # said behind the step's event


def gone(folder):
    return wait_for(lambda: not watch.process_lives(folder.status()), 60)


@pytest.mark.slow
def test_a_run_tells_its_states_and_goes_on_with_more_steps(make_run, start):
    folder = make_run("lora", steps=2)
    job, states = start(folder)
    job.thread.join(180)
    assert states[0] == "starting" and states[-1] == "done"  # "running" may be too short to be seen
    assert (folder.path.parent / "models" / "run.safetensors").is_file() and (folder.path / "log.txt").stat().st_size
    folder.send("stop")  # left over by somebody who came too late
    folder.write_config(replace(folder.config(), steps=4))
    job, states = start(folder)
    job.thread.join(180)
    assert states[-1] == "done"
    assert [event["step"] for event in events_of(folder, "step")] == [1, 2, 3, 4]


@posix
@pytest.mark.slow
def test_a_killed_run_gets_a_last_word_and_no_second_trainer_before(make_run, start):
    folder = make_run("full", **ENDLESS)
    job, states = start(folder)
    assert trained(folder)
    pid = folder.status()["pid"]
    with pytest.raises(RuntimeError, match=f"trained already, by process {pid}"):
        launcher.start(folder)
    assert train(folder.path / "run.json") == FAILED  # the shell's way in
    assert folder.status()["pid"] == pid and folder.status()["state"] == "running" and watch.is_alive(folder.status())
    os.kill(pid, signal.SIGKILL)
    job.thread.join(60)
    status = folder.status()
    assert (status["state"], states[-1]) == ("failed", "failed")
    assert f"killed by signal 9 (SIGKILL) after step {status['step']}. The computer has probably" in status["error"]
    assert [event["state"] for event in events_of(folder, "end")] == ["failed"]
    assert events_of(folder, "error")[0]["text"] == status["error"]


@pytest.mark.slow
def test_stop_waits_for_the_step_and_its_checkpoint(make_run, start):
    folder = make_run("full", **ENDLESS)
    job, states = start(folder)
    assert trained(folder)
    launcher.stop(folder)
    assert not watch.process_lives(folder.status())
    assert folder.status()["state"] == "stopped" and next(folder.complete_checkpoints(), None) is not None
    job.thread.join(60)
    assert states[-1] == "stopped" and not events_of(folder, "error")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "frozen", "frozen, with a second Cancel"])
def test_a_trainer_that_does_not_hear_is_killed_with_its_group(make_run, start, when):
    folder = make_run("full", **ENDLESS)
    job, states = start(folder)
    group = os.getpgid(folder.status()["pid"])
    if when.startswith("frozen"):
        assert trained(folder)
        os.kill(folder.status()["pid"], signal.SIGSTOP)
    launcher.stop(folder, **({"hurry": lambda: True} if "Cancel" in when else {"patience": 1}))
    job.thread.join(60)
    assert folder.status()["state"] == states[-1] == "stopped"
    left = [process for process in psutil.process_iter() if group_of(process.pid) == group]
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from pixart_nodes.jobs import launcher
from pixart_nodes.training.run_dir import RunFolder
launcher.start(RunFolder(sys.argv[2]), detached=sys.argv[3] == "detached", cpu=True)
print("started", flush=True)
input()
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("detached", "end"), [("detached", "exit"), ("detached", "kill"), ("attached", "exit"), ("attached", "kill")]
)
def test_a_run_ends_with_its_parent_unless_it_is_detached(make_run, monkeypatch, detached, end):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = make_run("full", **ENDLESS)
    words = [sys.executable, "-c", PARENT, str(ROOT), str(folder.path), detached]
    parent = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "started\n" and trained(folder)
        if end == "kill":
            parent.kill()
        parent.communicate("\n" if end == "exit" else None)
        if detached == "detached":
            assert trained(folder, folder.status()["step"] + 40) and watch.is_alive(folder.status())
        else:
            assert gone(folder) and folder.status()["state"] == "stopped"
            assert next(folder.complete_checkpoints(), None) is not None
    finally:
        launcher.stop(folder, patience=5)


@pytest.mark.slow
def test_the_check_lists_all_problems_or_what_the_run_will_take(make_run, tmp_path):
    folder = make_run("lora", steps=7)
    assert "7 updates of 2 pictures" in (text := launcher.check(folder.path / "run.json")) and "GB of memory" in text
    folder.write_config(replace(folder.config(), rank=0, steps=0, cache=str(tmp_path / "gone")))
    said = launcher.check(folder.path / "run.json")
    assert "rank is 0" in said and "steps is 0" in said


def test_a_trainer_finds_the_pack_wherever_it_is_and_no_gpu_where_comfyui_has_none(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PIXART_PARENT_FD", "3")
    environ = launcher.environment(cpu=True, detached=True)
    assert environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/somewhere"]
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"PIXART_PARENT_FD", "PIXART_PARENT_PID"} & set(environ)
    assert launcher.environment(detached=False)["PIXART_PARENT_PID"] == str(os.getpid())


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(0, []), (1, ["--num_processes", "1", "--num_machines", "1"]), (3, ["--multi_gpu", "--num_processes", "3"])],
)
def test_the_command_is_accelerates_launcher_with_as_many_processes_as_wanted(processes, flags):
    words = launcher.launch_command(Path("run.json"), processes)
    assert words[1:3] == ["-m", "accelerate.commands.launch"] and words[3 : 3 + len(flags)] == flags
    assert words[-3:] == ["-m", "pixart_nodes.training", "run.json"]


def test_missing_packages_are_named_with_the_command_that_installs_them(make_run, monkeypatch):
    monkeypatch.setattr(launcher, "NEEDED", ("accelerate", "no_such_package"))
    with pytest.raises(RuntimeError, match="Training needs no_such_package. Install: .* pip install no_such_package"):
        launcher.start(make_run("lora"))
