"""What a scan finds, and what it says about the rest."""

import json
import shutil

import pytest
from PIL import Image

from pixart_nodes.data import manifest
from pixart_nodes.data.buckets import TABLES, merge_small
from pixart_nodes.data.manifest import Memory, ScanOptions, scan, with_trigger
from pixart_nodes.data.pictures import load_pixels
from pixart_nodes.data.sources import entries

from .conftest import picture, write_pictures

OPTIONS = ScanOptions(size="256")


def kinds(manifest):
    return {problem.name: problem.kind for problem in manifest.problems}


def test_a_folder_gives_each_picture_its_caption_size_and_bucket(pictures):
    found = scan(pictures, OPTIONS)
    assert not found.problems
    first = found.samples[0]
    assert (first.name, first.caption, first.height, first.width) == ("p0.png", "picture number 0", 256, 256)
    assert (first.bucket.ratio, first.bucket.height, first.bucket.width) == (1.0, 256, 256)
    assert all(sample.bucket[1:] == TABLES["256"][sample.bucket.ratio] for sample in found.samples)


def test_every_kind_of_problem_is_listed_with_its_file_and_the_rest_is_usable(pictures):
    data = (pictures / "p0.png").read_bytes()
    (pictures / "torn.png").write_bytes(data[: len(data) // 2])
    picture(50).save(pictures / "torn.jpg")
    (pictures / "torn.jpg").write_bytes((pictures / "torn.jpg").read_bytes()[:-300])
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "phone.heic").write_bytes(b"....ftypheic")
    shutil.copy(pictures / "p1.png", pictures / "p1 copy.png")
    picture(51, 96, 96).save(pictures / "small.png")
    picture(52).save(pictures / "silent.png")
    frames = [picture(n) for n in (60, 61)]
    frames[0].save(pictures / "moving.webp", save_all=True, append_images=frames[1:])
    picture(53).save(pictures / "latin.png")
    (pictures / "latin.txt").write_bytes("fée".encode("latin-1"))
    for name in ("torn", "text", "empty", "small", "moving", "p1 copy"):
        (pictures / f"{name}.txt").write_text("a caption")
    found = scan(pictures, OPTIONS)
    assert kinds(found) == {
        "torn.png": "damaged", "torn.jpg": "damaged", "text.jpg": "damaged", "empty.png": "damaged",
        "moving.webp": "damaged", "phone.heic": "format", "p1.png": "duplicate", "small.png": "too small",
        "silent.png": "missing caption", "latin.png": "missing caption",
    }  # fmt: skip
    assert len(found.samples) == 7
    summary = found.summary()
    assert "7 usable, 10 excluded" in summary
    assert "small.png: too small (96 x 96 px would be enlarged 2.7 times to 256 x 256)" in summary
    assert "animation" in summary and "UTF-8" in summary


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
])  # fmt: skip
def test_an_unreadable_list_is_refused_with_the_place_of_the_mistake(tmp_path, text, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        scan(tmp_path / "list.jsonl", OPTIONS)


def test_a_place_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        scan(tmp_path, OPTIONS)
    with pytest.raises(FileNotFoundError, match="no data set at"):
        scan(tmp_path / "nowhere", OPTIONS)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is no data set"):
        scan(tmp_path / "a.txt", OPTIONS)


def test_wrong_options_are_named_all_at_once(pictures):
    with pytest.raises(ValueError) as raised:
        scan(pictures, ScanOptions(size="333", repeats=0, caption_from_trigger=True, real_caption_ratio=2))
    assert all(word in str(raised.value) for word in ("size", "repeats", "trigger word", "real_caption_ratio"))


def test_the_trigger_word_comes_first_and_only_once():
    assert with_trigger("a cup", "zkx") == "zkx, a cup"
    assert with_trigger("A ZKX, on a table", "zkx") == "A ZKX, on a table"
    assert with_trigger("zkxyz cup", "zkx") == "zkx, zkxyz cup"
    assert with_trigger("", "zkx") == "" and with_trigger("a cup", " ") == "a cup"


def test_pictures_without_captions_can_take_the_trigger_word(tmp_path):
    picture(1).save(tmp_path / "a.png")
    options = ScanOptions(size="256", trigger_word="zkx", caption_from_trigger=True)
    assert scan(tmp_path, options).samples[0].caption == "zkx"


def test_control_images_lie_beside_or_in_a_folder_and_are_no_samples(tmp_path):
    write_pictures(tmp_path, [(256, 256)] * 3)
    picture(100).save(tmp_path / "p0.control.jpg")
    (tmp_path / "control").mkdir()
    picture(101).save(tmp_path / "control" / "p1.webp", lossless=True)
    found = scan(tmp_path, OPTIONS)
    assert [(s.name, s.control.endswith(("p0.control.jpg", "p1.webp"))) for s in found.samples] == [
        ("p0.png", True), ("p1.png", True),
    ]  # fmt: skip
    assert kinds(found) == {"p2.png": "control"}


def test_a_second_scan_opens_only_what_changed(pictures, tmp_path, monkeypatch):
    memory = tmp_path / "memory.json"
    first = scan(pictures, OPTIONS, Memory(memory))
    picture(99).save(pictures / "p0.png")
    opened = []
    look = manifest.look
    monkeypatch.setattr(manifest, "look", lambda data: opened.append(data) or look(data))
    second = scan(pictures, OPTIONS, Memory(memory))
    assert len(opened) == 1
    assert second.samples[0].digest != first.samples[0].digest and second.samples[1:] == first.samples[1:]


def test_a_torn_memory_costs_time_only(pictures, tmp_path):
    (tmp_path / "memory.json").write_text('{"a": [')
    assert len(scan(pictures, OPTIONS, Memory(tmp_path / "memory.json")).samples) == 7


def test_scans_by_three_processes_give_the_same_data_set(pictures):
    shares = []
    for rank in range(3):
        scan(pictures, OPTIONS, rank=rank, world=3, gather=lambda found: shares.append(found) or [found])
    together = scan(pictures, OPTIONS, rank=0, world=3, gather=lambda found: shares)
    assert together == scan(pictures, OPTIONS)


def test_pictures_are_seen_as_a_person_sees_them(tmp_path):
    turned = picture(1, 300, 256)
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (256, 256), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (256, 256), 32768).save(tmp_path / "deep.png")
    Image.new("CMYK", (256, 256)).save(tmp_path / "print.jpg")
    for name in ("turned", "clear", "deep", "print"):
        (tmp_path / f"{name}.txt").write_text(name)
    samples = {s.name: s for s in scan(tmp_path, OPTIONS).samples}
    assert (samples["turned.jpg"].height, samples["turned.jpg"].width) == (300, 256)
    for name, value in (("clear.png", 1.0), ("deep.png", 0.5), ("print.jpg", 1.0)):
        pixels = load_pixels(samples[name].path, samples[name].digest, 64, 64)
        assert pixels.shape == (64, 64, 3) and abs(pixels.mean() - value) < 0.01


def test_small_buckets_join_a_near_one_and_far_ones_stay():
    assert merge_small({1.0: 10, 1.07: 1, 0.94: 2, 4.0: 1}, 4) == {1.0: 1.0, 1.07: 1.0, 0.94: 1.0, 4.0: 4.0}
    assert merge_small({1.0: 1}, 4) == {1.0: 1.0}
    assert merge_small({}, 4) == {}
    chain = merge_small({1.0: 1, 1.13: 1, 1.29: 1, 1.46: 1, 1.67: 1, 2.0: 1}, 3)
    assert all(max(a / b, b / a) <= 1.35 for a, b in chain.items())


def test_of_very_many_problems_the_first_are_shown_and_all_are_counted(tmp_path):
    write_pictures(tmp_path, [(256, 256)])
    for number in range(230):
        (tmp_path / f"x{number:03}.heic").touch()
    lines = scan(tmp_path, OPTIONS).summary().splitlines()
    assert len(lines) < 210 and lines[-1] == "... in all 230 x format"


def test_what_was_merged_and_what_will_be_repeated_is_said(tmp_path):
    write_pictures(tmp_path, [(256, 256)] * 4 + [(270, 250), (512, 128)])
    found = scan(tmp_path, OPTIONS)
    assert len(found.samples) == 6 and {s.bucket.ratio for s in found.samples} == {1.0, 0.25}
    assert any("joined 256 x 256" in note for note in found.notes)
    assert any("512 x 128 has 1" in note and "repeated" in note for note in found.notes)


def test_held_out_pictures_are_the_same_after_others_are_added(tmp_path):
    write_pictures(tmp_path, [(256, 256)] * 40)
    options = ScanOptions(size="256", validation_percent=25)
    before = {s.name for s in scan(tmp_path, options).samples if s.role == "validation"}
    write_pictures(tmp_path, [(256, 256)] * 20, start=40)
    after = {s.name for s in scan(tmp_path, options).samples if s.role == "validation"}
    assert 2 <= len(before) <= 20 and before == {name for name in after if int(name[1:-4]) < 40}


def test_data_sets_of_different_sizes_are_not_joined(pictures):
    small, large = (scan(pictures, ScanOptions(size=size, max_enlargement=4)) for size in ("256", "512"))
    assert len(small.joined(small).samples) == 14
    with pytest.raises(ValueError, match="same size"):
        small.joined(large)


def test_hidden_files_and_vlm_captions_are_no_pictures(pictures):
    (pictures / ".trash").mkdir()
    picture(9).save(pictures / ".trash" / "x.png")
    (pictures / "p0.vlm.txt").write_text("a dense\n caption")
    listed = list(entries(pictures))
    assert len(listed) == 7 and listed[0].vlm_caption == "a dense caption"
