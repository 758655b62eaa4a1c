"""LoRA files without ComfyUI: names, and what is refused."""

import re

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints import save_native
from pixart_nodes.checkpoints.keys import native_to_diffusers
from pixart_nodes.checkpoints.lora_files import load_lora, read_lora
from pixart_nodes.checkpoints.lora_keys import PREFIXES, native_module, sort_by_module, split
from pixart_nodes.model import VARIANTS, PixArtTransformer

from .lora_tensors import TO_Q, linear

DOTTED = [prefix for prefix in PREFIXES if prefix.endswith(".")]


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
        ("m.to_q_lora.up.weight", ("m.to_q", "up")),
        ("m.processor.to_q_lora.down.weight", ("m.to_q", "down")),
        ("m.processor.to_out_lora.down.weight", ("m.to_out.0", "down")),
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
        ("m.to_q_lora.weight", ("m.to_q_lora", "weight")),
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


# What is refused


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


@pytest.mark.parametrize(
    "leaves, kind",
    [(["oft_blocks", "alpha"], "OFT"), (["oft_diag"], "OFT"), (["oft_blocks", "rescale", "alpha"], "OFT"),
     (["oft_R.weight"], "OFT"), (["boft_R", "boft_s"], "OFT"),
     (["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"], "GLoRA"),
     (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "GLoRA"),
     (["lora_A", "lora_B", "lora_E"], "AdaLoRA"), (["ia3_l"], "IA3"), (["vera_lambda_b", "vera_lambda_d"], "VeRA")],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["lora_unet_blocks_0_attn_qkv.", f"base_model.model.{TO_Q}."])
def test_other_kinds_of_adapters_are_named(leaves, kind, prefix):
    tensors = {f"{prefix}{leaf}": torch.ones(() if leaf == "alpha" else (2, 2)) for leaf in leaves}
    with pytest.raises(ValueError, match=f"this is {kind} .*reads LoRA, DoRA, LoHa and LoKr. Merge it into the model"):
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
