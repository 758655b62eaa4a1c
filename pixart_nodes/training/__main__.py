"""Trains, as run.json says.

    accelerate launch -m pixart_nodes.training run.json [--dry-run]
    python -m pixart_nodes.training check run.json
    python -m pixart_nodes.training stop|pause|resume|save|sample RUN_FOLDER
    python -m pixart_nodes.training export RUN_FOLDER/checkpoints/step-000500

The folder of run.json is the run's folder. Killed at any moment, the same command goes on from the last checkpoint.
Exit status: 0 done, 3 stopped on command, 1 failed (status.json has the sentence).
"""

import argparse
import logging
import os
import signal
import stat
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from .run_dir import COMMANDS, Busy, RunFolder

logger = logging.getLogger("pixart_nodes.training")

DONE, FAILED, STOPPED = 0, 1, 3
PARENT_FD, PARENT_PID, PARENT_POLL = "PIXART_PARENT_FD", "PIXART_PARENT_PID", 2.0


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="pixart_nodes.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main.add_argument("words", nargs="+", metavar="run.json | COMMAND FOLDER")
    main.add_argument("--dry-run", action="store_true", help="two steps into the folder dry-run, and no result")
    return main


def make_accelerator(precision: str):
    import torch
    from accelerate import Accelerator

    from .sharding import hidden_from_accelerate

    launched = int(os.environ.get("WORLD_SIZE", 1))
    mixed = "no" if precision == "fp32" else precision
    # accelerate joins processes on CPUs only when it is told that there is nothing else.
    with hidden_from_accelerate():
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=mixed)
    if accelerator.num_processes != launched:
        raise ValueError(f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}.")
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


def train(path: Path, dry_run: bool = False) -> int:
    """Runs the run.json at `path`, unless another process does; the exit status."""
    folder = RunFolder(path.parent)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with folder.claimed() if is_main else nullcontext():
            return run(folder, is_main, dry_run)
    except Busy as error:
        logger.error("%s", error)
        return FAILED


def run(folder: RunFolder, is_main: bool, dry_run: bool) -> int:
    if is_main:
        folder.write_status(state="starting", pid=os.getpid(), started=time.time(), error=None, output=None)
    trainer = None
    try:
        config = folder.config()
        if problems := config.check():
            raise ValueError(" ".join(problems))
        from .trainer import Trainer, precision_of

        goal = folder
        if dry_run:
            config = replace(config, steps=2, warmup_steps=0, sample_every=0)
            goal = RunFolder(folder.path / "dry-run")
        trainer = Trainer(config, goal, make_accelerator(precision_of(config)))
        with stoppable(trainer):
            state = trainer.run()
            output = trainer.export() if state == "done" and not dry_run else None
    except Exception as error:  # whatever it is: the monitor and the exit status say so, the log has the traceback
        sentence = trainer.sentence(error) if trainer else str(error) or repr(error)
        logger.exception("%s", sentence)
        if is_main:
            record_end(folder, "failed", sentence=sentence)
        return FAILED
    if is_main:
        record_end(folder, state, output=str(output) if output else None)
    trainer.accelerator.end_training()
    return DONE if state == "done" else STOPPED


def record_end(folder: RunFolder, state: str, sentence: str | None = None, output: str | None = None):
    """The last words of a run; a disk that is full must not hide why it ended."""
    try:
        folder.write_status(state=state, error=sentence, output=output)
        if sentence:
            folder.add_event("error", text=sentence)
        folder.add_event("end", state=state)
    except OSError as error:
        logger.error("%s cannot be written: %s", folder.path, error)


def export(checkpoint: Path) -> int:
    """Writes what a run had at one of its checkpoints, with the checkpoint's name behind that of the run's result."""
    from .trainer import Trainer, precision_of

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
    try:
        config = RunFolder(path.parent).config()
        problems = config.check()
    except (ValueError, OSError) as error:
        problems = [str(error)]
    if not problems:
        problems, plan = look_closer(config)
    sys.stdout.write("\n".join(problems or [plan]) + "\n")
    return FAILED if problems else DONE


def look_closer(config) -> tuple[list[str], str]:
    """(problems, plan) of a config whose values are right."""
    from ..checkpoints import load_weights
    from ..data.dataset import Batches
    from .estimate import report
    from .recipes import RECIPES
    from .trainer import EMA_CHOICE, open_cache

    index = found = None
    problems = []
    try:
        index = open_cache(config.cache)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    family = None if config.base.family == "auto" else config.base.family
    try:
        choice = EMA_CHOICE[config.base.weights]
        found = load_weights(config.base.path, family=family, base_size=config.base.base_size, ema=choice)[1]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if problems:
        return problems, ""
    problems = RECIPES[config.recipe].problems(config, index, found.params)
    try:
        wanted = "sigma" if config.recipe == "weak-to-strong" else found.family
        batches = Batches(index, wanted, config.batch_size, caption_dim=found.params.caption_channels)
    except ValueError as error:
        return [*problems, str(error)], ""
    pixels = max(bucket.width * bucket.height for bucket in index.buckets)
    updates = f"{config.steps} updates of {config.batch_size * config.gradient_accumulation_steps} pictures per process"
    rate = f"learning rate {config.learning_rate:g}"
    return problems, "\n".join((batches.summary(), f"{updates}, {rate}", report(config, found.params, pixels)))


def main(words=None) -> int:
    arguments = parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    command, *rest = arguments.words
    if not rest:
        return train(Path(command).absolute(), arguments.dry_run)
    if command == "check":
        return check(Path(rest[0]).absolute())
    if command == "export":
        return export(Path(rest[0]).absolute())
    if command not in COMMANDS or not Path(rest[0], "run.json").is_file():
        logger.error("%s %s: the commands are check run.json, export CHECKPOINT, and %s RUN_FOLDER.", command, rest[0],
                     ", ".join(COMMANDS))  # fmt: skip
        return FAILED
    RunFolder(rest[0]).send(command)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
