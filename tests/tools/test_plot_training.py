"""The loss curve and the table of docs/tiny_family.md show the training as it is."""

from pathlib import Path

import pytest

from pixart_nodes.training import events
from tools.plot_training import HEIGHT, STAGES, WIDTH, curves, draw
from tools.tiny import train_dit

ROOT = Path(__file__).resolve().parents[2]


def write(folder, stage, *records):
    (folder / f"dit-{stage}").mkdir()
    for step, mse in records:
        events.append(folder / f"dit-{stage}" / "events.jsonl", {"step": step, "mse": mse})


def test_stages_follow_each_other_and_a_step_that_was_logged_twice_counts_once(tmp_path):
    write(tmp_path, "pixel", (20, 0.9), (40, 0.5), (40, 0.4))
    write(tmp_path, "alignment", (20, 0.3))
    assert curves(tmp_path) == {"pixel": [(20, 0.9), (40, 0.4)], "alignment": [(60, 0.3)]}


def test_every_stage_is_drawn_in_its_own_colour(tmp_path):
    for stage in STAGES:
        write(tmp_path, stage, (20, 0.9), (40, 0.1))
    picture = draw(curves(tmp_path))
    assert picture.size == (WIDTH, HEIGHT)
    drawn = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in picture.getcolors(1 << 20)}
    assert set(STAGES.values()) <= drawn


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="events.jsonl"):
        draw(curves(tmp_path))


def test_the_document_states_the_settings_of_the_stages():
    assert list(STAGES) == [stage.name for stage in train_dit.STAGES]
    document = (ROOT / "docs" / "tiny_family.md").read_text(encoding="utf-8")
    for stage in train_dit.STAGES:
        (row,) = [line for line in document.splitlines() if line.startswith(f"| {stage.name}")]
        *_, sizes, steps, batch, _ = row.strip("| ").split(" | ")
        assert sizes == ", ".join(f"{width} × {height}" for width, height in stage.sizes)
        assert (int(steps), int(batch)) == (stage.config.steps, stage.config.batch_size)
