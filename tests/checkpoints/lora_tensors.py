"""Tensors of tiny LoRAs."""

import torch

TO_Q = "transformer_blocks.0.attn1.to_q"


def linear(name, rank=4, rows=24, columns=24, seed=0, style=("lora_A.weight", "lora_B.weight")):
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    return {f"{name}.{style[0]}": down, f"{name}.{style[1]}": up}


def only(lora):
    (adapter,) = lora.adapters
    return adapter
