"""A ComfyUI node pack for the PixArt family of diffusion transformers."""
