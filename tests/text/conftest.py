import pytest
import torch

from pixart_nodes.text import t5


@pytest.fixture
def make_encoder():
    """Makes (weights, params) of a random T5 encoder."""

    def make(seed=0, **changes):
        sizes = {
            "vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 24, "gated": True,
            "num_buckets": 8, "max_distance": 32, "layer_norm_eps": 1e-6, "eos": 1, "pad": 0,
        } | changes  # fmt: skip
        params = t5.T5Params(**sizes)
        generator = torch.Generator().manual_seed(seed)
        shapes = t5.expected_shapes(params).items()
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes}, params

    return make
