"""A Chromium for the browser tests: the system's, else one that is installed where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find(python, progress, log_path):
    """(path of a Chromium that starts, "") or (None, why there is none). Installs one when none is found."""
    reasons = []
    for obtain in (_system, _debian, _playwright):
        path, reason = obtain(python, progress, log_path)
        if path and _starts(path):
            return path, ""
        reasons.append(reason or f"{path} does not start")
    return None, "; ".join(reasons)


def _system(python, progress, log_path):
    path = next((path for path in map(shutil.which, NAMES) if path), None)
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    if path is None and mac.exists():
        path = str(mac)
    return path, "no Chromium or Chrome on PATH"


def _debian(python, progress, log_path):
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None, "not root on Debian"
    with progress.step("Installing Debian's chromium package for the browser tests"):
        ok = (_log(["apt-get", "update"], log_path)
              and _log(["apt-get", "install", "-y", "--no-install-recommends", "chromium"], log_path))
    return (shutil.which("chromium") if ok else None), f"apt-get could not install chromium (log: {log_path})"


def _playwright(python, progress, log_path):
    where = ("from playwright.sync_api import sync_playwright\n"
             "with sync_playwright() as playwright: print(playwright.chromium.executable_path)")
    path = subprocess.run([str(python), "-c", where], capture_output=True, text=True).stdout.strip()
    if path and Path(path).exists():
        return path, ""
    with progress.step("Downloading Playwright's Chromium for the browser tests"):
        ok = _log([str(python), "-m", "playwright", "install", "chromium"], log_path)
    return (path if ok else None), f"playwright install chromium failed (log: {log_path})"


def _log(command, log_path):
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(log_path, "a", encoding="utf-8") as log:
        try:
            code = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env=environment, timeout=900)
        except subprocess.TimeoutExpired:
            log.write(f"{command[0]} took longer than 15 minutes\n")
            return False
    return code == 0


def _starts(path):
    command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"]
    try:
        return "<html" in subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
