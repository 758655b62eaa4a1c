"""The nodes, as one ComfyUI extension."""

from comfy_api.latest import ComfyExtension

from ..comfy_bridge.compat import register_replacements
from ..comfy_bridge.model_files import register_bundled_models
from . import loaders, resolution, sampling, text
from .replacements import REPLACEMENTS


class PixArtExtension(ComfyExtension):
    async def on_load(self):  # not called before ComfyUI 0.14
        await register_replacements(REPLACEMENTS)

    async def get_node_list(self):
        return [*loaders.NODES, *text.NODES, *resolution.NODES, *sampling.NODES]


def extension() -> PixArtExtension:
    register_bundled_models()
    return PixArtExtension()
