"""Install hook of ComfyUI Manager, and the door to the stand-alone set-up.

Without words: requirements.txt goes into the running Python, and an installed torch stays as it is.
With `demo`, `serve` or `test`: see tools/standalone.py, which the registry archive does not carry.
"""

import importlib.metadata
import importlib.util
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "torchsde", "triton", "xformers")
USAGE = """usage: python install.py                    install requirements.txt (what ComfyUI Manager runs)
       python install.py demo               set up privately, render the bundled workflow with ComfyUI
       python install.py serve [--port N]   set up privately, start ComfyUI for a browser
       python install.py test [ARGS]        set up privately, run the tests (ARGS go to pytest)"""


def requirements(path):
    """The requirement lines of a file, without comments and empty lines."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def installed_torch_family():
    """`name==version` of every installed package that pip must leave alone."""
    found = []
    for name in TORCH_FAMILY:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def install_requirements(path):
    """Let pip install what `path` lists; returns pip's exit code, 0 when the list is empty."""
    if not requirements(path):
        print(f"PixArt Nodes: {path.name} asks for nothing beyond ComfyUI itself, nothing to do.")
        return 0
    if importlib.util.find_spec("pip") is None:
        print(f"PixArt Nodes: this Python has no pip; install the lines of {path} in its environment by other means.",
              file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "keep.txt"
        constraints.write_text("\n".join(installed_torch_family()), encoding="utf-8")
        sys.argv = ["pip", "install", "--requirement", str(path), "--constraint", str(constraints)]
        try:
            runpy.run_module("pip", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def main(words):
    if not words:
        return install_requirements(ROOT / "requirements.txt")
    if words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] not in ("demo", "serve", "test"):
        print(f"install.py: unknown word {words[0]!r}\n{USAGE}", file=sys.stderr)
        return 2
    if not (ROOT / "tools" / "standalone.py").is_file():
        print(f"install.py {words[0]}: the registry archive does not carry the stand-alone set-up; "
              "clone the repository with git and run the command there.", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    from tools import standalone
    return standalone.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
