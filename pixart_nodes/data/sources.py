"""Where pictures and captions are listed: a folder with .txt files, a JSONL file, or PixArt's data_info.json.

Nothing is opened here but the lists and the captions; data/manifest.py looks at the pictures.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOREIGN_PICTURES = (
    ".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".raw", ".mp4", ".mov", ".webm",
)  # fmt: skip
LISTS = ("data_info.json", "metadata.jsonl", "captions.jsonl")  # found in a folder, they go before its .txt files
CONTROL = "control"  # a.control.png beside a.png, or control/a.png
VLM_CAPTION = ".vlm.txt"  # what a vision language model wrote, beside the user's own .txt

# Field names in lists: PixArt's own first, then Hugging Face's imagefolder and what others write.
PATH_FIELDS = ("path", "file_name", "image", "file", "image_path")
CAPTION_FIELDS = ("prompt", "caption", "text")
VLM_FIELDS = ("sharegpt4v", "vlm_caption")
CONTROL_FIELDS = ("control", "control_image", "conditioning_image")


class Entry(NamedTuple):
    """One picture as a list has it; `problem` is what the list itself shows to be wrong."""

    name: str  # relative to the source where possible, with forward slashes
    path: Path
    caption: str
    vlm_caption: str
    control: Path | None
    problem: tuple[str, str] | None = None


def entries(source) -> Iterator[Entry]:
    """The pictures of a folder, a .jsonl or a .json list, in a fixed order.

    Raises FileNotFoundError and ValueError (no such place, not a list, an unreadable line), with what to do.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"There is no data set at {source}: give a folder of pictures, a .jsonl or .json list.")
    if source.is_dir():
        listed = next((source / name for name in LISTS if (source / name).is_file()), None)
        return from_folder(source) if listed is None else from_list(listed)
    if source.suffix.lower() in (".json", ".jsonl"):
        return from_list(source)
    raise ValueError(f"{source} is no data set. Give a folder of pictures, a .jsonl or a .json list.")


def from_folder(folder: Path) -> Iterator[Entry]:
    """Pictures below `folder` with a.txt (caption), a.vlm.txt and a.control.png beside a.png, or control/a.png."""
    controls = folder / CONTROL
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or path.stem.endswith("." + CONTROL) or controls in path.parents:
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in FOREIGN_PICTURES:
            yield Entry(name, path, "", "", None, ("format", f"{path.suffix} is not read: save it as PNG or JPEG"))
        elif path.suffix.lower() in PICTURES:
            yield with_sidecars(Entry(name, path, "", "", None), controls / name)


def with_sidecars(entry: Entry, control: Path | None = None) -> Entry:
    """The entry with what lies beside its picture, where the list had nothing."""
    path = entry.path
    try:
        caption = entry.caption or read_caption(path.with_suffix(".txt")) or read_caption(path.with_suffix(".caption"))
        vlm_caption = entry.vlm_caption or read_caption(path.with_suffix(VLM_CAPTION))
    except UnicodeDecodeError:
        return entry._replace(problem=("missing caption", "its caption file is not UTF-8 text: save it as UTF-8"))
    places = [path.with_suffix(f".{CONTROL}.x"), *([control] if control else [])]
    found = (place.with_suffix(kind) for place in places for kind in PICTURES)
    control = entry.control or next((place for place in found if place.is_file()), None)
    return entry._replace(caption=caption, vlm_caption=vlm_caption, control=control)


def read_caption(path: Path) -> str:
    """One line of text; empty where there is no file."""
    return " ".join(path.read_text(encoding="utf-8-sig").split()) if path.is_file() else ""


def from_list(path: Path) -> Iterator[Entry]:
    """The records of a JSON or JSONL list; relative paths count from the list's folder, or from PixArt's InternImgs."""
    roots = [path.parent, path.parent / "InternImgs", path.parent.parent / "InternImgs"]
    if "InternData" in path.parent.as_posix():
        roots.append(Path(path.parent.as_posix().replace("InternData", "InternImgs")))
    roots = [root for root in dict.fromkeys(roots) if root.is_dir()]
    for where, record in records(path):
        name, caption, vlm_caption, control = (
            text_field(record, fields, where) for fields in (PATH_FIELDS, CAPTION_FIELDS, VLM_FIELDS, CONTROL_FIELDS)
        )
        if not name:
            raise ValueError(f"{where} has no {' or '.join(PATH_FIELDS[:2])}: name the picture there.")
        entry = Entry(name, locate(name, roots), caption, vlm_caption, locate(control, roots) if control else None)
        if entry.path.suffix.lower() in FOREIGN_PICTURES:
            entry = entry._replace(problem=("format", f"{entry.path.suffix} is not read: save it as PNG or JPEG"))
        yield with_sidecars(entry)


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a JSON list, or of a JSONL file line by line."""
    if path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parsed(line, f"{path.name}, line {number},")
        return
    where, content = parsed(path.read_text(encoding="utf-8-sig"), path.name, list)
    for number, record in enumerate(content):
        yield checked(record, f"{path.name}, record {number},", dict)


def parsed(text: str, where: str, kind=dict):
    try:
        return checked(json.loads(text), where, kind)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}). Repair it or remove it.") from error


def checked(content, where: str, kind):
    if not isinstance(content, kind):
        wanted = "a list of records" if kind is list else 'a record like {"path": "a.png", "prompt": "a fox"}'
        raise ValueError(f"{where} holds a {type(content).__name__}, but should hold {wanted}.")
    return where, content


def text_field(record: dict, fields, where: str) -> str:
    """The first of `fields` that the record has, on one line. Raises ValueError when it is no text."""
    value = next((record[name] for name in fields if record.get(name)), "")
    if not isinstance(value, str):
        raise ValueError(f"{where} has {value!r:.60} where text belongs ({', '.join(fields)}).")
    return " ".join(value.split())


def locate(name: str, roots) -> Path:
    """The first place where the file is; the first place where it could be when it is nowhere."""
    places = [root / name for root in roots]
    return next((place for place in places if place.is_file()), places[0])
