"""What a form with blanks becomes: the recipe's own defaults, or what was filled in."""

import pytest

from pixart_nodes.jobs.request import RECIPES_CHOICE, run_config
from pixart_nodes.training.config import RECIPES, RunConfig

BLANK = {
    "recipe": "lora", "base": {"path": "a"}, "cache": "b", "output": {"name": "fox", "folder": "c"}, "vae": "",
    "steps": 0, "batch_size": 0, "gradient_accumulation_steps": 0, "learning_rate": 0.0, "rank": 0, "alpha": 0.0,
    "save_every": 0, "warmup_steps": -1, "sample_every": -1, "caption_dropout": -1.0, "ema_decay": -1.0, "seed": 42,
    "precision": "auto", "base_quantization": "none", "gradient_checkpointing": True, "optimizer": "auto",
    "lr_schedule": "constant", "dora": False, "prior_loss_weight": 1.0, "trigger_word": "", "targets": RECIPES_CHOICE,
    "min_snr_gamma": 0.0, "lcm_guidance": 5.5, "controlnet_blocks": 0, "stronger_size": 0, "kv_sampling": "none",
    "kv_scale_factor": 2, "kv_layers": (),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_blank_form_is_the_recipes_defaults(recipe):
    config = run_config(BLANK | {"recipe": recipe}, depth=28)
    expected = RunConfig.from_dict({name: BLANK[name] for name in ("base", "cache", "output")} | {"recipe": recipe})
    assert config == expected and not config.check()


def test_what_is_filled_in_is_taken():
    filled = {"steps": 7, "learning_rate": 0.5, "batch_size": 3, "rank": 5, "sample_every": 0, "caption_dropout": 0.0,
              "targets": "all", "min_snr_gamma": 5.0, "warmup_steps": 2, "seed": 1, "lcm_guidance": 3.0}  # fmt: skip
    config = run_config(BLANK | filled, depth=28)
    assert config.lcm.guidance == filled.pop("lcm_guidance")
    assert {name: config.value(name) for name in filled} == filled
    assert config.alpha == 5.0  # as the rank


def test_a_short_run_has_a_short_warm_up():
    assert run_config(BLANK | {"steps": 50}, depth=28).warmup_steps == 5
    assert run_config(BLANK | {"steps": 10**6}, depth=28).warmup_steps == RunConfig.warmup_steps


def test_prodigy_gets_the_rate_that_it_needs_unless_one_is_filled_in():
    assert run_config(BLANK | {"optimizer": "prodigy"}, depth=28).learning_rate == 1.0
    assert run_config(BLANK | {"optimizer": "prodigy", "learning_rate": 0.5}, depth=28).learning_rate == 0.5


def test_a_small_model_gets_a_controlnet_and_a_compression_that_fit_it():
    config = run_config(BLANK | {"recipe": "controlnet"}, depth=8)
    assert config.controlnet.blocks == 4 and config.weak_to_strong.kv_layers == (4, 5, 6, 7)
    assert run_config(BLANK | {"kv_layers": (1, 2), "kv_sampling": "conv"}, depth=8).weak_to_strong.kv_layers == (1, 2)
