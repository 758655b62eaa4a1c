"""A real ComfyUI server as a child process: started on a base directory of its own, always ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from .progress import Failure, tail

# Localhost is never behind the proxy that the environment may name.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port():
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port):
    """Raise Failure when something already listens on `port`."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise Failure(f"Port {port} is in use: end the program that uses it, or choose another one with "
                          f"--port {port + 1}.")


def link_pack(repository, custom_nodes, name="pixart-nodes"):
    """Make `repository` appear as a custom node: a link, or a junction where Windows refuses links."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    link = custom_nodes / name
    if link.exists() and link.resolve() == repository.resolve():
        return
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(repository, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        import _winapi
        _winapi.CreateJunction(str(repository), str(link))


def has_accelerator(python):
    """Whether the torch of `python` sees a GPU that ComfyUI can use; ComfyUI needs --cpu otherwise."""
    code = ("import sys, torch; mps = getattr(torch.backends, 'mps', None); "
            "sys.exit(not (torch.cuda.is_available() or (mps and mps.is_available()) "
            "or (hasattr(torch, 'xpu') and torch.xpu.is_available())))")
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


class ComfyServer:
    """`with ComfyServer(...) as server:` gives a server that answers, and ends it afterwards."""

    def __init__(self, python, comfyui, base, log_path, *, port=None, options=()):
        self.python, self.comfyui, self.base, self.log_path = python, Path(comfyui), Path(base), Path(log_path)
        self.port = port or free_port()
        self.options = list(options)
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self, timeout=300):
        """Start ComfyUI and return when it answers. Raises Failure with the end of its log when it does not."""
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        example = self.comfyui / "input" / "example.png"  # what Load Image shows in a fresh ComfyUI
        if example.is_file() and not (self.base / "input" / example.name).exists():
            shutil.copy(example, self.base / "input")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), "-u", str(self.comfyui / "main.py"), "--base-directory", str(self.base),
                   "--port", str(self.port), "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
                   *self.options]
        environment = {**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        environment.pop("PYTHONPATH", None)
        with open(self.log_path, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=self.comfyui, env=environment, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT)
        start = time.monotonic()
        while not self.answers():
            if self.process.poll() is not None:
                raise Failure(f"ComfyUI ended while it started (exit code {self.process.returncode}); "
                              f"the end of its log {self.log_path}:\n{tail(self.log_path)}")
            if time.monotonic() - start > timeout:
                self.stop()
                raise Failure(f"ComfyUI did not answer within {timeout} s; the end of its log {self.log_path}:\n"
                              f"{tail(self.log_path)}")
            time.sleep(0.25)
        return self

    def answers(self):
        """Whether our process answers on its port."""
        try:
            with _opener.open(f"{self.url}/system_stats", timeout=5) as reply:
                return "system" in json.load(reply) and self.process.poll() is None
        except (OSError, ValueError):
            return False

    def stop(self, patience=5):
        """End the server: ask first, then insist."""
        if self.process is None:
            return
        asks = [] if os.name == "nt" else [lambda: self.process.send_signal(signal.SIGINT)]
        for ask in [*asks, self.process.terminate, self.process.kill]:
            if self.process.poll() is None:
                ask()
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue

    def log(self):
        """Everything the server has logged so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def __enter__(self):
        try:
            return self if self.process else self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *error):
        self.stop()


def copy_pack(repository, folder):
    """Copy what the registry archive would hold (everything that .comfyignore does not name) to `folder`."""
    lines = (repository / ".comfyignore").read_text(encoding="utf-8").split()
    left_out = {line.strip("/") for line in lines} | {".git", ".standalone"}

    def skip(directory, names):
        top = Path(directory) == repository
        return [name for name in names if name == "__pycache__" or (top and (name in left_out or name.startswith(".")))]

    shutil.copytree(repository, folder, ignore=skip)
