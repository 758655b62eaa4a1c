"""Fills a feature cache without ComfyUI, on any number of processes and machines that share its folder.

    accelerate launch -m pixart_nodes.data encode --source DIR --cache DIR --family sigma --vae PATH --t5 PATH
    python -m pixart_nodes.data check --source DIR
    python -m pixart_nodes.data import --source DIR --cache DIR
    python -m pixart_nodes.data verify --cache DIR

Stopped or killed at any moment, the same command goes on where it was.
"""

import argparse
import logging
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch

from .cache import Store
from .encode import fill, stores
from .imports import import_features
from .index import index_of
from .manifest import Manifest, ScanOptions, scan
from .memory import Memory
from .pictures import digest
from .processes import check_joined, launched, leave

logger = logging.getLogger("pixart_nodes.data")

FAILED = 2  # exit status
REPORT_EVERY = 10.0  # seconds
ANY_WAIT = timedelta(days=7)  # for the slowest process


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="pixart_nodes.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="encode pictures and captions into a cache")
    check = commands.add_parser("check", help="list what is wrong with a data set")
    for command in (encode, check):
        command.add_argument("--source", required=True, help="a folder of pictures, a .jsonl or a .json list")
        add_scan_options(command)
    encode.add_argument("--cache", required=True, help="the cache's folder, shared by all processes")
    encode.add_argument("--family", required=True, choices=("alpha", "sigma"))
    encode.add_argument("--vae", required=True, help="a diffusers folder, or a file")
    encode.add_argument("--t5", required=True, help="a Hugging Face folder, or a file with a tokenizer beside it")
    encode.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    encode.add_argument("--cpu", action="store_true", help="use no GPU")
    encode.add_argument("--batch-size", type=int, default=4)
    encode.add_argument("--prompt", action="append", default=[], help="a validation prompt; may be repeated")
    imports = commands.add_parser("import", help="take over .npy and .npz features of PixArt's own scripts")
    imports.add_argument("--source", required=True, help="the folder with data_info.json and the feature folders")
    imports.add_argument("--cache", required=True)
    verify = commands.add_parser("verify", help="read every byte of a cache and put damaged shards aside")
    verify.add_argument("--cache", required=True)
    return main


def add_scan_options(command: argparse.ArgumentParser):
    """One option for each field of ScanOptions."""
    for field in fields(ScanOptions):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool or field.type == "bool":
            command.add_argument(name, action="store_true")
        else:
            command.add_argument(name, type=type(field.default), default=field.default)


def scan_options(arguments) -> ScanOptions:
    return ScanOptions(**{field.name: getattr(arguments, field.name) for field in fields(ScanOptions)})


class Progress:
    """A line in the log every few seconds."""

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.reported = self.start

    def __call__(self, done: int, total: int):
        now = time.monotonic()
        if done == total or now - self.reported >= REPORT_EVERY:
            logger.info("%s %d of %d, %.1f per second", self.what, done, total, done / max(now - self.start, 1e-9))
            self.reported = now


def encode(arguments):
    """Each process looks at its share of the pictures and encodes its share; the first one writes the training set."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import gather_object

    from .loading import load_encoders

    # accelerate joins processes on CPUs only when it is told that there is nothing else.
    on_cpu = arguments.cpu or launched() > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=ANY_WAIT)])
    check_joined(accelerator)
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    source, cache = Path(arguments.source).resolve(), Path(arguments.cache)
    memory = shared_memory(source, cache / "scans", share["rank"])
    manifest = scan(
        source, scan_options(arguments), memory, Progress("looked at"),
        gather=lambda found: gather_object([found]), **share,
    )  # fmt: skip
    if accelerator.is_main_process:
        report(manifest)
    encoders = load_encoders(arguments.family, arguments.vae, arguments.t5, accelerator.device, arguments.dtype)
    latents, captions = stores(cache, encoders, share["rank"])
    if accelerator.is_main_process:
        latents.sweep()
        captions.sweep()
    done = fill(
        manifest, encoders, latents, captions, prompts=arguments.prompt, batch_size=arguments.batch_size,
        progress=Progress("encoded"), **share,
    )  # fmt: skip
    logger.info(done.summary())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        latents.refresh()
        captions.refresh()
        sys.stdout.write(f"{index_of(cache, manifest, encoders, latents, captions, arguments.prompt).path}\n")
    accelerator.wait_for_everyone()


def shared_memory(source: Path, folder: Path, rank: int) -> Memory:
    """What any process saw of these files in an earlier run; each process writes its own file."""
    name = digest(str(source).encode())
    return Memory(folder / f"{name}-{rank:05}.json", sorted(folder.glob(f"{name}-*.json")))


def report(manifest: Manifest):
    for line in manifest.summary().splitlines():
        logger.info(line)


def check(arguments) -> int:
    manifest = scan(Path(arguments.source), scan_options(arguments), progress=Progress("looked at"))
    sys.stdout.write(manifest.summary() + "\n")
    return 1 if manifest.problems else 0


def imports(arguments):
    index, problems = import_features(arguments.source, arguments.cache, progress=Progress("imported"))
    for problem in problems:
        logger.warning("%s: %s (%s)", *problem)
    sys.stdout.write(f"{index.path}\n")


def verify(arguments) -> int:
    folders = [path for kind in ("latents", "captions") for path in sorted(Path(arguments.cache, kind).glob("*"))]
    if not folders:
        raise FileNotFoundError(f"{arguments.cache} is no feature cache: it has no folders latents and captions.")
    damaged = []
    for folder in folders:
        store = Store(folder)
        damaged += store.set_aside + store.verify()
        logger.info("%s: %d entries are whole", folder, len(store.places))
    sys.stdout.write("".join(f"damaged, put aside: {name}\n" for name in damaged))
    return 1 if damaged else 0


def main(words=None) -> int:
    arguments = parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    commands = {"encode": encode, "check": check, "import": imports, "verify": verify}
    try:
        return commands[arguments.command](arguments) or 0
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return FAILED


if __name__ == "__main__":
    leave(main())
