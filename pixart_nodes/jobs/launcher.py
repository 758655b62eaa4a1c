"""Starting and ending trainers: `accelerate launch -m pixart_nodes.training run.json` in a process group of its own.

A thread waits for each trainer that this process started, so that the folder has a last word even when it is killed.
"""

import asyncio
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from ..training.run_dir import RunFolder
from .watch import FINAL, TAIL_LINES, last_word, likely_cause, process_lives, status_of

logger = logging.getLogger(__name__)

PACK = Path(__file__).parents[2]
NEEDED = ("accelerate", "peft", "diffusers")
POLL = 0.5  # seconds
GRACE = 5.0  # seconds that a trainer gets when it is told to end at once
PATIENCE = 300.0  # seconds that it gets for its step, its samples and its checkpoint
WINDOWS_NEW_GROUP = 0x200  # CREATE_NEW_PROCESS_GROUP


def missing_packages() -> str:
    """A sentence when training needs packages that are not installed; else empty."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"Training needs {', '.join(missing)}. Install: {sys.executable} -m pip install {' '.join(missing)}"


def training_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pixart_nodes.training", *words]


def launch_command(run_json: Path, processes: int) -> list[str]:
    """processes 0: as the user's `accelerate config` says; 1: one, whatever it says."""
    flags = {0: [], 1: ["--num_processes", "1"]}.get(processes, ["--multi_gpu", "--num_processes", str(processes)])
    if processes:
        flags += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    return [*launcher, "-m", "pixart_nodes.training", str(run_json)]


def environment(cpu: bool = False, detached: bool = True) -> dict[str, str]:
    """This process's, with the pack where Python finds it, whatever the pack's folder is called."""
    paths = [str(PACK), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    for name in ("PIXART_PARENT_FD", "PIXART_PARENT_PID"):
        changed.pop(name, None)
    if cpu:
        changed["CUDA_VISIBLE_DEVICES"] = ""
    # accelerate closes pipes, so the number of this process it is
    return changed if detached else {**changed, "PIXART_PARENT_PID": str(os.getpid())}


class Job:
    """A trainer that this process started. on_state(state) is called from a thread, at each change."""

    def __init__(self, folder: RunFolder, command: list[str], environ: dict, on_state: Callable[[str], None]):
        self.folder, self.command, self.environ, self.on_state = folder, command, environ, on_state
        self.error: OSError | None = None
        self.begun = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.supervise()), daemon=True)

    def start(self):
        """Raises OSError when there can be no process."""
        self.thread.start()
        self.begun.wait()
        if self.error:
            raise self.error

    async def supervise(self):
        try:
            process = await self.spawn()
        except OSError as error:
            self.error = error
            return
        finally:
            self.begun.set()
        ended, state = asyncio.ensure_future(process.wait()), None
        while not ended.done() or process_lives(status_of(self.folder.path)):  # the launcher may end before the trainer
            await asyncio.wait({ended}, timeout=POLL)
            state = self.tell(state)
            if ended.done():
                await asyncio.sleep(POLL)
        if self.tell(state) not in FINAL:
            self.close(ended.result())

    async def spawn(self):
        group = {"creationflags": WINDOWS_NEW_GROUP} if os.name == "nt" else {"start_new_session": True}
        with (self.folder.path / "log.txt").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command, cwd=self.folder.path, env=self.environ, stdin=asyncio.subprocess.DEVNULL, stdout=log,
                stderr=asyncio.subprocess.STDOUT, **group,
            )  # fmt: skip
        self.folder.write_status(state="starting", pid=process.pid, started=time.time(), error=None, output=None)
        return process

    def tell(self, before: str | None) -> str | None:
        """Passes the run's state on when it has changed, and returns it."""
        state = status_of(self.folder.path).get("state", before)
        if state != before:
            self.on_state(state)
        return state

    def close(self, returncode: int):
        """Writes the last word of a trainer that could not."""
        asked = any(command == "stop" for _, command in self.folder.waiting())
        asked = asked or status_of(self.folder.path).get("state") == "stopping"
        state, sentence = ("stopped", None) if asked else ("failed", last_word(self.folder.path, returncode))
        try:
            self.folder.write_status(state=state, error=sentence)
            if sentence:
                self.folder.add_event("error", text=sentence)
            self.folder.add_event("end", state=state)
        except OSError as error:
            logger.error("%s cannot be written: %s", self.folder.path, error)
        self.on_state(state)


def start(
    folder: RunFolder, *, processes: int = 1, detached: bool = False, cpu: bool = False,
    on_state: Callable[[str], None] = lambda state: None,
) -> Job:  # fmt: skip
    """Starts the trainer of a run, which goes on from its last checkpoint; `detached`: and survives this process.

    Raises RuntimeError when it is running already or packages are missing, OSError when there can be no process.
    """
    if status_of(folder.path).get("state") in FINAL:
        gone(folder, GRACE)  # a process takes a while to end
    if process_lives(status_of(folder.path)):
        pid = status_of(folder.path)["pid"]
        raise RuntimeError(f"{folder.path.name} is being trained already, by process {pid}.")
    if sentence := missing_packages():
        raise RuntimeError(sentence)
    for path, _ in folder.waiting():  # left behind by a run that was killed
        path.unlink(missing_ok=True)
    run_json = folder.path.absolute() / "run.json"
    job = Job(folder, launch_command(run_json, processes), environment(cpu, detached), on_state)
    job.start()
    return job


def check(run_json: Path, cpu: bool = False) -> str:
    """What `python -m pixart_nodes.training check` says: all problems, or what the run will take."""
    if sentence := missing_packages():
        return sentence
    with ThreadPoolExecutor(1) as pool:  # the calling thread may have an event loop that is running
        return pool.submit(asyncio.run, output_of(training_command("check", str(run_json)), environment(cpu))).result()


async def output_of(command: list[str], environ: dict) -> str:
    """What a command writes; the likely cause, or the end of its errors, when it writes nothing."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, cwd=PACK, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    said, errors = (part.decode("utf-8", "replace").strip() for part in await process.communicate())
    return said or likely_cause(errors) or "\n".join(errors.splitlines()[-TAIL_LINES:])


def stop(folder: RunFolder, patience: float = PATIENCE, hurry: Callable[[], bool] = lambda: False):
    """Asks the trainer to stop behind its step, with a checkpoint. After `patience` seconds, or as soon as hurry(),
    insists, and at last kills its group."""
    starting = status_of(folder.path).get("state") == "starting"  # nothing is trained yet, and nothing hears
    folder.send("stop")
    if not starting and gone(folder, patience, hurry):
        return
    for insist in (signal.SIGTERM, getattr(signal, "SIGKILL", None)):
        signal_group(status_of(folder.path).get("pid"), insist)
        if gone(folder, min(GRACE, patience)):
            return


def gone(folder: RunFolder, seconds: float, hurry: Callable[[], bool] = lambda: False) -> bool:
    """Waits for the end of a run, at most so long."""
    began = time.monotonic()
    while process_lives(status_of(folder.path)):
        if time.monotonic() - began > seconds or hurry():
            return False
        time.sleep(0.1)
    return True


def signal_group(pid: int | None, number: int | None):
    """Signals the group of a process, or ends its tree where there are no signals. None: kill."""
    try:
        if os.name != "nt":
            os.killpg(os.getpgid(pid), number)
            return
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            member.kill()
    except (ProcessLookupError, psutil.Error):  # it has ended meanwhile
        return
