"""The nodes, as one ComfyUI extension."""

from comfy_api.latest import ComfyExtension

from ..comfy_bridge.compat import register_replacements
from ..comfy_bridge.model_files import register_bundled_models
from . import (
    cache_features,
    control,
    dataset,
    few_step,
    highres,
    highres_vae,
    loaders,
    lora,
    resolution,
    sampling,
    speed,
    text,
    training,
)
from .replacements import REPLACEMENTS


class PixArtExtension(ComfyExtension):
    async def on_load(self):  # not called before ComfyUI 0.14
        await register_replacements(REPLACEMENTS)

    async def get_node_list(self):
        return [
            *loaders.NODES, *text.NODES, *resolution.NODES, *sampling.NODES,
            *control.NODES, *few_step.NODES, *highres.NODES, *highres_vae.NODES, *lora.NODES,
            *speed.NODES,
            *dataset.NODES, *cache_features.NODES, *training.NODES,
        ]  # fmt: skip


def extension() -> PixArtExtension:
    register_bundled_models()
    training.register_monitor()
    return PixArtExtension()
