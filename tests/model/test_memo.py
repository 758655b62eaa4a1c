"""What a sampling run computes once: remembered by identity, for as long as its input lives, never under gradients."""

import gc

import pytest
import torch
from comfyui.tiny import ALPHA_MS, SIGMA, random_weights
from torch import nn

from pixart_nodes.model import PixArtTransformer
from pixart_nodes.model.memo import KEY, Memo


class Counted(nn.Module):
    calls = 0

    def forward(self, x, factor=2.0):
        self.calls += 1
        return x * factor


@pytest.fixture
def memo():
    with torch.inference_mode():
        yield Memo()


def test_the_same_tensor_is_computed_once(memo):
    double, x = Counted(), torch.ones(2)
    assert memo(double, x) is memo(double, x)
    assert double.calls == 1


def test_an_equal_tensor_another_module_and_another_argument_are_computed_anew(memo):
    double, other, x = Counted(), Counted(), torch.ones(2)
    memo(double, x)
    memo(double, x.clone())
    memo(double, x, 3.0)
    memo(other, x)
    assert double.calls == 3 and other.calls == 1
    assert torch.equal(memo(double, x, 3.0), x * 3)


def test_results_go_when_their_input_goes(memo):
    double, x = Counted(), torch.ones(2)
    chained = memo(double, memo(double, x))
    assert len(memo.of_tensors) == 2
    del x, chained
    gc.collect()
    assert len(memo.of_tensors) == 0


def test_nothing_is_remembered_while_gradients_are_recorded():
    memo, double, x = Memo(), Counted(), torch.ones(2, requires_grad=True)
    memo(double, x)
    assert memo(double, x).requires_grad and double.calls == 2


def network(params):
    model = PixArtTransformer(params)
    model.load_state_dict(random_weights(params))
    return model


def inputs(params, batch=2, tokens=8):
    generator = torch.Generator().manual_seed(1)
    size = {"img_hw": torch.tensor([[128.0, 96.0]]), "aspect_ratio": torch.tensor([[0.75]])}
    return {
        "context": torch.randn(batch, tokens, params.caption_channels, generator=generator),
        "context_mask": torch.tensor([[1] * tokens, [1] * 3 + [0] * (tokens - 3)]),
        **(size if params.micro_condition else {}),
    }  # fmt: skip


@pytest.mark.parametrize("params", [SIGMA, ALPHA_MS], ids=["sigma", "micro-conditioned"])
def test_a_run_with_a_memo_computes_the_same_and_projects_the_caption_once(params):
    model, fixed, options = network(params), inputs(params), {KEY: Memo()}
    projected = []
    for module in (model.y_embedder, *(block.cross_attn.kv_linear for block in model.blocks)):
        module.register_forward_hook(lambda *_: projected.append(1))
    with torch.inference_mode():
        for step, t in enumerate((900.0, 500.0, 20.5)):
            x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(step))
            plain = model(x, torch.tensor([t, t]), **fixed)
            assert torch.equal(model(x, torch.tensor([t, t]), transformer_options=options, **fixed), plain)
    assert len(projected) == (3 + 1) * (1 + params.depth)


def test_prompts_and_sizes_that_alternate_within_a_run_do_not_mix():
    model, options = network(SIGMA), {KEY: Memo()}
    first, second = inputs(SIGMA), inputs(SIGMA, tokens=5)
    with torch.inference_mode():
        for height, fixed in ((8, first), (12, second), (8, second), (12, first), (8, first)):
            x, t = torch.ones(2, 4, height, 8), torch.tensor([300.0, 300.0])
            assert torch.equal(model(x, t, transformer_options=options, **fixed), model(x, t, **fixed))


@pytest.mark.parametrize("params", [SIGMA, ALPHA_MS], ids=["sigma", "micro-conditioned"])
def test_one_timestep_serves_a_whole_batch(params):
    model, fixed = network(params), inputs(params)
    x, t = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([400.25])
    with torch.inference_mode():
        one, each = model(x, t, **fixed), model(x, t.repeat(2), **fixed)
    assert (one - each).abs().max() < 1e-5 * each.abs().max()


def test_rows_at_different_timesteps_are_independent():
    model, fixed = network(SIGMA), inputs(SIGMA)
    x, t = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([800.0, 30.0])
    with torch.inference_mode():
        both = model(x, t, **fixed)
        for i in range(2):
            row = {name: value[i : i + 1] for name, value in fixed.items()}
            assert (model(x[i : i + 1], t[i : i + 1], **row) - both[i]).abs().max() < 1e-5 * both.abs().max()


def test_gradients_reach_every_weight_with_a_memo_too():
    model, fixed = network(SIGMA), inputs(SIGMA)
    x, t = torch.randn(2, 4, 8, 6), torch.tensor([400.0, 10.0])
    for _ in range(2):
        model.zero_grad()
        out = model(x, t, transformer_options={KEY: Memo()}, learned_variance=True, **fixed)
        out.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
