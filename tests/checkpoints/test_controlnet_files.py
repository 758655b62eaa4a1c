"""ControlNet files in every layout, and what is said about files that are something else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import files, load_controlnet, load_weights, save_controlnet, save_diffusers_controlnet
from pixart_nodes.checkpoints.controlnet import base_of, load_control_weights, misfit
from pixart_nodes.checkpoints.keys import control_to_diffusers, control_to_native, native_to_diffusers
from pixart_nodes.model import ControlNetTransformer, ControlParams, KVCompress

CONFIG = {"num_heads": 2}


@pytest.fixture
def make_net():
    def make(params, num_blocks=1, seed=3):
        generator = torch.Generator().manual_seed(seed)
        net = ControlNetTransformer(ControlParams.of(params, num_blocks))
        net.load_state_dict({k: torch.randn(t.shape, generator=generator) * 0.1 for k, t in net.state_dict().items()})
        return net.eval()

    return make


@pytest.fixture
def pth(make_net, original):
    """The state dict of the original's file: base and copies."""

    def make(params, num_blocks=1):
        base = {f"base_model.{name}": tensor for name, tensor in original(params).items()}
        return base | make_net(params, num_blocks).state_dict()

    return make


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_names_of_the_two_layouts():
    """Written down from the published adapter and the original's classes."""
    pairs = {
        "controlnet.0.before_proj.weight": ["controlnet_blocks.0.before_proj.weight"],
        "controlnet.12.after_proj.bias": ["controlnet_blocks.12.after_proj.bias"],
        "controlnet.3.copied_block.scale_shift_table": ["controlnet_blocks.3.transformer_block.scale_shift_table"],
        "controlnet.3.copied_block.attn.qkv.bias": [
            f"controlnet_blocks.3.transformer_block.attn1.to_{x}.bias" for x in "qkv"
        ],
        "controlnet.3.copied_block.attn.proj.weight": ["controlnet_blocks.3.transformer_block.attn1.to_out.0.weight"],
        "controlnet.3.copied_block.cross_attn.q_linear.weight": [
            "controlnet_blocks.3.transformer_block.attn2.to_q.weight"
        ],
        "controlnet.3.copied_block.cross_attn.kv_linear.weight": [
            f"controlnet_blocks.3.transformer_block.attn2.to_{x}.weight" for x in "kv"
        ],
        "controlnet.3.copied_block.cross_attn.proj.bias": [
            "controlnet_blocks.3.transformer_block.attn2.to_out.0.bias"
        ],
        "controlnet.3.copied_block.mlp.fc1.weight": ["controlnet_blocks.3.transformer_block.ff.net.0.proj.weight"],
        "controlnet.3.copied_block.mlp.fc2.bias": ["controlnet_blocks.3.transformer_block.ff.net.2.bias"],
    }
    for native, theirs in pairs.items():
        assert [name for name, _ in native_to_diffusers(native)] == theirs
    assert native_to_diffusers("controlnet.3.copied_block.final_layer.linear.weight") == []
    assert native_to_diffusers("controlnet.3.something.weight") == []


def test_every_layout_and_prefix_gives_the_same_tensors(tiny, make_net):
    state = make_net(tiny(depth=4), 3).state_dict()
    spelled = control_to_diffusers(state)
    assert len(spelled) > len(state)
    for prefix in ("", "module.", "model.", "controlnet.wrapped."):
        for layout in (state, spelled):
            assert same(control_to_native({prefix + name: tensor for name, tensor in layout.items()}), state)


@pytest.mark.parametrize("changes, count", [
    ({}, 1), ({"depth": 6}, 5), ({"depth": 3, "qk_norm": True}, 2), ({"mlp_ratio": 2.5}, 1),
    ({"depth": 4, "kv_compress": KVCompress("conv", 2, (1, 3))}, 3),
    ({"depth": 3, "kv_compress": KVCompress("uniform", 2, (1,)), "micro_condition": True}, 2),
])  # fmt: skip
def test_our_own_file_gives_everything_back(tmp_path, tiny, make_net, changes, count):
    params = tiny(**changes)
    net = make_net(params, count)
    save_controlnet(net, tmp_path / "c.safetensors", params, "sigma", "a test")
    loaded, found = load_controlnet(tmp_path / "c.safetensors")
    assert found.params == ControlParams.of(params, count) and found.base == params and found.family == "sigma"
    assert found.layout == "native" and found.notes == () and misfit(found, params, "sigma") == ""
    assert same(loaded.state_dict(), net.state_dict())
    metadata = files.read_header(tmp_path / "c.safetensors").metadata
    assert metadata["modelspec.architecture"] == "pixart-sigma/controlnet" and metadata["pixart.origin"] == "a test"


def test_a_diffusers_folder_gives_everything_back(tmp_path, tiny, make_net):
    params = tiny(depth=4)
    net = make_net(params, 2)
    save_diffusers_controlnet(net, tmp_path / "c", params, "alpha", "a test", dtype=torch.float16)
    config = json.loads((tmp_path / "c" / "config.json").read_text(encoding="utf-8"))
    assert config == {"_class_name": "PixArtControlNetAdapterModel", "num_layers": 2}
    for path in (tmp_path / "c", tmp_path / "c" / "diffusion_pytorch_model.safetensors"):
        loaded, found = load_controlnet(path, dtype=torch.float32)
        assert (found.params.num_blocks, found.layout, found.family, found.base) == (2, "diffusers", "alpha", params)
        assert same(loaded.state_dict(), {name: t.half().float() for name, t in net.state_dict().items()})
    assert set(load_file(path)) == set(control_to_diffusers(net.state_dict()))


def test_what_diffusers_cannot_express_is_not_saved_for_it(tmp_path, tiny, make_net):
    params = tiny(qk_norm=True)
    with pytest.raises(ValueError, match="save this one in the native layout"):
        save_diffusers_controlnet(make_net(params), tmp_path, params, "sigma", "a test")


def test_a_net_of_another_base_is_not_saved(tmp_path, tiny, make_net):
    with pytest.raises(ValueError, match="Wrong shape"):
        save_controlnet(make_net(tiny()), tmp_path / "c", tiny(hidden_size=48), "sigma", "a test")
    with pytest.raises(ValueError, match="for 2 blocks has 1 to 1 copies of them, not 2"):
        save_controlnet(make_net(tiny(depth=3), 2), tmp_path / "c", tiny(), "sigma", "a test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("micro", [False, True])
def test_the_originals_file_tells_its_base_and_hands_it_out(tmp_path, tiny, make_net, pth, original, micro):
    params = tiny(depth=4, caption_tokens=120, micro_condition=micro)
    torch.save({"state_dict": pth(params, 3)}, tmp_path / "PixArt-XL-2-1024-ControlNet.pth")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 24, "caption_channels": 16}))
    net, found = load_controlnet(tmp_path / "PixArt-XL-2-1024-ControlNet.pth")
    assert same(net.state_dict(), make_net(params, 3).state_dict())
    assert (found.base, found.family, found.params) == (params, "alpha", ControlParams.of(params, 3))
    weights, detection = load_weights(tmp_path / "PixArt-XL-2-1024-ControlNet.pth", beside_control=True)
    expected = original(params)
    del expected["pos_embed"]
    assert same(weights, expected) and detection.params == params


def test_a_full_size_file_needs_no_configuration(tiny):
    params = tiny(hidden_size=1152, depth=28)
    with torch.device("meta"):
        state = ControlNetTransformer(ControlParams.of(replace(params, num_heads=16), 13)).state_dict()
    from pixart_nodes.checkpoints.controlnet import control_weights

    for layout in (state, control_to_diffusers(state)):
        native, found = control_weights(layout)
        assert found.params == ControlParams(13, 1152, 16, 4.0, False, None)
        assert (found.base, found.family) == (None, None) and set(native) == set(state)


def test_a_damaged_base_does_not_keep_its_control_half_from_loading(tmp_path, tiny, pth):
    weights = pth(tiny(depth=3), 2)
    del weights["base_model.blocks.1.attn.qkv.weight"]
    torch.save(weights, tmp_path / "c.pth")
    _, found = load_control_weights(tmp_path / "c.pth", CONFIG)
    assert found.base is None and "base model in the same file cannot be used" in found.notes[0]
    with pytest.raises(ValueError, match="c.pth: Incomplete PixArt transformer"):
        load_weights(tmp_path / "c.pth", beside_control=True, config=CONFIG)


def test_a_configuration_of_another_model_beside_it_is_ignored(tmp_path, tiny, make_net):
    params = tiny(hidden_size=144)  # 72 for each head, as published
    save_file(make_net(params).state_dict(), tmp_path / "c.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48, "num_heads": 4, "caption_channels": 16}))
    _, found = load_control_weights(tmp_path / "c.safetensors")
    assert found.params.num_heads == 2 and "config.json beside the file is of another model" in found.notes[0]


def test_a_file_without_a_base_hands_none_out(tiny, make_net):
    with pytest.raises(ValueError, match="no base model in this ControlNet's file: take one from PixArtLoadModel"):
        base_of(make_net(tiny()).state_dict())


def remove(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize("change, message", [
    (remove("controlnet.1.after_proj.bias"), "Incomplete PixArt ControlNet: controlnet.1.after_proj.bias missing"),
    (remove("controlnet.0.before_proj.weight"), "Incomplete .* controlnet.0.before_proj.weight missing"),
    (remove("controlnet.0.copied_block.mlp.fc1.weight"), "Incomplete .* controlnet.0.copied_block.mlp.fc1.weight is"),
    (lambda w: w.update({"controlnet.1.copied_block.attn.rel_pos": torch.ones(2)}), "also holds controlnet.1.copied_b"),
    (lambda w: w.update({"controlnet.7.after_proj.bias": torch.ones(24)}), "it has the blocks 0, 1, 2, 7 only"),
    (lambda w: w.update({"controlnet.1.after_proj.bias": torch.ones(5)}), r"controlnet.1.after_proj.bias is \(5,\), e"),
    (lambda w: w.update({"controlnet.0.after_proj.weight": torch.ones(24)}), r"controlnet.0.after_proj.weight is \(24"),
])  # fmt: skip
def test_a_damaged_file_says_what_is_wrong(tmp_path, tiny, make_net, change, message):
    weights = make_net(tiny(depth=4), 3).state_dict()
    change(weights)
    save_file(weights, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=f"c.safetensors: .*{message}"):
        load_controlnet(tmp_path / "c.safetensors", config=CONFIG)


def test_a_lost_slice_is_named_as_the_file_spells_it(tiny, make_net):
    weights = control_to_diffusers(make_net(tiny()).state_dict())
    del weights["controlnet_blocks.0.transformer_block.attn1.to_k.weight"]
    with pytest.raises(ValueError, match="Incomplete PixArt ControlNet: controlnet_blocks.0.*to_k.weight missing"):
        load_controlnet(weights, config=CONFIG)


def test_a_narrow_file_asks_for_its_number_of_heads(tiny, make_net):
    weights = make_net(tiny()).state_dict()
    with pytest.raises(ValueError, match="how many heads a width of 24 has: put config.json beside the file"):
        load_controlnet(weights)
    with pytest.raises(ValueError, match="7 heads do not divide a width of 24"):
        load_controlnet(weights, config={"num_heads": 7})
    assert load_controlnet(weights, config=CONFIG)[1].params.num_heads == 2


@pytest.mark.parametrize("names, message", [
    (("t_block.1.weight", "y_embedder.y_proj.fc1.weight"), "a PixArt transformer: load it with PixArtLoadModel"),
    (("adaln_single.linear.weight", "caption_projection.linear_1.weight"), "a PixArt transformer"),
    (("zero_convs.0.0.weight", "input_blocks.0.0.weight"), "a Stable Diffusion ControlNet: it does not fit PixArt"),
    (("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x.weight"), "a Stable Diffusion ControlNet"),
    (("block1.convs.0.weight", "norm"), "a HED edge detector"),
    (("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",), "a LoRA"),
    (("encoder.block.0.layer.0.x",), "a T5 text encoder"), (("what",), "a file with tensors named what"),
])  # fmt: skip
def test_another_file_is_named(tmp_path, names, message):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: This is not a PixArt ControlNet but {message}"):
        load_controlnet(tmp_path / "x.safetensors")


def test_a_control_net_given_as_a_model_is_named(tmp_path, tiny, pth):
    torch.save(pth(tiny()), tmp_path / "c.pth")
    with pytest.raises(ValueError, match="a PixArt ControlNet: load it with PixArtLoadControlNet"):
        load_weights(tmp_path / "c.pth")


def test_two_nets_in_one_file_are_refused(tiny, make_net):
    state = make_net(tiny()).state_dict()
    with pytest.raises(ValueError, match="several PixArt ControlNets, under 'a.', 'b.'"):
        control_to_native({f"{prefix}.{name}": tensor for prefix in "ab" for name, tensor in state.items()})


def test_a_damaged_header_is_an_error_not_a_crash(tmp_path, tiny, make_net):
    for damaged in ("{}", '{"depth": 3, "kv_compress": null}', '{"nonsense'):
        save_file(make_net(tiny()).state_dict(), tmp_path / "c.safetensors", metadata={"pixart.params": damaged})
        with pytest.raises(ValueError, match=r"c\.safetensors: "):
            load_controlnet(tmp_path / "c.safetensors")


@pytest.mark.parametrize("changes, family, message", [
    ({}, "sigma", ""), ({"pe_interpolation": 2.0, "base_size": 64}, "sigma", ""),
    ({"hidden_size": 48}, "sigma", "the width of its blocks is 24, of the model's 48, the MLP width"),
    ({"num_heads": 4}, "sigma", "the number of heads of its blocks is 2, of the model's 4"),
    ({"mlp_ratio": 2.0}, "sigma", "the MLP width of its blocks is 96, of the model's 48"),
    ({"qk_norm": True}, "sigma", "QK normalisation is in the model's blocks only"),
    ({"depth": 28}, "sigma", "trained on 4 blocks, the model has 28"),
    ({}, "alpha", "trained on PixArt-sigma, the model is PixArt-alpha"),
])  # fmt: skip
def test_a_misfit_says_which_number_differs(tmp_path, tiny, make_net, changes, family, message):
    params = tiny(depth=4)
    save_controlnet(make_net(params, 2), tmp_path / "c.safetensors", params, "sigma", "a test")
    _, found = load_control_weights(tmp_path / "c.safetensors")
    assert message in misfit(found, replace(params, **changes), family)
    assert bool(misfit(found, replace(params, **changes), family)) == bool(message)


def test_a_file_that_does_not_know_its_base_fits_any_that_is_deep_enough(tiny, make_net):
    _, found = load_controlnet(make_net(tiny(depth=4), 3).state_dict(), config=CONFIG)
    assert misfit(found, tiny(depth=4), "alpha") == misfit(found, tiny(depth=28), "sigma") == ""
    assert misfit(found, tiny(depth=3), "sigma") == "it steers 4 blocks, the model has 3"
