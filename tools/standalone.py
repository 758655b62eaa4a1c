"""`python install.py demo | serve | test`: everything in one private folder, against a real ComfyUI server.

Runs on the standard library of any Python 3.10 to 3.13; what it needs more lives in `.standalone/venv`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import browser, comfy_source
from .comfy_server import ComfyServer, check_port, has_accelerator, link_pack
from .lockfile import only_one
from .private_env import CONSTRAINTS, REQUIREMENTS, PrivateEnv, check_python
from .progress import Failure, Progress, tail

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = ROOT / ".standalone"
DEMO = ROOT / "workflows" / "text_to_image_tiny.json"


def prepare(progress, tests=False):
    """Bring `.standalone` up to date and return (its Python, the ComfyUI to use)."""
    check_python()
    try:
        logs = PRIVATE / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with only_one(PRIVATE / "lock", progress):
            env = PrivateEnv(PRIVATE / "venv", logs, progress)
            source = comfy_source.locate(ROOT)
            lists, constraints = [REQUIREMENTS / "comfyui.txt"], CONSTRAINTS
            if source:
                *lists, constraints = comfy_source.requirements(source, PRIVATE)
            lists += [ROOT / "requirements.txt", REQUIREMENTS / "client.txt"]
            env.ensure("comfyui", lists, constraints, torch=True)
            if tests:
                env.ensure("test", [REQUIREMENTS / "test.txt"])
            source = source or comfy_source.downloaded(PRIVATE, env.python, progress)
    except PermissionError as error:
        raise Failure(f"{error.filename} cannot be written: check the owner of {ROOT}.") from error
    progress.say(f"-- ComfyUI: {source.path} ({source.origin})")
    return env.python, source


def server(progress, python, source, port=None, options=()):
    """A started server whose files live in `.standalone/run` and whose only custom node is this pack."""
    base = PRIVATE / "run"
    link_pack(ROOT, base / "custom_nodes")
    if not has_accelerator(python):
        options = [*options, "--cpu"]
    comfy = ComfyServer(python, source.path, base, PRIVATE / "logs" / "comfyui.log", port=port, options=options)
    with progress.step(f"Starting ComfyUI at {comfy.url} (its log: {comfy.log_path})"):
        try:
            comfy.start()
        except BaseException:
            comfy.stop()
            raise
    return comfy


def demo(options, progress):
    """Render the bundled workflow."""
    if not options.workflow.is_file():
        raise Failure(f"There is no workflow {options.workflow}.")
    workflow = options.workflow.resolve()
    python, source = prepare(progress)
    with server(progress, python, source, options=["--disable-api-nodes"]) as comfy:
        command = [str(python), "-m", "tools.render_workflow", comfy.url, str(workflow), str(comfy.base / "output")]
        code = subprocess.call(command, cwd=ROOT)
        if comfy.process.poll() is not None:
            raise Failure(f"ComfyUI ended while it rendered; the end of its log {comfy.log_path}:\n"
                          f"{tail(comfy.log_path)}")
        return code


def serve(options, progress):
    """Keep a server for a browser until Ctrl-C."""
    check_port(options.port)
    python, source = prepare(progress)
    with server(progress, python, source, options.port) as comfy:
        progress.say(f"\nOpen {comfy.url} in a browser. Models go to {comfy.base / 'models'}. Ctrl-C ends the server.")
        try:
            while comfy.process.poll() is None:
                time.sleep(0.5)
        except KeyboardInterrupt:
            progress.say("\nEnding the server.")
            return 0
    raise Failure(f"ComfyUI ended by itself (exit code {comfy.process.returncode}); its log: {comfy.log_path}")


def test(options, progress):
    """Run pytest with the private environment, ComfyUI and, where there can be one, a browser."""
    python, source = prepare(progress, tests=True)
    chromium, reason = browser.find(python, progress, PRIVATE / "logs" / "browser.log")
    progress.say(f"-- Browser: {chromium or 'none, because ' + reason}")
    environment = {**os.environ, "COMFYUI_PATH": str(source.path), "PIXART_CHROMIUM": chromium or "",
                   "PIXART_NO_CHROMIUM": reason, "DO_NOT_TRACK": "1"}
    return subprocess.call([str(python), "-m", "pytest", *options.pytest], cwd=ROOT, env=environment)


def main(words):
    """Run one command; its exit code. A Failure is printed as one sentence."""
    parser = argparse.ArgumentParser(prog="install.py")
    commands = parser.add_subparsers(required=True, metavar="demo | serve | test")
    for command in (demo, serve, test):
        commands.add_parser(command.__name__, help=command.__doc__).set_defaults(run=command)
    commands.choices["demo"].add_argument("--workflow", type=Path, default=DEMO, help="a saved workflow")
    commands.choices["serve"].add_argument("--port", type=int, default=8188)
    if words[:1] == ["test"]:
        options = argparse.Namespace(run=test, pytest=words[1:])
    else:
        options = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))   # lets `with` end the server
    try:
        return options.run(options, Progress())
    except Failure as failure:
        print(f"\ninstall.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninstall.py: stopped.", file=sys.stderr)
        return 130
