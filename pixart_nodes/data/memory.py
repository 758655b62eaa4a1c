"""What the bytes of picture files say, remembered from scan to scan."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.files import replacing
from .pictures import DAMAGED, decode, digest

logger = logging.getLogger(__name__)


class Look(NamedTuple):
    """What a file's bytes say, remembered by path, size and time of change."""

    digest: str
    height: int
    width: int
    damage: str  # empty: none


class Memory:
    """What was seen of each file, so that only new and changed files are read again. `path` None: for this scan.

    `others` are the files of other processes, which are read too.
    """

    def __init__(self, path: Path | None = None, others: Iterable[Path] = ()):
        self.path, self.changed = path, False
        self.own = recall(path) if path is not None else {}
        self.known = {name: seen for other in others for name, seen in recall(other).items()} | self.own

    def look(self, path: Path) -> Look:
        """Raises OSError when the file is not there."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        before = self.known.get(str(path))
        if before is None or before[0] != stamp:
            before = self.known[str(path)] = self.own[str(path)] = (stamp, look(path.read_bytes()))
            self.changed = True
        return before[1]

    def save(self):
        if self.path is not None and self.changed:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(dict(self.own)), encoding="utf-8")
            self.changed = False


def recall(path: Path) -> dict[str, tuple[list[int], Look]]:
    """{path of a picture: (size and time of change, what was seen)}; empty for a file that is not there or torn."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: (stamp, Look(*seen)) for name, (stamp, seen) in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not used: %s. The pictures are looked at again.", path, error)
        return {}


def look(data: bytes) -> Look:
    try:
        image = decode(data)
    except DAMAGED as error:
        return Look(digest(data), 0, 0, " ".join(str(error).split())[:200] or type(error).__name__)
    return Look(digest(data), image.height, image.width, "")
