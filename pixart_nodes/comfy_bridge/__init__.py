"""The ComfyUI side: everything that imports comfy.*, apart from the nodes themselves."""
