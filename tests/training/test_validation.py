import json

import pytest
import torch

from pixart_nodes.training.__main__ import DONE, make_accelerator, train
from pixart_nodes.training.run_dir import VALIDATION, RunFolder
from pixart_nodes.training.trainer import Trainer
from pixart_nodes.training.validation import MEASUREMENTS, EvenDraws, Validation

from .conftest import events_of, losses, read_status, write_cache


@pytest.fixture
def held_out(tmp_path):
    """A cache with one picture that is kept out of training."""
    write_cache(tmp_path / "cache-alpha", roles=("train", "train", "prior", "validation"))


def weights(folder, step):
    return (folder.checkpoints / f"step-{step:06}" / "weights.safetensors").read_bytes()


@pytest.mark.usefixtures("held_out")
def test_validation_is_measured_at_first_at_intervals_and_at_the_end_and_changes_no_weight(make_run):
    fields = {"steps": 5, "save_every": 5, "caption_dropout": 0.5}
    with_it = make_run("lora", name="with", validate_every=2, **fields)
    without = make_run("lora", name="without", validate_every=0, **fields)
    assert [train(folder.path / "run.json") for folder in (with_it, without)] == [DONE, DONE]
    measured = events_of(with_it, "validation")
    assert [event["step"] for event in measured] == [0, 2, 4, 5]
    assert len({event["loss"] for event in measured}) == 4
    assert not events_of(without, "validation")
    assert losses(with_it) == losses(without)
    assert weights(with_it, 5) == weights(without, 5)


@pytest.mark.usefixtures("held_out")
def test_the_same_weights_have_the_same_validation_loss_and_processes_share_it(make_run):
    folder = make_run("full")
    trainer = Trainer(folder.config(), folder, make_accelerator("fp32"))
    alone = trainer.validation.share()
    assert torch.equal(alone, trainer.validation.share())
    parts = [Validation(trainer.recipe, trainer.index, rank, 3).share() for rank in range(3)]
    torch.testing.assert_close(sum(parts), alone)


@pytest.mark.usefixtures("held_out")
@pytest.mark.parametrize("recipe", ["dreambooth", "lcm", "lcm-lora", "controlnet"])
def test_every_kind_of_loss_can_be_validated(make_run, recipe):
    folder = make_run(recipe, steps=1, **{"controlnet": {"blocks": 1}} if recipe == "controlnet" else {})
    assert train(folder.path / "run.json") == DONE, read_status(folder)["error"]
    assert [event["step"] for event in events_of(folder, "validation")] == [0, 1]


def test_noise_levels_are_spread_over_the_whole_range():
    drawn = [EvenDraws(0, number).integers(1000, "cpu").item() for number in range(MEASUREMENTS)]
    assert drawn == sorted(set(drawn)) and drawn[0] < 10 and drawn[-1] > 990


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept_beside_the_newest(tmp_path):
    folder = RunFolder(tmp_path)
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6), (5, None)):
        with folder.new_checkpoint(step) as path:
            if loss is not None:
                (path / VALIDATION).write_text(json.dumps({"loss": loss}))
        folder.prune(2, step)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000002", "step-000004", "step-000005"]
    assert len(list(folder.complete_checkpoints())) == 3


@pytest.mark.usefixtures("held_out")
def test_a_checkpoint_knows_its_validation_loss(make_run):
    folder = make_run("lora", steps=3, save_every=2, validate_every=100)
    assert train(folder.path / "run.json") == DONE
    said = {event["step"]: event["loss"] for event in events_of(folder, "validation")}
    for step in (2, 3):
        stored = json.loads((folder.checkpoints / f"step-{step:06}" / VALIDATION).read_text())
        assert stored["loss"] == said[step]
