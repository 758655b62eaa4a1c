"""The folder of a run: what trainer, monitor and command line tell each other. Standard library only.

run.json, status.json, events.jsonl, commands/NNNN.json, checkpoints/step-001000, samples, log.txt. Every file but
events.jsonl appears whole, by renaming.
"""

import errno
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import events
from .config import RunConfig

COMMANDS = ("pause", "resume", "sample", "save", "stop")
STATES = ("starting", "running", "paused", "stopping", "done", "stopped", "failed")
COMPLETE = "complete"  # written last: the sizes and checksums of a checkpoint's files
REPLACED = ".replaced"  # of a checkpoint's folder, while a new one of the same step takes its place
VALIDATION = "validation.json"  # in a checkpoint whose validation loss was measured
OPEN_ELSEWHERE = 2.0  # seconds that a file is waited for


def write_json(path: Path, content: dict):
    """Replaces `path`, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(source: Path, target: Path):
    """os.replace, once more for a while where somebody has the target open (Windows)."""
    deadline = time.monotonic() + OPEN_ELSEWHERE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def seal(path) -> list[int] | None:
    """Size and time of a file, by which it is known again; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


class Busy(RuntimeError):
    """Another process trains in this folder."""


class RunFolder:
    """A run's folder; `path` need not exist yet."""

    def __init__(self, path):
        self.path = Path(path)
        self.checkpoints, self.samples, self.commands = (self.path / n for n in ("checkpoints", "samples", "commands"))

    def config(self) -> RunConfig:
        """Raises ValueError or FileNotFoundError with what is wrong with run.json."""
        path = self.path / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} is no run: it has no run.json.")
        try:
            return RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write_config(self, config: RunConfig):
        write_json(self.path / "run.json", config.to_dict())

    def status(self) -> dict:
        """The last status; an empty one before the trainer has started, or where the file holds none."""
        path = self.path / "status.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_status(self, **fields):
        """Changes these fields of the status."""
        write_json(self.path / "status.json", {**self.status(), **fields})

    def add_event(self, kind: str, **fields):
        events.append(self.path / "events.jsonl", {"type": kind, "time": time.time(), **fields})

    def read_events(self) -> list[dict]:
        return events.read(self.path / "events.jsonl")

    def send(self, command: str) -> Path:
        """Leaves a command for the trainer, and returns its file. Raises ValueError for an unknown one."""
        if command not in COMMANDS:
            raise ValueError(f"There is no command {command!r}; there are {', '.join(COMMANDS)}.")
        path = self.commands / f"{time.time_ns():020}.json"
        write_json(path, {"command": command})
        return path

    def waiting(self) -> list[tuple[Path, str]]:
        """Commands that are not done, oldest first; a file that is none has the command ""."""
        found = []
        for path in sorted(path for path in self.commands.glob("*.json") if path.is_file()):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                content = None
            found.append((path, content.get("command", "") if isinstance(content, dict) else ""))
        return found

    @contextmanager
    def claimed(self):
        """Meanwhile no other process trains here. Raises Busy when one does; a killed one holds nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "run.lock").open("ab") as file:
            if not lock(file):
                pid = self.status().get("pid")
                raise Busy(f"{self.path} is being trained by process {pid} already: wait, or stop that one.")
            yield

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """Yields an empty folder to fill; afterwards it is checkpoints/step-<step>, complete, or nothing at all.

        A whole checkpoint of this step that is there already is never removed before the new one has its place.
        """
        final, temporary = self.checkpoints / f"step-{step:06}", self.checkpoints / f".step-{step:06}.tmp"
        replaced = self.checkpoints / f"step-{step:06}{REPLACED}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            write_json(temporary / COMPLETE, {path.name: fingerprint(path) for path in sorted(temporary.iterdir())})
            if final.exists():  # the same step once more, or a damaged one
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(final, replaced)
            os.replace(temporary, final)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise OSError(f"Cannot write the checkpoint {final}: {error}. Free some space, then run again.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def complete_checkpoints(self) -> Iterator[Path]:
        """Checkpoints that are whole, newest first: each file has the size and checksum that it was written with."""
        return (path for path in reversed(self.listed()) if is_whole(path))

    def listed(self) -> list[Path]:
        """Checkpoints by step, whole or not."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda path: (step_of(path), path.suffix != REPLACED))

    def prune(self, keep: int, step: int):
        """Keeps the checkpoint of `step` and the ones before, `keep` in all, and the one with the lowest validation
        loss; removes what unfinished saves left.

        Later ones are damaged: the run has gone back behind them.
        """
        found = self.listed()
        valid = [path for path in found if step_of(path) <= step and not (
            path.suffix == REPLACED and path.with_suffix("") in found)]  # fmt: skip
        measured = [path for path in valid if validation_loss(path) < math.inf]
        kept = [*valid[-keep:], min(measured, key=validation_loss, default=None)]
        for path in found:
            if path not in kept:
                shutil.rmtree(path)
        for path in self.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def lock(file) -> bool:
    """Whether nobody else holds the file; the system lets go of it when it is closed or the process ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system that has no locks is as good as an unlocked file
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def validation_loss(checkpoint: Path) -> float:
    """Infinite where it was not measured."""
    try:
        return float(json.loads((checkpoint / VALIDATION).read_text(encoding="utf-8"))["loss"])
    except (OSError, ValueError, TypeError, KeyError):
        return math.inf


def step_of(checkpoint: Path) -> int:
    """-1 for a folder that is none."""
    digits = checkpoint.name.removeprefix("step-").removesuffix(REPLACED)
    return int(digits) if digits.isdigit() else -1


def fingerprint(path: Path) -> list[int]:
    """Size and CRC-32."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]


def is_whole(checkpoint: Path) -> bool:
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return all(fingerprint(checkpoint / name) == expected for name, expected in listed.items())
    except (OSError, ValueError, AttributeError):
        return False
