"""PEFT adapters with random factors on a tiny transformer, and the networks' outputs to compare."""

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from pixart_nodes.checkpoints import save_diffusers
from pixart_nodes.model import PixArtTransformer

from .tiny import ALPHA_MS, SIGMA, random_weights

# PixArt's own scripts (train_pixart_lora_hf.py): a suffix each, so `proj` is also the convolution of the patches.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1",
           "linear_2"]  # fmt: skip
NATIVE_TARGETS = ["qkv", "q_linear", "kv_linear", "proj", "fc1", "fc2", "mlp.0", "mlp.2", "t_block.1", "linear"]


class Reference:
    """A tiny transformer with PEFT's adapter on it, every factor random."""

    def __init__(self, tmp_path, config, seed=0, native=False, params=SIGMA, randomised=True):
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
        if randomised:
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
            tensors[f"{flat}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[leaf] }.weight"] = tensor
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


def run(model, params=SIGMA):
    """The network's noise with all patches on, as ComfyUI would sample with it."""
    from comfy import model_management

    x, t, context, size = inputs(params)
    extra = {} if size is None else {"c_size": size, "c_ar": size[:, :1] / size[:, 1:]}
    with torch.inference_mode():
        model_management.load_models_gpu([model])
        x, context = (tensor.to(model.model.inference_dtype()) for tensor in (x, context))
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
