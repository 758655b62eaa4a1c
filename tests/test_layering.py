"""Who may import whom: the table of docs/DESIGN.md, section 2, walked over every file of the package."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pixart_nodes"

COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}

# The standard library is always allowed. A dotted name allows that module only.
ALLOWED = {
    "model": {"torch", "einops"},
    "diffusion": {"torch", "einops", "tqdm"},
    "checkpoints": {"torch", "safetensors", "model"},
    "vae": {"torch"},
    "text": {"torch", "transformers", "tokenizers", "sentencepiece", "ftfy", "bs4"},
    "data": {"torch", "numpy", "PIL", "transformers", "diffusers", "accelerate",
             "checkpoints.files", "checkpoints.configs", "text"},
    "training": {"torch", "accelerate", "peft", "bitsandbytes", "diffusers", "PIL", "psutil", "came_pytorch",
                 "prodigyopt", "model", "diffusion", "checkpoints", "data"},
    "comfy_bridge": {"torch", "bitsandbytes", *COMFYUI, "model", "diffusion", "checkpoints", "vae", "text"},
    "jobs": {"aiohttp", "psutil", "PIL", "training.config", "training.run_dir", "training.events"},
    "nodes": {"torch", *COMFYUI, "comfy_bridge", "jobs", "text", "data", "training.config", "training.run_dir"},
}
RUN_FOLDER_MODULES = ("config", "run_dir", "events")   # ComfyUI's process reads a run with these, so no torch


def imports(path):
    """(line, module, is_relative) of every import; relative ones as a dotted name below pixart_nodes."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts[1:]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module, False
        elif isinstance(node, ast.ImportFrom):
            above = here[:len(here) - node.level]
            base = ".".join((*above, *(node.module or "").split(".") * bool(node.module)))
            yield from ((node.lineno, f"{base}.{alias.name}".lstrip("."), True) for alias in node.names)


def files(package):
    return sorted((PACKAGE / package).rglob("*.py"))


def packages():
    return sorted(folder.name for folder in PACKAGE.iterdir() if any(folder.glob("*.py")))


def within(name, allowed):
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


@pytest.mark.parametrize("package", packages())
def test_a_package_imports_only_what_the_design_allows(package):
    assert package in ALLOWED, f"docs/DESIGN.md has no row for pixart_nodes/{package}"
    allowed = ALLOWED[package]
    foreign = [f"{path.relative_to(ROOT)}:{line} imports {name}"
               for path in files(package) for line, name, relative in imports(path)
               if not within(name, {package, *allowed} if relative else allowed | sys.stdlib_module_names)]
    assert not foreign


def test_the_package_imports_itself_only_relatively():
    """ComfyUI imports the pack under a name that it derives from the path."""
    absolute = [f"{path.relative_to(ROOT)}:{line}" for path in PACKAGE.rglob("*.py")
                for line, name, relative in imports(path) if not relative and name.split(".")[0] == "pixart_nodes"]
    assert not absolute


@pytest.mark.parametrize("module", [name for name in RUN_FOLDER_MODULES if (PACKAGE / f"training/{name}.py").exists()])
def test_reading_a_run_folder_needs_only_the_standard_library(module):
    allowed = {f"training.{name}" for name in RUN_FOLDER_MODULES} | sys.stdlib_module_names
    foreign = [f"{name} at line {line}" for line, name, relative in imports(PACKAGE / f"training/{module}.py")
               if not within(name, allowed)]
    assert not foreign


def test_the_root_module_imports_nothing_at_module_scope():
    """pytest imports it too, without ComfyUI; and ComfyUI would show a failing import as one line without a cause."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node.lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
