"""KV token compression: what a fresh one computes, which tokens it leaves out, and what it saves."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.live_tensors import LiveTensors
from pixart_nodes.model import VARIANTS, KVCompress, PixArtParams, PixArtTransformer, transformer
from pixart_nodes.model.attention import SelfAttention, sdpa
from pixart_nodes.model.kv_compress import compress_untrained, lost_tokens, untrained_tensors

TINY = PixArtParams(
    depth=4, hidden_size=48, num_heads=4, in_channels=4, patch_size=2, mlp_ratio=4.0, caption_channels=32,
    caption_tokens=300, base_size=16, pe_interpolation=0.5, micro_condition=False, qk_norm=False, kv_compress=None,
    learned_variance=True,
)  # fmt: skip
XL = VARIANTS["sigma-1024"]
DEEP, ALL = tuple(range(14, 28)), tuple(range(28))
GRIDS = [(4, 4), (8, 12), (7, 9), (5, 16), (13, 4)]


def tokens(grid, channels=48, seed=0):
    rows, cols = grid
    return torch.randn(2, rows * cols, channels, generator=torch.Generator().manual_seed(seed))


def attention_with(kv: KVCompress) -> SelfAttention:
    """One block's self-attention, its compression as `untrained_tensors` says."""
    attn = SelfAttention(TINY, kv, operations=torch.nn, attention=sdpa)
    start = {name.removeprefix("blocks.0.attn."): t for name, t in untrained_tensors(TINY, kv).items()}
    missing, unexpected = attn.load_state_dict(start, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"qkv", "proj"}
    return attn


# What it computes


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_start_without_weights_is_the_start_with_weights(grid, factor):
    x = tokens(grid)
    attn = attention_with(KVCompress("conv", factor, (0,)))
    with torch.no_grad():
        assert torch.allclose(compress_untrained(x, grid, "conv", factor), attn.compress(x, grid), atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_keeps_every_nth_row_and_column_unchanged(grid, factor):
    x = tokens(grid)
    attn = SelfAttention(TINY, KVCompress("uniform", factor, (0,)), operations=torch.nn, attention=sdpa)
    kept = compress_untrained(x, grid, "uniform", factor)
    assert torch.equal(kept, attn.compress(x, grid))
    rows, cols = (-(-side // factor) for side in grid)
    last = x.unflatten(1, grid)[:, (rows - 1) * factor, (cols - 1) * factor]
    assert torch.equal(kept.unflatten(1, (rows, cols))[:, -1, -1], last)


def test_a_cell_is_averaged_and_normalised():
    grid, x = (4, 6), tokens((4, 6))
    cell = x.unflatten(1, grid)[:, 2:4, 4:6].mean((1, 2))                     # the last cell
    expected = (cell - cell.mean(1, keepdim=True)) / (cell.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(compress_untrained(x, grid, "conv", 2)[:, -1], expected, atol=1e-5)


def test_a_row_that_fills_no_cell_changes_nothing():
    grid = (5, 6)
    x, other = tokens(grid), tokens(grid)
    other.unflatten(1, grid)[:, -1] += 1
    assert torch.equal(compress_untrained(x, grid, "conv", 2), compress_untrained(other, grid, "conv", 2))
    assert lost_tokens(grid, "conv", 2) == (1, 0) and lost_tokens((6, 7), "conv", 4) == (2, 3)
    assert lost_tokens(grid, "uniform", 2) == (0, 0) and lost_tokens((8, 4), "conv", 4) == (0, 0)


@pytest.mark.parametrize("sampling", ["conv", "uniform"])
@pytest.mark.parametrize("height, width", [(16, 16), (14, 30), (10, 26), (18, 12)])
def test_a_compressing_network_takes_every_size(sampling, height, width):
    model = PixArtTransformer(replace(TINY, kv_compress=KVCompress(sampling, 2, (1, 3))))
    for parameter in model.state_dict().values():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 4, height, width)
    with torch.no_grad():
        out = model(x, torch.tensor([500.0]), torch.randn(1, 5, 32))
    assert out.shape == x.shape and out.isfinite().all()


# What it saves: XL/2 on the meta device, where everything has a shape and nothing is computed


def meta_model(kv: KVCompress | None, attention=sdpa):
    return PixArtTransformer(replace(XL, kv_compress=kv), device="meta", dtype=torch.float16, attention=attention)


def forward(model, pixels: int, batch: int = 2):
    x = torch.empty(batch, 4, pixels // 8, pixels // 8, device="meta", dtype=torch.float16)
    context = torch.empty(batch, 300, 4096, device="meta", dtype=torch.float16)
    with torch.no_grad():
        model(x, torch.empty(batch, device="meta"), context)


@cache
def tflops(kv, pixels) -> float:
    with FlopCounterMode(display=False) as counter:
        forward(meta_model(kv), pixels)
    return counter.get_total_flops() / 1e12


def attention_tflops(pixels: int, keys: list[int], batch: int = 2) -> float:
    """Scores and weighted sums of every block: 2 x 2 N M C for N queries and M keys."""
    return sum(4 * batch * (pixels // 16) ** 2 * m * XL.hidden_size for m in keys) / 1e12


@pytest.mark.parametrize("pixels", [512, 4096])
@pytest.mark.parametrize("factor, layers", [(2, DEEP), (4, DEEP), (4, ALL)])
def test_arithmetic_falls_by_what_the_compressed_blocks_save(pixels, factor, layers):
    kv, N = KVCompress("conv", factor, layers), (pixels // 16) ** 2
    saved = tflops(None, pixels) - tflops(kv, pixels)
    keys = [N // factor**2 if i in layers else N for i in range(28)]
    expected = attention_tflops(pixels, [N] * 28) - attention_tflops(pixels, keys)
    convolutions = 2 * 2 * 2 * N * XL.hidden_size * len(layers) / 1e12        # k and v, each input read once
    assert saved == pytest.approx(expected - convolutions, rel=1e-3)


def test_papers_setting_saves_a_third_of_a_4k_forward():
    plain = tflops(None, 4096)
    assert tflops(KVCompress("conv", 2, DEEP), 4096) / plain == pytest.approx(0.67, abs=0.005)
    assert tflops(KVCompress("conv", 4, ALL), 4096) / plain == pytest.approx(0.17, abs=0.005)


@cache
def peak(kv, pixels, attention) -> float:
    """Peak of live tensors in one forward of batch 2, in units of a (B, N, C) tensor."""
    model = meta_model(kv, attention)
    with LiveTensors() as live:
        forward(model, pixels)
    return live.peak / (2 * (pixels // 16) ** 2 * XL.hidden_size * 2)


def fused(q, k, v, heads, mask=None, transformer_options=None):
    """The memory of an attention that never holds its scores."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("factor", [2, 4])
def test_unfused_attention_holds_fewer_scores_by_the_square_of_the_factor(factor):
    """Scores are (B, heads, N, M); other tensors are those that fused attention leaves, and copies of q, k and v."""
    N, kv = (2048 // 16) ** 2, KVCompress("conv", factor, ALL)
    matrix = XL.num_heads * N / XL.hidden_size                                # (B, heads, N, N) in (B, N, C)
    plain, compressed = (peak(how, 2048, sdpa) - peak(how, 2048, fused) for how in (None, kv))
    held = round(plain / matrix)
    assert plain == pytest.approx(held * matrix, rel=0.05)
    assert compressed == pytest.approx(plain / factor**2, rel=0.15)


def test_fused_attention_needs_no_long_keys_and_values_beside_the_short_ones():
    plain = peak(None, 4096, fused)
    assert peak(KVCompress("conv", 2, ALL), 4096, fused) < plain - 0.4
    assert peak(KVCompress("conv", 4, ALL), 4096, fused) < plain - 0.8


def test_hidden_layer_of_the_mlp_is_never_whole_at_4k():
    """It alone would be 4 tensors of (B, N, C), twice: before and behind its GELU."""
    assert peak(None, 4096, fused) < 9 < peak(None, 1024, fused)


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_an_mlp_in_parts_is_the_whole_mlp(monkeypatch, rows):
    """Also where every picture has a modulation of its own; with gradients the MLP is in one piece."""
    torch.manual_seed(0)
    block, C = transformer.PixArtBlock(TINY, 0, operations=torch.nn, attention=sdpa), TINY.hidden_size
    for modulation in (torch.randn(6, 1, 1, C), torch.randn(6, 3, 1, C)):
        inputs = torch.randn(3, 12, C), torch.randn(3, 5, C), modulation, None, (3, 4), {}
        whole = block(*inputs).detach()
        monkeypatch.setattr(transformer, "MLP_ROWS_CPU", rows)
        with torch.no_grad():
            assert torch.allclose(block(*inputs), whole, atol=1e-5)
