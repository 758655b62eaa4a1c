"""One set-up at a time per folder. The operating system drops the lock when its holder dies."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

if os.name == "nt":
    import msvcrt

    def _lock(file):
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def only_one(path, progress, poll_seconds=1.0):
    """Hold the lock file `path`; waits, and says so once, while another process holds it."""
    with open(path, "a+", encoding="utf-8") as file:
        waiting = False
        while True:
            try:
                _lock(file)
                break
            except OSError:
                if not waiting:
                    progress.say(f"-- Another set-up is at work in {path.parent}, waiting for it to end")
                waiting = True
                time.sleep(poll_seconds)
        yield
