"""Trains, as run.json says.

    accelerate launch -m pixart_nodes.training run.json [--dry-run]
    python -m pixart_nodes.training check run.json
    python -m pixart_nodes.training stop|pause|resume|save|sample RUN_FOLDER
    python -m pixart_nodes.training export RUN_FOLDER/checkpoints/step-000500

The folder of run.json is the run's folder, and may be given in its place. Killed at any moment, the same command goes
on from the last checkpoint. Exit status: 0 done, 3 stopped on command, 1 failed (status.json has the sentence), 2 words
that are no command.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import stat
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from ..data.processes import check_joined, leave
from .run_dir import COMMANDS, Busy, RunFolder, seal

logger = logging.getLogger("pixart_nodes.training")

DONE, FAILED, STOPPED = 0, 1, 3
MAIN_PATIENCE = 5.0  # seconds
PARENT_FD, PARENT_PID, PARENT_POLL = "PIXART_PARENT_FD", "PIXART_PARENT_PID", 2.0


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="pixart_nodes.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main.add_argument("words", nargs="+", metavar="run.json | COMMAND PATH")
    main.add_argument("--dry-run", action="store_true", help="two steps in the folder dry-run, and no result")
    return main


def make_accelerator(precision: str):
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from .sharding import hidden_from_accelerate

    mixed = "no" if precision == "fp32" else precision
    # accelerate joins processes on CPUs only when it is told that there is nothing else.
    with hidden_from_accelerate():
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=mixed,
            # the trainer's own loop accumulates, so accelerate shall not, whatever the environment says
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )  # fmt: skip
    check_joined(accelerator)
    return accelerator


def watch_parent(stop):
    """Calls stop(why) when the process that asked for this run ends: its pipe closes, or its number is gone."""
    fd, pid = os.environ.get(PARENT_FD, ""), os.environ.get(PARENT_PID, "")

    def wait_for_pipe():
        while os.read(int(fd), 1024):
            pass
        stop("the program that started the run has ended")

    def wait_for_process():
        import psutil

        try:
            parent = psutil.Process(int(pid))
            while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(PARENT_POLL)
        except psutil.NoSuchProcess:
            pass
        stop("the program that started the run has ended")

    if fd.isdigit() and is_pipe(int(fd)):
        threading.Thread(target=wait_for_pipe, daemon=True).start()
    elif pid.isdigit():  # launchers in between may have closed the pipe
        threading.Thread(target=wait_for_process, daemon=True).start()


def is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


@contextmanager
def stoppable(trainer):
    """Signals, and the end of the parent, make the trainer stop after its step."""

    def stop(why):
        logger.info("stops after this step: %s", why)
        trainer.stopping = why

    before = {
        number: signal.signal(number, lambda number, frame: stop(signal.Signals(number).name))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    watch_parent(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_folder(path: Path) -> RunFolder:
    """The run of a run.json, or of its folder. Raises ValueError or FileNotFoundError for any other path."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: give a run.json, or the folder that it is in.")
    if path.is_file() and path.name != "run.json":
        raise ValueError(f"{path} is no run.json: a run's settings have that name, and what it writes is beside them. "
                         "Give this file that name, in a folder of its own.")  # fmt: skip
    folder = RunFolder(path if path.is_dir() else path.parent)
    if not (folder.path / "run.json").is_file():
        raise FileNotFoundError(f"{folder.path} is no run: it has no run.json.")
    return folder


def train(path: Path, dry_run: bool = False) -> int:
    """Runs the run.json at `path`, unless another process does; the exit status."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        folder = run_folder(path)
        with folder.claimed() if is_main else nullcontext():
            return run(folder, is_main, dry_run)
    except (Busy, ValueError, OSError) as error:
        logger.error("%s", sentence_of(error, path))
        return FAILED


def asked_at(folder: RunFolder) -> float:
    """When this run was asked for: now, or when the launcher that has noted itself in the status started it."""
    import psutil

    status = folder.status()
    launchers = {process.pid for process in psutil.Process().parents()}
    return status.get("started", 0) if status.get("pid") in launchers else time.time()


def forget_old_commands(folder: RunFolder):
    """Deletes what was meant for an earlier run; a command to this one may come before its trainer is ready."""
    asked = asked_at(folder)
    for path, _ in folder.waiting():
        if path.stat().st_mtime < asked:
            path.unlink()


def run(folder: RunFolder, is_main: bool, dry_run: bool) -> int:
    goal, trainer = RunFolder(folder.path / "dry-run") if dry_run else folder, None
    try:
        if is_main:
            if dry_run and goal.path.exists():
                shutil.rmtree(goal.path)
            forget_old_commands(goal)
            goal.write_status(state="starting", pid=os.getpid(), started=time.time(), error=None, output=None)
        config = folder.config()
        if problems := config.check():
            raise ValueError(" ".join(problems))
        from .inspection import output_problems
        from .start import precision_of
        from .trainer import Trainer

        if is_main and (problems := output_problems(config)):  # now, not behind the last step
            raise ValueError(" ".join(problems))
        if dry_run:
            config = replace(config, steps=2, warmup_steps=0, sample_every=0)
        trainer = Trainer(config, goal, make_accelerator(precision_of(config)))
        with stoppable(trainer):
            state = trainer.run()
            output = trainer.export() if state == "done" and not dry_run else None
    except Exception as error:  # whatever it is: the monitor and the exit status say so, the log has the traceback
        sentence = sentence_of(error, goal.path, trainer)
        logger.exception("%s", sentence)
        if is_main or not main_has_said_why(goal):
            record_end(goal, "failed", sentence=sentence)
        return FAILED
    if is_main:
        record_end(goal, state, output=str(output) if output else None)
    trainer.accelerator.wait_for_everyone()
    return DONE if state == "done" else STOPPED


def main_has_said_why(folder: RunFolder) -> bool:
    """Waits for the main process to record a failure that it shares: when this one is gone, the launcher ends it.

    False when it does not, because it waits for this process. A machine that does not share the folder has none to
    write to.
    """
    import psutil

    began = psutil.Process().create_time() - MAIN_PATIENCE
    deadline = time.monotonic() + MAIN_PATIENCE
    while time.monotonic() < deadline:
        status = folder.status()
        if status.get("state") == "failed" and status.get("started", 0) > began:
            return True
        time.sleep(0.1)
    return not folder.status()


def sentence_of(error: BaseException, folder: Path, trainer=None) -> str:
    """What went wrong, and what to do. folder: that was written to when nothing says otherwise."""
    from .failures import disk_full, is_disk_full

    if is_disk_full(error):
        return disk_full(error, folder)
    return trainer.sentence(error) if trainer else str(error) or repr(error)


def record_end(folder: RunFolder, state: str, sentence: str | None = None, output: str | None = None):
    """The last words of a run; a disk that is full must not hide why it ended."""
    try:
        write_last_status(folder, state=state, error=sentence, output=output, output_seal=output and seal(output))
        if sentence:
            folder.add_event("error", text=sentence)
        folder.add_event("end", state=state)
    except OSError as error:
        logger.error("%s cannot be written: %s", folder.path, error)


def write_last_status(folder: RunFolder, **fields):
    """Over the old one, which has its place on the disk, when there is no room for another."""
    try:
        folder.write_status(**fields)
    except OSError:
        content = json.dumps({**folder.status(), **fields}, indent=2)
        with (folder.path / "status.json").open("r+", encoding="utf-8") as file:
            file.write(content)
            file.truncate()


def export(checkpoint: Path) -> int:
    """Writes what a run had at one of its checkpoints, with the checkpoint's name behind that of the run's result."""
    from .start import precision_of
    from .trainer import Trainer

    folder = RunFolder(checkpoint.parents[1])
    try:
        config = folder.config()
        config = replace(config, output=replace(config.output, name=f"{config.output.name}-{checkpoint.name}"))
        if problems := config.check():
            raise ValueError(" ".join(problems))
        trainer = Trainer(config, folder, make_accelerator(precision_of(config)), checkpoint)
        sys.stdout.write(f"{trainer.export()}\n")
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return FAILED
    return DONE


def check(path: Path) -> int:
    """Lists every problem, of the config and of what it points at; without one, what the run will take."""
    plan = ""
    try:
        folder = run_folder(path)
        from .inspection import inspect

        problems, plan = inspect(folder)
    except (ValueError, OSError) as error:
        problems = [str(error)]
    sys.stdout.write("\n".join(problems or [plan]) + "\n")
    return FAILED if problems else DONE


def send(command: str, path: Path) -> int:
    """Leaves a command for the trainer of a run."""
    try:
        run_folder(path).send(command)
    except (ValueError, OSError) as error:
        logger.error("%s", sentence_of(error, path))
        return FAILED
    return DONE


def main(words=None) -> int:
    usage = parser()
    arguments = usage.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    command, *paths = arguments.words
    is_command = command in ("check", "export", *COMMANDS)
    if len(paths) != is_command or is_command and arguments.dry_run:
        usage.error(f"{' '.join(arguments.words)}: give a run.json, with or without --dry-run, or a path behind one of "
                    f"check, export, {', '.join(COMMANDS)}.")  # fmt: skip
    path = Path(paths[0] if is_command else command).absolute()
    if not is_command:
        return train(path, arguments.dry_run)
    if command == "check":
        return check(path)
    return export(path) if command == "export" else send(command, path)


if __name__ == "__main__":
    leave(main())
