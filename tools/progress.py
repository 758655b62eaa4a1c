"""What the command line shows: steps with their time, one live line, and one sentence when something fails."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import contextmanager


class Failure(Exception):
    """A sentence for the user: what failed and what to do. Shown without a stack trace."""


class Progress:
    """Prints steps. On a terminal the last line lives; in a log file it is repeated every `quiet` seconds."""

    def __init__(self, stream=None, quiet=20.0):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet = quiet
        self.last = time.monotonic()

    def say(self, text):
        """A line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)
        self.last = time.monotonic()

    @contextmanager
    def step(self, title):
        """Announce `title`, and say how long it took when the block ends without an error."""
        self.say(f"-- {title}")
        start = time.monotonic()
        yield self
        self.say(f"   done in {time.monotonic() - start:.0f} s")

    def update(self, text, force=False):
        """Replace the live line."""
        now = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._clear()
            self.stream.write(f"   {text}"[:width])
            self.stream.flush()
        elif force or now - self.last >= self.quiet:
            print(f"   {text}", file=self.stream, flush=True)
            self.last = now

    def bar(self, label, value, total):
        """A progress bar as the live line; the full bar stays."""
        filled = round(24 * value / total) if total else 0
        text = f"{label} [{'#' * filled}{'.' * (24 - filled)}] {value:g}/{total:g}"
        self.update(text, force=value == total)
        if self.live and value == total:
            self.stream.write("\n")
            self.stream.flush()

    def _clear(self):
        if self.live:
            self.stream.write("\r\033[K")


def tail(path, lines=15):
    """The last lines of a log file, indented for the screen."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join("   | " + line for line in text.splitlines()[-lines:])
