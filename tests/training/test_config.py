import json

import pytest

from pixart_nodes.training.config import RECIPES, RunConfig, defaults
from pixart_nodes.training.run_dir import RunFolder

GIVEN = {"base": {"path": "base"}, "cache": "cache", "output": {"name": "result", "folder": "models"}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_defaults_of_a_recipe_are_valid_and_survive_json(recipe):
    config = RunConfig.from_dict({"recipe": recipe, **GIVEN})
    assert config.check() == []
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_given_comes_before_the_defaults_of_the_recipe():
    assert defaults("lcm-lora")["rank"] == 64
    assert RunConfig.from_dict({"recipe": "lcm-lora", "rank": 4, **GIVEN}).rank == 4


def test_all_wrong_values_are_reported_at_once():
    config = RunConfig.from_dict({
        "recipe": ["lora"], "steps": 0, "batch_size": 1.5, "rank": "3", "learning_rate": float("nan"), "ema_decay": 1,
        "min_snr_gamma": -5, "base_quantization": "int4", "dora": "yes", "trigger_word": 3, "output": {"name": "a/b"},
    })  # fmt: skip
    problems = config.check()
    for name in ("recipe", "steps", "batch_size", "rank", "learning_rate", "ema_decay", "min_snr_gamma",
                 "base_quantization", "base.path", "cache", "output.name", "output.folder"):  # fmt: skip
        assert any(problem.startswith(name + " ") for problem in problems), name


def test_whole_numbers_may_be_written_with_a_point():
    config = RunConfig.from_dict({"rank": 8.0, "weak_to_strong": {"base_size": 512.0}, "alpha": 2.0, **GIVEN})
    assert config.check() == []
    kinds = [type(config.value(name)) for name in ("rank", "weak_to_strong.base_size", "alpha")]
    assert kinds == [int, int, float]


@pytest.mark.parametrize("name, value", [
    ("seed", 2**63), ("weak_to_strong.base_size", 8), ("weak_to_strong.base_size", 64.5), ("base.base_size", 8),
    ("weak_to_strong.kv_scale_factor", 1), ("output.name", "x" * 201), ("output.name", "a\nb"), ("output.name", "fox."),
    ("output.name", "fox "), ("output.name", "aux"), ("output.name", "COM1.fox"), ("output.name", ".fox"),
])  # fmt: skip
def test_a_value_that_would_fail_in_the_run_is_reported(name, value):
    group, _, leaf = name.rpartition(".")
    given = {**GIVEN, **({group: {**GIVEN.get(group, {}), leaf: value}} if group else {leaf: value})}
    problems = RunConfig.from_dict(given).check()
    assert len(problems) == 1 and problems[0].startswith(name + " ")


def test_dora_is_refused_on_an_int8_base_alone():
    given = {"recipe": "lora", "dora": True, **GIVEN}
    assert "set it to nf4 or none" in RunConfig.from_dict({**given, "base_quantization": "int8"}).check()[0]
    assert RunConfig.from_dict({**given, "base_quantization": "nf4"}).check() == []


def test_unknown_keys_are_reported_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match=r"stepps; did you mean steps\?.*lcm.guidanc; did you mean lcm.guidance\?"):
        RunConfig.from_dict({"stepps": 3, "lcm": {"guidanc": 1}})


@pytest.mark.parametrize("content", ["{", "[1]", '{"version": 2}', '{"base": 3}'])
def test_a_run_json_that_cannot_be_meant_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json"):
        RunFolder(tmp_path).config()


def test_a_quantised_base_is_refused_where_all_weights_are_trained():
    config = RunConfig.from_dict({"recipe": "full", "base_quantization": "nf4", **GIVEN})
    assert "frozen weights" in config.check()[0]


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_are_no_checkpoints(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        with folder.new_checkpoint(step) as path:
            (path / "weights").write_bytes(b"weights")
    (folder.checkpoints / ".step-000004.tmp").mkdir()
    (folder.checkpoints / "step-000005").mkdir()
    assert [path.name for path in folder.complete_checkpoints()] == ["step-000003", "step-000002", "step-000001"]
    folder.prune(2, step=3)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000002", "step-000003"]


def test_an_error_while_saving_leaves_no_checkpoint_and_keeps_the_one_before(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.new_checkpoint(1) as path:
        (path / "weights").write_bytes(b"weights")
    with pytest.raises(OSError, match="Free some space"), folder.new_checkpoint(2) as path:
        (path / "weights").write_bytes(b"wei")
        raise OSError("No space left on device")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]
