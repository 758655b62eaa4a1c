"""Speed inside a real ComfyUI: what a run computes once, and the nodes that trade quality for time."""

import gc
import weakref

import pytest
import torch

from .drive import latent, prompt, sample
from .tiny import ALPHA_MS, SIGMA


@pytest.fixture
def watch():
    """watch(module) -> a list that grows with every call of the module."""
    handles = []

    def start(module):
        calls = []
        handles.append(module.register_forward_hook(lambda *_: calls.append(1)))
        return calls

    yield start
    for handle in handles:
        handle.remove()


def lora(seed=0, scale=0.3):
    """Random, on the weights that a run remembers the results of."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i in range(SIGMA.depth):
        name = f"diffusion_model.blocks.{i}.cross_attn.kv_linear"
        weights[f"{name}.lora_up.weight"] = torch.randn(96, 4, generator=generator) * scale
        weights[f"{name}.lora_down.weight"] = torch.randn(4, 48, generator=generator) * scale
    return weights


def without_memo(comfy, model):
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    assert clone.wrappers[WrappersMP.OUTER_SAMPLE].pop(comfy.pack("model.memo").KEY)
    return clone


# What a run computes once


def test_captions_are_projected_once_per_run(comfy, sigma, watch):
    network = sigma.model.diffusion_model
    projected = [watch(module) for module in (network.y_embedder, network.blocks[2].cross_attn.kv_linear)]
    blocks = watch(network.blocks[2])
    for run in (1, 2):
        sample(comfy, sigma, prompt(40, 1), prompt(3, 2), steps=5)
        assert [len(calls) for calls in projected] == [run, run] and len(blocks) == 5 * run


def test_a_run_that_remembers_gives_the_same_picture_as_one_that_does_not(comfy, load_model):
    for name, size in (("sigma.safetensors", latent(20, 12, batch=2)), ("alpha_ms.safetensors", latent(14, 16))):
        model = load_model(name)
        expected = sample(comfy, without_memo(comfy, model), prompt(9, 1), prompt(4, 2), size)
        assert torch.equal(sample(comfy, model, prompt(9, 1), prompt(4, 2), size), expected)


def test_sizes_of_micro_conditioned_models_are_embedded_once(comfy, load_model, watch):
    model = load_model("alpha_ms.safetensors")
    calls = watch(model.model.diffusion_model.csize_embedder)
    sample(comfy, model, steps=4)
    assert ALPHA_MS.micro_condition and len(calls) == 1


def test_regional_prompts_are_remembered_side_by_side(comfy, sigma, watch):
    region = [[prompt(5, 1)[0][0], {"area": (8, 8, 4, 8)}], *prompt(12, 3)]
    calls = watch(sigma.model.diffusion_model.y_embedder)
    out = sample(comfy, sigma, region, prompt(3, 2), steps=6)
    assert len(calls) == 2  # one batch for the region, one for the whole picture
    assert torch.equal(out, sample(comfy, without_memo(comfy, sigma), region, prompt(3, 2), steps=6))


def test_nothing_of_a_run_outlives_it(comfy, sigma, monkeypatch):
    module, made = comfy.pack("comfy_bridge.memo"), []

    class Watched(module.Memo):
        def __init__(self):
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, "Memo", Watched)
    sample(comfy, sigma)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    assert comfy.pack("model.memo").KEY not in sigma.model_options["transformer_options"]


def test_a_lora_between_two_runs_of_the_same_prompt_is_seen(comfy, sigma):
    from comfy import sd

    text, negative = prompt(9, 1), prompt(4, 2)
    plain = sample(comfy, sigma, text, negative)
    changed, _ = sd.load_lora_for_models(sigma, None, lora(), 1.0, 0)
    with_lora = sample(comfy, changed, text, negative)
    assert torch.equal(with_lora, sample(comfy, without_memo(comfy, changed), text, negative))
    assert (with_lora - plain).abs().max() > 1e-3
    assert torch.equal(sample(comfy, sigma, text, negative), plain)


def test_a_lora_with_a_schedule_changes_the_remembered_weights_within_a_run(comfy, sigma):
    from comfy import hooks

    def scheduled():
        group, frames = hooks.create_hook_lora(lora(), 1.0, 0.0), hooks.HookKeyframeGroup()
        for strength, start in ((0.0, 0.0), (1.0, 0.4), (0.2, 0.7)):
            frames.add(hooks.HookKeyframe(strength, start))
        group.set_keyframes_on_hooks(frames)
        return [[prompt(9, 1)[0][0], {"hooks": group}]]

    plain = sample(comfy, sigma, prompt(9, 1), steps=8)
    out = sample(comfy, sigma, scheduled(), steps=8)
    assert torch.equal(out, sample(comfy, without_memo(comfy, sigma), scheduled(), steps=8))
    assert (out - plain).abs().max() > 1e-3


def test_what_a_function_wrapper_does_to_a_caption_lasts_for_one_call_of_the_network(comfy, load_model):
    def in_place(apply, args):
        args["c"]["c_crossattn"].mul_(0.5)
        args["c"]["c_ar"].mul_(2)
        return apply(args["input"], args["timestep"], **args["c"])

    def on_copies(apply, args):
        c = args["c"] | {"c_crossattn": args["c"]["c_crossattn"] * 0.5, "c_ar": args["c"]["c_ar"] * 2}
        return apply(args["input"], args["timestep"], **c)

    pictures, seen = [], []
    for wrapper in (in_place, on_copies):
        model = load_model("alpha_ms.safetensors")
        model.set_model_unet_function_wrapper(wrapper)
        pictures.append(sample(comfy, model, prompt(9, 1), prompt(4, 2), steps=4))
    assert torch.equal(*pictures)

    def twice(apply, args):  # halved between two calls of one step
        for _ in range(2):
            seen.append(apply(args["input"], args["timestep"], **args["c"]))
            args["c"]["c_crossattn"].mul_(0.5)
        return seen[-1]

    model.set_model_unet_function_wrapper(twice)
    sample(comfy, model, prompt(9, 1), prompt(4, 2), steps=1)
    assert not torch.equal(*seen)


def test_gradients_of_a_lora_that_is_being_trained_are_not_cut_off(comfy, sigma):
    """ComfyUI trains inside a sampling run: weights change from step to step, and gradients must reach them."""
    memo = comfy.pack("model.memo").Memo()
    linear, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    for _ in range(2):
        linear.zero_grad()
        memo(linear, x).sum().backward()
        assert linear.weight.grad is not None
        linear.weight.data += 1


# PixArt Step Cache


def cached(comfy, model, threshold, start=0.0, end=1.0):
    return comfy.call("PixArtStepCache", model=model, threshold=threshold, start_percent=start, end_percent=end)[0]


def test_the_step_cache_skips_blocks_but_for_the_first(comfy, sigma, watch):
    first, last = (watch(sigma.model.diffusion_model.blocks[i]) for i in (0, SIGMA.depth - 1))
    sample(comfy, cached(comfy, sigma, 0.5), steps=12)
    assert len(first) == 12 and 1 <= len(last) < 12


def test_a_higher_threshold_is_faster_and_further_from_the_exact_picture(comfy, sigma, watch):
    exact, last = sample(comfy, sigma, steps=16), watch(sigma.model.diffusion_model.blocks[-1])
    computed, errors = [], []
    for threshold in (0.0, 0.3, 1.0):
        errors.append((sample(comfy, cached(comfy, sigma, threshold), steps=16) - exact).norm().item())
        computed.append(len(last))
        last.clear()
    assert computed[0] == 16 > computed[1] > computed[2]
    assert errors[0] == 0 < errors[1] <= errors[2]


def test_runs_do_not_share_a_step_cache(comfy, sigma):
    model = cached(comfy, sigma, 0.5)
    first = sample(comfy, model, steps=8)
    sample(comfy, model, steps=8, seed=7)
    assert torch.equal(sample(comfy, model, steps=8), first)


def test_the_step_cache_works_with_separate_calls_for_the_prompts(comfy, sigma, watch):
    """Regions of different size cannot share a call; each follows its own last step."""
    region = [[prompt(5, 1)[0][0], {"area": (8, 8, 4, 8)}], *prompt(12, 3)]
    exact, last = sample(comfy, sigma, region, steps=12), watch(sigma.model.diffusion_model.blocks[-1])
    out = sample(comfy, cached(comfy, sigma, 0.4), region, steps=12)
    assert 2 <= len(last) < 24
    assert (out - exact).norm() < 0.5 * exact.norm()


def test_the_step_cache_runs_under_block_replacement(comfy, sigma):
    model, seen = cached(comfy, sigma, 0.0), []

    def replace(args, extra):
        seen.append(args["img"].shape)
        return extra["original_block"](args)

    model.set_model_patch_replace(replace, "dit", "double_block", 0)
    assert torch.equal(sample(comfy, model, steps=4), sample(comfy, sigma, steps=4))
    assert len(seen) == 4


def test_the_step_cache_stands_back_from_scheduled_loras(comfy, sigma, watch, caplog):
    from comfy import hooks

    hooked = [[prompt(9, 1)[0][0], {"hooks": hooks.create_hook_lora(lora(), 1.0, 0.0)}]]
    last = watch(sigma.model.diffusion_model.blocks[-1])
    sample(comfy, cached(comfy, sigma, 1.0), hooked, steps=6)
    assert len(last) == 12 and "PixArt Step Cache does nothing here" in caplog.text


def test_a_wrong_range_and_a_foreign_model_are_refused(comfy, sigma):
    with pytest.raises(ValueError, match="start_percent 0.9 is behind end_percent 0.1"):
        cached(comfy, sigma, 0.1, 0.9, 0.1)
    foreign = sigma.clone()
    foreign.model = torch.nn.Identity()
    with pytest.raises(ValueError, match="PixArt Step Cache works on models from PixArt Load Model"):
        cached(comfy, foreign, 0.1)


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_comfyuis_own_step_caches_save_calls_of_the_network(comfy, sigma, watch, node):
    (model,) = comfy.call(node, model=sigma, reuse_threshold=1.0, start_percent=0.1, end_percent=0.95, verbose=False)
    last = watch(sigma.model.diffusion_model.blocks[-1])
    sample(comfy, model, steps=16)
    assert 0 < len(last) < 16


# PixArt Compile


@pytest.mark.slow
def test_compiled_blocks_give_the_same_picture_with_one_graph_for_all_blocks(comfy, sigma):
    from torch._dynamo.utils import counters

    exact = sample(comfy, sigma)
    torch._dynamo.reset()
    counters.clear()
    (model,) = comfy.call("PixArtCompile", model=sigma, mode="default")
    assert (sample(comfy, model) - exact).norm() < 1e-4 * exact.norm()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    sample(comfy, model, seed=5, steps=5)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(sample(comfy, sigma), exact)  # the model without the node is as it was


@pytest.mark.slow
def test_a_lora_on_a_compiled_model_is_seen(comfy, sigma):
    from comfy import sd

    changed, _ = sd.load_lora_for_models(sigma, None, lora(), 1.0, 0)
    (model,) = comfy.call("PixArtCompile", model=sigma, mode="default")
    (compiled,) = comfy.call("PixArtCompile", model=changed, mode="default")
    for one, other in ((model, sigma), (compiled, changed), (model, sigma)):
        exact = sample(comfy, other)
        assert (sample(comfy, one) - exact).norm() < 1e-4 * exact.norm()
