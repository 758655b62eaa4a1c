"""The folder of all runs: <ComfyUI's output>/pixart_runs/<name>_<month and day>_<time>."""

import itertools
import time
from pathlib import Path

from ..training.config import RunConfig
from ..training.run_dir import COMPLETE, RunFolder, seal, step_of, write_json
from .watch import is_alive, last_step, read_json, status_of

FOLDER = "pixart_runs"
ORIGIN = "origin.json"  # who asked for the run; run.json holds nothing but the config
WORKFLOW = "workflow.json"  # the graph that it was asked in, to be opened in ComfyUI
# What a run can go on with changed: how long, and what is written on the way.
FREE = ("steps", "warmup_steps", "save_every", "keep", "sample_every", "validate_every", "vae")


def run_folders(root: Path) -> list[Path]:
    """The runs that are directly in the folder, newest first."""
    return sorted(filter(is_run, root.iterdir()), key=created, reverse=True) if root.is_dir() else []


def known_run(root: Path, name: str) -> Path | None:
    """The run of this name out of the list of those that there are: nothing is made of the name itself."""
    if not root.is_dir():
        return None
    return next((path for path in root.iterdir() if path.name == name and is_run(path)), None)


def is_run(path: Path) -> bool:
    """Whether this is a folder with a run.json, and neither is a link that may lead elsewhere."""
    config = path / "run.json"
    return not path.is_symlink() and not config.is_symlink() and config.is_file()


def created(run: Path) -> float:
    said = read_json(run / ORIGIN).get("created")
    return said if isinstance(said, (int, float)) else (run / "run.json").stat().st_mtime


def create(root: Path, config: RunConfig, workflow: dict | None = None, **origin) -> RunFolder:
    """A new run's folder with its run.json, origin.json and workflow.json."""
    name = f"{config.output.name}_{time.strftime('%m%d_%H%M')}"
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    path = next(root / name for name in names if not (root / name).exists())
    write_json(path / ORIGIN, {"created": time.time(), **origin})
    note(path, workflow)
    folder = RunFolder(path)
    folder.write_config(config)
    return folder


def find(root: Path, config: RunConfig) -> RunFolder | None:
    """The newest run that this config goes on with: what was trained would be the same, and not more steps than these
    are done."""
    for path in run_folders(root):
        folder = RunFolder(path)
        try:
            found = folder.config()
        except (ValueError, OSError):  # somebody's own, or an older version's
            continue
        if essence(found) == essence(config) and (last_checkpoint(path) or 0) <= config.steps:
            return folder
    return None


def essence(config: RunConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in FREE}


def is_done(run: Path, steps: int) -> bool:
    """Whether the run has made this many steps and its result is still there, not that of another run."""
    status = status_of(run)
    done = status.get("state") == "done" and status.get("step") == steps
    if not done or not status.get("output"):
        return False
    made = seal(status["output"])
    return made is not None and made == status.get("output_seal", made)


def note(run: Path, workflow: dict | None = None, **origin):
    """Changes these entries of origin.json, and the workflow when there is one."""
    if origin:
        write_json(run / ORIGIN, {"created": created(run), **read_json(run / ORIGIN), **origin})
    if workflow:
        write_json(run / WORKFLOW, workflow)


def newest(root: Path, name: str) -> Path | None:
    """The newest run with this output name."""
    return next((path for path in run_folders(root) if output_name(path) == name), None)


def output_name(run: Path) -> str:
    output = read_json(run / "run.json").get("output")
    return str(output.get("name", "")) if isinstance(output, dict) else ""


def last_checkpoint(run: Path) -> int | None:
    steps = [step_of(path) for path in RunFolder(run).listed() if (path / COMPLETE).is_file()]
    return max(steps, default=None)


def samples(run: Path) -> list[dict]:
    """[{"step", "files"}] by step."""
    found = {}
    for path in sorted(RunFolder(run).samples.glob("step-*_*.png")):
        digits = path.stem.removeprefix("step-").partition("_")[0]
        if digits.isdigit():
            found.setdefault(int(digits), []).append(path.name)
    return [{"step": step, "files": files} for step, files in sorted(found.items())]


def summary(run: Path) -> dict:
    """A run as the list of all runs shows it."""
    status = status_of(run)
    alive = is_alive(status)
    return {
        "id": run.name, "name": output_name(run), "recipe": read_json(run / "run.json").get("recipe", ""),
        "created": created(run), "status": status, "alive": alive,
        "resumable": not alive and status.get("state") != "done", "last": last_step(run),
    }  # fmt: skip


def details(run: Path) -> dict:
    status = status_of(run)
    return {
        "id": run.name, "config": read_json(run / "run.json"), "status": status, "alive": is_alive(status),
        "last_checkpoint": last_checkpoint(run),
    }  # fmt: skip
