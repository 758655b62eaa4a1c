"""PixArt Load LoRA inside a real ComfyUI: the same pictures as PEFT's, whoever wrote the file."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import save_native
from pixart_nodes.model import PixArtTransformer

from .inprocess import PACK
from .tiny import ALPHA_MS, SIGMA
from .tiny_lora import NATIVE_TARGETS, Reference, check, inputs, lora_config, off, run

# Equal to PEFT, layout by layout


def write(layout, reference, loras):
    """The LoRA as one of the producers writes it -> (name for the node, alpha widget, where alpha must come from)."""
    config = reference.config
    alpha, module_wise = config.lora_alpha, reference.state_dict
    path = loras / f"{layout}.safetensors"
    if layout in ("peft folder", "peft file"):
        reference.model.save_pretrained(loras / "adapter")
        return ("adapter" if "folder" in layout else "adapter/adapter_model.safetensors"), 0.0, "adapter_config.json"
    if layout == "official script":  # alpha is nowhere
        save_file(module_wise("unet.base_model.model."), path)
        return path.name, alpha, "set on the node"
    if layout == "official folder":
        reference.model.save_pretrained(loras / "official")
        (loras / "official" / "adapter_model.safetensors").unlink()
        save_file(module_wise("unet.base_model.model."), loras / "official" / "pytorch_lora_weights.safetensors")
        return "official", 0.0, "adapter_config.json"
    if layout == "diffusers with metadata":
        fields = {f"transformer.{k}": v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, dict))}
        save_file(module_wise("transformer."), path, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
        return path.name, 3.0, "the file's metadata"
    if layout == "OneTrainer folded":
        scales = reference.scales()
        folded = {k: v * (scales[k.rsplit(".lora_B", 1)[0]] if "lora_B" in k else 1) for k, v in module_wise().items()}
        save_file({f"transformer.{k}": v for k, v in folded.items()}, path, {"ot_branch": "master"})
        return path.name, 0.0, "OneTrainer"
    if layout == "diffusers of 2023":
        tensors = {
            name.replace("to_out.0.", "to_out.").replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up."): t
            for name, t in module_wise("transformer.").items()
        }
        processors = {re.sub(r"\.(to_\w+_lora)", r".processor.\1", name): tensor for name, tensor in tensors.items()}
        save_file(processors, path)
        return path.name, alpha, "set on the node"
    prefix = {"OneTrainer": "lora_transformer_", "kohya": "lora_unet_", "SimpleTuner LyCORIS": "lycoris_"}.get(layout)
    if prefix:
        save_file(reference.kohya(prefix), path)
        return path.name, 3.0, "stored in the file"
    save_file(module_wise(f"{layout}."), path, {"lora_alpha": str(alpha)})
    return path.name, 0.0, "the file's metadata"


BUNDLED = "pixart-tiny-zorb.safetensors"
LAYOUTS = ["peft folder", "peft file", "official script", "official folder", "diffusers with metadata", "OneTrainer",
           "OneTrainer folded", "kohya", "SimpleTuner LyCORIS", "transformer", "diffusion_model", "base_model.model",
           "transformer.base_model.model", "unet", "diffusers of 2023"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_diffusers_names_equals_peft(tmp_path, loras, load_lora, load_model, layout):
    seed = LAYOUTS.index(layout)
    reference = Reference(tmp_path, lora_config(seed), seed)
    name, alpha, source = write(layout, reference, loras)
    base = load_model()
    plain = run(base)
    model, said = load_lora(base, name, alpha=alpha)
    expected = check(reference, model, said)
    assert source in said
    assert off(plain, expected) > 0.01


NATIVE_LAYOUTS = {"lora_unet_": "_", "diffusion_model.": ".", "transformer.": ".", "base_model.model.": ".", "": "."}


@pytest.mark.parametrize("prefix", NATIVE_LAYOUTS)
def test_every_layout_with_native_names_equals_peft(tmp_path, loras, load_lora, load_model, prefix):
    """qkv and kv as one module each: kohya's and ComfyUI's names, and what a trainer of this network writes."""
    seed = len(prefix)
    reference = Reference(tmp_path, lora_config(seed, NATIVE_TARGETS), seed, native=True)
    assert "blocks.0.attn.qkv" in reference.scales() and "x_embedder.proj" in reference.scales()
    separator = NATIVE_LAYOUTS[prefix]
    tensors = reference.kohya(prefix) if separator == "_" else reference.state_dict(prefix)
    save_file(tensors, loras / "native.safetensors", {"ss_network_alpha": str(reference.config.lora_alpha)})
    model, said = load_lora(load_model(), "native.safetensors")
    check(reference, model, said)


def test_onetrainers_names_for_slices_of_fused_modules_equal_peft(tmp_path, loras, load_lora, load_model):
    """Its OMI layout has native names, and "attn.qkv.1" for the k of them."""
    reference = Reference(tmp_path, lora_config(5, ["to_q", "to_k", "to_v", "ff.net.2"]), 5)
    tensors = {}
    for name, tensor in reference.kohya("").items():
        for ours, theirs in (("attn.qkv.0", "attn1_to_q"), ("attn.qkv.1", "attn1_to_k"), ("attn.qkv.2", "attn1_to_v"),
                             ("cross_attn.q_linear", "attn2_to_q"), ("cross_attn.kv_linear.0", "attn2_to_k"),
                             ("cross_attn.kv_linear.1", "attn2_to_v"), ("mlp.fc2", "ff_net_2")):  # fmt: skip
            name = name.replace(theirs, ours)
        tensors["transformer." + name.replace("transformer_blocks_", "blocks.").replace("_", ".", 1)] = tensor
    tensors = {name.replace("cross.attn", "cross_attn").replace("lora.", "lora_"): t for name, t in tensors.items()}
    save_file({name.replace("..", "."): t for name, t in tensors.items()}, loras / "omi.safetensors")
    model, said = load_lora(load_model(), "omi.safetensors")
    check(reference, model, said)


# What a user does with it


def test_every_widget_is_explained_and_has_its_line_on_the_help_page(comfy):
    schema = comfy.classes["PixArtLoadLora"].define_schema()
    assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))
    page = (PACK / "web" / "docs" / "PixArtLoadLora.md").read_text(encoding="utf-8")
    assert all(f"`{item.id}`" in page for item in schema.inputs)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_strength_scales_the_update(tmp_path, loras, load_lora, load_model, kind):
    reference = Reference(tmp_path, lora_config(3, use_dora=kind == "dora"), 3)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model()
    weight = base.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight.clone()
    changes = {}
    for strength in (1.0, 0.4, -2.0):
        model, _ = load_lora(base, "adapter", strength)
        run(model)
        changes[strength] = model.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight - weight
        model.detach()
    assert changes[1.0].abs().max() > 0.01
    for strength, change in changes.items():
        assert (change - strength * changes[1.0]).abs().max() < 1e-5


def test_strength_zero_is_the_unchanged_model(tmp_path, loras, load_lora, sigma):
    Reference(tmp_path, lora_config()).model.save_pretrained(loras / "adapter")
    model, said = load_lora(sigma, "adapter", 0.0)
    assert not model.patches and "unchanged" in said
    assert torch.equal(run(model), run(sigma))


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "bf16", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_lora_works_on_small_weights_and_comes_off_again(
    tmp_path, loras, load_lora, load_model, weight_dtype, use_dora
):
    reference = Reference(tmp_path, lora_config(4, ["to_q", "to_k", "to_v", "ff.net.2"], use_dora=use_dora), 4)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model(weight_dtype=weight_dtype)
    before = {name: tensor.clone() for name, tensor in base.model.diffusion_model.state_dict().items()}
    plain = run(base).float()
    model, said = load_lora(base, "adapter")
    changed, expected = run(model).float(), reference(*inputs(SIGMA))
    assert "All " in said
    assert off(changed, expected) < 0.35 * off(plain, expected)
    model.detach()
    after = base.model.diffusion_model.state_dict()
    assert all(torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8)) for n in before)
    assert torch.equal(run(base).float(), plain)


def test_a_lora_works_on_models_of_comfyuis_own_loader(comfy, loras, load_lora):
    """They are 1152 wide, whatever the file."""
    wide = replace(SIGMA, depth=1, hidden_size=1152, num_heads=16, caption_channels=4096)
    shapes = PixArtTransformer(wide, device="meta").state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in shapes.items()}
    path = comfy.folder("diffusion_models") / "wide.safetensors"
    save_native(zeros, wide, path, "sigma", "zeros for a test")
    (model,) = comfy.call("UNETLoader", unet_name=path.name, weight_dtype="default")
    path.unlink()
    name = "unet.base_model.model.transformer_blocks.0.attn2.to_v"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 1152), f"{name}.lora_B.weight": torch.ones(1152, 4)}
    save_file(tensors, loras / "any.safetensors")
    model, said = load_lora(model, "any.safetensors")
    model.patch_model()
    weight = model.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight
    assert "All 2 keys matched" in said and "scale 2" in said and "PEFT's default" in said
    assert (weight[:1152] == 0).all() and (weight[1152:] == 8).all()


def test_files_and_peft_folders_are_offered(tmp_path, comfy, loras):
    Reference(tmp_path, lora_config()).model.save_pretrained(loras / "mine" / "adapter")
    (loras / "mine" / "notes").mkdir()
    save_file({"x": torch.zeros(1)}, loras / "one.safetensors")
    offered = comfy.classes["PixArtLoadLora"].define_schema().inputs[1].options
    assert {"mine/adapter", "mine/adapter/adapter_model.safetensors", "one.safetensors", BUNDLED} == set(offered)


def test_a_missing_lora_is_named(load_lora, sigma):
    with pytest.raises(FileNotFoundError, match="gone.safetensors is in none of ComfyUI's LoRA folders"):
        load_lora(sigma, "gone.safetensors")


def test_a_pickled_peft_folder_is_read(tmp_path, loras, load_lora, load_model):
    reference = Reference(tmp_path, lora_config(6), 6)
    reference.model.save_pretrained(loras / "adapter", safe_serialization=False)
    if not (loras / "adapter" / "adapter_model.bin").exists():
        tensors = load_file(loras / "adapter" / "adapter_model.safetensors")
        torch.save(tensors, loras / "adapter" / "adapter_model.bin")
        (loras / "adapter" / "adapter_model.safetensors").unlink()
    model, said = load_lora(load_model(), "adapter")
    check(reference, model, said)


# What does not fit


def test_the_node_lists_what_the_model_has_no_place_for(tmp_path, loras, load_lora, load_model, caplog):
    reference = Reference(tmp_path, lora_config(3), 3, params=ALPHA_MS)
    tensors = reference.state_dict("transformer.") | {"lora_te_encoder_block_0.lora_up.weight": torch.zeros(4, 1)}
    save_file(tensors, loras / "extra.safetensors", {"lora_alpha": "4", "pixart.family": "alpha"})
    model, said = load_lora(load_model(), "extra.safetensors")  # Sigma has no embedders of size and aspect ratio
    lost = [name for name in tensors if "resolution" in name or "aspect" in name or "lora_te" in name]
    assert len(lost) == 9
    assert f"{len(tensors) - 9} of {len(tensors)} keys matched" in said and "and 5 more" in said
    assert all(name in caplog.text for name in lost)
    assert "trained on PixArt-alpha" in said
    assert off(run(model), run(load_model())) > 0.01


def test_a_lora_for_a_wider_model_is_refused(loras, load_lora, sigma):
    wide = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 64),
            "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(64, 4)}  # fmt: skip
    save_file(wide, loras / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors is for another model: it changes .*\(64, 64\).*\(48, 48\)"):
        load_lora(sigma, "wide.safetensors")


def test_a_lora_whose_blocks_do_not_exist_is_refused(loras, load_lora, sigma):
    deep = {"lora_unet_blocks_30_attn_qkv.lora_down.weight": torch.ones(2, 48),
            "lora_unet_blocks_30_attn_qkv.lora_up.weight": torch.ones(144, 2)}  # fmt: skip
    save_file(deep, loras / "deep.safetensors")
    with pytest.raises(ValueError, match="deep.safetensors has nothing for this PixArt model"):
        load_lora(sigma, "deep.safetensors")


@pytest.mark.parametrize("wrong", ["magnitude", "factors"])
def test_parts_that_do_not_fit_each_other_are_refused(loras, load_lora, sigma, wrong):
    name = "lora_unet_blocks_0_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 48), f"{name}.lora_up.weight": torch.ones(48, 2)}
    tensors |= {f"{name}.dora_scale": torch.ones(7, 1)} if wrong == "magnitude" else {}
    tensors |= {f"{name}.lora_up.weight": torch.ones(48, 3)} if wrong == "factors" else {}
    save_file(tensors, loras / "wrong.safetensors")
    with pytest.raises(ValueError, match="wrong.safetensors is for another model"):
        load_lora(sigma, "wrong.safetensors")


def test_a_model_that_is_no_pixart_is_refused(comfy, loras, load_lora):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="works on PixArt models, but got a SimpleNamespace"):
        comfy.pack("comfy_bridge.lora").apply_lora(SimpleNamespace(model=SimpleNamespace()), "any")


def test_the_whole_base_checkpoint_is_refused(comfy, loras, load_lora, sigma):
    shutil.copy(comfy.folder("diffusion_models") / "sigma.safetensors", loras / "base.safetensors")
    with pytest.raises(ValueError, match="base.safetensors: this is no LoRA but a PixArt transformer"):
        load_lora(sigma, "base.safetensors")
