import json
from pathlib import Path

import pytest
import torch

from pixart_nodes.checkpoints.keys import (
    BLOCK_KEYS,
    OUTER_KEYS,
    diffusers_to_native,
    native_to_diffusers,
    to_diffusers,
    to_native,
)
from pixart_nodes.model import VARIANTS, KVCompress, PixArtTransformer

GOLDENS = Path(__file__).parents[1] / "goldens"
BUFFERS = ("pos_embed", "y_embedder.y_embedding")


@pytest.mark.parametrize("rows", [BLOCK_KEYS, OUTER_KEYS])
def test_every_diffusers_name_maps_once_and_the_parts_of_a_native_tensor_are_complete(rows):
    theirs = [row[1] for row in rows]
    assert len(set(theirs)) == len(theirs)
    for ours in {row[0] for row in rows}:
        parts = [part for name, _, part in rows if name == ours]
        assert parts == [(i, len(parts)) for i in range(len(parts))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_models_have_the_number_of_tensors_that_diffusers_has(variant):
    state = PixArtTransformer(VARIANTS[variant], device="meta").state_dict()
    converted = to_diffusers(state)
    assert len(converted) == (611 if VARIANTS[variant].micro_condition else 603)
    back = to_native(converted)
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in state.items() if n not in BUFFERS}


def test_names_translate_to_and_fro_with_and_without_leaf():
    assert diffusers_to_native("transformer_blocks.7.attn1.to_v.bias") == ("blocks.7.attn.qkv.bias", (2, 3))
    assert diffusers_to_native("transformer_blocks.7.attn2.to_k") == ("blocks.7.cross_attn.kv_linear", (0, 2))
    assert native_to_diffusers("final_layer.scale_shift_table") == [("scale_shift_table", (0, 1))]
    assert native_to_diffusers("blocks.11.scale_shift_table") == [("transformer_blocks.11.scale_shift_table", (0, 1))]
    assert diffusers_to_native("down_blocks.0.attn1.to_q.weight") is None


@pytest.mark.parametrize("seed", range(6))
def test_any_model_survives_the_way_to_diffusers_and_back(tiny, make_model, seed):
    pick = torch.Generator().manual_seed(seed)
    roll = torch.randint(0, 2, (3,), generator=pick).bool().tolist()
    depth = int(torch.randint(1, 13, (1,), generator=pick))
    kv = KVCompress("conv", 2, tuple(range(depth // 2, depth))) if roll[0] else None
    state = make_model(tiny(depth=depth, kv_compress=kv, qk_norm=roll[1], micro_condition=roll[2]), seed).state_dict()
    back = to_native(to_diffusers(state))
    assert set(back) == set(state) - set(BUFFERS)
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_small_dtypes_are_joined_bit_by_bit(tiny, make_model, dtype):
    state = {name: t.to(dtype) for name, t in make_model(tiny()).state_dict().items()}
    back = to_native(to_diffusers(state))
    assert all(back[name].dtype == dtype for name in back)
    assert all(torch.equal(back[name].float(), state[name].float()) for name in back)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.", "_orig_mod."]
)
def test_prefixes_and_a_neighbouring_vae_are_stripped(tiny, make_model, prefix):
    state = make_model(tiny()).state_dict()
    neighbours = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    for layout in (state, to_diffusers(state)):
        native = to_native({**{prefix + name: t for name, t in layout.items()}, **neighbours})
        assert all(torch.equal(native[name], state[name]) for name in native)
        assert set(native) >= set(state) - set(BUFFERS)


def test_a_missing_third_of_qkv_is_named(tiny, make_model):
    converted = to_diffusers(make_model(tiny()).state_dict())
    del converted["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match="transformer_blocks.1.attn1.to_k.weight missing"):
        to_native(converted)


def test_thirds_of_different_shapes_are_not_joined(tiny, make_model):
    converted = to_diffusers(make_model(tiny()).state_dict())
    converted["transformer_blocks.0.attn1.to_q.bias"] = torch.zeros(23)
    converted["transformer_blocks.0.attn1.to_v.bias"] = torch.zeros(25)
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1.to_q.bias.*one shape"):
        to_native(converted)


def test_the_table_is_the_golden_key_map():
    golden = json.loads((GOLDENS / "key_map.json").read_text())
    for row in golden["map"]:
        part = tuple(row.get("chunk_dim0", (0, 1)))
        assert diffusers_to_native(row["diffusers"]) == (row["original"], part)
        assert (row["diffusers"], part) in native_to_diffusers(row["original"])
