"""What the command line shows: steps with their time, one live line, and one sentence when something fails."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from contextlib import contextmanager


class Failure(Exception):
    """A sentence for the user: what failed and what to do. Shown without a stack trace."""


class Progress:
    """Prints steps. On a terminal their last line lives; elsewhere it is repeated every `quiet` seconds."""

    def __init__(self, stream=None, quiet=20.0):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet
        self.text = ""
        self.lock = threading.Lock()

    def say(self, text):
        """A line that stays."""
        with self.lock:
            self.stream.write(("\r\033[K" if self.live else "") + text + "\n")
            self.stream.flush()

    @contextmanager
    def step(self, title):
        """Announce `title`, show until the block ends that it is alive, and say how long it took if it succeeds."""
        self.say(f"-- {title}")
        self.text, start, ended = "", time.monotonic(), threading.Event()
        ticker = threading.Thread(target=self._tick, args=(ended, start), daemon=True)
        ticker.start()
        try:
            yield self
        finally:
            ended.set()
            ticker.join()
        self.say(f"   done in {time.monotonic() - start:.0f} s")

    def update(self, text):
        """What the running step is doing now."""
        self.text = text
        self._show(text)

    def bar(self, label, value, total):
        """A progress bar as what the running step is doing; the full bar stays."""
        filled = round(24 * value / total) if total else 0
        text = f"{label} [{'#' * filled}{'.' * (24 - filled)}] {value:g}/{total:g}"
        self.update(text)
        if value == total:
            self.say(f"   {text}")

    def _tick(self, ended, start):
        while not ended.wait(1.0 if self.live else self.quiet):
            text = f"{self.text} ({time.monotonic() - start:.0f} s)".lstrip()
            if self.live:
                self._show(text)
            else:
                self.say(f"   {text}")

    def _show(self, text):
        if self.live:
            with self.lock:
                width = shutil.get_terminal_size().columns - 1
                self.stream.write("\r\033[K" + f"   {text}"[:width])
                self.stream.flush()


def tail(path, lines=15):
    """The last lines of a log file, indented for the screen."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join("   | " + line for line in text.splitlines()[-lines:])
