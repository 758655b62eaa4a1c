"""Every kind of adapter inside a real ComfyUI: the same pictures as PEFT's, or the formulas of who made it."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import save_file

from .tiny import ALPHA_MS, SIGMA, random_weights
from .tiny_lora import TARGETS, Reference, check, lora_config, off, run

CONFIGS = {
    "rslora": lambda: lora_config(1, use_rslora=True),
    "patterns": lambda: lora_config(
        2, rank_pattern={"attn1.to_q": 3, r"transformer_blocks\.1\.ff.*": 5, "proj_out": 1},
        alpha_pattern={"attn1.to_q": 2.5, "linear_1": 11, "transformer_blocks.0.attn2.to_k": 0.7},
    ),
    "patterns, rslora": lambda: lora_config(3, rank_pattern={"to_v": 7}, alpha_pattern={"to_v": 3}, use_rslora=True),
    "bias": lambda: lora_config(4, lora_bias=True),
    "trained biases": lambda: lora_config(5, bias="lora_only"),
    "bias on trained biases": lambda: lora_config(4, lora_bias=True, bias="lora_only"),
    "saved module": lambda: lora_config(6, ["to_q", "ff.net.2"], modules_to_save=["proj_out"]),
    "dora": lambda: lora_config(7, use_dora=True),
    "dora with rslora": lambda: lora_config(8, ["to_k", "to_v", "proj"], use_dora=True, use_rslora=True),
    "loha": lambda: LoHaConfig(r=3, alpha=5.0, target_modules=TARGETS),
    "loha of convolutions": lambda: LoHaConfig(r=2, alpha=3.0, target_modules=["proj"], use_effective_conv2d=True),
    "lokr": lambda: LoKrConfig(r=3, alpha=2.0, target_modules=TARGETS),
    "lokr of two full matrices": lambda: LoKrConfig(r=200, alpha=90.0, target_modules=["to_q", "ff.net.2", "proj"]),
    "lokr, both taken apart": lambda: LoKrConfig(
        r=2, alpha=3.0, target_modules=TARGETS, decompose_both=True, use_effective_conv2d=True,
        rank_pattern={"to_q": 1}, alpha_pattern={"to_v": 1.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("params, file", [(SIGMA, "sigma.safetensors"), (ALPHA_MS, "alpha_ms.safetensors")])
def test_every_kind_of_adapter_in_a_peft_folder_equals_peft(tmp_path, loras, load_lora, load_model, kind, params, file):
    reference = Reference(tmp_path, CONFIGS[kind](), len(kind), params=params)
    if kind in ("trained biases", "bias on trained biases", "saved module"):
        with torch.no_grad():
            for name, p in reference.model.named_parameters():
                if "modules_to_save" in name or (p.requires_grad and name.endswith("bias")):
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model(file)
    plain = run(base, params)
    model, said = load_lora(base, "adapter")
    expected = check(reference, model, said)
    assert off(plain, expected) > 0.01
    assert "adapter_config.json" in said


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_lora_that_changed_the_weights_is_refused_until_peft_has_converted_it(
    tmp_path, loras, load_lora, load_model, init
):
    """Random factors stand in for a training."""
    reference = Reference(tmp_path, lora_config(3, ["to_q", "ff.net.2"], init_lora_weights=init), randomised=False)
    reference.model.save_pretrained(tmp_path / "initial")
    reference.randomise(torch.Generator().manual_seed(1))
    reference.model.save_pretrained(loras / "trained")
    with pytest.raises(ValueError, match=f"^trained: its adapter_config.json says init_lora_weights '{init}'"):
        load_lora(load_model(), "trained")
    reference.model.peft_config["default"].init_lora_weights = True
    reference.model.save_pretrained(
        loras / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    model, said = load_lora(load_model(), "converted")
    check(reference, model, said)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of two full matrices"])
def test_lycoris_files_of_simpletuner_equal_peft(tmp_path, loras, load_lora, load_model, kind):
    """Tensors as PEFT has them, names with underscores and alpha as a tensor, which two full matrices do not need."""
    config = CONFIGS[kind]()
    if kind == "lokr of two full matrices":
        config.alpha = config.r
    reference = Reference(tmp_path, config, 1)
    tensors = reference.state_dict("lycoris_", "_")
    alphas = {f"{name.rsplit('.', 1)[0]}.alpha": torch.tensor(float(config.alpha)) for name in tensors}
    save_file(tensors | alphas, loras / "lycoris.safetensors")
    model, said = load_lora(load_model(), "lycoris.safetensors")
    check(reference, model, said)


def test_dora_of_onetrainer_by_row_and_by_column_is_the_formula_of_the_paper(loras, load_lora, load_model):
    weights, g = random_weights(SIGMA), torch.Generator().manual_seed(3)
    up, down = torch.randn(48, 2, generator=g) * 0.1, torch.randn(2, 48, generator=g)
    for rows in (True, False):
        magnitude = torch.rand(48, 1, generator=g) + 0.5 if rows else torch.rand(1, 48, generator=g) + 0.5
        name = "lora_transformer_transformer_blocks_1_attn1_to_k"
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": magnitude,
                   f"{name}.alpha": torch.tensor(3.0)}  # fmt: skip
        save_file(tensors, loras / "dora.safetensors")
        model, _ = load_lora(load_model(), "dora.safetensors")
        changed = weights["blocks.1.attn.qkv.weight"].clone()
        k = changed[48:96] + up @ down * 1.5
        changed[48:96] = magnitude * k / k.norm(dim=1 if rows else 0, keepdim=True)
        run(model)
        found = model.model.diffusion_model.blocks[1].attn.qkv.weight
        assert (found - changed).abs().max() < 1e-6
        model.detach()


def test_a_convolution_of_three_factors_is_their_product(loras, load_lora, load_model):
    """LyCORIS' LoCon with a Tucker core, on the patch embedder."""
    g = torch.Generator().manual_seed(3)
    up, core, down = (torch.randn(s, generator=g) for s in ((48, 3, 1, 1), (3, 3, 2, 2), (3, 4, 1, 1)))
    name = "lycoris_pos_embed_proj"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core, f"{name}.lora_down.weight": down}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.5)}, loras / "locon.safetensors")
    model, said = load_lora(load_model(), "locon.safetensors")
    run(model)
    update = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], core, down[:, :, 0, 0]) * 0.5
    found = model.model.diffusion_model.x_embedder.proj.weight - random_weights(SIGMA)["x_embedder.proj.weight"]
    assert (found - update).abs().max() < 1e-5 and "All 4 keys" in said
    model.detach()


def test_differences_of_weights_and_biases_are_added_and_those_of_tables_are_named(loras, load_lora, load_model):
    """ComfyUI never patches the tables: they belong to modules that have modules inside."""
    g, weights = torch.Generator().manual_seed(4), random_weights(SIGMA)
    changes = {"blocks.0.attn.proj.weight": "lora_unet_blocks_0_attn_proj.diff",
               "blocks.0.attn.proj.bias": "lora_unet_blocks_0_attn_proj.diff_b",
               "x_embedder.proj.weight": "transformer.pos_embed.proj.diff"}  # fmt: skip
    tensors = {theirs: torch.randn(weights[ours].shape, generator=g) for ours, theirs in changes.items()}
    table = "diffusion_model.blocks.1.scale_shift_table.diff"
    save_file(tensors | {table: torch.ones(6, 48)}, loras / "diff.safetensors")
    model, said = load_lora(load_model(), "diff.safetensors", 0.5)
    run(model)
    after = model.model.diffusion_model.state_dict()
    for name, stored in changes.items():
        assert (after[name] - weights[name] - tensors[stored] / 2).abs().max() < 1e-6, name
    assert said == f"3 of 4 keys matched. Not used: {table}."
    model.detach()


def test_factors_and_differences_of_one_module_are_both_added(loras, load_lora, load_model):
    g, weights = torch.Generator().manual_seed(5), random_weights(SIGMA)
    up, down, diff = (torch.randn(shape, generator=g) for shape in ((48, 3), (3, 48), (48, 48)))
    bias, more = torch.randn(48, generator=g), torch.randn(48, generator=g)
    name = "transformer.blocks.0.attn.proj"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.diff": diff, f"{name}.alpha":
               torch.tensor(6.0), f"{name}.diff_b": bias, f"{name}.lora_B.bias": more}  # fmt: skip
    save_file(tensors, loras / "both.safetensors")
    model, said = load_lora(load_model(), "both.safetensors", 0.5)
    run(model)
    proj = model.model.diffusion_model.blocks[0].attn.proj
    assert "All 6 keys" in said
    assert (proj.weight - weights["blocks.0.attn.proj.weight"] - (up @ down * 2 + diff) / 2).abs().max() < 1e-5
    assert (proj.bias - weights["blocks.0.attn.proj.bias"] - (bias + more * 2) / 2).abs().max() < 1e-6
    model.detach()
