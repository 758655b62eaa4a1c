"""Savings that the user asks for: reused steps, guidance for a part of the steps, compiled blocks."""

import logging
from functools import partial

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch.utils._triton import has_triton

from ..model import step_cache
from . import compat
from .model import pixart_model

logger = logging.getLogger(__name__)

# What ComfyUI's guiders call their scales, and the value that turns each off: CFGGuider, DualCFGGuider, PerpNegGuider.
GUIDANCE_OFF = {"cfg": 1.0, "cfg1": 1.0, "cfg2": 1.0, "neg_scale": 0.0}
KNOWN_GUIDERS = ("Guider_DualCFG", "Guider_DualModel", "Guider_PerpNeg")  # those that guide in a way of their own
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")


def with_step_cache(model, threshold: float, start_percent: float, end_percent: float):
    """A clone of the MODEL whose runs each have a StepCache. Raises ValueError for models of other loaders."""
    pixart_model(model, "PixArt Step Cache")
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, step_cache.KEY)
    wrapper = partial(run_with_step_cache, settings=(threshold, *noise_levels(model, start_percent, end_percent)))
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, step_cache.KEY, wrapper)
    return clone


def run_with_step_cache(executor, *args, settings, **kwargs):
    options = executor.class_obj.model_options  # this run's own copy
    if "registered_hooks" in options:
        logger.warning("PixArt Step Cache does nothing here: hooks change the weights between the steps.")
        return executor(*args, **kwargs)
    cache = options["transformer_options"][step_cache.KEY] = step_cache.StepCache(*settings)
    try:
        return executor(*args, **kwargs)
    finally:
        del options["transformer_options"][step_cache.KEY]
        logger.info("PixArt Step Cache: %d of %d calls of the network reused the last one.", cache.skipped, cache.calls)


def with_guidance_interval(model, start_percent: float, end_percent: float):
    """A clone of the MODEL that is guided in a part of the steps only, and costs half in the others.

    Kynkaanniemi et al., "Applying Guidance in a Limited Interval", arXiv 2404.07724.
    """
    key, levels = "pixart_guidance", noise_levels(model, start_percent, end_percent)
    clone = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, say_if_not_guided),
        (WrappersMP.PREDICT_NOISE, partial(predict_within_interval, levels=levels)),
    ):
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def say_if_not_guided(executor, *args, **kwargs):
    """Logs, once in a run, that the guider guides in a way of its own, by scales that may have any name."""
    kind = type(executor.class_obj)
    if kind.predict_noise is not comfy.samplers.CFGGuider.predict_noise and kind.__name__ not in KNOWN_GUIDERS:
        logger.warning(
            "PixArt Guidance Interval may do nothing here: it does not know the scales of %s. Sample with KSampler, "
            "CFGGuider, DualCFGGuider or PerpNegGuider.",
            kind.__name__,
        )
    return executor(*args, **kwargs)


def predict_within_interval(executor, x, sigma, *args, levels, **kwargs):
    """Wraps a guider's prediction: its scales are off above and below the two noise levels."""
    guider, (start, end) = executor.class_obj, levels
    if end <= sigma.max().item() <= start:
        return executor(x, sigma, *args, **kwargs)
    scales = guidance_scales(guider)
    for name in scales:
        setattr(guider, name, GUIDANCE_OFF[name])
    try:
        return executor(x, sigma, *args, **kwargs)
    finally:
        for name, value in scales.items():
            setattr(guider, name, value)


def guidance_scales(guider) -> dict[str, float]:
    """The scales that a guider of ComfyUI has, by name."""
    return {name: getattr(guider, name) for name in GUIDANCE_OFF if hasattr(guider, name)}


def noise_levels(model, start_percent: float, end_percent: float) -> tuple[float, float]:
    """Fractions of the sampling time as noise levels, from high to low. Raises ValueError where they are swapped."""
    if start_percent > end_percent:
        raise ValueError(f"start_percent {start_percent} is behind end_percent {end_percent}: swap them.")
    schedule = model.get_model_object("model_sampling")
    return schedule.percent_to_sigma(start_percent), schedule.percent_to_sigma(end_percent)


def with_compiled_blocks(model, mode: str):
    """A clone of the MODEL whose blocks run through torch.compile; what is around them stays as it is.

    All blocks share one compiled graph, for their weights are inputs to it: a LoRA or a reloaded model costs nothing,
    a new picture size or a prompt of another length compiles again, the second time for every size.
    Raises ValueError for models of other loaders, and where torch.compile cannot work: on a GPU it needs Triton.
    """
    depth = pixart_model(model, "PixArt Compile").params.depth
    if model.load_device.type == "cuda" and not has_triton():
        raise ValueError(
            "PixArt Compile needs Triton, which this Python lacks: install the package triton (on Windows "
            "triton-windows) that fits this PyTorch, or remove the node."
        )
    clone = compat.clone_without_dynamic(model)
    blocks = [f"diffusion_model.blocks.{i}" for i in range(depth)]
    set_torch_compile_wrapper(clone, backend="inductor", mode=mode, keys=blocks)
    return clone
