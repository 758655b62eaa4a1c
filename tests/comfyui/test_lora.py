"""PixArt Load LoRA inside a real ComfyUI: the same pictures as PEFT's, whoever wrote the file."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart_nodes.checkpoints import save_diffusers, save_native
from pixart_nodes.checkpoints.lora_export import save_lora
from pixart_nodes.checkpoints.lora_files import read_lora
from pixart_nodes.model import PixArtTransformer

from .inprocess import PACK
from .tiny import ALPHA_MS, SIGMA, random_weights

# PixArt's own scripts (train_pixart_lora_hf.py): a suffix each, so `proj` is also the convolution of the patches.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1",
           "linear_2"]  # fmt: skip
NATIVE_TARGETS = ["qkv", "q_linear", "kv_linear", "proj", "fc1", "fc2", "mlp.0", "mlp.2", "t_block.1", "linear"]


class Reference:
    """A tiny transformer with PEFT's adapter on it, every factor random."""

    def __init__(self, tmp_path, config, seed=0, native=False, params=SIGMA):
        weights = random_weights(params, {SIGMA: 0, ALPHA_MS: 2}[params])
        if native:
            base = PixArtTransformer(params)
            base.load_state_dict(weights)
        else:
            family = "alpha" if params.micro_condition else "sigma"
            save_diffusers(weights, params, tmp_path / "base", family, "random weights for a test")
            base = PixArtTransformer2DModel.from_pretrained(tmp_path / "base")
        self.native, self.config, self.params = native, config, params
        self.model = get_peft_model(base, config).eval()
        self.randomise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def randomise(self, generator):
        """Random factors whose product is a third as long as the weight: more would make the network chaotic."""
        for name, p in self.model.named_parameters():
            if "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            elif any(part in name for part in ("lora_", "hada_", "lokr_")):
                p.copy_(torch.randn(p.shape, generator=generator))
        for module in self.model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                length = module.get_delta_weight("default").norm() / module.get_base_layer().weight.norm()
                factors = (getattr(module, name, {}) for name in ("lora_B", "hada_w1_a", "lokr_w1", "lokr_w1_a"))
                factor = next(found["default"] for found in factors if "default" in found)
                getattr(factor, "weight", factor).div_(3 * length)

    def state_dict(self, prefix="", separator="."):
        """Module names without PEFT's prefix, then the leaf: {"blocks.0.attn.qkv.lora_A.weight": ...}."""
        result = {}
        for name, tensor in get_peft_model_state_dict(self.model).items():
            name = name.removeprefix("base_model.model.")
            cut = min(name.find(f".{leaf}") for leaf in ("lora_", "hada_", "lokr_") if f".{leaf}" in name)
            result[prefix + name[:cut].replace(".", separator) + name[cut:]] = tensor.detach().clone()
        return result

    def scales(self):
        """Module name -> PEFT's own scale."""
        return {
            name.removeprefix("base_model.model."): module.scaling["default"]
            for name, module in self.model.named_modules() if isinstance(getattr(module, "scaling", None), dict)
        }  # fmt: skip

    def kohya(self, prefix):
        """kohya's leaves with alpha as a tensor, as OneTrainer and the Kohya scripts write them."""
        tensors, scales = {}, self.scales()
        for name, tensor in self.state_dict().items():
            module, leaf, _ = name.rsplit(".", 2)
            flat = prefix + module.replace(".", "_")
            tensors[f"{flat}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[leaf]}.weight"] = tensor
            if leaf == "lora_A":
                tensors[f"{flat}.alpha"] = torch.tensor(scales[module] * tensor.shape[0])
        return tensors

    @torch.no_grad()
    def __call__(self, x, t, context, size):
        if self.native:
            return self.model.base_model.model(x, t, context, **({} if size is None else micro(size)))
        cond = {"resolution": None, "aspect_ratio": None}
        if size is not None:
            cond = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        out = self.model.base_model.model(x, context, t, cond, return_dict=False)[0]
        return out[:, :4]


def micro(size):
    return {"img_hw": size, "aspect_ratio": size[:, :1] / size[:, 1:]}


def inputs(params):
    g = torch.Generator().manual_seed(9)
    size = torch.tensor([[128.0, 192.0]] * 2) if params.micro_condition else None
    return (torch.randn(2, 4, 16, 24, generator=g), torch.tensor([90.0, 3.0]),
            torch.randn(2, 6, params.caption_channels, generator=g), size)  # fmt: skip


@pytest.fixture
def loras(comfy):
    folder = comfy.folder("loras")
    yield folder
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture
def load(comfy):
    """PixArt Load LoRA with its widgets' defaults -> (MODEL, what the node shows)."""

    def load(model, name, strength=1.0, alpha=0.0):
        output = comfy.classes["PixArtLoadLora"].execute(model=model, lora_name=name, strength=strength, alpha=alpha)
        return output.result[0], output.ui.as_dict()["text"][0]

    return load


def run(model, params=SIGMA):
    """The network's noise with all patches on, as ComfyUI would sample with it."""
    from comfy import model_management

    x, t, context, size = inputs(params)
    extra = {} if size is None else {"c_size": size, "c_ar": size[:, :1] / size[:, 1:]}
    with torch.inference_mode():
        model_management.load_models_gpu([model])
        return model.model.diffusion_model(x, t, context, **extra).clone()


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def lora_config(seed=0, targets=TARGETS, **changes):
    pick = torch.Generator().manual_seed(seed)
    r, alpha = int(torch.randint(1, 9, (), generator=pick)), float(torch.rand((), generator=pick) * 20 + 0.5)
    return LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": targets, **changes})


def check(reference, model, said):
    expected = reference(*inputs(reference.params))
    assert "All " in said and " keys matched." in said, said
    assert off(run(model, reference.params), expected) < 1e-5
    return expected


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
    prefix = {"OneTrainer": "lora_transformer_", "kohya": "lora_unet_", "SimpleTuner LyCORIS": "lycoris_"}.get(layout)
    if prefix:
        save_file(reference.kohya(prefix), path)
        return path.name, 3.0, "stored in the file"
    save_file(module_wise(f"{layout}."), path, {"lora_alpha": str(alpha)})
    return path.name, 0.0, "the file's metadata"


LAYOUTS = ["peft folder", "peft file", "official script", "official folder", "diffusers with metadata", "OneTrainer",
           "OneTrainer folded", "kohya", "SimpleTuner LyCORIS", "transformer", "diffusion_model", "base_model.model",
           "transformer.base_model.model", "unet"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_diffusers_names_equals_peft(tmp_path, loras, load, load_model, layout):
    seed = LAYOUTS.index(layout)
    reference = Reference(tmp_path, lora_config(seed), seed)
    name, alpha, source = write(layout, reference, loras)
    base = load_model()
    plain = run(base)
    model, said = load(base, name, alpha=alpha)
    expected = check(reference, model, said)
    assert source in said
    assert off(plain, expected) > 0.01


NATIVE_LAYOUTS = {"lora_unet_": "_", "diffusion_model.": ".", "transformer.": ".", "base_model.model.": ".", "": "."}


@pytest.mark.parametrize("prefix", NATIVE_LAYOUTS)
def test_every_layout_with_native_names_equals_peft(tmp_path, loras, load, load_model, prefix):
    """qkv and kv as one module each: kohya's and ComfyUI's names, and what a trainer of this network writes."""
    seed = len(prefix)
    reference = Reference(tmp_path, lora_config(seed, NATIVE_TARGETS), seed, native=True)
    assert "blocks.0.attn.qkv" in reference.scales() and "x_embedder.proj" in reference.scales()
    separator = NATIVE_LAYOUTS[prefix]
    tensors = reference.kohya(prefix) if separator == "_" else reference.state_dict(prefix)
    save_file(tensors, loras / "native.safetensors", {"ss_network_alpha": str(reference.config.lora_alpha)})
    model, said = load(load_model(), "native.safetensors")
    check(reference, model, said)


def test_onetrainers_names_for_slices_of_fused_modules_equal_peft(tmp_path, loras, load, load_model):
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
    model, said = load(load_model(), "omi.safetensors")
    check(reference, model, said)


CONFIGS = {
    "rslora": lambda: lora_config(1, use_rslora=True),
    "patterns": lambda: lora_config(
        2, rank_pattern={"attn1.to_q": 3, r"transformer_blocks\.1\.ff.*": 5, "proj_out": 1},
        alpha_pattern={"attn1.to_q": 2.5, "linear_1": 11, "transformer_blocks.0.attn2.to_k": 0.7},
    ),
    "patterns, rslora": lambda: lora_config(3, rank_pattern={"to_v": 7}, alpha_pattern={"to_v": 3}, use_rslora=True),
    "bias": lambda: lora_config(4, lora_bias=True),
    "trained biases": lambda: lora_config(5, bias="lora_only"),
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
def test_every_kind_of_adapter_in_a_peft_folder_equals_peft(tmp_path, loras, load, load_model, kind, params, file):
    reference = Reference(tmp_path, CONFIGS[kind](), len(kind), params=params)
    if kind in ("trained biases", "saved module"):
        with torch.no_grad():
            for name, p in reference.model.named_parameters():
                if "modules_to_save" in name or (p.requires_grad and name.endswith("bias")):
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model(file)
    plain = run(base, params)
    model, said = load(base, "adapter")
    expected = check(reference, model, said)
    assert off(plain, expected) > 0.01
    assert "adapter_config.json" in said


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of two full matrices"])
def test_lycoris_files_of_simpletuner_equal_peft(tmp_path, loras, load, load_model, kind):
    """Tensors as PEFT has them, names with underscores and alpha as a tensor, which two full matrices do not need."""
    config = CONFIGS[kind]()
    if kind == "lokr of two full matrices":
        config.alpha = config.r
    reference = Reference(tmp_path, config, 1)
    tensors = reference.state_dict("lycoris_", "_")
    alphas = {f"{name.rsplit('.', 1)[0]}.alpha": torch.tensor(float(config.alpha)) for name in tensors}
    save_file(tensors | alphas, loras / "lycoris.safetensors")
    model, said = load(load_model(), "lycoris.safetensors")
    check(reference, model, said)


def test_dora_of_onetrainer_by_row_and_by_column_is_the_formula_of_the_paper(loras, load, load_model):
    weights, g = random_weights(SIGMA), torch.Generator().manual_seed(3)
    up, down = torch.randn(48, 2, generator=g) * 0.1, torch.randn(2, 48, generator=g)
    for rows in (True, False):
        magnitude = torch.rand(48, 1, generator=g) + 0.5 if rows else torch.rand(1, 48, generator=g) + 0.5
        name = "lora_transformer_transformer_blocks_1_attn1_to_k"
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": magnitude,
                   f"{name}.alpha": torch.tensor(3.0)}  # fmt: skip
        save_file(tensors, loras / "dora.safetensors")
        model, _ = load(load_model(), "dora.safetensors")
        changed = weights["blocks.1.attn.qkv.weight"].clone()
        k = changed[48:96] + up @ down * 1.5
        changed[48:96] = magnitude * k / k.norm(dim=1 if rows else 0, keepdim=True)
        run(model)
        found = model.model.diffusion_model.blocks[1].attn.qkv.weight
        assert (found - changed).abs().max() < 1e-6
        model.detach()


def test_a_convolution_of_three_factors_is_their_product(loras, load, load_model):
    """LyCORIS' LoCon with a Tucker core, on the patch embedder."""
    g = torch.Generator().manual_seed(3)
    up, core, down = (torch.randn(s, generator=g) for s in ((48, 3, 1, 1), (3, 3, 2, 2), (3, 4, 1, 1)))
    name = "lycoris_pos_embed_proj"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core, f"{name}.lora_down.weight": down}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.5)}, loras / "locon.safetensors")
    model, said = load(load_model(), "locon.safetensors")
    run(model)
    update = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], core, down[:, :, 0, 0]) * 0.5
    found = model.model.diffusion_model.x_embedder.proj.weight - random_weights(SIGMA)["x_embedder.proj.weight"]
    assert (found - update).abs().max() < 1e-5 and "All 4 keys" in said
    model.detach()


def test_differences_of_weights_and_biases_are_added_and_those_of_tables_are_named(loras, load, load_model):
    """ComfyUI never patches the tables: they belong to modules that have modules inside."""
    g, weights = torch.Generator().manual_seed(4), random_weights(SIGMA)
    changes = {"blocks.0.attn.proj.weight": "lora_unet_blocks_0_attn_proj.diff",
               "blocks.0.attn.proj.bias": "lora_unet_blocks_0_attn_proj.diff_b",
               "x_embedder.proj.weight": "transformer.pos_embed.proj.diff"}  # fmt: skip
    tensors = {theirs: torch.randn(weights[ours].shape, generator=g) for ours, theirs in changes.items()}
    table = "diffusion_model.blocks.1.scale_shift_table.diff"
    save_file(tensors | {table: torch.ones(6, 48)}, loras / "diff.safetensors")
    model, said = load(load_model(), "diff.safetensors", 0.5)
    run(model)
    after = model.model.diffusion_model.state_dict()
    for name, stored in changes.items():
        assert (after[name] - weights[name] - tensors[stored] / 2).abs().max() < 1e-6, name
    assert said == f"3 of 4 keys matched. Not used: {table}."
    model.detach()


# What a user does with it


def test_every_widget_is_explained_and_has_its_line_on_the_help_page(comfy):
    schema = comfy.classes["PixArtLoadLora"].define_schema()
    assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))
    page = (PACK / "web" / "docs" / "PixArtLoadLora.md").read_text(encoding="utf-8")
    assert all(f"`{item.id}`" in page for item in schema.inputs)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_strength_scales_the_update(tmp_path, loras, load, load_model, kind):
    reference = Reference(tmp_path, lora_config(3, use_dora=kind == "dora"), 3)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model()
    weight = base.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight.clone()
    changes = {}
    for strength in (1.0, 0.4, -2.0):
        model, _ = load(base, "adapter", strength)
        run(model)
        changes[strength] = model.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight - weight
        model.detach()
    assert changes[1.0].abs().max() > 0.01
    for strength, change in changes.items():
        assert (change - strength * changes[1.0]).abs().max() < 1e-5


def test_strength_zero_is_the_unchanged_model(tmp_path, loras, load, sigma):
    Reference(tmp_path, lora_config()).model.save_pretrained(loras / "adapter")
    model, said = load(sigma, "adapter", 0.0)
    assert not model.patches and "unchanged" in said
    assert torch.equal(run(model), run(sigma))


def test_two_loras_stack_as_in_peft_and_leave_no_trace(tmp_path, loras, load, load_model):
    first, second = lora_config(1), lora_config(2, ["to_q", "ff.net.0.proj", "proj_out"])
    reference = Reference(tmp_path, first, 1)
    reference.model.save_pretrained(loras / "first")
    other = Reference(tmp_path, second, 2)
    other.model.save_pretrained(loras / "second")
    reference.model.load_adapter(loras / "second", "second")
    reference.model.base_model.set_adapter(["default", "second"])
    base = load_model()
    before = {name: tensor.clone() for name, tensor in base.model.diffusion_model.state_dict().items()}
    plain = run(base)
    one, _ = load(base, "first")
    both, _ = load(one, "second")
    assert off(run(both), reference(*inputs(SIGMA))) < 1e-5
    assert off(run(one), run(both)) > 0.01
    assert torch.equal(run(base), plain)
    base.detach()
    after = base.model.diffusion_model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not base.patches


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "bf16", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_lora_works_on_small_weights_and_comes_off_again(tmp_path, loras, load, load_model, weight_dtype, use_dora):
    reference = Reference(tmp_path, lora_config(4, ["to_q", "to_k", "to_v", "ff.net.2"], use_dora=use_dora), 4)
    reference.model.save_pretrained(loras / "adapter")
    base = load_model(weight_dtype=weight_dtype)
    before = {name: tensor.clone() for name, tensor in base.model.diffusion_model.state_dict().items()}
    plain = run(base).float()
    model, said = load(base, "adapter")
    changed, expected = run(model).float(), reference(*inputs(SIGMA))
    assert "All " in said
    assert off(changed, expected) < 0.35 * off(plain, expected)
    model.detach()
    after = base.model.diffusion_model.state_dict()
    assert all(torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8)) for n in before)
    assert torch.equal(run(base).float(), plain)


def test_a_lora_works_on_models_of_comfyuis_own_loader(comfy, loras, load):
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
    model, said = load(model, "any.safetensors")
    model.patch_model()
    weight = model.model.diffusion_model.blocks[0].cross_attn.kv_linear.weight
    assert "All 2 keys matched" in said and "scale 2" in said and "PEFT's default" in said
    assert (weight[:1152] == 0).all() and (weight[1152:] == 8).all()


def test_files_and_peft_folders_are_offered(tmp_path, comfy, loras):
    Reference(tmp_path, lora_config()).model.save_pretrained(loras / "mine" / "adapter")
    (loras / "mine" / "notes").mkdir()
    save_file({"x": torch.zeros(1)}, loras / "one.safetensors")
    offered = comfy.classes["PixArtLoadLora"].define_schema().inputs[1].options
    assert {"mine/adapter", "mine/adapter/adapter_model.safetensors", "one.safetensors"} == set(offered)


def test_a_missing_lora_is_named(load, sigma):
    with pytest.raises(FileNotFoundError, match="gone.safetensors is in none of ComfyUI's LoRA folders"):
        load(sigma, "gone.safetensors")


def test_a_pickled_peft_folder_is_read(tmp_path, loras, load, load_model):
    reference = Reference(tmp_path, lora_config(6), 6)
    reference.model.save_pretrained(loras / "adapter", safe_serialization=False)
    if not (loras / "adapter" / "adapter_model.bin").exists():
        tensors = load_file(loras / "adapter" / "adapter_model.safetensors")
        torch.save(tensors, loras / "adapter" / "adapter_model.bin")
        (loras / "adapter" / "adapter_model.safetensors").unlink()
    model, said = load(load_model(), "adapter")
    check(reference, model, said)


# What does not fit


def test_the_node_lists_what_the_model_has_no_place_for(tmp_path, loras, load, load_model, caplog):
    reference = Reference(tmp_path, lora_config(3), 3, params=ALPHA_MS)
    tensors = reference.state_dict("transformer.") | {"lora_te_encoder_block_0.lora_up.weight": torch.zeros(4, 1)}
    save_file(tensors, loras / "extra.safetensors", {"lora_alpha": "4", "pixart.family": "alpha"})
    model, said = load(load_model(), "extra.safetensors")  # Sigma has no embedders of size and aspect ratio
    lost = [name for name in tensors if "resolution" in name or "aspect" in name or "lora_te" in name]
    assert len(lost) == 9
    assert f"{len(tensors) - 9} of {len(tensors)} keys matched" in said and "and 5 more" in said
    assert all(name in caplog.text for name in lost)
    assert "trained on PixArt-alpha" in said
    assert off(run(model), run(load_model())) > 0.01


def test_a_lora_for_a_wider_model_is_refused(loras, load, sigma):
    wide = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 64),
            "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(64, 4)}  # fmt: skip
    save_file(wide, loras / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors is for another model: it changes .*\(64, 64\).*\(48, 48\)"):
        load(sigma, "wide.safetensors")


def test_a_lora_whose_blocks_do_not_exist_is_refused(loras, load, sigma):
    deep = {"lora_unet_blocks_30_attn_qkv.lora_down.weight": torch.ones(2, 48),
            "lora_unet_blocks_30_attn_qkv.lora_up.weight": torch.ones(144, 2)}  # fmt: skip
    save_file(deep, loras / "deep.safetensors")
    with pytest.raises(ValueError, match="deep.safetensors has nothing for this PixArt model"):
        load(sigma, "deep.safetensors")


@pytest.mark.parametrize("wrong", ["magnitude", "factors"])
def test_parts_that_do_not_fit_each_other_are_refused(loras, load, sigma, wrong):
    name = "lora_unet_blocks_0_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 48), f"{name}.lora_up.weight": torch.ones(48, 2)}
    tensors |= {f"{name}.dora_scale": torch.ones(7, 1)} if wrong == "magnitude" else {}
    tensors |= {f"{name}.lora_up.weight": torch.ones(48, 3)} if wrong == "factors" else {}
    save_file(tensors, loras / "wrong.safetensors")
    with pytest.raises(ValueError, match="wrong.safetensors is for another model"):
        load(sigma, "wrong.safetensors")


def test_a_model_that_is_no_pixart_is_refused(comfy, loras, load):
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="works on PixArt models, but got a SimpleNamespace"):
        comfy.pack("comfy_bridge.lora").apply_lora(SimpleNamespace(model=SimpleNamespace()), "any")


def test_the_whole_base_checkpoint_is_refused(comfy, loras, load, sigma):
    shutil.copy(comfy.folder("diffusion_models") / "sigma.safetensors", loras / "base.safetensors")
    with pytest.raises(ValueError, match="base.safetensors: this is no LoRA but a PixArt transformer"):
        load(sigma, "base.safetensors")


# What is written is read, by ComfyUI's own loader and by PEFT


@pytest.fixture
def core_loader(comfy, caplog):
    """ComfyUI's own LoRA loader; it must match every key."""

    def load(model, name):
        caplog.clear()
        (patched,) = comfy.call("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
        assert not [line for line in caplog.messages if "not loaded" in line.lower()], caplog.text
        return patched

    return load


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("native", [True, False])
def test_exports_load_in_comfyuis_own_loader_and_equal_peft(
    tmp_path, loras, core_loader, load, load_model, layout, native
):
    config = lora_config(7, NATIVE_TARGETS if native else TARGETS, use_rslora=True, rank_pattern={"to_q": 5, "qkv": 3},
                         alpha_pattern={"to_k": 2.0, "fc1": 9.0})  # fmt: skip
    reference = Reference(tmp_path, config, 7, native)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "export.safetensors", layout, {"pixart.trigger_word": "blorb"})
    expected = reference(*inputs(SIGMA))
    core = core_loader(load_model(), "export.safetensors")
    assert off(run(core), expected) < 1e-5
    core.detach()
    model, said = load(load_model(), "export.safetensors")
    check(reference, model, said)
    assert "stored in the file" in said
    with safe_open(loras / "export.safetensors", "pt") as file:
        assert file.metadata()["pixart.trigger_word"] == "blorb"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_exports_load_into_peft(tmp_path, loras, load, load_model, native, use_dora):
    config = lora_config(8, NATIVE_TARGETS if native else TARGETS, use_dora=use_dora, alpha_pattern={"to_v": 3.5},
                         rank_pattern={"ff.net.2": 2, "fc2": 2})  # fmt: skip
    reference = Reference(tmp_path, config, 8, native)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "export", "peft")
    save_diffusers(random_weights(SIGMA), SIGMA, tmp_path / "plain", "sigma", "random weights for a test")
    model = PeftModel.from_pretrained(PixArtTransformer2DModel.from_pretrained(tmp_path / "plain"), loras / "export")
    copy = Reference.__new__(Reference)
    copy.model, copy.native, copy.params = model.eval(), False, SIGMA
    expected = reference(*inputs(SIGMA))
    assert off(copy(*inputs(SIGMA)), expected) < 1e-5
    ours, said = load(load_model(), "export")
    check(reference, ours, said)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_exported_dora_matches_every_key_and_equals_peft(tmp_path, loras, core_loader, load, load_model, layout):
    config = lora_config(9, use_dora=True)
    reference = Reference(tmp_path, config, 9)
    lora = read_lora(get_peft_model_state_dict(reference.model), config=config.to_dict())
    save_lora(lora, loras / "dora.safetensors", layout)
    core_loader(load_model(), "dora.safetensors")  # its formula for rows is another one
    model, said = load(load_model(), "dora.safetensors")
    check(reference, model, said)
