"""Pictures and captions as folders and lists have them, and what is wrong with those."""

import json
import os
import shutil

import pytest

from pixart_nodes.data.manifest import ScanOptions, scan
from pixart_nodes.data.sources import entries

from .conftest import kinds, picture, write_pictures

OPTIONS = ScanOptions(size="256")


@pytest.mark.parametrize("file", ["p0.txt", "p0.vlm.txt", "p0.control.webp", "control/p0.webp"])
def test_pictures_that_share_a_caption_or_control_file_are_listed(tmp_path, file):
    for name in ("p0.png", "p0.jpg"):
        picture(ord(name[-1])).save(tmp_path / name)
    options = ScanOptions(size="256", trigger_word="zkx", caption_from_trigger=True)
    assert len(scan(tmp_path, options).samples) == 2
    (tmp_path / "control").mkdir()
    (tmp_path / file).write_text("a caption") if file.endswith("txt") else picture(9).save(tmp_path / file)
    found = scan(tmp_path, options)
    assert kinds(found) == {"p0.jpg": "shared caption", "p0.png": "shared caption"}
    assert "rename one of them" in found.summary()


def test_pictures_of_one_name_with_captions_in_a_list_share_nothing(tmp_path):
    for name in ("p0.png", "p0.jpg"):
        picture(ord(name[-1])).save(tmp_path / name)
    (tmp_path / "p0.txt").write_text("unused")
    records = [{"path": name, "prompt": name} for name in ("p0.png", "p0.jpg", "p0.jpg")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert [sample.caption for sample in scan(tmp_path / "list.jsonl", OPTIONS).samples] == ["p0.png", "p0.jpg"]


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.ppm", "a.pgm", "a.pbm"])
def test_pictures_under_rarer_names_are_used(tmp_path, name):
    picture(1).convert({"pgm": "L", "pbm": "1"}.get(name[2:], "RGB")).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a caption")
    assert [sample.name for sample in scan(tmp_path, OPTIONS).samples] == [name]


def test_linked_folders_are_followed_and_links_to_nothing_are_listed(tmp_path):
    folder = write_pictures(tmp_path / "set", [(256, 256)])
    write_pictures(tmp_path / "elsewhere", [(256, 256)], start=1)
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    found = scan(folder, OPTIONS)
    assert [sample.name for sample in found.samples] == ["linked/p1.png", "p0.png"]
    assert kinds(found) == {"gone.png": "missing file", "lost": "missing file"}


def test_a_name_that_is_not_utf8_is_listed_in_letters_that_can_be_printed(pictures):
    for name in (b"caf\xe9.png", b"caf\xe9.heic"):
        shutil.copy(pictures / "p0.png", os.fsencode(pictures / "x")[:-1] + name)
    found = scan(pictures, OPTIONS)
    assert kinds(found) == {r"caf\udce9.png": "name", r"caf\udce9.heic": "format"} and len(found.samples) == 7
    assert "rename the file" in found.summary().encode().decode()


def test_a_folder_that_may_not_be_read_is_listed(pictures, monkeypatch):
    (pictures / "secret").mkdir()
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: path != pictures / "secret" and allowed(path, mode))
    found = scan(pictures, OPTIONS)
    assert kinds(found) == {"secret": "missing file"} and len(found.samples) == 7


def test_names_with_several_dots_keep_their_own_captions(tmp_path):
    for name in ("a.b", "a.c"):
        picture(ord(name[-1])).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    assert {s.name: s.caption for s in scan(tmp_path, OPTIONS).samples} == {
        "a.b.png": "this is a.b", "a.c.png": "this is a.c",
    }  # fmt: skip


def test_jsonl_and_data_info_give_both_captions_and_find_the_pictures(tmp_path):
    write_pictures(tmp_path / "InternImgs" / "sub", [(256, 256)] * 2)
    records = [{"path": f"sub/p{n}.png", "prompt": f"own {n}", "sharegpt4v": f"vlm {n}", "ratio": 1.0} for n in (0, 1)]
    (tmp_path / "data_info.json").write_text(json.dumps(records))
    for number in (0, 1):
        (tmp_path / "InternImgs" / "sub" / f"p{number}.txt").unlink()
    by_list = scan(tmp_path, OPTIONS)
    assert [(s.caption, s.vlm_caption) for s in by_list.samples] == [("own 0", "vlm 0"), ("own 1", "vlm 1")]
    lines = tmp_path / "InternImgs" / "list.jsonl"
    lines.write_text("".join(json.dumps({"file_name": r["path"], "text": r["prompt"]}) + "\n" for r in records))
    assert [s.caption for s in scan(lines, OPTIONS).samples] == ["own 0", "own 1"]


def test_a_listed_picture_that_is_not_there_is_a_problem_and_no_error(tmp_path):
    write_pictures(tmp_path, [(256, 256)])
    (tmp_path / "metadata.jsonl").write_text('{"path": "p0.png", "prompt": "a"}\n{"path": "gone.png", "prompt": "b"}\n')
    found = scan(tmp_path, OPTIONS)
    assert kinds(found) == {"gone.png": "missing file"} and len(found.samples) == 1


@pytest.mark.parametrize(("text", "message"), [
    ('{"path": "a.png"\n', "list.jsonl, line 1, is no JSON"),
    ('["a.png"]\n', "line 1, holds a list"),
    ('{"prompt": "a fox"}\n', "line 1, has no path"),
    ('{"path": "a.png", "prompt": 7}\n', "has 7 where text belongs"),
    ('{"path": "a.png", "prompt": "a fox \\ud83e"}\n', "line 1, has half a character in 'a fox"),
])  # fmt: skip
def test_an_unreadable_list_is_refused_with_the_place_of_the_mistake(tmp_path, text, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        scan(tmp_path / "list.jsonl", OPTIONS)


@pytest.mark.parametrize(("name", "where"), [("list.jsonl", "list.jsonl, line 2,"), ("list.json", "list.json")])
def test_a_list_that_is_not_utf8_is_refused_with_the_place_of_the_first_wrong_letter(tmp_path, name, where):
    lines = ['{"path": "a.png", "prompt": "a fox"}', '{"path": "b.png", "prompt": "une fée"}']
    text = "\n".join(lines) if name == "list.jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{where} is not UTF-8 text after .*une f'. Save the list as UTF-8"):
        scan(tmp_path / name, OPTIONS)


def test_names_in_a_list_that_no_file_can_have_are_listed_and_the_rest_is_used(tmp_path):
    write_pictures(tmp_path, [(256, 256)] * 3)
    impossible = ["a\0.png", "n" * 300 + ".png", "/"]
    records = [{"path": name, "prompt": "x"} for name in ("p0.png", *impossible)]
    records += [{"path": "p1.png", "prompt": "x", "control": name} for name in impossible]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = scan(tmp_path / "list.jsonl", OPTIONS)
    assert [sample.name for sample in found.samples] == ["p0.png"]
    assert [problem.kind for problem in found.problems] == ["missing file"] * 3 + ["control"] * 3


def test_a_place_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        scan(tmp_path, OPTIONS)
    with pytest.raises(FileNotFoundError, match="no data set at"):
        scan(tmp_path / "nowhere", OPTIONS)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is no data set"):
        scan(tmp_path / "a.txt", OPTIONS)


def test_hidden_files_and_vlm_captions_are_no_pictures(pictures):
    (pictures / ".trash").mkdir()
    picture(9).save(pictures / ".trash" / "x.png")
    (pictures / "p0.vlm.txt").write_text("a dense\n caption")
    listed = list(entries(pictures))
    assert len(listed) == 7 and listed[0].vlm_caption == "a dense caption"
