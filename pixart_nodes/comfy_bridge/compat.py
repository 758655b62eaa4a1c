"""Differences between ComfyUI 0.3.75 and 0.33, found by looking at signatures, never at version numbers."""

import inspect
import sys

import comfy.model_management
import comfy.model_patcher
import comfy.sample
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

# Presentation that ComfyUI learned after 0.3.75. Nothing breaks without it, so older versions go without.
NEWER_KEYWORDS = {"search_aliases", "essentials_category", "has_intermediate_output", "advanced"}


class AnyType(str):
    """The type of an output that may be connected to every input, also to a list of names, whose type is the list."""

    def __new__(cls, value="*"):  # copies are made with a value
        return super().__new__(cls, value)

    def __ne__(self, other):
        return False

    __hash__ = str.__hash__


def build(cls, *args, **keywords):
    """`cls(*args, **keywords)` for io.Schema and io.X.Input, without the presentation this ComfyUI does not know."""
    known = inspect.signature(cls.__init__).parameters
    return cls(*args, **{k: v for k, v in keywords.items() if k in known or k not in NEWER_KEYWORDS})


def model_patcher_class(disable_dynamic: bool = False):
    """The patcher class in force right now: ComfyUI replaces it after start-up where DynamicVRAM works (0.16)."""
    if disable_dynamic:
        return comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def clone_without_dynamic(model):
    """A clone of a MODEL whose weights ComfyUI does not stream in by itself (DynamicVRAM), as torch.compile needs."""
    if "disable_dynamic" in inspect.signature(model.clone).parameters:
        return model.clone(disable_dynamic=True)
    return model.clone()


def load_model_weights(model, state_dict, patcher):
    """Loads into a BaseModel; a dynamic patcher keeps the file's own tensors instead of copying them (0.12)."""
    if "assign" in inspect.signature(model.load_model_weights).parameters:
        model.load_model_weights(state_dict, "", assign=patcher.is_dynamic())
    else:
        model.load_model_weights(state_dict, "")


def fit_empty_latent(model, latent: dict):
    """The samples of a LATENT; empty ones made for other models get this model's channels and, since 0.16, its size."""
    fit = comfy.sample.fix_empty_latent_channels
    known = inspect.signature(fit).parameters
    return fit(model, latent["samples"], **{name: value for name, value in latent.items() if name in known})


def check_interrupt():
    """Raises ComfyUI's interrupt when the user pressed Cancel. Call once per step of anything slow."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def prompt_server():
    """The running server, or None where ComfyUI runs without one."""
    module = sys.modules.get("server")  # there wherever one runs; importing it can fail where none does
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def executing_node() -> str | None:
    """The id of the node that is being executed, None outside of a prompt."""
    context = get_executing_context()
    return context.node_id if context else None


def show_text(node_id, text: str):
    """Writes `text` under a node in the browser, where there is one."""
    if node_id and text and prompt_server() is not None:
        prompt_server().send_progress_text(text, node_id)


async def register_replacements(replacements):
    """Offers our nodes in place of another pack's (0.14): [{new_node_id, old_node_id, input_mapping, ...}, ...]."""
    if not hasattr(io, "NodeReplace") or prompt_server() is None:
        return
    from comfy_api.latest import ComfyAPI

    for replacement in replacements:
        await ComfyAPI().node_replacement.register(io.NodeReplace(**replacement))
