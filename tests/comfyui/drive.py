"""Runs a MODEL through ComfyUI's samplers with random prompts and latents of the tiny models' size."""

import torch


def prompt(tokens: int, seed: int, batch: int = 1, **extra):
    return [[torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(seed)), extra]]


def latent(height=16, width=16, batch=1, **extra):
    return {"samples": torch.zeros(batch, 4, height, width), **extra}


def sample(comfy, model, positive=None, negative=None, size=None, **settings):
    options = {"seed": 0, "steps": 3, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    (out,) = comfy.call(
        "KSampler", model=model, positive=positive or prompt(7, 1), negative=negative or prompt(3, 2),
        latent_image=size or latent(), **(options | settings),
    )  # fmt: skip
    assert torch.isfinite(out["samples"]).all()
    return out["samples"]


def counted(model):
    """A clone of the model that notes the batch size and mask of every call of the network."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    calls, clone = [], model.clone()

    def note(executor, *args, **kwargs):
        calls.append((args[0].shape[0], args[3]))
        return executor(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note, clone.model_options, is_model_options=True)
    return clone, calls


def predict(model, conds, x, sigma=5.0):
    """The model's denoised latents for a list of conditionings, evaluated in one go."""
    from comfy import model_management, sampler_helpers, samplers

    conds = {str(i): sampler_helpers.convert_cond(cond) for i, cond in enumerate(conds)}
    model_management.load_models_gpu([model])
    model.pre_run()
    with torch.inference_mode():
        conds = samplers.process_conds(model.model, x, conds, x.device, seed=0)
        level = torch.full((x.shape[0],), sigma)
        return samplers.calc_cond_batch(model.model, list(conds.values()), x, level, model.model_options)


def noise(batch=1, height=16, width=16, channels=4):
    return 5 * torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))
