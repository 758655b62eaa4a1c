"""One memo per sampling run: what depends on the prompt and the size alone is computed at the first step only."""

from comfy.patcher_extension import WrappersMP

from ..model.memo import KEY, Memo


def add_memo(patcher):
    """Gives every sampling run of a MODEL a memo of its own, gone when the run is over."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run_with_memo)


def has_function_wrapper(model_options) -> bool:
    """Whether another node's function stands between conditions and network: it may change captions in place."""
    return "model_function_wrapper" in model_options


def run_with_memo(executor, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options  # this run's own copy
    weights_change = "registered_hooks" in options or guider.model_patcher.model.training
    if not weights_change and not has_function_wrapper(options):
        options["transformer_options"][KEY] = Memo()
    try:
        return executor(*args, **kwargs)
    finally:
        options["transformer_options"].pop(KEY, None)
