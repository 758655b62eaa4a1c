"""The run's diary: one JSON object per line, appended; a torn last line is no harm. Standard library only."""

import json
from pathlib import Path


def append(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict]:
    """All records of a diary; a missing file is an empty one. A line that a kill or a full disk has cut is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
