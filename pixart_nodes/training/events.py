"""The run's diary: one JSON object per line, appended; a torn last line is no harm. Standard library only."""

import json
from pathlib import Path


def append(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict]:
    """All whole lines of a diary; a missing file is an empty one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
