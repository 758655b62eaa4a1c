"""Captions and the T5 text encoder: cleaning, token limits, files, shapes. Knows nothing of ComfyUI."""
