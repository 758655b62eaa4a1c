"""PixArt-alpha, PixArt-delta and PixArt-Sigma for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this once; nothing of the pack is imported before."""
    from .pixart_nodes.nodes import extension

    return extension()
