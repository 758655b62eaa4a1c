"""Reading a run from outside: torn files, processes that are gone, and why they went."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pixart_nodes.jobs import watch


def write_events(run, events, torn=""):
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run / "events.jsonl").write_text(lines + torn, encoding="utf-8")


def step(number, **others):
    return {"type": "step", "step": number, "loss": 1.0, **others}


def test_a_torn_last_line_waits_for_the_next_look(tmp_path):
    write_events(tmp_path, [step(1)], torn='{"type": "st')
    events, start, offset = watch.read_events(tmp_path)
    assert (events, start) == ([step(1)], 0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('ep", "step": 2, "loss": 1.0}\n')
    assert watch.read_events(tmp_path, offset) == ([step(2)], offset, (tmp_path / "events.jsonl").stat().st_size)


def test_events_that_were_written_anew_are_read_from_their_start(tmp_path):
    write_events(tmp_path, [step(number) for number in range(1, 9)])
    offset = watch.read_events(tmp_path).offset
    assert watch.read_events(tmp_path, offset) == ([], offset, offset)
    write_events(tmp_path, [step(1)])
    assert watch.read_events(tmp_path, offset) == ([step(1)], 0, (tmp_path / "events.jsonl").stat().st_size)


def test_a_line_that_was_cut_in_the_middle_is_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"type": "st{"type": "end"}\n[1]\n' + json.dumps(step(3)) + "\n")
    assert watch.read_events(tmp_path)[0] == [step(3)]
    assert watch.last_step(tmp_path) == step(3)


def test_a_folder_without_files_says_nothing_and_does_not_fail(tmp_path):
    assert watch.read_events(tmp_path) == watch.read_events(tmp_path, 10**9) == ([], 0, 0)
    assert watch.status_of(tmp_path) == {} and watch.last_step(tmp_path) is None and watch.log_tail(tmp_path) == ""
    (tmp_path / "status.json").write_text("{")
    assert watch.status_of(tmp_path) == {}


def test_thinning_keeps_the_last_step_and_everything_that_is_no_step(tmp_path):
    write_events(tmp_path, [event for n in range(1, 1001) for event in ([step(n)] + [{"type": "sample", "step": n}] *
                                                                         (n % 100 == 0))])  # fmt: skip
    first = watch.read_events(tmp_path, 0).found[0]
    events, _, offset = watch.read_events(tmp_path, 0, points=50)
    steps = [event["step"] for event in events if event["type"] == "step"]
    assert len(steps) == 50 and steps[-1] == 1000 and steps == sorted(steps)
    assert sum(event["type"] == "sample" for event in events) == 10
    assert watch.read_events(tmp_path, 0, points=5000)[0] == watch.read_events(tmp_path)[0]
    assert watch.read_events(tmp_path, offset, points=50) == ([], offset, offset)
    later = watch.read_events(tmp_path, len(json.dumps(first)) + 1, points=50).found  # nobody has looked for hours
    assert [event["step"] for event in later if event["type"] == "step"][-50:] == steps and len(later) <= 61


def test_the_last_step_of_a_long_run_is_found_from_its_end(tmp_path):
    write_events(tmp_path, [step(n, note="x" * 200) for n in range(2000)])
    assert watch.last_step(tmp_path)["step"] == 1999


def test_a_process_lives_until_it_ends_and_its_number_given_away_is_not_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    status = {"state": "running", "pid": process.pid, "started": time.time()}
    assert watch.is_alive(status)
    assert not watch.is_alive({**status, "state": "done"})
    younger = psutil.Process(process.pid).create_time() - 60  # the status is older than the process of this number
    assert not watch.is_alive({**status, "started": younger})
    process.kill()
    deadline = time.monotonic() + 10
    while watch.is_alive(status) and time.monotonic() < deadline:  # a zombie until somebody waits for it
        time.sleep(0.02)
    assert not watch.is_alive(status)
    process.communicate()


@pytest.mark.parametrize("pid", [None, -1, 0, "7", 2**30, True])
def test_a_status_without_a_process_is_not_alive(pid):
    assert not watch.is_alive({"state": "running", "pid": None if pid is True else pid, "started": time.time()})


@pytest.mark.parametrize(
    ("log", "returncode", "expected"),
    [
        ("loading\n", -9, "killed by signal 9 (SIGKILL) before its first step. The computer has probably run out of"),
        ("CalledProcessError: Command '[...]' died with <Signals.SIGKILL: 9>.\n", 1, "killed by signal 9 (SIGKILL)"),
        ("  exitcode  : -11 (pid: 77)\n", 1, "killed by signal 11 (SIGSEGV)"),
        ("ModuleNotFoundError: No module named 'peft'\n", 1, "The Python package peft is missing"),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", 1, "run out of memory"),
        ("OSError: [Errno 28] No space left on device\n", 1, "The disk is full"),
        ("", 1, "ended without a last word with exit status 1 before its first step. Queue again"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_the_last_word_names_the_signal_and_the_likely_cause(tmp_path, log, returncode, expected):
    (tmp_path / "log.txt").write_text(log)
    assert expected in watch.last_word(tmp_path, returncode)
    (tmp_path / "status.json").write_text('{"step": 7}')
    assert "after step 7." in watch.last_word(tmp_path, returncode)


def test_the_end_of_a_log_is_forty_lines_of_text_whatever_its_bytes(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe\n" + b"\n".join(b"line %d" % n for n in range(9000)))
    lines = watch.log_tail(tmp_path).splitlines()
    assert len(lines) == 40 and lines[-1] == "line 8999"


def test_a_signal_that_this_system_does_not_know_has_no_name():
    assert watch.signal_name(9999) == "unknown" and watch.signal_name(signal.SIGTERM) == "SIGTERM"
