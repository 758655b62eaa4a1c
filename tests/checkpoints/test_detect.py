import dataclasses
import functools

import pytest
import torch

from pixart_nodes.checkpoints import detect
from pixart_nodes.checkpoints.keys import to_diffusers
from pixart_nodes.model import VARIANTS, KVCompress, PixArtTransformer
from pixart_nodes.model.position import position_table

HEADS = {"num_heads": 2}


@functools.cache
def table(grid, interpolation):
    return position_table(grid, grid, 1152, grid, interpolation)


def xl(variant, layout="native", **changes):
    """A full-size model without memory: meta tensors, but a real position table as in the published `.pth`."""
    params = dataclasses.replace(VARIANTS[variant], **changes)
    state = PixArtTransformer(params, device="meta").state_dict()
    if layout == "diffusers":
        return to_diffusers(state)
    return {"pos_embed": table(params.base_size, params.pe_interpolation), **state}


def diffusers_config(variant, **changes):
    params = VARIANTS[variant]
    return {
        "_class_name": "PixArtTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72,
        "num_layers": 28, "caption_channels": 4096, "in_channels": 4, "patch_size": 2,
        "sample_size": params.base_size * 2, "interpolation_scale": params.pe_interpolation, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_original_files_are_detected_without_help(variant):
    found = detect(xl(variant))
    assert found.params == VARIANTS[variant]
    assert found.family == variant.split("-")[0]
    assert found.latent_scale == (0.18215 if found.family == "alpha" else 0.13025)
    assert found.layout == "native" and found.notes == ()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_header_alone_is_enough(variant):
    state = {name: tensor.to("meta") for name, tensor in xl(variant).items()}
    assert detect(state).params == VARIANTS[variant]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_are_read_in_half_precision(variant, dtype):
    state = xl(variant)
    state["pos_embed"] = state["pos_embed"].to(dtype)
    assert detect(state).params == VARIANTS[variant]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "alpha-1024"])
def test_diffusers_files_are_ambiguous_until_family_and_size_are_chosen(variant):
    state = xl(variant, "diffusers")
    with pytest.raises(ValueError, match='PixArt-alpha 256.*PixArt-Sigma 2048.*family.*base_size'):
        detect(state)
    family, size = variant.replace("2k", "2048").split("-")
    found = detect(state, family=family, base_size=int(size))
    assert found.params == VARIANTS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_config_and_the_family_decide(variant):
    state, config = xl(variant, "diffusers"), diffusers_config(variant)
    assert detect(state, config=config, family=variant.split("-")[0]).params == VARIANTS[variant]


def test_micro_conditioning_is_only_known_from_alpha_1024():
    found = detect(xl("alpha-1024", "diffusers"))
    assert found.params == VARIANTS["alpha-1024"] and found.family == "alpha" and found.notes


def test_1024_px_without_micro_conditioning_is_sigma():
    config = diffusers_config("sigma-1024", interpolation_scale=None)
    assert detect(xl("sigma-1024", "diffusers"), config=config).params == VARIANTS["sigma-1024"]


def test_a_config_of_512_px_leaves_the_family_open():
    with pytest.raises(ValueError, match="may be PixArt-alpha 512 or PixArt-Sigma 512.*Choose family"):
        detect(xl("alpha-512", "diffusers"), config=diffusers_config("alpha-512"))


def test_42_blocks_are_the_900m_model():
    found = detect(xl("sigma-1024", "diffusers", depth=42))
    assert found.params == dataclasses.replace(VARIANTS["sigma-1024"], depth=42) and found.family == "sigma"


def test_alpha_diffusers_files_of_2023_are_told_by_their_null_caption():
    state = xl("alpha-512", "diffusers") | {"caption_projection.y_embedding": torch.empty(120, 4096, device="meta")}
    found = detect(state, config=diffusers_config("alpha-512"))
    assert found.family == "alpha" and found.params == VARIANTS["alpha-512"]


def test_the_position_table_that_onetrainer_writes_is_not_believed():
    state = xl("sigma-1024")
    state["pos_embed"] = table(64, 1.0)
    del state["y_embedder.y_embedding"]
    with pytest.raises(ValueError, match="Choose"):
        detect(state)
    found = detect(state, family="sigma", base_size=1024)
    assert found.params == VARIANTS["sigma-1024"]
    assert any("OneTrainer" in note for note in found.notes)


def test_a_position_table_of_other_values_is_ignored():
    state = xl("sigma-512") | {"pos_embed": torch.randn(1, 1024, 1152)}
    with pytest.raises(ValueError, match="base_size"):
        detect(state)
    assert any("ignored" in note for note in detect(state, base_size=512).notes)


def test_an_unpublished_interpolation_is_measured(tiny, original):
    assert detect(original(tiny(pe_interpolation=1.5)), config=HEADS).params.pe_interpolation == 1.5


@pytest.mark.parametrize("factor", [2, 4])
def test_kv_compression_is_read_from_its_convolutions(tiny, original, factor):
    kv = KVCompress("conv", factor, (1, 3))
    found = detect(original(tiny(depth=4, kv_compress=kv, qk_norm=True)), config=HEADS)
    assert found.params.kv_compress == kv and found.params.qk_norm


def test_declared_kv_sampling_overrules_unused_convolutions(tiny, original):
    state = original(tiny(depth=4, kv_compress=KVCompress("conv", 2, (1, 3))))
    uniform = {"sampling": "uniform", "scale_factor": 2, "kv_compress_layer": [1, 3]}
    found = detect(state, config={**HEADS, "kv_compress_config": uniform})
    assert found.params.kv_compress == KVCompress("uniform", 2, (1, 3))
    assert detect(state, config={**HEADS, "kv_compress_config": None}).params.kv_compress is None


@pytest.mark.parametrize(
    "changes",
    [{"learned_variance": False}, {"mlp_ratio": 3.5}, {"depth": 11}, {"in_channels": 16}, {"caption_channels": 7}],
)
def test_unusual_sizes_are_measured(tiny, original, changes):
    params = tiny(**changes)
    assert detect(original(params), config=HEADS).params == params


def test_the_number_of_heads_must_be_supplied_where_72_does_not_divide(tiny, original):
    with pytest.raises(ValueError, match="attention heads .* put the model's config.json"):
        detect(original(tiny()))
    with pytest.raises(ValueError, match="do not divide"):
        detect(original(tiny()), config={"num_heads": 7})


def test_the_original_configuration_is_understood(tiny, original):
    state = original(tiny())
    del state["pos_embed"], state["y_embedder.y_embedding"]
    config = {
        "family": "sigma", "hidden_size": 24, "depth": 2, "num_heads": 2, "input_size": 64, "lewei_scale": 2,
        "model_max_length": 77, "kv_compress_config": None,
    }  # fmt: skip
    assert detect(state, config=config).params == tiny(pe_interpolation=2.0, caption_tokens=77)


def test_a_configuration_of_another_model_is_refused(tiny, original):
    with pytest.raises(ValueError, match="depth 28, but the tensors have 2"):
        detect(original(tiny()), config={**HEADS, "depth": 28})


def test_the_users_choice_overrules_the_file_and_is_noted():
    found = detect(xl("alpha-512"), family="sigma", base_size=1024)
    assert found.family == "sigma" and found.latent_scale == 0.13025
    assert (found.params.base_size, found.params.pe_interpolation) == (64, 2.0)
    assert any("chosen" in note for note in found.notes)


@pytest.mark.parametrize("choice", [{"family": "flux"}, {"base_size": 0}, {"base_size": 1000}])
def test_impossible_choices_are_refused(choice):
    with pytest.raises(ValueError, match="alpha, sigma|256, 512, 1024"):
        detect(xl("alpha-512"), **choice)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_each_missing_tensor_is_named(tiny, original, layout):
    whole = original(tiny(depth=1, micro_condition=True))
    whole = to_diffusers(whole) if layout == "diffusers" else whole
    for name in whole:
        if name in ("pos_embed", "y_embedder.y_embedding"):
            continue
        state = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(ValueError, match=f"Incomplete.*{name}"):
            detect(state, config=HEADS, family="alpha")


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_each_wrong_shape_is_named(tiny, original, layout):
    whole = original(tiny(depth=1, micro_condition=True, qk_norm=True))
    whole = to_diffusers(whole) if layout == "diffusers" else whole
    for name, tensor in whole.items():
        if name in ("pos_embed", "y_embedder.y_embedding"):
            continue
        longer = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        if name == "caption_projection.linear_1.weight":  # nothing else in a diffusers file tells the caption's width
            longer = tensor[None]
        for wrong in (longer, torch.zeros(())):
            with pytest.raises(ValueError, match="shape") as error:
                detect({**whole, name: wrong}, config=HEADS, family="alpha")
            module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
            assert module in str(error.value), (name, str(error.value))


def test_a_hole_in_the_blocks_is_incomplete(tiny, original):
    state = {name: t for name, t in original(tiny(depth=5)).items() if not name.startswith("blocks.2.")}
    with pytest.raises(ValueError, match=r"Incomplete.*blocks\.2\..*more"):
        detect(state, config=HEADS)


def test_unknown_tensors_are_reported(tiny, original):
    state = original(tiny()) | {"blocks.0.attn.gate.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"also holds blocks\.0\.attn\.gate\.weight"):
        detect(state, config=HEADS)


FOREIGN = {
    "a PixArt ControlNet": [
        "base_model.t_block.1.weight", "base_model.x_embedder.proj.weight", "controlnet.0.copied_block.attn.qkv.weight",
        "controlnet.0.before_proj.weight",
    ],
    "a PixArt ControlNet (diffusers)": ["controlnet_blocks.0.transformer_block.attn1.to_q.weight"],
    "a LoRA": ["base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "a LoRA (unet)": ["unet.base_model.model.transformer_blocks.0.attn1.to_q.lora_B.weight"],
    "a LoRA (OneTrainer)": ["lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight"],
    "a LoRA (ComfyUI)": ["diffusion_model.blocks.0.attn.qkv.lora_up.weight"],
    "a LoRA (LyCORIS)": ["lycoris_transformer_blocks_0_attn1_to_q.lokr_w1"],
    "a Stable Diffusion LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a HED edge detector": ["norm", "block1.convs.0.weight"],
    "a T5 text encoder": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
    "a VAE (tiny)": ["taesd_decoder.1.weight", "vae_scale"],
    "a CLIP model": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "a Stable Diffusion or SDXL model": [
        "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "a Stable Diffusion ControlNet": ["control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"],
    "a Flux-like transformer": ["double_blocks.0.img_attn.qkv.weight"],
    "a Stable Diffusion 3 transformer": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "an LTX-Video transformer": [
        "adaln_single.linear.weight", "caption_projection.linear_1.weight", "patchify_proj.weight",
    ],
    "a class-conditional DiT": ["y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"],
    "a transformer of another kind": ["transformer_blocks.0.attn1.to_q.weight"],
    "a file with tensors named": ["foo", "bar"],
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_called_what_they_are(what):
    with pytest.raises(ValueError) as error:
        detect({name: torch.zeros(1) for name in FOREIGN[what]})
    assert f"not a PixArt transformer but {what.split(' (')[0]}" in str(error.value)


def test_no_tensors_at_all_are_refused():
    with pytest.raises(ValueError, match="no tensors"):
        detect({})
