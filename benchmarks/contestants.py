"""One guided step of the same transformer, with the same weights and inputs: ours, ComfyUI's own, diffusers'.

Each contestant is built as its users get it: ComfyUI's and ours through ComfyUI's batching of conditions and its choice
of dtypes, diffusers' as its pipeline calls it, with captions padded and masked.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TIMESTEP = 500


@dataclass
class Problem:
    """What is to be computed: noise of a latent (1, 4, height, width) for two captions of `tokens` and `short` tokens.

    Numbers of the variants are those of `model.VARIANTS`; width and depth may be smaller.
    """

    variant: str
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device
    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    caption_channels: int = 4096
    tokens: int = 40
    short: int = 12
    padded: int = 300

    def __post_init__(self):
        from pixart_nodes.model import VARIANTS, PixArtTransformer

        self.params = replace(
            VARIANTS[self.variant], depth=self.depth, hidden_size=self.hidden_size, num_heads=self.num_heads,
            caption_channels=self.caption_channels,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        shapes = {name: t.shape for name, t in PixArtTransformer(self.params, device="meta").state_dict().items()}
        self.weights = {  # tensors of the dtype, shared by all contestants
            name: (torch.randn(shape, generator=generator) * (0.02 if len(shape) == 1 else shape[-1] ** -0.5)).to(
                self.device, self.dtype
            )
            for name, shape in shapes.items()
        }
        self.latent = torch.randn(1, 4, self.height, self.width, generator=generator).to(self.device)
        self.captions = [
            torch.randn(1, n, self.caption_channels, generator=generator) for n in (self.tokens, self.short)
        ]


@dataclass
class Contestant:
    """step: everything that a sampler waits for, (2, 4, H, W), the predicted noise for both captions; or None.
    forward: the network's part of it."""

    step: Callable[[], Tensor | None]
    forward: Callable[[], object]


def start_comfyui(path, device: torch.device):
    """Once per process, before `build`."""
    sys.path.insert(0, str(path))
    words, sys.argv = sys.argv, ["main.py", *(["--cpu"] if device.type == "cpu" else [])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv when it is imported
    finally:
        sys.argv = words


def noise_level() -> Tensor:
    from pixart_nodes.diffusion import schedule

    return schedule.sigmas()[TIMESTEP].float()


def comfy_contestant(problem: Problem, model, captions, options=None) -> Contestant:
    """A BaseModel of ComfyUI's, called as its samplers call it."""
    from comfy import sampler_helpers, samplers

    level = noise_level()[None].to(problem.device)
    x = problem.latent * (level**2 + 1).sqrt()
    conds = {str(i): sampler_helpers.convert_cond([[caption, {}]]) for i, caption in enumerate(captions)}
    conds = list(samplers.process_conds(model, x, conds, x.device, seed=0).values())
    model_options = {"transformer_options": dict(options or {})}

    def step():
        denoised = torch.cat(samplers.calc_cond_batch(model, conds, x, level, model_options))
        return (x - denoised) / level

    calls = []
    network = model.diffusion_model
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    step()  # warms up, too
    handle.remove()
    return Contestant(step, lambda: [network(*args, **kwargs) for args, kwargs in calls])


def patcher_around(model, device):
    """What ComfyUI does around a model that has its weights: on its device, ready to run."""
    from comfy import model_management, model_patcher

    patcher = model_patcher.ModelPatcher(model, device, device)
    model_management.load_models_gpu([patcher])
    patcher.pre_run()
    return patcher


def our_patcher(problem: Problem):
    """The MODEL that PixArt Load Model makes."""
    from comfy import supported_models

    from pixart_nodes.checkpoints.detect import Detection
    from pixart_nodes.comfy_bridge.memo import add_memo
    from pixart_nodes.comfy_bridge.model import PixArtModel, choose_dtypes

    family = problem.variant.split("-")[0]
    kind = supported_models.PixArtAlpha if family == "alpha" else supported_models.PixArtSigma
    config = kind(vars(problem.params))
    config.set_inference_dtype(*choose_dtypes(problem.dtype, problem.weights, config, problem.device))
    detection = Detection(problem.params, family, config.latent_format.scale_factor, "native", [])
    model = PixArtModel(config, detection, "random weights", device=problem.device).eval()
    model.diffusion_model.load_state_dict(problem.weights, assign=True)
    patcher = patcher_around(model, problem.device)
    add_memo(patcher)
    return patcher


def ours(problem: Problem) -> Contestant:
    from pixart_nodes.model.memo import KEY, Memo

    return comfy_contestant(problem, our_patcher(problem).model, problem.captions, {KEY: Memo()})


def comfyui(problem: Problem, best_case: bool = False) -> Contestant:
    """best_case: prompts of one length, so that it makes one pass, and PyTorch's attention in place of its choice."""
    from comfy import model_base, supported_models
    from comfy import model_management as mm
    from comfy.ldm.modules import attention
    from comfy.ldm.pixart import blocks

    p = problem.params
    config = supported_models.PixArtSigma({
        "num_heads": p.num_heads, "patch_size": p.patch_size, "hidden_size": p.hidden_size, "depth": p.depth,
        "in_channels": p.in_channels, "caption_channels": p.caption_channels, "model_max_length": p.caption_tokens,
        "input_size": 2 * p.base_size, "pe_interpolation": int(p.pe_interpolation), "micro_condition": False,
        "learn_sigma": True,
    })  # fmt: skip
    manual_cast = mm.unet_manual_cast(problem.dtype, problem.device, config.supported_inference_dtypes)
    config.set_inference_dtype(problem.dtype, manual_cast)
    model = model_base.PixArt(config, device=problem.device).eval()
    model.diffusion_model.load_state_dict(problem.weights, assign=True)
    long = problem.captions[0]
    captions = [long, long.flip(1)] if best_case else problem.captions

    def with_attention(function):
        def call():
            chosen = blocks.optimized_attention
            blocks.optimized_attention = attention.attention_pytorch if best_case else chosen
            try:
                return function()
            finally:
                blocks.optimized_attention = chosen

        return call

    contestant = comfy_contestant(problem, patcher_around(model, problem.device).model, captions)
    return Contestant(with_attention(contestant.step), with_attention(contestant.forward))


def diffusers_transformer(problem: Problem):
    from diffusers import PixArtTransformer2DModel

    from pixart_nodes.checkpoints.keys import to_diffusers

    p = problem.params
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=p.num_heads, attention_head_dim=p.hidden_size // p.num_heads, num_layers=p.depth,
            cross_attention_dim=p.hidden_size, caption_channels=p.caption_channels, sample_size=2 * p.base_size,
            interpolation_scale=p.pe_interpolation, use_additional_conditions=p.micro_condition,
        )  # fmt: skip
    model.load_state_dict(to_diffusers(problem.weights), assign=True)
    fresh = type(model.pos_embed)(  # its table is no weight, and cannot be made on the meta device
        height=2 * p.base_size, width=2 * p.base_size, patch_size=2, in_channels=4, embed_dim=p.hidden_size,
        interpolation_scale=p.pe_interpolation,
    )  # fmt: skip
    model.pos_embed.register_buffer("pos_embed", fresh.pos_embed.to(problem.device), persistent=False)
    return model.eval().requires_grad_(False)


def diffusers(problem: Problem) -> Contestant:
    model = diffusers_transformer(problem)
    missing = [problem.padded - caption.shape[1] for caption in problem.captions]
    padded = [torch.nn.functional.pad(c, (0, 0, 0, n)) for c, n in zip(problem.captions, missing, strict=True)]
    context = torch.cat(padded).to(problem.device, problem.dtype)
    mask = torch.arange(problem.padded) < torch.tensor([[problem.tokens], [problem.short]])
    inputs = {
        "hidden_states": problem.latent.repeat(2, 1, 1, 1).to(problem.dtype), "encoder_hidden_states": context,
        "timestep": torch.full((2,), TIMESTEP, device=problem.device),
        "encoder_attention_mask": mask.to(problem.device, problem.dtype),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
    }  # fmt: skip
    return Contestant(lambda: model(**inputs)[0][:, :4].float(), lambda: model(**inputs))


def bare(problem: Problem) -> Contestant:
    """The blocks' matrix products and attention alone, with nothing between them: what no implementation avoids.

    Weights are in the dtype that ours computes in, and of the caption only the real tokens are there.
    """
    from torch.nn.functional import linear, scaled_dot_product_attention

    from pixart_nodes.comfy_bridge.model import cpu_is_fast_in_bf16

    dtype = problem.dtype if problem.device.type != "cpu" or cpu_is_fast_in_bf16() else torch.float32
    names = "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"
    blocks = [
        [tuple(problem.weights[f"blocks.{i}.{name}.{kind}"].to(dtype) for kind in ("weight", "bias")) for name in names]
        for i in range(problem.depth)
    ]
    heads, tokens = problem.num_heads, problem.height * problem.width // 4
    x = torch.randn(2, tokens, problem.hidden_size, device=problem.device, dtype=dtype)
    keys = torch.randn(2, problem.tokens, heads, problem.hidden_size // heads, device=problem.device, dtype=dtype)
    mask = torch.arange(problem.tokens) < torch.tensor([[problem.tokens], [problem.short]])
    mask, keys = mask[:, None, None].to(problem.device), keys.transpose(1, 2)

    def attend(q, k, v, mask=None):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def step():
        for qkv, proj, q_linear, cross_proj, fc1, fc2 in blocks:
            q, k, v = linear(x, *qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            linear(attend(q, k, v), *proj)
            q = linear(x, *q_linear).unflatten(2, (heads, -1)).transpose(1, 2)
            linear(attend(q, keys, keys, mask), *cross_proj)
            linear(linear(x, *fc1), *fc2)

    step()
    return Contestant(step, step)


CONTESTANTS: dict[str, Callable[[Problem], Contestant]] = {
    "ours": ours,
    "diffusers": diffusers,
    "ComfyUI": comfyui,
    "ComfyUI, best case": lambda problem: comfyui(problem, best_case=True),
    "products and attention alone": bare,
}
