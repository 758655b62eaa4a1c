"""The ControlNet-Transformer alone: where it enters, what it costs, how it trains."""

from dataclasses import replace

import pytest
import torch

from pixart_nodes.model import ControlNetTransformer, ControlParams, KVCompress, PixArtParams, PixArtTransformer

PARAMS = PixArtParams(
    depth=5, hidden_size=24, num_heads=2, in_channels=4, patch_size=2, mlp_ratio=4.0, caption_channels=16,
    caption_tokens=120, base_size=8, pe_interpolation=1.0, micro_condition=False, qk_norm=False, kv_compress=None,
    learned_variance=True,
)  # fmt: skip
CONV = KVCompress("conv", 2, (1, 3))


def randomised(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def networks(params=PARAMS, num_blocks=3):
    base = randomised(PixArtTransformer(params), 0)
    base.y_embedder.y_embedding.zero_()
    return base, randomised(ControlNetTransformer(ControlParams.of(params, num_blocks)), 1)


def inputs(height=8, width=12, batch=2, seed=2):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])[:batch]
    x, context, hint = tensor(batch, 4, height, width), tensor(batch, 5, 16), tensor(batch, 4, height, width)
    return (x, torch.tensor([700.0, 33.5])[:batch], context, mask), hint


@pytest.mark.parametrize("count", [1, 2, 4])
def test_copy_i_enters_block_i_plus_1_and_the_first_starts_behind_block_0(count):
    base, net = networks(num_blocks=count)
    (x, t, context, mask), hint = inputs()
    before = [[] for _ in base.blocks]
    handles = [
        block.register_forward_pre_hook(lambda _, args, into=before[i]: into.append(args[0]))
        for i, block in enumerate(base.blocks)
    ]
    behind_0, entering, left = [], [], []
    handles.append(base.blocks[0].register_forward_hook(lambda _, args, out: behind_0.append(out)))
    for block in net.controlnet:
        handles.append(block.copied_block.register_forward_pre_hook(lambda _, args: entering.append(args[0])))
        handles.append(block.register_forward_hook(lambda _, args, out: left.append(out)))
    with torch.no_grad():
        base(x, t, context, mask, control={"branches": [net.branch(hint)]})
        assert all(len(calls) == 1 for calls in before) and len(entering) == count
        c = base.embed_image(hint, (4, 6))
        assert torch.allclose(entering[0], behind_0[0] + net.controlnet[0].before_proj(c), atol=1e-6)
        for i in range(1, count):
            assert torch.equal(entering[i], left[i - 1][0])
        assert torch.allclose(before[1][0], behind_0[0] + net.controlnet[0].after_proj(left[0][0]), atol=1e-6)
        for i in range(1, count):
            out = base.blocks[i](before[i][0], *_arguments(base, x, t, context, mask, i))
            assert torch.allclose(before[i + 1][0], out + left[i][1], atol=1e-5)


def _arguments(base, x, t, context, mask, index):
    from pixart_nodes.model.transformer import modulations

    _, t0 = base.embed_time(t, None, None, x.dtype)
    caption = base.y_embedder(context)
    return caption, modulations(base.blocks, t0)[index], base.attention_mask(mask, len(x), x.dtype), (4, 6), {}


def test_branches_given_residuals_and_weights_add_up():
    base, net = networks()
    (x, t, context, mask), hint = inputs()
    caught = []

    def catching(*args, **kwargs):
        for residual in net.residuals(*args, hint=hint, weights=(0.5, 0, 2.0)):
            caught.append(residual)
            yield residual

    with torch.no_grad():
        expected = base(x, t, context, mask, control={"branches": [catching]})
        assert caught[1] is None and len(caught) == 3
        given = base(x, t, context, mask, control={"output": caught})
        named = base(x, t, context, mask, control={"branches": [net.branch(hint, (0.5, 0, 2.0))]})
        both = base(x, t, context, mask, control={"output": caught, "branches": [net.branch(hint, (0, 0, 0))]})
    for out in (given, named, both):
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("control", [None, {}, {"output": [], "branches": []}, {"output": [None] * 9}])
def test_no_control_is_the_plain_network_to_the_bit(control):
    base, net = networks()
    arguments, hint = inputs()
    with torch.no_grad():
        plain = base(*arguments)
        assert torch.equal(base(*arguments, control=control), plain)
        assert torch.equal(base(*arguments, control={"branches": [net.branch(hint, (0.0, 0.0, 0.0))]}), plain)
        assert not torch.equal(base(*arguments, control={"branches": [net.branch(hint)]}), plain)


def test_one_hint_serves_a_whole_batch():
    base, net = networks()
    arguments, hint = inputs()
    with torch.no_grad():
        one = base(*arguments, control={"branches": [net.branch(hint[:1])]})
        each = base(*arguments, control={"branches": [net.branch(hint[:1].repeat(2, 1, 1, 1))]})
    assert torch.allclose(one, each, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 28), (7, 9)])
@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform", "uniform_every"])
def test_copies_of_compressing_blocks_know_the_grid_of_any_shape(sampling, size):
    """A grid guessed from the number of tokens would be square, and fail here or mix up rows."""
    params = replace(PARAMS, kv_compress=KVCompress(sampling, 2, (1, 3)))
    base, net = networks(params)
    arguments, hint = inputs(*size)
    with torch.no_grad():
        out = base(*arguments, control={"branches": [net.branch(hint)]})
        plain = base(*arguments)
    assert out.shape == plain.shape == (2, 4, *size) and not torch.equal(out, plain)


def test_a_net_made_from_its_base_starts_as_its_copy_and_steers_nothing():
    params = replace(PARAMS, qk_norm=True, kv_compress=CONV, micro_condition=False)
    base, _ = networks(params)
    net = ControlNetTransformer.from_base(base, 4)
    for i, block in enumerate(net.controlnet):
        for name, tensor in block.copied_block.state_dict().items():
            assert torch.equal(tensor, base.blocks[i].state_dict()[name])
        assert not any(p.any() for p in block.after_proj.parameters())
    arguments, hint = inputs()
    with torch.no_grad():
        steered = base(*arguments, control={"branches": [net.branch(hint)]})
        assert torch.allclose(steered, base(*arguments), atol=1e-6)
    base.blocks[0].mlp.fc1.weight.data.zero_()  # a copy, not the same tensors
    assert net.controlnet[0].copied_block.mlp.fc1.weight.any()


def test_it_learns_from_zero_while_the_base_stays():
    base, _ = networks()
    base.requires_grad_(False)
    net = ControlNetTransformer.from_base(base, 3)
    arguments, hint = inputs()
    loss = base(*arguments, control={"branches": [net.branch(hint)]}).square().mean()
    loss.backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {f"controlnet.{i}.after_proj.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    with torch.no_grad():
        for p in net.parameters():
            p -= 1e-2 * p.grad if p.grad is not None else 0
    again = base(*arguments, control={"branches": [net.branch(hint)]}).square().mean()
    assert again < loss
    again.backward()
    assert net.controlnet[0].before_proj.weight.grad.any() and net.controlnet[0].copied_block.attn.qkv.weight.grad.any()
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("count", [0, 5, 13])
def test_more_copies_than_blocks_to_steer_are_refused(count):
    with pytest.raises(ValueError, match=f"for 5 blocks has 1 to 4 copies of them, not {count}"):
        ControlParams.of(PARAMS, count)
