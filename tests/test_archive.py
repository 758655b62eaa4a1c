"""What the registry would ship, by comfy-cli's own `node validate` and `node pack`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".standalone", "__pycache__", ".pytest_cache", ".ruff_cache")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git repository of its own with everything that is here: comfy-cli packs what git tracks."""
    folder = tmp_path_factory.mktemp("clone") / "pixart nodes"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "all"],
                   cwd=folder, check=True)
    return folder


def comfy(folder, *words):
    return subprocess.run([sys.executable, "-m", "comfy_cli", "--skip-prompt", "node", *words], cwd=folder, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "DO_NOT_TRACK": "1", "HOME": str(folder.parent)})


@pytest.mark.slow
def test_the_registry_accepts_the_pack_and_its_scanner_finds_nothing(clone):
    result = comfy(clone, "validate")
    said = result.stdout + result.stderr
    assert result.returncode == 0 and "All validation checks passed" in said, said
    assert "warning" not in said.lower()


@pytest.mark.slow
def test_the_registry_archive_holds_the_pack_and_none_of_its_workshop(clone):
    result = comfy(clone, "pack")
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(clone / "node.zip") as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {"__init__.py", "install.py", "pyproject.toml", "requirements.txt", "LICENSE", "pixart_nodes", "web",
            "workflows"} <= top
    assert not top & {"tests", "tools", "benchmarks", "docs", ".ci", ".github"}
    assert any(name.startswith("web/docs/PixArt") for name in names)
    assert {"web/js/monitor.js", "web/js/monitor.css"} <= set(names)
    assert any(name.startswith("pixart_nodes/assets/tiny/") for name in names)
    assert sum((clone / name).stat().st_size for name in names) < 45e6
