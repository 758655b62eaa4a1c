"""What a scan finds, and what it says about the rest."""

import shutil

import pytest
from PIL import Image

from pixart_nodes.data import memory
from pixart_nodes.data.buckets import TABLES, merge_small
from pixart_nodes.data.manifest import ScanOptions, scan, with_trigger
from pixart_nodes.data.memory import Memory
from pixart_nodes.data.pictures import load_pixels

from .conftest import kinds, picture, write_pictures

OPTIONS = ScanOptions(size="256")


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
    picture(50).save(pictures / "cut.jpg")
    (pictures / "cut.jpg").write_bytes((pictures / "cut.jpg").read_bytes()[:-300])
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
    for name in ("torn", "cut", "text", "empty", "small", "moving", "p1 copy"):
        (pictures / f"{name}.txt").write_text("a caption")
    found = scan(pictures, OPTIONS)
    assert kinds(found) == {
        "torn.png": "damaged", "cut.jpg": "damaged", "text.jpg": "damaged", "empty.png": "damaged",
        "moving.webp": "damaged", "phone.heic": "format", "p1.png": "duplicate", "small.png": "too small",
        "silent.png": "missing caption", "latin.png": "missing caption",
    }  # fmt: skip
    assert len(found.samples) == 7
    summary = found.summary()
    assert "7 usable, 10 excluded" in summary
    assert "small.png: too small (96 x 96 px would be enlarged 2.7 times to 256 x 256)" in summary
    assert "animation" in summary and "UTF-8" in summary


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


def test_a_control_image_of_another_shape_than_its_picture_is_listed(tmp_path):
    write_pictures(tmp_path, [(320, 256)] * 3)
    for number, shape in enumerate([(160, 128), (330, 256), (256, 320)]):
        picture(100 + number, *shape).save(tmp_path / f"p{number}.control.png")
    found = scan(tmp_path, OPTIONS)
    assert [sample.name for sample in found.samples] == ["p0.png", "p1.png"]
    assert "p2.png: control (p2.control.png is 256 x 320 px, but the picture 320 x 256" in found.summary()


def test_a_second_scan_opens_only_what_changed(pictures, tmp_path, monkeypatch):
    file = tmp_path / "memory.json"
    first = scan(pictures, OPTIONS, Memory(file))
    picture(99).save(pictures / "p0.png")
    opened = []
    look = memory.look
    monkeypatch.setattr(memory, "look", lambda data: opened.append(data) or look(data))
    second = scan(pictures, OPTIONS, Memory(file))
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


@pytest.mark.parametrize("count, percent, expected", [
    (49, -1, range(0, 1)), (50, -1, range(1, 6)), (3, 1, range(1, 2)), (1, 50, range(0, 1)), (60, 0, range(0, 1)),
])  # fmt: skip
def test_large_sets_keep_two_percent_for_validation_and_whoever_asks_gets_one_picture_at_least(
    tmp_path, count, percent, expected
):
    write_pictures(tmp_path, [(256, 256)] * count)
    samples = scan(tmp_path, ScanOptions(size="256", validation_percent=percent)).samples
    assert sum(sample.role == "validation" for sample in samples) in expected and len(samples) == count


def test_data_sets_of_different_sizes_are_not_joined(pictures):
    small, large = (scan(pictures, ScanOptions(size=size, max_enlargement=4)) for size in ("256", "512"))
    with pytest.raises(ValueError, match="same size"):
        small.joined(large)


@pytest.mark.parametrize("role", ["train", "validation", "prior"])
def test_a_picture_of_two_joined_data_sets_comes_once_and_is_listed(tmp_path, role):
    first = scan(write_pictures(tmp_path / "a", [(256, 256)] * 2), ScanOptions(size="256", repeats=3))
    again = write_pictures(tmp_path / "b", [(256, 256)] * 2, start=1)
    both = scan(again, ScanOptions(size="256", role=role)).joined(first)
    assert [(s.name, s.role, s.repeats) for s in both.samples] == [
        ("p0.png", "train", 3), ("p1.png", "train", 3), ("p2.png", role, 1),
    ]  # fmt: skip
    assert both.problems == (("p1.png", "duplicate", f"the same file as p1.png for train in {tmp_path / 'a'}"),)
