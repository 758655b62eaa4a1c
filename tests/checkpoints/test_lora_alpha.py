"""How strong a LoRA is: alpha from tensor, metadata, adapter_config.json, widget, and PEFT's default."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints.lora_files import load_lora, read_lora

from .lora_tensors import linear, only

NAME = "transformer.transformer_blocks.3.attn1.to_q"
METADATA = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}


@pytest.mark.parametrize(
    "tensor, metadata, config, widget, alpha, source",
    [
        (2.0, METADATA, CONFIG, 20.0, 2.0, "stored in the file"),
        (None, METADATA, CONFIG, 20.0, 6.0, "the file's metadata"),
        (None, {}, CONFIG, 20.0, 12.0, "adapter_config.json"),
        (None, {}, None, 20.0, 20.0, "set on the node"),
        (None, {}, None, None, 8.0, "PEFT's default"),
        (None, {"ss_network_alpha": "3"}, CONFIG, None, 3.0, "the file's metadata"),
        (None, {"ss_network_alpha": "None"}, CONFIG, None, 12.0, "adapter_config.json"),
        (None, {"lora_alpha": "5.5"}, None, 20.0, 5.5, "the file's metadata"),
        (None, {"r": "4"}, None, None, 8.0, "PEFT's default"),
        (None, {}, {"r": 4}, 3.0, 3.0, "set on the node"),
        (0.0, {}, None, 20.0, 0.0, "stored in the file"),
    ],
)
def test_alpha_comes_from_the_first_place_that_knows_it(tensor, metadata, config, widget, alpha, source):
    tensors = linear(NAME) | ({} if tensor is None else {f"{NAME}.alpha": torch.tensor(tensor)})
    lora = read_lora(tensors, metadata, config, widget)
    strength = only(lora).strength
    assert (strength.alpha, strength.scale) == (alpha, alpha / 4)
    assert source in strength.source and source in lora.summary() and f"alpha {alpha:g}" in lora.summary()


def test_a_lora_of_pixarts_own_scripts_is_a_quarter_as_strong_as_its_rank_suggests():
    """LCM-LoRA: rank 32, alpha nowhere, PEFT's default 8."""
    assert only(read_lora(linear("unet.base_model.model.proj_out", rank=32))).strength.scale == 0.25


def test_patterns_and_rank_stabilisation_of_peft_count():
    config = {"r": 9, "lora_alpha": 3.0, "use_rslora": True, "rank_pattern": {"attn1.to_q": 4},
              "alpha_pattern": {r"^transformer_blocks\.3\..*": 10.0, "to_q": 1.0}}  # fmt: skip
    assert only(read_lora(linear(NAME), config=config)).strength.scale == 10.0 / 2
    other = linear(NAME.replace("3", "2"))
    assert only(read_lora(other, config=config)).strength.scale == 1.0 / 2


@pytest.mark.parametrize("patterns, place", [("alpha_pattern", "header"), ("alpha_pattern", "config"),
                                             ("rank_pattern", "config")])  # fmt: skip
def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path, patterns, place):
    fields = CONFIG | {patterns: {"*to_q": 3}}
    header = {name: json.dumps(value) for name, value in fields.items()}
    save_file(linear(NAME), tmp_path / "x.safetensors", header if place == "header" else None)
    if place == "config":
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"^x.safetensors: its settings name modules by '\*to_q', which is no regular"):
        load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("numbers", [0, 2])
def test_an_alpha_of_several_numbers_is_named(tmp_path, numbers):
    save_file(linear(NAME) | {f"{NAME}.alpha": torch.ones(numbers)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^x.safetensors: {NAME}.alpha holds {numbers} numbers, and alpha is one"):
        load_lora(tmp_path / "x.safetensors")


def test_onetrainer_signs_its_files_and_folds_alpha_into_them():
    lora = read_lora(linear(NAME), {"ot_branch": "master"})
    assert only(lora).strength.scale == 1.0 and "OneTrainer" in lora.summary()


def test_what_a_user_sets_counts_more_than_a_signature_of_onetrainer():
    """Only when the file has no alpha itself."""
    signed, alpha = {"ot_branch": "master"}, {f"{NAME}.alpha": torch.tensor(2.0)}
    assert only(read_lora(linear(NAME), signed, None, 3.0)).strength == (0.75, 3.0, "set on the node")
    assert only(read_lora(linear(NAME) | alpha, signed, None, 3.0)).strength.alpha == 2.0


def test_a_config_of_another_lora_in_the_same_folder_is_ignored():
    lora = read_lora(linear(NAME), None, {"r": 16, "lora_alpha": 64})
    assert only(lora).strength.alpha == 8.0
    assert "of another LoRA (rank 16 there, 4 here)" in lora.notes[0]


def beside(tmp_path, config, alpha=None, tensors=None):
    """A file without alpha, next to an adapter_config.json."""
    (tmp_path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors or linear(NAME), tmp_path / "x.safetensors")
    return load_lora(tmp_path / "x.safetensors", alpha)


UNUSABLE = ["{", {"peft_type": "IA3"}, CONFIG | {"alpha_pattern": {"*": 3}}, CONFIG | {"target_modules": "("}]


@pytest.mark.parametrize("config", [*UNUSABLE, CONFIG | {"init_lora_weights": "pissa"}, CONFIG])
def test_a_file_that_stores_its_alpha_needs_no_config_beside_it(tmp_path, config):
    lora = beside(tmp_path, config, tensors=linear(NAME) | {f"{NAME}.alpha": torch.tensor(2.0)})
    assert only(lora).strength.alpha == 2.0 and not lora.notes


@pytest.mark.parametrize("config", UNUSABLE)
def test_an_unusable_config_beside_a_file_stops_it_unless_the_user_sets_alpha(tmp_path, config):
    with pytest.raises(ValueError, match=r"^x.safetensors: "):
        beside(tmp_path, config)
    lora = beside(tmp_path, config, 3.0)
    assert only(lora).strength.alpha == 3.0 and "beside it is ignored" in lora.notes[0]


@pytest.mark.parametrize(
    "targets, alpha",
    [(["to_q"], 12.0), (["ff.net.2", "attn1.to_q"], 12.0), (r".*attn\d\.to_[qk]", 12.0), ("all-linear", 12.0),
     (None, 12.0), (["ff.net.2"], 8.0), (["q"], 8.0), (r".*attn\d\.to_[kv]", 8.0)],
)  # fmt: skip
def test_a_config_for_other_modules_beside_a_file_is_ignored(tmp_path, targets, alpha):
    lora = beside(tmp_path, CONFIG | {"target_modules": targets})
    assert only(lora).strength.alpha == alpha
    assert not lora.notes if alpha == 12.0 else "of another LoRA (of " in lora.notes[0]


def test_names_with_underscores_fit_the_modules_of_a_config(tmp_path):
    tensors = linear("lora_unet_transformer_blocks_0_ff_net_2", columns=96)
    assert only(beside(tmp_path, CONFIG | {"target_modules": ["ff.net.2"]}, None, tensors)).strength.alpha == 12.0
    assert beside(tmp_path, CONFIG | {"target_modules": ["to_q"]}, None, tensors).notes


# Initialisations that change the model

CHANGING = ["pissa", "pissa_niter_16", "corda", "olora", "OLoRA", "lora_ga"]


@pytest.mark.parametrize("init", CHANGING)
def test_a_lora_that_needs_changed_weights_is_refused(tmp_path, init):
    config = CONFIG | {"init_lora_weights": init}
    for alpha in (None, 3.0):
        with pytest.raises(ValueError, match="^x.safetensors: .*PEFT had changed.*path_initial_model_for_weight_conv"):
            beside(tmp_path, config, alpha)
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    with pytest.raises(ValueError, match=f"its metadata says init_lora_weights '{init.lower()}'"):
        read_lora(linear(NAME), header)
    with pytest.raises(ValueError, match="init_lora_weights 'loftq'.* Merge it into the model"):
        read_lora(linear(NAME), config=config | {"init_lora_weights": "loftq"})


def test_the_folder_of_such_a_lora_is_refused_even_if_it_stores_alpha(tmp_path):
    save_file(linear(NAME) | {f"{NAME}.alpha": torch.tensor(2.0)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights 'pissa'"):
        load_lora(tmp_path)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_change_nothing(init):
    assert only(read_lora(linear(NAME), config=CONFIG | {"init_lora_weights": init})).strength.alpha == 12.0


def test_many_alphas_are_summed_up():
    tensors = {}
    for i in range(6):
        name = f"lora_unet_blocks_{i}_attn_proj"
        tensors |= linear(name, rank=i + 1, style=("lora_down.weight", "lora_up.weight"))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    assert "and 3 other combinations" in read_lora(tensors).summary()
