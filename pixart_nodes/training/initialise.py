"""Weights of a transformer that is trained from scratch (PixArt-sigma diffusion/model/nets/PixArtMS.py:250-285)."""

import torch
from torch import nn

EMBEDDERS = ("t_embedder", "t_block", "csize_embedder", "ar_embedder", "y_embedder")


@torch.no_grad()
def initialise(model, embedder_std: float | None = 0.02) -> None:
    """Fill every weight of a PixArtTransformer from torch's global generator.

    Linear layers Xavier-uniform with zero bias; embedders N(0, embedder_std); the cross-attention's and the last
    projection start at zero; scale-shift tables and the null caption N(0, 1 / width). The original's 0.02 fits
    thousands of caption channels: for narrow models give None, which stands for 1 / sqrt(inputs) of each layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for name, parameter in model.named_parameters():
        if name.startswith(EMBEDDERS) and name.endswith("weight"):
            nn.init.normal_(parameter, std=embedder_std or parameter.shape[1] ** -0.5)
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for block in model.blocks:
        nn.init.zeros_(block.cross_attn.proj.weight)
        initialise_compression(block.attn)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.normal_(model.y_embedder.y_embedding, std=model.params.caption_channels**-0.5)


def initialise_compression(attn) -> None:
    """KV compression starts as the plain average of each cell."""
    if hasattr(attn, "sr"):
        nn.init.constant_(attn.sr.weight, 1 / attn.kv_compress.scale_factor**2)
        nn.init.zeros_(attn.sr.bias)
