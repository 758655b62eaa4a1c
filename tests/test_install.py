"""install.py as ComfyUI Manager runs it, and what the stand-alone set-up says when something is missing."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from tools import comfy_source
from tools.comfy_server import ComfyServer, check_port, link_pack
from tools.lockfile import only_one
from tools.private_env import PrivateEnv, check_disk, check_python
from tools.progress import Failure, Progress

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *words, python=sys.executable, **environment):
    return subprocess.run([str(python), str(folder / "install.py"), *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **environment})


@pytest.fixture
def archive(tmp_path):
    """The pack as the registry ships it, reduced to what install.py needs: no tools/."""
    folder = tmp_path / "pixart nodes"
    folder.mkdir()
    for name in ("install.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


VERSION = "1.0+here"                                  # a local version: no package index can offer it


def write_wheel(folder, name, requires=""):
    """A wheel with one empty module."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def plain_venv(tmp_path_factory):
    """A fresh environment that pretends to hold torch 2.1.0; pip in it sees only the wheels beside it."""
    folder = tmp_path_factory.mktemp("plain_venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    where = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           capture_output=True, text=True, check=True).stdout.strip()
    info = Path(where) / "torch-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    (info / "RECORD").write_text("torch-2.1.0.dist-info/METADATA,,\n")
    write_wheel(folder / "wheels", "plain")
    write_wheel(folder / "wheels", "wants_new_torch", "Requires-Dist: torch>=2.5\n")
    write_wheel(folder / "wheels", "torch")
    return python, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_CONFIG_FILE": os.devnull,
                    "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def installed(python):
    return subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout


def test_without_words_an_empty_list_is_done_at_once(archive):
    (archive / "requirements.txt").write_text("# nothing\n\n")
    result = run(archive)
    assert (result.returncode, "nothing to do" in result.stdout) == (0, True)


def test_without_words_requirements_are_installed_once_and_torch_stays(archive, plain_venv):
    python, environment = plain_venv
    (archive / "requirements.txt").write_text("# two\nplain\ntorch\n")
    first, again = (run(archive, python=python, **environment) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert f"Successfully installed plain-{VERSION}" in first.stdout and "Successfully" not in again.stdout
    assert {f"plain=={VERSION}", "torch==2.1.0"} <= set(installed(python).split())


def test_without_words_a_requirement_that_would_replace_torch_is_refused(archive, plain_venv):
    python, environment = plain_venv
    (archive / "requirements.txt").write_text("wants_new_torch\n")
    assert run(archive, python=python, **environment).returncode != 0
    assert "torch==2.1.0" in installed(python)


def test_the_shipped_requirements_have_no_pins_and_no_comment_on_a_line():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if re.search(r"[#<=!~]|\btorch", line)]


def test_pyproject_repeats_the_shipped_requirements():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    (declared,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r'"([^"]+)"', declared) == lines


def test_what_the_extras_name_is_pinned_and_in_the_environment_of_the_tests():
    named = re.findall(r"^(?:train|quant) = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    extras = {name for line in named for name in re.findall(r'"([^"]+)"', line)}
    folder = ROOT / "tools" / "requirements"
    pinned = {line.split("==")[0] for line in (folder / "constraints.txt").read_text().splitlines() if "==" in line}
    assert len(named) == 2 and extras <= set((folder / "test.txt").read_text().split()) & pinned


def test_an_archive_without_tools_says_where_the_demo_is(archive):
    result = run(archive, "demo")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "clone the repository" in result.stderr


def test_an_unknown_word_shows_the_usage(archive):
    result = run(archive, "dmeo")
    assert result.returncode == 2 and "unknown word 'dmeo'" in result.stderr and "install.py demo" in result.stderr


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (2, 7, 18)])
def test_a_python_that_does_not_fit_is_named_with_a_remedy(version):
    with pytest.raises(Failure, match=rf"Python 3.10 to 3.13 is needed and this is {version[0]}\.{version[1]}: "):
        check_python(version)


@pytest.mark.parametrize("minor", range(10, 14))
def test_a_python_that_fits_passes(minor):
    check_python((3, minor, 0))


def test_too_little_disk_is_said_before_anything_is_downloaded(tmp_path):
    with pytest.raises(Failure, match=r"9 GB of disk are needed in .* and 3\.0 GB are free"):
        check_disk(tmp_path, 9.0, free_bytes=3e9)
    check_disk(tmp_path, 9.0, free_bytes=10e9)


def test_a_port_in_use_is_said_with_another_one_to_choose():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(ROOT, "serve", "--port", str(port))
    assert result.returncode == 1
    assert f"Port {port} is in use" in result.stderr and "--port" in result.stderr
    assert "Traceback" not in result.stderr
    check_port(port)


def fake_comfyui(folder, main):
    (folder / "comfy").mkdir(parents=True)
    (folder / "nodes.py").touch()
    (folder / "main.py").write_text(main)
    return folder


def test_a_server_that_dies_while_it_starts_shows_the_end_of_its_log(tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "print('hello')\nraise ImportError('no torchsde')\n")
    server = ComfyServer(sys.executable, comfyui, tmp_path / "base", tmp_path / "comfyui.log")
    with pytest.raises(Failure, match=r"(?s)ended while it started \(exit code 1\).*no torchsde"):
        server.start()


def test_a_server_that_never_answers_is_ended(tmp_path):
    comfyui = fake_comfyui(tmp_path / "ComfyUI", "import time\nprint('thinking', flush=True)\ntime.sleep(600)\n")
    server = ComfyServer(sys.executable, comfyui, tmp_path / "base", tmp_path / "comfyui.log")
    with pytest.raises(Failure, match=r"(?s)did not answer within 1 s.*thinking"):
        server.start(timeout=1)
    assert server.process.poll() is not None


def test_a_comfyui_path_without_comfyui_is_an_error_and_not_a_fallback(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(Failure, match="COMFYUI_PATH is .* which holds no ComfyUI"):
        comfy_source.locate(ROOT)


def test_the_comfyui_that_the_pack_is_installed_in_comes_first(tmp_path, monkeypatch):
    home = fake_comfyui(tmp_path / "home", "")
    monkeypatch.setenv("COMFYUI_PATH", str(fake_comfyui(tmp_path / "other", "")))
    assert comfy_source.locate(home / "custom_nodes" / "pixart-nodes").path == home
    assert comfy_source.locate(tmp_path / "elsewhere").path == tmp_path / "other"


def test_the_pack_is_linked_once_and_follows_a_moved_repository(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for _ in range(2):
            link_pack(tmp_path / name, tmp_path / "custom_nodes")
        assert (tmp_path / "custom_nodes" / "pixart-nodes").resolve() == tmp_path / name


def test_a_second_set_up_waits_for_the_first_and_says_so(tmp_path, capsys):
    done = []

    def second():
        with only_one(tmp_path / "lock", Progress(), poll_seconds=0.05):
            done.append(time.monotonic())

    with only_one(tmp_path / "lock", Progress()):
        worker = threading.Thread(target=second)
        worker.start()
        time.sleep(0.4)
        assert not done
        released = time.monotonic()
    worker.join(10)
    assert done[0] >= released
    assert capsys.readouterr().out.count("Another set-up is at work") == 1


@pytest.mark.slow
def test_no_network_is_said_in_one_sentence_without_a_stack_trace(tmp_path, monkeypatch):
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull,
                        "PIP_RETRIES": "1", "PIP_TIMEOUT": "2", "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_DEFAULT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    env = PrivateEnv(tmp_path / "venv", tmp_path, Progress())
    with pytest.raises(Failure, match="the package index cannot be reached; check the network"):
        env.ensure("comfyui", [ROOT / "requirements.txt"])


@pytest.mark.slow
def test_an_environment_is_reused_extended_and_made_again_after_a_crash(tmp_path, monkeypatch, capsys):
    write_wheel(tmp_path / "wheels", "plain")
    write_wheel(tmp_path / "wheels", "other")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wanted, pins = tmp_path / "wanted.txt", tmp_path / "pins.txt"
    wanted.write_text("plain\n")
    pins.write_text(f"plain=={VERSION}\nother=={VERSION}\n")
    env = PrivateEnv(tmp_path / "my venv", tmp_path, Progress())

    def ensure():
        env.ensure("things", [wanted], pins)
        return capsys.readouterr().out

    assert "Making a private Python" in ensure()
    assert ensure() == ""
    wanted.write_text("plain\nother\n")
    out = ensure()
    assert "Installing packages: things" in out and "Making" not in out
    assert {f"plain=={VERSION}", f"other=={VERSION}"} <= set(installed(env.python).split())
    env.unfinished.touch()                            # what a run leaves that is killed while pip unpacks
    out = ensure()
    assert "Removing an environment that is unfinished" in out and "Making a private Python" in out
    assert ensure() == ""
