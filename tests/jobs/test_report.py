"""A run in words and as a curve."""

import json

import numpy as np
import pytest

from pixart_nodes.jobs import report


def write(run, *losses, **status):
    events = [{"type": "step", "step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (44.6, "45 s"), (700, "12 min"), (12_000, "3 h 20 min"), (5430, "1 h 30 min")]
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert report.duration(seconds) == text


def test_the_time_left_counts_what_comes_between_the_steps():
    pace, step = report.Pace(), {"step": 10, "time": 100.0, "seconds_per_step": 1.0}
    assert pace.left(step, 20) == 10.0
    assert pace.left({"step": 12, "time": 106.0, "seconds_per_step": 1.0}, 20) == 24.0


@pytest.mark.parametrize(("loss", "said"), [(0.125, "loss 0.125,"), (None, "loss no number,")])
def test_the_node_tells_step_loss_and_time_left_while_it_waits(tmp_path, loss, said):
    status = {"state": "running", "steps": 20}
    step = {"step": 10, "time": 100.0, "seconds_per_step": 2.0, "loss": loss}
    text = report.progress_text(tmp_path, status, step, report.Pace())
    assert "step 10 of 20" in text and said in text and "about 20 s left" in text
    assert report.progress_text(tmp_path, {"state": "starting"}, None, report.Pace()).endswith(": starting ...")


def test_the_average_starts_at_the_first_value():
    assert report.smoothed([4.0]) == [4.0] and report.smoothed([4.0] * 9)[-1] == pytest.approx(4.0)
    assert 2.0 < report.smoothed([4.0, 2.0])[-1] < 3.5


@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, 1.0), (3.0, float("nan"), 1.0, 2.0), tuple(range(5000))])
def test_a_curve_is_drawn_for_any_losses(tmp_path, losses):
    write(tmp_path, *losses)
    pixels = np.asarray(report.loss_curve(tmp_path))
    assert pixels.shape == (report.HEIGHT, report.WIDTH, 3) and pixels.std() > 1


def test_a_falling_loss_falls_in_the_curve(tmp_path):
    write(tmp_path, *np.linspace(5, 1, 400).tolist())
    orange = (np.asarray(report.loss_curve(tmp_path)) == (255, 169, 77)).all(-1)
    rows = [np.flatnonzero(orange[:, column]).mean() for column in (100, 350, 600)]
    assert rows == sorted(rows) and rows[-1] - rows[0] > 100


def test_a_run_in_the_background_tells_how_far_it_is_and_why_it_failed_before(tmp_path):
    write(tmp_path, 1.0, state="running", step=1, steps=9)
    assert "in the background, step 1 of 9. It shares the GPU's memory" in report.running_text(tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"type": "error", "text": "Out of memory at step 2."}\n')
    assert report.running_text(tmp_path).endswith("It has failed before: Out of memory at step 2.")


def test_a_failure_that_was_explained_needs_no_log_and_one_that_was_not_shows_its_end(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(f"line {n}" for n in range(99)))
    write(tmp_path, state="failed", error="Out of memory at step 1.")
    assert report.failure(tmp_path) == f"Out of memory at step 1.\nThe whole log: {tmp_path / 'log.txt'}"
    write(tmp_path, state="failed", error="The trainer was killed by signal 9 (SIGKILL) after step 1.")
    assert report.failure(tmp_path).endswith("line 98") and "line 59\n" in report.failure(tmp_path)
    assert "line 58\n" not in report.failure(tmp_path)
