"""LoRA files without ComfyUI: names, alpha, what is refused, and what is written."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixart_nodes.checkpoints import save_native
from pixart_nodes.checkpoints.keys import native_to_diffusers
from pixart_nodes.checkpoints.lora_export import LAYOUTS, save_lora
from pixart_nodes.checkpoints.lora_files import load_lora, read_lora
from pixart_nodes.checkpoints.lora_keys import PREFIXES, native_module, sort_by_module, split
from pixart_nodes.model import VARIANTS, PixArtTransformer

DOTTED = [prefix for prefix in PREFIXES if prefix.endswith(".")]


def linear(name, rank=4, rows=24, columns=24, seed=0, style=("lora_A.weight", "lora_B.weight")):
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    return {f"{name}.{style[0]}": down, f"{name}.{style[1]}": up}


def only(lora):
    (adapter,) = lora.adapters
    return adapter


def deltas(lora, width=24):
    """Native module -> the whole matrix that is added."""
    result = {}
    for a in lora.adapters:
        delta = a.tensors["up"].float().flatten(1) @ a.tensors["down"].float().flatten(1) * a.strength.scale
        i, n = a.target.part
        whole = result.setdefault(a.target.module, torch.zeros(delta.shape[0] * n, delta.shape[1]))
        whole[i * delta.shape[0] : (i + 1) * delta.shape[0]] += delta
    return result


# Names


@pytest.mark.parametrize("variant", ["alpha-1024", "sigma-1024"])
def test_every_module_of_a_model_is_found_in_every_spelling(variant):
    """With dots and underscores, native and diffusers' names, behind every prefix; and no two modules mix."""
    names = PixArtTransformer(VARIANTS[variant], device="meta").state_dict()
    modules = {re.sub(r"\.(weight|bias)$", "", name) for name in names} - {"y_embedder.y_embedding"}
    seen = {}
    for module in modules:
        for theirs, part in [(module, (0, 1)), *native_to_diffusers(module)]:
            flat = theirs.replace(".", "_")
            for spelling in [*(p + theirs for p in ["", *DOTTED]), *(f"{p}{flat}" for p in PREFIXES if p[-1] == "_")]:
                if theirs == "scale_shift_table" and part == (0, 1) and module != "final_layer.scale_shift_table":
                    continue
                (found, found_part), bare = native_module(spelling)
                assert (found, found_part) == (module, part), spelling
                assert bare in (theirs, flat)
                assert seen.setdefault(spelling, (module, part)) == (module, part)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("m.x.lora_A.weight", ("m.x", "down")),
        ("m.x.lora_B.default.weight", ("m.x", "up")),
        ("m.x.lora_A", ("m.x", "down")),
        ("m.x.lora_B.bias", ("m.x", "up_bias")),
        ("m.x.lora.up.weight", ("m.x", "up")),
        ("m.x.lora_linear_layer.down.weight", ("m.x", "down")),
        ("lora_unet_a_b.alpha", ("lora_unet_a_b", "alpha")),
        ("m.x.lora_magnitude_vector.default.weight", ("m.x", "row_magnitude")),
        ("m.x.lora_magnitude_vector", ("m.x", "row_magnitude")),
        ("m.x.dora_scale", ("m.x", "magnitude")),
        ("lycoris_x.lokr_w2_a", ("lycoris_x", "lokr_w2_a")),
        ("m.x.hada_w1_b.default", ("m.x", "hada_w1_b")),
        ("m.x.diff_b", ("m.x", "diff_b")),
        ("m.x.modules_to_save.default.weight", ("m.x", "weight")),
        ("m.x.base_layer.bias", ("m.x", "bias")),
        ("m.x.lora_A.bias", None),
        ("m.x.running_mean", None),
    ],
)
def test_a_name_is_a_module_and_a_leaf(name, expected):
    assert split(name) == expected


def test_slices_of_fused_modules_have_names_at_onetrainer():
    assert native_module("transformer.blocks.7.attn.qkv.2")[0] == ("blocks.7.attn.qkv", (2, 3))
    assert native_module("transformer.blocks.7.cross_attn.kv_linear.0")[0] == ("blocks.7.cross_attn.kv_linear", (0, 2))
    assert native_module("transformer.blocks.7.attn.qkv.3") is None
    assert native_module("transformer.blocks.7.mlp.fc1.0") is None


@pytest.mark.parametrize(
    "name",
    ["lora_te_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.encoder.block.0", "lora_unet_down_blocks_0_x",
     "transformer.single_transformer_blocks.0.proj_mlp", "transformer.transformer_blocks.0.attn.to_q", "", "unet.",
     "lora_unet_", "blocks.x.attn.qkv", "transformer_blocks.0"],
)  # fmt: skip
def test_names_of_others_are_not_taken_for_ours(name):
    assert native_module(name) is None


def test_two_adapters_in_one_file_are_refused():
    tensors = linear("base_model.model.transformer_blocks.0.attn1.to_q", style=("lora_A.a.weight", "lora_B.a.weight"))
    tensors |= linear("base_model.model.transformer_blocks.0.attn1.to_q", style=("lora_A.b.weight", "lora_B.b.weight"))
    with pytest.raises(ValueError, match="several LoRAs"):
        sort_by_module(tensors)


# Alpha: tensor, metadata, adapter_config.json, widget, PEFT's default

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


def test_onetrainer_signs_its_files_and_folds_alpha_into_them():
    lora = read_lora(linear(NAME), {"ot_branch": "master"}, None, 3.0)
    assert only(lora).strength.scale == 1.0 and "OneTrainer" in lora.summary()


def test_a_config_of_another_lora_in_the_same_folder_is_ignored():
    lora = read_lora(linear(NAME), None, {"r": 16, "lora_alpha": 64})
    assert only(lora).strength.alpha == 8.0
    assert "of another LoRA (rank 16 there, 4 here)" in lora.notes[0]


def test_many_alphas_are_summed_up():
    tensors = {}
    for i in range(6):
        name = f"lora_unet_blocks_{i}_attn_proj"
        tensors |= linear(name, rank=i + 1, style=("lora_down.weight", "lora_up.weight"))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    assert "and 3 other combinations" in read_lora(tensors).summary()


# What is refused

TO_Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "tensors, said",
    [
        (linear("lora_unet_down_blocks_0_attentions_0_proj_in"), "a Stable Diffusion LoRA: it does not fit PixArt"),
        (linear("transformer.single_transformer_blocks.0.attn.to_q"), "a LoRA for a Flux-like model"),
        (linear("diffusion_model.double_blocks.0.img_attn.qkv"), "a LoRA for a Flux-like model"),
        (linear(f"transformer.{TO_Q.replace('attn1', 'attn')}"), "a LoRA for Stable Diffusion 3"),
        (linear("lora_te_encoder_block_0"), "a LoRA for a text encoder only"),
        (linear("model.layers.3.self_attn.q_proj"), "a LoRA for another model"),
        ({"controlnet.0.before_proj.weight": torch.zeros(2, 2)}, "no LoRA but a PixArt ControlNet"),
        ({"decoder.conv_in.weight": torch.zeros(2, 2)}, "no LoRA but a VAE"),
        ({"encoder.block.0.layer.0.x": torch.zeros(2)}, "no LoRA but a T5 text encoder"),
        ({"down_blocks.0.x": torch.zeros(2)}, "no LoRA but a Stable Diffusion or SDXL model"),
        ({"something": torch.zeros(2)}, "no LoRA: it holds something"),
    ],
)
def test_other_files_are_named(tensors, said):
    with pytest.raises(ValueError, match=said):
        read_lora(tensors)


def test_a_base_checkpoint_is_named(tiny, make_model, tmp_path):
    params = tiny()
    save_native(make_model(params), params, tmp_path / "base.safetensors", "sigma", "test")
    with pytest.raises(ValueError, match="base.safetensors: this is no LoRA but a PixArt transformer: load it with"):
        load_lora(tmp_path / "base.safetensors")


def test_half_a_lora_is_named():
    tensors = linear(TO_Q)
    del tensors[f"{TO_Q}.lora_B.weight"]
    with pytest.raises(ValueError, match=f"{TO_Q} is incomplete: up missing"):
        read_lora(tensors)
    with pytest.raises(ValueError, match="incomplete: lokr_w2 missing"):
        read_lora({f"{TO_Q}.lokr_w1": torch.ones(2, 2), f"{TO_Q}.lokr_w2_a": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="incomplete: weights missing"):
        read_lora(linear("proj_out") | {f"{TO_Q}.alpha": torch.tensor(1.0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_that_holds_no_numbers_is_refused(value):
    tensors = linear(TO_Q)
    tensors[f"{TO_Q}.lora_A.weight"][1, 2] = value
    with pytest.raises(ValueError, match="lora_A.weight holds NaN or infinity"):
        read_lora(tensors)


def test_other_adapters_of_peft_are_named():
    with pytest.raises(ValueError, match="adapter_config.json says ADALORA; PixArt Load LoRA reads LORA, LOHA, LOKR"):
        read_lora(linear(TO_Q), config={"peft_type": "ADALORA", "lora_alpha": 4})


def test_damaged_metadata_and_config_are_named(tmp_path):
    with pytest.raises(ValueError, match="metadata about the LoRA is no JSON"):
        read_lora(linear(TO_Q), {"lora_adapter_metadata": "{"})
    save_file(linear(TO_Q), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        load_lora(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no PEFT folder: it has no adapter_model.safetensors"):
        load_lora(tmp_path)


def test_unmatched_names_are_kept_for_the_report():
    extra = {"lora_te_x.lora_up.weight": torch.zeros(1), "bundle_emb.x": torch.zeros(1)}
    assert set(read_lora(linear(TO_Q) | extra).unmatched) == set(extra)


# What is written


def random_lora(seed, native, dora=False):
    """Random ranks and alphas on fused modules, or on some of their slices, and on a convolution."""
    g = torch.Generator().manual_seed(seed)
    modules = {"blocks.0.attn.qkv": (72, 24), "blocks.1.cross_attn.kv_linear": (48, 24), "blocks.1.mlp.fc1": (96, 24),
               "final_layer.linear": (32, 24)}  # fmt: skip
    tensors, prefix = {}, "diffusion_model." if native else "transformer."
    for module, (rows, columns) in modules.items():
        names = [(module, (0, 1))] if native else native_to_diffusers(module)
        for name, (_, n) in names if native or dora else names[-2:]:
            r = int(torch.randint(1, 6, (), generator=g))
            tensors |= linear(prefix + name, r, rows // n, columns, seed + r)
            tensors[f"{prefix}{name}.alpha"] = torch.rand((), generator=g) * 9
            if dora:
                tensors[f"{prefix}{name}.dora_scale"] = torch.rand(rows // n, 1, generator=g)
    conv = prefix + ("x_embedder.proj" if native else "pos_embed.proj")
    tensors[f"{conv}.lora_A.weight"] = torch.randn(3, 4, 2, 2, generator=g)
    tensors[f"{conv}.lora_B.weight"] = torch.randn(24, 3, 1, 1, generator=g)
    if dora:
        tensors[f"{conv}.dora_scale"] = torch.rand(24, 1, 1, 1, generator=g)
    return read_lora(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_means_the_same(tmp_path, layout, native, seed):
    lora = random_lora(seed, native)
    save_lora(lora, tmp_path / "out", layout)
    back = load_lora(tmp_path / "out")
    assert not back.unmatched and not back.notes
    expected, found = deltas(lora), deltas(back)
    assert expected.keys() == found.keys()
    for module in expected:
        assert (expected[module] - found[module]).abs().max() < 1e-5 * expected[module].abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("native", [True, False])
def test_dora_magnitudes_survive(tmp_path, layout, native):
    def magnitudes(lora):
        by_module = {}
        for a in sorted(lora.adapters, key=lambda a: a.target):
            by_module.setdefault(a.target.module, []).append(a.tensors["magnitude"].flatten())
        return {module: torch.cat(parts) for module, parts in by_module.items()}

    lora = random_lora(1, native, dora=True)
    save_lora(lora, tmp_path / "out", layout)
    expected, found = magnitudes(lora), magnitudes(load_lora(tmp_path / "out"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[m], found[m]) for m in expected)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "peft"])
def test_alpha_and_metadata_are_in_the_file(tmp_path, layout):
    save_lora(random_lora(0, True), tmp_path / "x.safetensors", layout, {"pixart.family": "sigma"}, torch.float16)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.metadata()["pixart.family"] == "sigma"
        assert all(file.get_tensor(name).dtype == torch.float16 for name in names if "alpha" not in name)
    downs = [name for name in names if "lora_down" in name or "lora_A" in name]
    assert downs and all(re.sub(r"lora_(down|A)\.weight", "alpha", name) in names for name in downs)
    back = load_lora(tmp_path / "x.safetensors")
    assert back.metadata["pixart.family"] == "sigma"
    assert {a.strength.alpha for a in back.adapters} >= {a.strength.alpha for a in random_lora(0, True).adapters[:1]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_is_all_or_nothing(tmp_path, layout):
    path = tmp_path / "x.safetensors"
    (path / "adapter_config.json" / "in the way").mkdir(parents=True)  # a folder where a file is to be
    with pytest.raises(OSError, match="could not be written"):
        save_lora(random_lora(0, True), path, layout)
    assert os.listdir(tmp_path) == ["x.safetensors"] and os.listdir(path) == ["adapter_config.json"]


def test_what_a_layout_cannot_express_is_refused(tmp_path):
    def refused(tensors, layout, said):
        with pytest.raises(ValueError, match=said):
            save_lora(read_lora(tensors), tmp_path / "x", layout)
        assert not (tmp_path / "x").exists()

    by_column = linear("diffusion_model.blocks.0.attn.proj") | {
        "diffusion_model.blocks.0.attn.proj.dora_scale": torch.ones(1, 24)
    }
    refused(by_column, "comfyui", "magnitudes by column")
    some = linear(TO_Q) | {f"{TO_Q}.dora_scale": torch.ones(24, 1)}
    refused(some, "kohya", "magnitudes for 1 of its 3 slices")
    refused(linear("proj_out") | some, "peft", "PEFT has one switch")
    both = linear(TO_Q) | linear("blocks.0.attn.qkv", rows=72)
    refused(both, "comfyui", "as a whole and one of a part")
    refused({f"{TO_Q}.lokr_w1": torch.ones(2, 2), f"{TO_Q}.lokr_w2": torch.ones(12, 12)}, "peft", "Only plain LoRA")
    refused(linear(TO_Q), "unknown", "no LoRA layout 'unknown'")
    refused(linear(TO_Q) | linear("blocks.0.attn.qkvz"), "kohya", "qkvz.lora_A.weight, .*would be lost")
