"""ControlNet files, nodes with their defaults, and the network with ControlNets written out as in the paper."""

from dataclasses import replace

import pytest
import torch

from pixart_nodes.checkpoints import save_controlnet
from pixart_nodes.model import ControlNetTransformer, ControlParams, KVCompress, PixArtTransformer

from ..drive import prompt
from ..tiny import ALPHA_MS, SIGMA, random_control, random_weights, save_random

KV = replace(SIGMA, kv_compress=KVCompress("conv", 2, (1, 2)))
SCALE = {"sigma": 0.13025, "alpha": 0.18215}


@pytest.fixture(scope="module")
def files(comfy):
    """Control files for the models of conftest.py, and one more base."""
    folder = comfy.folder("controlnet")
    save_controlnet(random_control(SIGMA), folder / "sigma.safetensors", SIGMA, "sigma", "a test")
    save_controlnet(random_control(SIGMA, 1, seed=6), folder / "sigma_one.safetensors", SIGMA, "sigma", "a test")
    save_controlnet(random_control(ALPHA_MS), folder / "alpha_ms.safetensors", ALPHA_MS, "alpha", "a test")
    save_controlnet(random_control(KV), folder / "kv.safetensors", KV, "sigma", "a test")
    save_random(comfy.folder("diffusion_models") / "kv.safetensors", KV, "sigma", seed=3)
    return folder


@pytest.fixture(scope="module")
def vae(comfy):
    return comfy.call("VAELoader", vae_name="pixart-tiny-vae.safetensors")[0]


@pytest.fixture
def load(comfy, files):
    """PixArt Load ControlNet with its widgets' defaults -> CONTROL_NET."""

    def run(name="sigma.safetensors", base="load it elsewhere", weight_dtype="auto"):
        return comfy.call("PixArtLoadControlNet", control_net_name=name, base=base, weight_dtype=weight_dtype)[0]

    return run


@pytest.fixture
def apply(comfy, vae):
    """ComfyUI's Apply ControlNet -> (positive, negative)."""

    def run(control, image=None, positive=None, negative=None, strength=1.0, start=0.0, end=1.0, vae=vae):
        return comfy.call(
            "ControlNetApplyAdvanced", positive=positive or prompt(7, 1), negative=negative or prompt(3, 2),
            control_net=control, image=edges() if image is None else image, strength=strength, start_percent=start,
            end_percent=end, vae=vae,
        )  # fmt: skip

    return run


@pytest.fixture
def apply_ours(comfy, vae):
    """PixArt Apply ControlNet with its widgets' defaults -> (positive, negative)."""

    def run(control, image=None, positive=None, negative=None, **widgets):
        defaults = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "fit": "crop", "posterior": "mode",
                    "posterior_seed": 0, "block_weights": "", "vae": vae}  # fmt: skip
        return comfy.call(
            "PixArtApplyControlNet", positive=positive or prompt(7, 1), negative=negative or prompt(3, 2),
            control_net=control, image=edges() if image is None else image, **defaults | widgets,
        )  # fmt: skip

    return run


def edges(height=128, width=128, batch=1, seed=9):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def network(params, seed=0):
    model = PixArtTransformer(params)
    model.load_state_dict(random_weights(params, seed))
    return model.requires_grad_(False)


def control_network(params, num_blocks=2, seed=5):
    net = ControlNetTransformer(ControlParams.of(params, num_blocks))
    net.load_state_dict(random_control(params, num_blocks, seed))
    return net.requires_grad_(False)


def steered(base, controls, x, t, context, mask=None, img_hw=None, aspect_ratio=None):
    """The network with ControlNets, written out as in the paper: [(ControlNetTransformer, hint, strength), ...]."""
    residuals = []

    def behind_block_0(_, args, x):
        _, caption, modulation, mask, grid, options = args
        t, t0 = base.embed_time(t_, img_hw, aspect_ratio, x.dtype)
        for net, hint, strength in controls:
            c, skips = base.embed_image(hint, grid).expand(len(x), -1, -1), []
            for block in net.controlnet:
                c = block.before_proj(c) + x if block.before_proj is not None else c
                table = block.copied_block.scale_shift_table + t0
                table = torch.stack([part + (i % 3 == 1) for i, part in enumerate(table.unbind(1))])[:, :, None]
                c = block.copied_block(c, caption, table, mask, grid, options)
                skips.append(strength * block.after_proj(c))
            residuals.append(skips)
        return x + sum(skips[0] for skips in residuals)

    def behind_block(i):
        return lambda _, args, x: x + sum(skips[i] for skips in residuals if i < len(skips))

    t_ = t
    handles = [base.blocks[0].register_forward_hook(behind_block_0)]
    handles += [base.blocks[i].register_forward_hook(behind_block(i)) for i in range(1, len(base.blocks))]
    try:
        return base(x, t, context, mask, img_hw, aspect_ratio)
    finally:
        for handle in handles:
            handle.remove()


def watched(model):
    """A clone of the model that notes what the network got and gave at every call."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    calls, clone = [], model.clone()

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        calls.append((args, out))
        return out

    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note, clone.model_options, is_model_options=True)
    return clone, calls
