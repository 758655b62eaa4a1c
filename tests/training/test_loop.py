from dataclasses import replace

import pytest
import torch

from pixart_nodes.model import PixArtParams, PixArtTransformer
from pixart_nodes.training import checkpointing, events
from pixart_nodes.training.config import OPTIMIZERS, TrainConfig
from pixart_nodes.training.initialise import initialise
from pixart_nodes.training.loop import Batch, drop_captions, learning_rate_factor, train
from pixart_nodes.training.optimizers import orthogonalise

PARAMS = PixArtParams(
    depth=2, hidden_size=32, num_heads=2, in_channels=4, patch_size=2, mlp_ratio=2.0, caption_channels=16,
    caption_tokens=10, base_size=4, pe_interpolation=1.0, micro_condition=False, qk_norm=False, kv_compress=None,
    learned_variance=True,
)  # fmt: skip
CONFIG = TrainConfig(steps=6, batch_size=4, warmup_steps=2, save_every=3, log_every=3)


def make_model():
    torch.manual_seed(0)
    model = PixArtTransformer(PARAMS)
    initialise(model)
    return model


def make_batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    latent = torch.randn(4, 4, 8, 8, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([7, 5, 3, 1])[:, None]
    return Batch(latent, torch.randn(4, 7, 16, generator=generator), mask)


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    whole = make_model()
    ema = train(config, whole, make_batch, tmp_path / "whole")

    def killed_after_four(step, rank):
        if step == 4:
            raise Killed
        return make_batch(step, rank)

    with pytest.raises(Killed):
        train(config, make_model(), killed_after_four, tmp_path / "resumed")
    resumed = make_model()
    resumed_ema = train(config, resumed, make_batch, tmp_path / "resumed")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    for name, weight in ema.weights.items():
        assert torch.equal(weight, resumed_ema.weights[name]), name


def test_training_on_one_batch_lowers_the_loss(tmp_path):
    config = TrainConfig(steps=150, batch_size=4, warmup_steps=5, learning_rate=5e-3, log_every=15, save_every=200)
    train(config, make_model(), lambda step, rank: make_batch(0, rank), tmp_path)
    log = events.read(tmp_path / "events.jsonl")
    assert log[-1]["mse"] < 0.8 * log[0]["mse"]


def test_every_weight_gets_a_gradient_from_the_original_loss(tmp_path):
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(CONFIG, model, make_batch, tmp_path)
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


def test_a_dropped_caption_becomes_the_null_rows_and_keeps_its_own_mask():
    batch = make_batch(0, 0)
    null = torch.arange(10.0)[:, None].expand(10, 16)
    generator = torch.Generator().manual_seed(1)
    context = drop_captions(batch, null, 0.5, generator)
    dropped = [torch.equal(row, null[:7]) for row in context]
    kept = [torch.equal(row, old) for row, old in zip(context, batch.context, strict=True)]
    assert any(dropped) and any(kept)
    assert all(d != k for d, k in zip(dropped, kept, strict=True))


def test_the_learning_rate_warms_up_and_falls_to_its_final_value():
    config = TrainConfig(steps=100, batch_size=1, warmup_steps=10, learning_rate=1e-3, final_learning_rate=1e-4)
    factors = [learning_rate_factor(config, step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)


def test_all_wrong_numbers_are_reported_at_once_before_anything_is_written(tmp_path):
    config = TrainConfig(steps=0, batch_size=0, caption_dropout=1.5)
    with pytest.raises(ValueError, match=r"steps is 0.*batch_size is 0.*caption_dropout is 1.5"):
        train(config, make_model(), make_batch, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_save_keeps_the_last_checkpoint_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpointing.save(path, step=1)
    path.with_suffix(".tmp").mkdir()  # the temporary name cannot be opened for writing
    with pytest.raises(OSError, match="checkpoint"):
        checkpointing.save(path, step=2)
    assert checkpointing.load(path) == {"step": 1}


def test_a_torn_last_line_of_the_diary_is_ignored(tmp_path):
    path = tmp_path / "events.jsonl"
    events.append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "ms')
    assert events.read(path) == [{"step": 1}]


@pytest.mark.parametrize("shape", [(3, 12, 30), (3, 30, 12)])
def test_muon_turns_a_gradient_into_one_whose_singular_values_are_about_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.3
