"""Where pictures and captions are listed: a folder with .txt files, a JSONL file, or PixArt's data_info.json.

Nothing is opened here but the lists and the captions; data/manifest.py looks at the pictures.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
FOREIGN_PICTURES = (
    ".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".psd", ".tga", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".mp4", ".mov", ".webm",
)  # fmt: skip
LISTS = ("data_info.json", "metadata.jsonl", "captions.jsonl")  # found in a folder, they go before its .txt files
CONTROL = "control"  # a.control.png beside a.png, or control/a.png
VLM_CAPTION = ".vlm.txt"  # what a vision language model wrote, beside the user's own .txt

# Field names in lists: PixArt's own first, then Hugging Face's imagefolder and what others write.
PATH_FIELDS = ("path", "file_name", "image", "file", "image_path")
CAPTION_FIELDS = ("prompt", "caption", "text")
VLM_FIELDS = ("sharegpt4v", "vlm_caption")
CONTROL_FIELDS = ("control", "control_image", "conditioning_image")
SHARED = ("shared caption", "two pictures of this name would share one caption file: rename one of them")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of UTF-16, which no text file can hold


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
    controls, paths = folder / CONTROL, list(files_below(folder))
    shared = twins(paths)
    for path in paths:
        stored, kind = path.relative_to(folder).as_posix(), path.suffix.lower()
        name = stored.encode(errors="backslashreplace").decode()  # names on Linux are bytes, not always text
        if not path.exists():
            yield Entry(name, path, "", "", None, ("missing file", "a link to a place where nothing is: repair it"))
        elif path.is_dir():
            yield Entry(name, path, "", "", None, ("missing file", "a folder that may not be read: permit it"))
        elif path.stem.endswith("." + CONTROL) or controls in path.parents:
            continue
        elif kind in FOREIGN_PICTURES:
            yield Entry(name, path, "", "", None, ("format", f"{path.suffix} is not read: save it as PNG or JPEG"))
        elif kind in PICTURES and name != stored:
            yield Entry(name, path, "", "", None, ("name", "it is not UTF-8: rename the file, or its folder"))
        elif kind in PICTURES:
            yield with_sidecars(Entry(name, path, "", "", None), shared, controls / name)


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below a folder that are not hidden, in order, also behind links; broken links; unreadable folders.

    A link back to one of the folders `above` is not followed, so that nothing goes round for ever.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        yield folder
        return
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from files_below(path, above)


def twins(paths: Iterable[Path]) -> set[Path]:
    """Names without their ending that several pictures have: those would share one caption file."""
    counts = Counter(path.with_suffix("") for path in set(paths) if path.suffix.lower() in PICTURES)
    return {name for name, count in counts.items() if count > 1}


def with_sidecars(entry: Entry, shared: set[Path], control: Path | None = None) -> Entry:
    """The entry with what lies beside its picture, where the list had nothing; a problem when that is `shared`."""
    path = entry.path
    if entry.problem:
        return entry
    try:
        caption = entry.caption or read_caption(path.with_suffix(".txt")) or read_caption(path.with_suffix(".caption"))
        vlm_caption = entry.vlm_caption or read_caption(path.with_suffix(VLM_CAPTION))
    except UnicodeDecodeError:
        return entry._replace(problem=("missing caption", "its caption file is not UTF-8 text: save it as UTF-8"))
    except OSError as error:
        return entry._replace(problem=("missing caption", f"its caption file cannot be read ({error.strerror})"))
    places = [path.with_suffix(f".{CONTROL}.x"), *([control] if control else [])]
    found = (place.with_suffix(kind) for place in places for kind in PICTURES)
    control = entry.control or next((place for place in found if os.path.isfile(place)), None)
    whole = entry._replace(caption=caption, vlm_caption=vlm_caption, control=control)
    return entry._replace(problem=SHARED) if whole != entry and path.with_suffix("") in shared else whole


def read_caption(path: Path) -> str:
    """One line of text; empty where there is no file."""
    return " ".join(path.read_text(encoding="utf-8-sig").split()) if os.path.isfile(path) else ""


def from_list(path: Path) -> Iterator[Entry]:
    """The records of a JSON or JSONL list; relative paths count from the list's folder, or from PixArt's InternImgs."""
    roots = [path.parent, path.parent / "InternImgs", path.parent.parent / "InternImgs"]
    if "InternData" in path.parent.as_posix():
        roots.append(Path(path.parent.as_posix().replace("InternData", "InternImgs")))
    roots = [root for root in dict.fromkeys(roots) if root.is_dir()]
    listed = [from_record(record, where, roots) for where, record in records(path)]
    shared = twins(entry.path for entry in listed)
    yield from (with_sidecars(entry, shared) for entry in listed)


def from_record(record: dict, where: str, roots: list[Path]) -> Entry:
    name, caption, vlm_caption, control = (
        text_field(record, fields, where) for fields in (PATH_FIELDS, CAPTION_FIELDS, VLM_FIELDS, CONTROL_FIELDS)
    )
    if not name:
        raise ValueError(f"{where} has no {' or '.join(PATH_FIELDS[:2])}: name the picture there.")
    picture, hint = (locate(each, roots) if each else None for each in (name, control))
    entry = Entry(name, picture or roots[0] / name, caption, vlm_caption, hint)
    if entry.path.suffix.lower() in FOREIGN_PICTURES:
        return entry._replace(problem=("format", f"{entry.path.suffix} is not read: save it as PNG or JPEG"))
    if picture is None:
        return entry._replace(problem=("missing file", f"there is no such file in {roots[0]}"))
    if control and hint is None:
        return entry._replace(problem=("control", f"there is no file {control} in {roots[0]}"))
    return entry


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a JSON list, or of a JSONL file line by line."""
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parsed(line, f"{path.name}, line {number},")
        return
    where, content = parsed(path.read_bytes(), path.name, list)
    for number, record in enumerate(content):
        yield checked(record, f"{path.name}, record {number},", dict)


def parsed(data: bytes, where: str, kind=dict):
    try:
        return checked(json.loads(data.decode("utf-8-sig")), where, kind)
    except UnicodeDecodeError as error:
        before = data[max(0, error.start - 30) : error.start].decode(errors="ignore")
        raise ValueError(f"{where} is not UTF-8 text after {before!r}. Save the list as UTF-8.") from error
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
    if HALF_CHARACTER.search(value):
        raise ValueError(f"{where} has half a character in {value!r:.60} ({', '.join(fields)}). Repair it.")
    return " ".join(value.split())


def locate(name: str, roots) -> Path | None:
    """The first place where the file is. os.path, unlike Path, also takes names that no file can have."""
    return next((root / name for root in roots if os.path.isfile(root / name)), None)
