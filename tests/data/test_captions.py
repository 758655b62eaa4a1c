"""Captions from a vision language model: two kinds of models, nothing overwritten unasked, resumable."""

import json
from pathlib import Path

import pytest

from pixart_nodes.data.captions import PROMPT, caption_pictures, list_models, vision_language_model
from pixart_nodes.data.manifest import ScanOptions, scan

from .conftest import picture, write_pictures
from .tiny_vlm import WORDS, save_blip, save_llava


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    save_llava(root / "tiny-llava")
    save_blip(root / "sorted" / "tiny-blip")
    return root


@pytest.fixture
def silent(tmp_path):
    """Four pictures, one of them with a caption."""
    folder = write_pictures(tmp_path / "pictures", [(256, 256), (320, 192), (200, 300), (256, 256)])
    for number in (0, 1, 3):
        (folder / f"p{number}.txt").unlink()
    return folder


def test_models_that_see_are_found_and_others_are_not(models):
    (models / "blind").mkdir(exist_ok=True)
    (models / "blind" / "config.json").write_text('{"model_type": "llama"}')
    (models / "broken").mkdir(exist_ok=True)
    (models / "broken" / "config.json").write_text("{")
    assert list_models([models, models / "nowhere"]) == ["sorted/tiny-blip", "tiny-llava"]


@pytest.mark.parametrize("name", ["tiny-llava", "sorted/tiny-blip"])
def test_the_model_answers_about_the_picture_without_repeating_the_question(models, name):
    prompt = "describe this image and its style"
    with vision_language_model(models / name, prompt=prompt, max_new_tokens=12) as describe:
        answers = [describe(picture(number, 300, 200)) for number in range(4)]
        assert answers[0] == describe(picture(0, 300, 200))
    assert any(answers) and not any(answer.lower().startswith(prompt) for answer in answers)
    assert len(set(answers)) > 1
    assert set(" ".join(answers).split()) <= {*WORDS, ".", ",", "<unk>", "[UNK]"}


def test_captions_are_written_beside_the_pictures_that_have_none(silent):
    done = caption_pictures(silent, lambda image: f"a picture\nof {image.width} by {image.height} ")
    assert (len(done.written), done.kept, done.problems) == (3, 1, [])
    assert (silent / "p1.txt").read_text() == "a picture of 320 by 192\n"
    assert (silent / "p2.txt").read_text() == "picture number 2"
    assert not scan(silent, ScanOptions(size="256")).problems


def test_a_stopped_run_goes_on_with_the_next_picture(silent):
    class Cancel(BaseException):
        pass

    def cancel(done, total):
        if done == 2:
            raise Cancel

    with pytest.raises(Cancel):
        caption_pictures(silent, lambda image: "first run", progress=cancel)
    done = caption_pictures(silent, lambda image: "second run")
    assert [(silent / f"p{n}.txt").read_text().strip() for n in range(4)] == [
        "first run", "first run", "picture number 2", "second run",
    ]  # fmt: skip
    assert done.kept == 3


def test_captions_are_replaced_only_when_that_is_said(silent):
    caption_pictures(silent, lambda image: "new", existing="replace")
    assert all((silent / f"p{n}.txt").read_text() == "new\n" for n in range(4))


def test_vlm_captions_stand_beside_the_own_ones(silent):
    done = caption_pictures(silent, lambda image: "dense", kind="VLM caption")
    assert len(done.written) == 4 and (silent / "p2.txt").read_text() == "picture number 2"
    samples = scan(silent, ScanOptions(size="256")).samples
    assert [s.vlm_caption for s in samples] == ["dense"] * 4
    assert [s.caption for s in samples] == ["", "", "picture number 2", ""]


@pytest.mark.parametrize("blank", ["", "\n", " \t\r\n\n", "\ufeff\n"])
def test_a_blank_caption_file_is_none_for_the_scan_and_for_the_captioner(silent, blank):
    (silent / "p2.txt").write_text(blank, encoding="utf-8")
    assert "p2.png: missing caption" in scan(silent, ScanOptions(size="256")).summary()
    assert len(caption_pictures(silent, lambda image: "new").written) == 4
    assert (silent / "p2.txt").read_text() == "new\n"


def test_a_caption_file_that_may_not_be_read_stops_nothing_and_stays(silent, monkeypatch):
    read = Path.read_text

    def refuse(path, **options):
        if path.name == "p2.txt":
            raise PermissionError(13, "Permission denied")
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "p2.png: missing caption (its caption file cannot be read (Permission denied))" in scan(
        silent, ScanOptions(size="256")
    ).summary()
    done = caption_pictures(silent, lambda image: "new")
    assert (len(done.written), done.kept) == (3, 1)


def test_a_caption_that_cannot_be_read_is_not_overwritten(silent):
    (silent / "p0.txt").write_bytes("fée".encode("latin-1"))
    caption_pictures(silent, lambda image: "new")
    assert (silent / "p0.txt").read_bytes() == "fée".encode("latin-1")


@pytest.mark.parametrize("existing", ["keep", "replace"])
def test_no_caption_is_written_that_two_pictures_would_share(silent, existing):
    for name in ("p0.jpg", "p2.jpg"):
        picture(20).save(silent / name)
    done = caption_pictures(silent, lambda image: "new", existing=existing)
    assert [(p.name, p.kind) for p in done.problems] == [
        (name, "shared caption") for name in ("p0.jpg", "p0.png", "p2.jpg", "p2.png")
    ]  # fmt: skip
    assert not (silent / "p0.txt").exists() and (silent / "p2.txt").read_text() == "picture number 2"


def test_a_caption_in_the_list_counts(tmp_path):
    write_pictures(tmp_path, [(256, 256)])
    (tmp_path / "p0.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"path": "p0.png", "prompt": "listed"}))
    assert caption_pictures(tmp_path, lambda image: "new").kept == 1 and not (tmp_path / "p0.txt").exists()


def test_pictures_that_cannot_be_read_and_empty_answers_are_listed(silent):
    (silent / "p0.png").write_bytes(b"no picture")
    (silent / "x.heic").write_bytes(b"")
    done = caption_pictures(silent, lambda image: "  " if image.width == 320 else "fine")
    assert [(p.name, p.kind) for p in done.problems] == [
        ("p0.png", "damaged"), ("p1.png", "missing caption"), ("x.heic", "format"),
    ]  # fmt: skip
    assert not (silent / "p1.txt").exists() and "3 problems" in done.summary()


def test_a_folder_that_is_no_such_model_is_named(tmp_path, silent):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vision_config": {}}')
    with pytest.raises(ValueError, match="no complete image-text-to-text model"):
        with vision_language_model(tmp_path) as describe:
            caption_pictures(silent, describe)


def test_no_model_is_loaded_when_nothing_is_to_be_written(tmp_path):
    write_pictures(tmp_path / "pictures", [(256, 256)])
    with vision_language_model(tmp_path / "nowhere") as describe:
        assert caption_pictures(tmp_path / "pictures", describe).kept == 1


def test_the_question_is_that_of_the_paper():
    assert PROMPT == "Describe this image and its style in a very detailed manner."
