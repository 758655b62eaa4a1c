"""LoRA files without ComfyUI: what is written means the same."""

import os
import re

import pytest
import torch
from safetensors import safe_open

from pixart_nodes.checkpoints.keys import native_to_diffusers
from pixart_nodes.checkpoints.lora_export import LAYOUTS, save_lora
from pixart_nodes.checkpoints.lora_files import load_lora, read_lora

from .lora_tensors import TO_Q, linear


def deltas(lora, width=24):
    """Native module -> the whole matrix that is added."""
    result = {}
    for a in lora.adapters:
        delta = a.tensors["up"].float().flatten(1) @ a.tensors["down"].float().flatten(1) * a.strength.scale
        i, n = a.target.part
        whole = result.setdefault(a.target.module, torch.zeros(delta.shape[0] * n, delta.shape[1]))
        whole[i * delta.shape[0] : (i + 1) * delta.shape[0]] += delta
    return result


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
