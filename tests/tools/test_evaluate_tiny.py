import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools.evaluate_tiny import held_out_samples, main, make_graph, parse, read_samples
from tools.progress import Failure
from tools.tiny.grid import Tile, save_grid
from tools.tiny.scenes import Scene, SceneObject, is_held_out

ROOT = Path(__file__).parents[2]
GOOD = {"caption": "a red circle (big)\nat the top",
        "scene": {"objects": [{"shape": "circle", "color": "red", "position": "top"}]}}  # fmt: skip
KEYS = {"captions", "objects", "object_accuracy", "colour", "shape", "position", "count", "scenes_exact", "steps",
        "guidance", "sampler", "scheduler", "seconds_per_image", "model"}  # fmt: skip


def test_a_captions_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"caption": "red dot"}) + "\n", encoding="utf-8")
    first, second = read_samples(path)
    assert first.caption == "a red circle (big) at the top" and second.caption == "red dot"
    assert first.scene == Scene((SceneObject("circle", "red", "top"),))


@pytest.mark.parametrize("line, reason", [
    ('{"caption": "x"', "no JSON"),
    ('["x"]', "no caption"),
    ('{"caption": " ", "scene": {}}', "no caption"),
    ('{"caption": "x"}', "no scene"),
    ('{"caption": "x", "scene": {"objects": []}}', "objects"),
    ('{"caption": "x", "scene": {"objects": [{"shape": "blob", "color": "red", "position": "top"}]}}', "blob"),
    ('{"caption": "x", "scene": {"objects": [{"shape": "ring", "color": "mauve", "position": "top"}]}}', "mauve"),
])  # fmt: skip
def test_a_bad_line_of_a_captions_file_is_named_with_its_number(tmp_path, line, reason, capsys):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n", encoding="utf-8")
    assert main(["--captions", str(path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "line 2" in shown.err and reason in shown.err and shown.err.count("\n") == 1


def test_an_empty_or_missing_captions_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(Failure, match="no captions"):
        read_samples(tmp_path / "empty.jsonl")
    with pytest.raises(Failure, match="cannot be read"):
        read_samples(tmp_path / "missing.jsonl")


def test_generated_captions_are_of_held_out_objects_and_the_same_for_the_same_seed():
    samples = held_out_samples(50, seed=3)
    assert samples == held_out_samples(50, seed=3) and samples != held_out_samples(50, seed=4)
    for sample in samples:
        assert all(is_held_out(item.shape, item.colour, item.position) for item in sample.scene.objects)


def test_the_graph_takes_one_caption_per_line_and_no_bracket_as_a_weight():
    options = parse(["--steps", "7", "--guidance", "3", "--width", "160"])
    graph = make_graph(["a red circle (top)", "a star"], 5, options)
    assert graph["positive"]["inputs"]["text"] == "a red circle \\(top\\)\na star"
    assert graph["latent"]["inputs"] == {"width": 160, "height": 192, "batch_size": 2}
    assert {"seed": 5, "steps": 7, "cfg": 3.0}.items() <= graph["sampler"]["inputs"].items()
    assert make_graph(["x"], 0, options)["positive"]["inputs"]["text"] == "x"


def test_no_server_and_no_folder_for_the_grid_are_said_in_one_line(capsys, tmp_path):
    assert main(["--server", "http://127.0.0.1:9", "--count", "1"]) == 1
    assert main(["--save-grid", str(tmp_path / "none" / "grid.png")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "127.0.0.1:9" in first and "grid.png" in second


def test_a_grid_holds_every_tile(tmp_path):
    tiles = [Tile(Image.new("RGB", (192, 128), (200, 30, 10 * index)), "a caption of some words " * 4, index % 2, 1)
             for index in range(6)]  # fmt: skip
    save_grid(tiles, tmp_path / "grid.png")
    colours = {colour for _, colour in Image.open(tmp_path / "grid.png").getcolors(1 << 20)}
    assert {(200, 30, 10 * index) for index in range(6)} <= colours


@pytest.mark.slow
def test_the_bundled_model_is_scored_in_process_with_one_line_of_json(comfyui_path, tmp_path):
    command = [sys.executable, str(ROOT / "tools/evaluate_tiny.py"), "--comfyui", str(comfyui_path), "--count", "16",
               "--save-grid", str(tmp_path / "grid.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert KEYS <= set(result) and result["captions"] == 16
    # 0.91 over 300 captions; the rest is room for chance on 33 objects.
    assert result["position"] > 0.9 and result["object_accuracy"] > 0.75
    assert Image.open(tmp_path / "grid.png").width > 800


def test_the_bundled_model_is_scored_on_a_server_with_somebody_elses_captions(comfy_server, tmp_path, capsys):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-8")
    assert main(["--server", comfy_server.url, "--captions", str(path), "--steps", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert KEYS <= set(result) and result["captions"] == result["objects"] == 1
