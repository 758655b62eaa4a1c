"""What a T5 file is, by its tensors."""

import pytest
import torch

from pixart_nodes.text import t5

CONFIG = {"relative_attention_max_distance": 32, "layer_norm_epsilon": 1e-6}


@pytest.mark.parametrize(
    "changes", [{}, {"gated": False}, {"num_heads": 3, "d_kv": 8, "num_buckets": 32, "num_layers": 5}]
)
def test_sizes_are_read_from_the_shapes(make_encoder, changes):
    weights, params = make_encoder(**changes)
    assert t5.params_from(weights, CONFIG, "file") == params


def test_the_sizes_of_t5_xxl_are_read_without_its_tensors():
    xxl = t5.T5Params(32128, 4096, 24, 64, 64, 10240, True, 32, 128, 1e-6, 1, 0)
    weights = {name: torch.empty(shape, device="meta") for name, shape in t5.expected_shapes(xxl).items()}
    assert t5.params_from(weights, None, "t5xxl_fp16.safetensors") == xxl
    assert len(weights) == 219
    assert 4.7e9 < xxl.num_parameters < 4.8e9


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder."])
def test_a_prefix_and_other_models_in_the_file_are_ignored(make_encoder, prefix):
    weights, params = make_encoder()
    file = {prefix + name: value for name, value in weights.items()}
    file["model.diffusion_model.x" if prefix else "decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(1)
    found = t5.encoder_weights(file, t5.encoder_prefix(file), "file")
    assert set(found) == set(weights)
    assert t5.params_from(found, CONFIG, "file") == params


def test_either_name_of_the_tied_embedding_will_do(make_encoder):
    weights, _ = make_encoder()
    table = weights.pop("shared.weight")
    found = t5.encoder_weights(weights | {"encoder.embed_tokens.weight": table}, "", "file")
    assert found["shared.weight"] is table and "encoder.embed_tokens.weight" not in found


def test_umt5_is_refused_by_name(make_encoder):
    weights, _ = make_encoder()
    weights[t5.RELATIVE_BIAS.format(1)] = weights[t5.RELATIVE_BIAS.format(0)]
    with pytest.raises(ValueError, match="umt5_xxl.*UMT5.*T5 v1.1"):
        t5.encoder_weights(weights, "", "umt5_xxl")
    with pytest.raises(ValueError, match="umt5"):
        t5.params_from(make_encoder()[0], {"model_type": "umt5"}, "folder")


@pytest.mark.parametrize("name", ["shared.weight", "encoder.block.1.layer.1.DenseReluDense.wo.weight",
                                  "encoder.block.0.layer.0.SelfAttention.q.weight", t5.RELATIVE_BIAS.format(0)])
def test_a_missing_tensor_is_named(make_encoder, name):
    weights, _ = make_encoder()
    del weights[name]
    with pytest.raises(ValueError, match=rf"file is incomplete.*{name}.*Download it again"):
        t5.params_from(weights, None, "file")


def test_missing_layers_are_noticed_by_the_config(make_encoder):
    weights, _ = make_encoder(num_layers=2)
    with pytest.raises(ValueError, match="num_layers = 24, but the weights have 2"):
        t5.params_from(weights, {"num_layers": 24}, "folder")


def test_a_wrong_shape_is_named(make_encoder):
    weights, _ = make_encoder()
    weights["encoder.block.1.layer.0.SelfAttention.k.weight"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"block.1.layer.0.SelfAttention.k.weight has the shape \(3, 5\)"):
        t5.params_from(weights, None, "file")


def test_a_foreign_tensor_among_the_encoders_is_named(make_encoder):
    weights, _ = make_encoder()
    weights["encoder.block.0.adapter.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="adapter"):
        t5.params_from(weights, None, "file")


def test_fp8_keeps_small_weights_that_a_plain_cast_would_lose(make_encoder):
    weights, params = make_encoder()
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    small = weights[name] * 1e-4
    weights[name] = small.clone()
    cast = t5.cast(weights, torch.float8_e4m3fn, "file")
    restored = cast[name].float() * cast[name.replace("weight", "scale_weight")]
    assert small.to(torch.float8_e4m3fn).float().count_nonzero() == 0
    assert (restored - small).abs().max() < 0.07 * small.abs().max()
    assert cast["shared.weight"].dtype == torch.bfloat16
    assert t5.params_from(cast, CONFIG, "file") == params


@pytest.mark.parametrize("layout", ["scale_weight", "weight_scale"])
def test_scaled_fp8_of_both_layouts_can_become_bf16(make_encoder, layout):
    weights, _ = make_encoder()
    exact = {name: value.clone() for name, value in weights.items()}
    file = t5.cast(weights, torch.float8_e4m3fn, "file")
    file = {name.replace("scale_weight", layout): value for name, value in file.items()}
    file |= {"scaled_fp8": torch.zeros(0), "encoder.block.0.layer.0.SelfAttention.q.scale_input": torch.ones(())}
    cast = t5.cast(t5.encoder_weights(file, "", "file"), torch.bfloat16, "file")
    assert set(cast) == set(exact)
    assert all(value.dtype == torch.bfloat16 for value in cast.values())
    assert all((cast[name] - exact[name]).abs().max() < 0.07 * exact[name].abs().max() for name in exact)


def test_other_quantisation_is_refused_with_the_way_out(make_encoder):
    weights, _ = make_encoder()
    weights["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(8, 8, dtype=torch.uint8)
    weights["encoder.block.0.layer.0.SelfAttention.q.weight_scale"] = torch.zeros(8, 1)
    with pytest.raises(ValueError, match="CLIPLoader"):
        t5.encoder_weights(weights, "", "t5_nvfp4")


def test_a_weight_beyond_fp16_is_an_error_that_names_the_choice(make_encoder):
    weights, _ = make_encoder()
    weights["shared.weight"] = weights["shared.weight"] * 1e6
    with pytest.raises(ValueError, match="shared.weight.*bf16"):
        t5.cast(weights, torch.float16, "file")
