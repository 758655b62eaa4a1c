"""The private Python environment of the stand-alone set-up: made once, checked by a stamp, never half-used."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .progress import Failure, tail

PYTHONS = ((3, 10), (3, 13))             # oldest and newest Python that every pinned package has wheels for
FIRST_GB, MORE_GB = 9.0, 1.5             # the environment has 6.1 GB with CUDA libraries; pip keeps wheels meanwhile
REQUIREMENTS = Path(__file__).with_name("requirements")
CONSTRAINTS = REQUIREMENTS / "constraints.txt"
TORCH = REQUIREMENTS / "torch.txt"

NOT_OFFERED = "the configured package index does not offer versions that fit this Python and platform"
PIP_FAILURES = (                         # (what pip's log says, the sentence)
    (r"No space left on device|Errno 28", "the disk is full; free some space and run the same command again"),
    (r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|Temporary failure in name resolution"
     r"|Connection refused|ProxyError|Network is unreachable|IncompleteRead|Connection broken|from versions: none",
     "the package index cannot be reached; check the network (or pip's proxy settings) and run the same command again"),
    (r"SSLError|CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted; set PIP_CERT"),
    (r"No matching distribution|Could not find a version|ResolutionImpossible", NOT_OFFERED),
    (r"Permission denied|Errno 13", "a file cannot be written; check the owner of the folder"),
)


def check_python(version=sys.version_info):
    """Raise Failure unless `version` (major, minor, ...) is a Python that the pinned packages support."""
    if PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        return
    fitting = next((f"python3.{minor}" for minor in range(13, 9, -1) if _runs(f"python3.{minor}")), None)
    remedy = f"run the same command with {fitting}" if fitting else "install one of them and run the command with it"
    raise Failure(f"Python 3.10 to 3.13 is needed and this is {version[0]}.{version[1]}: {remedy}.")


def check_venv():
    """Raise Failure when this Python cannot make virtual environments (Debian splits that off)."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise Failure("This Python cannot make virtual environments: install its venv module (on Debian and "
                      f"Ubuntu: apt install python3.{sys.version_info[1]}-venv) and run the command again.")


def check_disk(folder, needed_gb, free_bytes=None):
    """Raise Failure unless the disk of `folder` has `needed_gb` free."""
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    if free < needed_gb * 1e9:
        raise Failure(f"{needed_gb:g} GB of disk are needed in {folder} and {free / 1e9:.1f} GB are free: "
                      "free some space, or move the repository to a larger disk.")


def has_nvidia():
    """Whether an NVIDIA GPU's driver is present, without importing torch."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def write_atomic(path, text):
    """Write a small file so that it is either old or new, never torn."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class PrivateEnv:
    """A virtual environment in `folder`, with pip's full log in `logs`."""

    def __init__(self, folder, logs, progress):
        self.folder, self.logs, self.progress = folder, logs, progress
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.unfinished = folder / ".unfinished"      # exists while packages are being written

    def ensure(self, name, lists, constraints=CONSTRAINTS, torch=False):
        """Install the requirement files `lists` unless the stamp of `name` says that just these are there.

        Raises Failure with one sentence when the disk, the network or pip fails.
        """
        files = [*lists, constraints, *([TORCH] if torch else [])]
        stamp, wanted = self.folder / f".{name}.stamp", self._fingerprint(files)
        if self._usable() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return
        self._make(FIRST_GB if torch else MORE_GB)
        with self.progress.step(f"Installing packages: {name}"):
            if torch:
                self._install_torch()
            self._install(name, lists, constraints)
        write_atomic(stamp, wanted)

    def _fingerprint(self, files):
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return json.dumps({"python": platform.python_version_tuple()[:2], "requirements": digest.hexdigest()})

    def _usable(self):
        """Whether an interrupted set-up or another Python's left-over is not in the way."""
        made_by = self.folder / ".python.stamp"
        return (not self.unfinished.exists() and made_by.is_file()
                and made_by.read_text(encoding="utf-8") == platform.python_version_tuple()[1]
                and _runs(self.python, "-m", "pip"))

    def _make(self, needed_gb):
        if self._usable():
            check_disk(self.folder, MORE_GB)
            return
        check_venv()
        if self.folder.exists():
            with self.progress.step("Removing an environment that is unfinished or made by another Python"):
                shutil.rmtree(self.folder)
        check_disk(self.folder.parent, needed_gb)
        with self.progress.step(f"Making a private Python {platform.python_version()} environment in {self.folder}"):
            log = self.logs / "venv.log"
            with open(log, "w", encoding="utf-8") as out:
                code = subprocess.call([sys.executable, "-m", "venv", str(self.folder)], stdout=out, stderr=out)
            if code:
                raise Failure(f"The virtual environment could not be made:\n{tail(log)}")
            self._must(self._pip("pip", ["--upgrade", "pip"]))
            write_atomic(self.folder / ".python.stamp", platform.python_version_tuple()[1])

    def _install_torch(self):
        """The CPU build where the configured index offers it and no NVIDIA GPU is present: 4 GB less on disk.

        `===` keeps pip from mixing a local CPU build of torch with another index's torchvision, which cannot work.
        """
        pins = [line for line in TORCH.read_text(encoding="utf-8").splitlines() if "==" in line]
        if platform.system() == "Linux" and not has_nvidia():
            if self._pip("torch-cpu", [f"{pin}+cpu" for pin in pins]) is None:
                return
        self._must(self._pip("torch", [pin.replace("==", "===") for pin in pins]))

    def _install(self, name, lists, constraints):
        arguments = [word for file in lists for word in ("-r", str(file))]
        failed_log = self._pip(name, [*arguments, "-c", str(constraints)])
        if failed_log and _reason(failed_log) == NOT_OFFERED:
            self.progress.say("   some exact versions are not offered here; taking the nearest that fit")
            failed_log = self._pip(name, [*arguments, "-c", str(TORCH)])
        self._must(failed_log)

    def _must(self, failed_log):
        if failed_log is None:
            return
        reason = _reason(failed_log)
        if reason:
            raise Failure(f"Installing packages failed: {reason}. pip's log: {failed_log}")
        raise Failure(f"Installing packages failed; the end of pip's log {failed_log}:\n{tail(failed_log)}")

    def _pip(self, name, arguments):
        """Run `pip install` and show where it is. Returns None, or the log of a run that failed."""
        scratch = self.folder / "tmp"                 # unpacking gigabytes in a small /tmp would fail
        scratch.mkdir(exist_ok=True)
        command = [str(self.python), "-m", "pip", "install", "--no-input", "--no-compile", "--no-color",
                   "--disable-pip-version-check", *self._raw_progress(), *arguments]
        environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch),
                       "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        log_path = self.logs / f"pip-{name}.log"
        with open(log_path, "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", errors="replace",
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            with process:
                try:
                    self._follow(process.stdout, log)
                except BaseException:                 # Ctrl-C or SIGTERM: pip must not go on alone
                    process.terminate()
                    raise
        shutil.rmtree(scratch, ignore_errors=True)
        if process.returncode:
            return log_path
        self.unfinished.unlink(missing_ok=True)
        return None

    def _raw_progress(self):
        version = _output(self.python, "-m", "pip", "--version").split()[1:2] or ["0"]
        return ["--progress-bar", "raw" if int(version[0].split(".")[0]) >= 25 else "off"]

    def _follow(self, lines, log):
        package = ""
        for line in lines:
            advance = re.match(r"Progress (\d+) of (\d+)", line)
            if advance:
                done, total = (int(number) / 1e6 for number in advance.groups())
                if total > 20:
                    self.progress.update(f"fetching {package}: {done:.0f} of {total:.0f} MB")
                continue
            log.write(line)
            log.flush()
            fetched = re.match(r"\s*(?:Downloading|Using cached) (?:\S*/)?(\w+)-", line)
            if fetched:
                package = fetched[1]
                self.progress.update(f"fetching {package}")
            elif line.startswith("Installing collected packages"):
                self.unfinished.touch()
                self.progress.update(f"unpacking {line.count(',') + 1} packages")


def _reason(log_path):
    log = log_path.read_text(encoding="utf-8", errors="replace")
    return next((sentence for pattern, sentence in PIP_FAILURES if re.search(pattern, log)), None)


def _output(*command):
    try:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _runs(program, *arguments):
    return bool(_output(program, *arguments, "--version"))
