import dataclasses

import pytest
import torch

from pixart_nodes.model import PixArtParams, PixArtTransformer
from pixart_nodes.model.position import position_table

TINY = PixArtParams(
    depth=2, hidden_size=24, num_heads=2, in_channels=4, patch_size=2, mlp_ratio=4.0,
    caption_channels=16, caption_tokens=300, base_size=32, pe_interpolation=1.0,
    micro_condition=False, qk_norm=False, kv_compress=None, learned_variance=True,
)  # fmt: skip


@pytest.fixture
def tiny():
    """Makes the parameters of a tiny Sigma-512, with changes."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture
def make_model():
    """Makes a transformer with random weights everywhere."""

    def make(params, seed=0):
        generator = torch.Generator().manual_seed(seed)
        model = PixArtTransformer(params)
        state = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in model.state_dict().items()}
        model.load_state_dict(state)
        return model.eval()

    return make


@pytest.fixture
def original(make_model):
    """Makes the state dict that the original code would save: our tensors and the position table."""

    def make(params, seed=0):
        table = position_table(
            params.base_size, params.base_size, params.hidden_size, params.base_size, params.pe_interpolation
        )
        return {"pos_embed": table, **make_model(params, seed).state_dict()}

    return make


@pytest.fixture
def picture():
    """Runs a model on fixed random inputs and gives all its output channels."""

    @torch.no_grad()
    def run(model):
        p, g = model.params, torch.Generator().manual_seed(1)
        extra = {}
        if p.micro_condition:
            extra = {"img_hw": torch.tensor([[64.0, 96.0]]), "aspect_ratio": torch.tensor([[0.67]])}
        return model(
            torch.randn(1, p.in_channels, 8, 12, generator=g), torch.tensor([500.0]),
            torch.randn(1, 5, p.caption_channels, generator=g), learned_variance=True, **extra,
        )  # fmt: skip

    return run
