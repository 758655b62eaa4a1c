"""A run seen from outside: what it says, whether its process lives, and why it ended when it does not say so."""

import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import psutil

FINAL = ("done", "stopped", "failed")
CLOCK = 5.0  # seconds by which the clocks of processes and files may differ
TAIL_BYTES = 1 << 16
TAIL_LINES = 40
MEMORY = "The computer has probably run out of memory: try a smaller batch, gradient checkpointing or an 8-bit base."
CAUSES = (
    (r"No module named '([\w.]+)'", "The Python package {0} is missing: install it with pip where ComfyUI runs."),
    (r"No space left on device|Disk quota exceeded", "The disk is full: free some space, then queue again."),
    (r"(?i)out of memory|can't allocate memory|bad_alloc|MemoryError", MEMORY),
    (r"no kernel image|invalid device function|CUDA driver version|not compiled with CUDA",
     "PyTorch and the GPU's driver do not fit each other: reinstall PyTorch for this GPU."),
    (r"Address already in use", "The port of the processes is taken by another run: wait until it has ended."),
    (r"PermissionError: .*", "A file or folder may not be written: {match}"),
)  # fmt: skip
SIGNAL = re.compile(r"died with <Signals\.\w+: (\d+)>|exitcode\s*: -(\d+)")  # what accelerate and torchrun say


def read_json(path: Path) -> dict:
    """The object in a file; empty where there is none, or where another process is writing it (Windows)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def status_of(run: Path) -> dict:
    return read_json(run / "status.json")


def process_lives(status: dict) -> bool:
    """Whether the process that wrote this status is still there, and not a later one that got its number."""
    pid, started = status.get("pid"), status.get("started")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(started, (int, float)):
        return False
    try:
        process = psutil.Process(pid)
        return process.create_time() <= started + CLOCK and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_alive(status: dict) -> bool:
    """Whether a run goes on: it has not said its last word, and its process lives."""
    return status.get("state") not in FINAL and process_lives(status)


class Part(NamedTuple):
    """What a growing file holds from byte `start` up to `offset`."""

    found: list
    start: int
    offset: int


def whole_lines(path: Path, offset: int = 0) -> Part:
    """The lines from a byte offset on, or all where the file has become shorter than that. A line without its end
    waits; a missing file is empty."""
    if not path.is_file():
        return Part([], 0, 0)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, offset) if offset <= size else 0
        file.seek(start)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return Part(data.splitlines(), start, start + len(data))


def parse(lines) -> list[dict]:
    """The events in these lines. One that is none is left out: a full disk or a kill may have cut it."""
    found = []
    for line in lines:
        try:
            event = json.loads(line, parse_constant=lambda name: None)  # browsers know no NaN
        except ValueError:
            continue
        found += [event] if isinstance(event, dict) else []
    return found


def read_events(run: Path, offset: int = 0, points: int = 0) -> Part:
    """The events from a byte offset on; `points` thins those of steps to about that many."""
    lines, start, end = whole_lines(run / "events.jsonl", offset)
    return Part(parse(thinned(lines, points) if points > 0 else lines), start, end)


def thinned(lines: list[bytes], points: int) -> list[bytes]:
    """About `points` of the lines that tell of a step, the last one among them, and all others."""
    steps = [number for number, line in enumerate(lines) if b'"type": "step"' in line]
    stride = max(1, -(-len(steps) // points))
    left_out = set(steps) - set(steps[::-1][::stride])
    return [line for number, line in enumerate(lines) if number not in left_out]


def last_step(run: Path) -> dict | None:
    """The newest step event."""
    path = run / "events.jsonl"
    if not path.is_file():
        return None
    lines = whole_lines(path, path.stat().st_size - TAIL_BYTES).found
    steps = (event for event in reversed(parse(lines)) if event.get("type") == "step")
    return next(steps, None)


def log_tail(run: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of log.txt."""
    path = run / "log.txt"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:])


def last_word(run: Path, returncode: int | None) -> str:
    """What to tell of a trainer that is gone and did not say why: how, where, and the likely cause."""
    tail, step = log_tail(run), status_of(run).get("step")
    found = SIGNAL.findall(tail)
    number = -returncode if returncode is not None and returncode < 0 else int("".join(found[-1])) if found else 0
    how = f"was killed by signal {number} ({signal_name(number)})" if number else "ended without a last word"
    how += f" with exit status {returncode}" if returncode and not number else ""
    place = f"after step {step}" if step else "before its first step"
    cause = likely_cause(tail) or (MEMORY if number == 9 else "")
    return " ".join([f"The trainer {how} {place}.", *([cause] if cause else []), "Queue again to go on from the last "
                     "checkpoint."])  # fmt: skip


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in {s.value for s in signal.Signals} else "unknown"


def likely_cause(log: str) -> str:
    """A sentence for what a log's end looks like; empty when it looks like nothing known."""
    for pattern, sentence in CAUSES:
        if match := re.search(pattern, log):
            return sentence.format(*match.groups(), match=match[0])
    return ""
