"""ControlNets inside a real ComfyUI: what its sampler sees, ComfyUI's own Apply ControlNet, and ours."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from pixart_nodes.checkpoints import save_controlnet
from pixart_nodes.model import ControlNetTransformer, ControlParams, KVCompress, PixArtTransformer

from .drive import counted, latent, noise, predict, prompt, sample
from .tiny import ALPHA_MS, SIGMA, random_control, random_weights, save_random

KV = replace(SIGMA, kv_compress=KVCompress("conv", 2, (1, 2)))
SCALE = {"sigma": 0.13025, "alpha": 0.18215}


@pytest.fixture(scope="module")
def files(comfy):
    """Control files for the models of conftest.py, and one more base."""
    folder = comfy.folder("controlnet")
    save_controlnet(random_control(SIGMA), folder / "sigma.safetensors", SIGMA, "sigma", "a test")
    save_controlnet(random_control(SIGMA, 1, seed=6), folder / "sigma_one.safetensors", SIGMA, "sigma", "a test")
    save_controlnet(random_control(ALPHA_MS), folder / "alpha_ms.safetensors", ALPHA_MS, "alpha", "a test")
    save_controlnet(random_control(KV), folder / "kv.safetensors", KV, "sigma", "a test")
    save_random(comfy.folder("diffusion_models") / "kv.safetensors", KV, "sigma", seed=3)
    return folder


@pytest.fixture(scope="module")
def vae(comfy):
    return comfy.call("VAELoader", vae_name="pixart-tiny-vae.safetensors")[0]


@pytest.fixture
def load(comfy, files):
    """PixArt Load ControlNet with its widgets' defaults -> CONTROL_NET."""

    def run(name="sigma.safetensors", base="load it elsewhere", weight_dtype="auto"):
        return comfy.call("PixArtLoadControlNet", control_net_name=name, base=base, weight_dtype=weight_dtype)[0]

    return run


@pytest.fixture
def apply(comfy, vae):
    """ComfyUI's Apply ControlNet -> (positive, negative)."""

    def run(control, image=None, positive=None, negative=None, strength=1.0, start=0.0, end=1.0, vae=vae):
        return comfy.call(
            "ControlNetApplyAdvanced", positive=positive or prompt(7, 1), negative=negative or prompt(3, 2),
            control_net=control, image=edges() if image is None else image, strength=strength, start_percent=start,
            end_percent=end, vae=vae,
        )  # fmt: skip

    return run


@pytest.fixture
def apply_ours(comfy, vae):
    """PixArt Apply ControlNet with its widgets' defaults -> (positive, negative)."""

    def run(control, image=None, positive=None, negative=None, **widgets):
        defaults = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "fit": "crop", "posterior": "mode",
                    "posterior_seed": 0, "block_weights": "", "vae": vae}  # fmt: skip
        return comfy.call(
            "PixArtApplyControlNet", positive=positive or prompt(7, 1), negative=negative or prompt(3, 2),
            control_net=control, image=edges() if image is None else image, **defaults | widgets,
        )  # fmt: skip

    return run


def edges(height=128, width=128, batch=1, seed=9):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def network(params, seed=0):
    model = PixArtTransformer(params)
    model.load_state_dict(random_weights(params, seed))
    return model.requires_grad_(False)


def control_network(params, num_blocks=2, seed=5):
    net = ControlNetTransformer(ControlParams.of(params, num_blocks))
    net.load_state_dict(random_control(params, num_blocks, seed))
    return net.requires_grad_(False)


def steered(base, controls, x, t, context, mask=None, img_hw=None, aspect_ratio=None):
    """The network with ControlNets, written out as in the paper: [(ControlNetTransformer, hint, strength), ...]."""
    residuals = []

    def behind_block_0(_, args, x):
        _, caption, modulation, mask, grid, options = args
        t, t0 = base.embed_time(t_, img_hw, aspect_ratio, x.dtype)
        for net, hint, strength in controls:
            c, skips = base.embed_image(hint, grid).expand(len(x), -1, -1), []
            for block in net.controlnet:
                c = block.before_proj(c) + x if block.before_proj is not None else c
                table = block.copied_block.scale_shift_table + t0
                table = torch.stack([part + (i % 3 == 1) for i, part in enumerate(table.unbind(1))])[:, :, None]
                c = block.copied_block(c, caption, table, mask, grid, options)
                skips.append(strength * block.after_proj(c))
            residuals.append(skips)
        return x + sum(skips[0] for skips in residuals)

    def behind_block(i):
        return lambda _, args, x: x + sum(skips[i] for skips in residuals if i < len(skips))

    t_ = t
    handles = [base.blocks[0].register_forward_hook(behind_block_0)]
    handles += [base.blocks[i].register_forward_hook(behind_block(i)) for i in range(1, len(base.blocks))]
    try:
        return base(x, t, context, mask, img_hw, aspect_ratio)
    finally:
        for handle in handles:
            handle.remove()


def watched(model):
    """A clone of the model that notes what the network got and gave at every call."""
    from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

    calls, clone = [], model.clone()

    def note(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        calls.append((args, out))
        return out

    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note, clone.model_options, is_model_options=True)
    return clone, calls


# What the sampler sees


@pytest.mark.parametrize("strength, start, end, active", [
    (1.0, 0.0, 1.0, 6), (0.35, 0.0, 1.0, 6), (2.0, 0.0, 0.5, 3), (0.7, 0.3, 1.0, 4), (1.0, 0.1, 0.5, 2),
])  # fmt: skip
def test_every_step_equals_a_direct_call_of_the_network(comfy, sigma, load, apply, vae, strength, start, end, active):
    image, model = edges(), network(SIGMA)
    watching, calls = watched(sigma)
    positive, negative = apply(load(), image, strength=strength, start=start, end=end)
    sample(comfy, watching, positive, negative, steps=6)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["sigma"]
    assert len(calls) == 6
    sigmas = [sigma.model.model_sampling.sigma(args[1][:1]).item() for args, _ in calls]
    first, last = (sigma.model.model_sampling.percent_to_sigma(p) for p in (start, end))
    assert sum(first >= s * (1 - 1e-6) and s * (1 + 1e-6) >= last for s in sigmas) == active
    for level, ((x, t, context, mask, *_), out) in zip(sigmas, calls, strict=True):
        on = first >= level * (1 - 1e-6) and level * (1 + 1e-6) >= last
        controls = [(control_network(SIGMA), hint, strength)] if on else []
        expected = steered(model, controls, x, t, context, mask) if on else model(x, t, context, mask)
        assert x.shape[0] == 2                                                # both halves of guidance at once
        assert (out - expected).abs().max() < 1e-5
        assert not on or (out - model(x, t, context, mask)).abs().max() > 0.05


def test_a_micro_conditioned_model_of_another_shape_too(comfy, load_model, load, apply, vae):
    image, model = edges(96, 160), network(ALPHA_MS, seed=2)
    watching, calls = watched(load_model("alpha_ms.safetensors"))
    positive, negative = apply(load("alpha_ms.safetensors"), image)
    sample(comfy, watching, positive, negative, latent(12, 20), steps=2)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["alpha"]
    for (x, t, context, mask, img_hw, ratio, *_), out in calls:
        assert img_hw.tolist() == [[96, 160]] * 2
        expected = steered(model, [(control_network(ALPHA_MS), hint, 1.0)], x, t, context, mask, img_hw, ratio)
        assert (out - expected).abs().max() < 1e-5


def test_copies_of_compressing_blocks_get_the_token_grid(comfy, load_model, load, apply, vae):
    image, model = edges(64, 192), network(KV, seed=3)
    watching, calls = watched(load_model("kv.safetensors"))
    positive, negative = apply(load("kv.safetensors"), image)
    sample(comfy, watching, positive, negative, latent(8, 24), steps=2)
    with torch.inference_mode():
        hint = vae.encode(image) * SCALE["sigma"]
    for (x, t, context, mask, *_), out in calls:
        expected = steered(model, [(control_network(KV), hint, 1.0)], x, t, context, mask)
        assert (out - expected).abs().max() < 1e-5


def test_chained_control_nets_add_up(comfy, sigma, load, apply, apply_ours, vae):
    images = edges(seed=1), edges(seed=2)
    both = apply_ours(load("sigma_one.safetensors"), images[1], *apply(load(), images[0], strength=0.5), strength=0.8)
    watching, calls = watched(sigma)
    sample(comfy, watching, *both, steps=2)
    with torch.inference_mode():
        hints = [vae.encode(image) * SCALE["sigma"] for image in images]
    controls = [(control_network(SIGMA), hints[0], 0.5), (control_network(SIGMA, 1, seed=6), hints[1], 0.8)]
    for (x, t, context, mask, *_), out in calls:
        assert (out - steered(network(SIGMA), controls, x, t, context, mask)).abs().max() < 1e-5


def test_the_same_control_net_twice_is_one_model_in_memory(load, apply):
    control = load()
    positive, negative = apply(control, None, *apply(control))
    first, second = positive[0][1]["control"].get_models()
    assert first is second is control.patcher
    assert positive[0][1]["control"] is negative[0][1]["control"]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_strength_zero_is_the_plain_model_to_the_bit(comfy, sigma, load, apply_ours, strength):
    positive, negative = apply_ours(load(), strength=strength)
    assert torch.equal(sample(comfy, sigma, positive, negative), sample(comfy, sigma)) == (strength == 0)


def test_untrained_copies_change_nothing(comfy, sigma, files, load, apply):
    net = ControlNetTransformer.from_base(network(SIGMA), 2)
    save_controlnet(net, files / "untrained.safetensors", SIGMA, "sigma", "a test")
    out = sample(comfy, sigma, *apply(load("untrained.safetensors")))
    assert (out - sample(comfy, sigma)).abs().max() < 1e-6


def test_no_block_of_the_base_is_run_twice(comfy, sigma, load, apply):
    control, ran = load(), []
    blocks = [*sigma.model.diffusion_model.blocks, *(block.copied_block for block in control.patcher.model.controlnet)]
    handles = [block.register_forward_hook(lambda block, *_: ran.append(blocks.index(block))) for block in blocks]
    try:
        sample(comfy, sigma, *apply(control), steps=2)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 3, 1, 4, 2] * 2


def test_copies_behind_the_last_weight_are_not_run(comfy, sigma, load, apply_ours):
    control, ran = load(), []
    for block in control.patcher.model.controlnet:
        block.register_forward_hook(lambda *_: ran.append(1))
    some = sample(comfy, sigma, *apply_ours(control, block_weights="1, 0"), steps=2)
    assert len(ran) == 2
    assert not torch.equal(some, sample(comfy, sigma, *apply_ours(control), steps=2))


def test_block_weights_scale_each_copy(comfy, sigma, load, apply_ours, vae):
    watching, calls = watched(sigma)
    sample(comfy, watching, *apply_ours(load(), strength=2.0, block_weights="0.5, 0.25"), steps=1)
    ((x, t, context, mask, *_), out), = calls
    net = control_network(SIGMA)
    for block, weight in zip(net.controlnet, (1.0, 0.5), strict=True):
        block.after_proj.weight *= weight
        block.after_proj.bias *= weight
    with torch.inference_mode():
        hint = vae.encode(edges()) * SCALE["sigma"]
    assert (out - steered(network(SIGMA), [(net, hint, 1.0)], x, t, context, mask)).abs().max() < 1e-5


def test_fewer_block_weights_go_on_with_the_last(comfy, sigma, load, apply_ours):
    short = sample(comfy, sigma, *apply_ours(load(), block_weights="0.5"))
    assert torch.equal(short, sample(comfy, sigma, *apply_ours(load(), block_weights="0.5 0.5")))
    assert not torch.equal(short, sample(comfy, sigma, *apply_ours(load())))


# With ComfyUI's other features


def test_prompts_of_unequal_length_stay_in_one_batch(comfy, sigma, load, apply):
    model, calls = counted(sigma)
    sample(comfy, model, *apply(load(), positive=prompt(12, 1), negative=prompt(2, 2)), steps=2)
    assert [batch for batch, _ in calls] == [2, 2] and all(mask is not None for _, mask in calls)


def test_a_lora_on_the_base_reaches_the_hint_too(comfy, sigma, load, apply, vae):
    generator, layer = torch.Generator().manual_seed(0), "transformer.transformer_blocks"
    lora = {
        f"{layer}.{i}.attn1.to_out.0.lora_{part}.weight": torch.randn(*shape, generator=generator) / 4
        for i in range(3) for part, shape in (("A", (4, 48)), ("B", (48, 4)))
    }  # fmt: skip
    save_file(lora, comfy.folder("loras") / "control.safetensors")
    patched, = comfy.call("LoraLoaderModelOnly", model=sigma, lora_name="control.safetensors", strength_model=1.0)
    watching, calls = watched(patched)
    sample(comfy, watching, *apply(load()), steps=1)
    base = network(SIGMA)
    for i in range(3):
        up, down = (lora[f"{layer}.{i}.attn1.to_out.0.lora_{part}.weight"] for part in "BA")
        base.blocks[i].attn.proj.weight += up @ down
    with torch.inference_mode():
        hint = vae.encode(edges()) * SCALE["sigma"]
    ((x, t, context, mask, *_), out), = calls
    assert (out - steered(base, [(control_network(SIGMA), hint, 1.0)], x, t, context, mask)).abs().max() < 1e-5


def test_an_area_of_the_picture_follows_its_own_image(comfy, sigma, load, apply):
    positive, negative = apply(load())
    (area,) = comfy.call("ConditioningSetArea", conditioning=positive, width=64, height=128, x=0, y=0, strength=1.0)
    both = comfy.call("ConditioningCombine", conditioning_1=area, conditioning_2=prompt(7, 1))[0]
    out = sample(comfy, sigma, both, negative)
    plain = sample(comfy, sigma, comfy.call("ConditioningCombine", conditioning_1=prompt(7, 1),
                                            conditioning_2=prompt(7, 1))[0])  # fmt: skip
    assert not torch.equal(out, plain)
    assert set(positive[0][1]["control"].encoded) == {(16, 8), (16, 16)}


def test_a_masked_prompt_keeps_its_control(comfy, sigma, load, apply):
    positive, negative = apply(load())
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    widgets = {"mask": mask, "strength": 1.0, "set_cond_area": "default"}
    (masked,) = comfy.call("ConditioningSetMask", conditioning=positive, **widgets)
    both = comfy.call("ConditioningCombine", conditioning_1=masked, conditioning_2=prompt(7, 4))[0]
    assert not torch.equal(sample(comfy, sigma, both, negative), sample(comfy, sigma, *apply(load())))


def test_attention_overrides_see_the_copies_and_output_patches_do_not(comfy, sigma, load, apply):
    seen, patched, clone = [], [], sigma.clone()

    def override(attention, q, k, v, heads, **options):
        seen.append(options["transformer_options"]["block_type"])
        return attention(q, k, v, heads, **options)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    clone.set_model_patch(lambda out, options: patched.append(options["block_type"]) or out, "attn1_output_patch")
    sample(comfy, clone, *apply(load()), steps=1)
    assert seen == ["double"] * 2 + (["control"] * 2 + ["double"] * 2) * 2
    assert patched == ["double"] * 3


def test_weights_come_back_after_unloading_everything(comfy, sigma, load, apply):
    from comfy import model_management as mm

    conds = apply(load())
    before = sample(comfy, sigma, *conds)
    mm.unload_all_models()
    assert torch.equal(sample(comfy, sigma, *conds), before)


@pytest.mark.parametrize("base, control, tolerance", [
    ("fp32", "fp16", 0.01), ("fp32", "bf16", 0.05), ("fp32", "fp8_e4m3fn", 0.2), ("fp16", "fp32", 0.01),
    ("bf16", "fp16", 0.1), ("fp8_e4m3fn", "bf16", 0.3),
])  # fmt: skip
def test_base_and_control_may_have_different_dtypes(load_model, load, apply, base, control, tolerance):
    (reference,) = predict(load_model(), [apply(load())[0]], noise())
    (out,) = predict(load_model(weight_dtype=base), [apply(load(weight_dtype=control))[0]], noise())
    assert (out - reference).norm() <= tolerance * (reference - noise()).norm()
    assert not torch.equal(out, reference)


def test_eight_bit_control_nets_keep_tables_and_biases_in_sixteen(load):
    state_dict = load(weight_dtype="fp8_e4m3fn").patcher.model.state_dict()
    assert state_dict["controlnet.0.copied_block.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    assert state_dict["controlnet.1.after_proj.weight"].dtype == torch.float8_e4m3fn
    assert state_dict["controlnet.0.copied_block.scale_shift_table"].dtype == torch.float16


def test_a_clone_for_another_device_has_weights_of_its_own(comfy, sigma, load, apply):
    positive, negative = apply(load())
    control = positive[0][1]["control"]
    clone = control.deepclone_multigpu(torch.device("cpu"))
    clone.patcher.model.controlnet[0].after_proj.weight.data.zero_()
    changed = [[entry[0], {**entry[1], "control": clone}] for entry in positive]
    assert clone.get_models() != control.get_models()
    assert not torch.equal(sample(comfy, sigma, changed, negative), sample(comfy, sigma, positive, negative))


# The hint


def test_the_image_is_encoded_once_for_all_runs_and_both_halves(comfy, sigma, load, apply, vae, monkeypatch):
    encoded = []
    run = vae.first_stage_model.encode
    monkeypatch.setattr(vae.first_stage_model, "encode", lambda x: encoded.append(x.shape) or run(x))
    conds = apply(load())
    sample(comfy, sigma, *conds)
    sample(comfy, sigma, *conds, seed=1)
    assert encoded == [(1, 3, 128, 128)]
    sample(comfy, sigma, *conds, size=latent(8, 16))
    assert encoded[1:] == [(1, 3, 64, 128)]


def test_one_image_each_or_one_for_all(comfy, sigma, load, apply):
    def run(image, batch=3):
        return sample(comfy, sigma, *apply(load(), image), size=latent(batch=batch))

    def alike(a, b):
        return (a - b).abs().max() < 1e-4 * b.abs().max()

    each = torch.cat([edges(seed=seed) for seed in (1, 2, 3)])
    out = run(each)
    for i in range(3):
        assert alike(run(each[i : i + 1].repeat(3, 1, 1, 1))[i], out[i])
        assert alike(run(each[i : i + 1])[i], out[i])
    assert not alike(run(each[:1])[1], out[1])
    assert alike(run(each[:2])[2], run(each[[0, 1, 0]])[2])  # fewer: from the start again
    assert alike(run(each, batch=2), out[:2])                # more: the first ones


def test_a_latent_of_odd_size_is_steered(comfy, sigma, load, apply):
    assert sample(comfy, sigma, *apply(load(), edges(100, 200)), size=latent(15, 17)).shape == (1, 4, 15, 17)


@pytest.mark.parametrize("how, expected", [
    # 40 x 20 into 32 x 32: crop keeps the middle 20 rows, pad leaves 8 columns at each side, original does as crop here
    ("crop", (slice(None), slice(None), 16.0)), ("pad", (slice(None), slice(8, 24), 16.0)),
])  # fmt: skip
def test_an_image_of_another_shape_is_fitted(comfy, how, expected):
    fit = comfy.pack("comfy_bridge.hints").fit
    rows = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 3, 40, 20) / 40
    out = fit(rows, 32, 32, how)
    y, x, _ = expected
    assert out.shape == (1, 3, 32, 32) and (out[:, :, y, x][:, :, 4:-4] > 0).all()
    outside = out.clone()
    outside[:, :, y, x] = 0
    assert (outside == 0).all()
    assert out[0, 0, 15:17, 16].mean().item() == pytest.approx(19.5 / 40, abs=0.01)  # the centre stays the centre


def test_the_original_fit_is_torchvisions_resize_and_center_crop(comfy):
    torchvision = pytest.importorskip("torchvision.transforms")
    fit = comfy.pack("comfy_bridge.hints").fit
    for (h, w), (height, width) in (((300, 200), (128, 96)), ((200, 300), (128, 128)), ((97, 251), (64, 208)),
                                    ((50, 50), (72, 136)), ((128, 96), (128, 96))):  # fmt: skip
        image = edges(h, w).movedim(-1, 1)
        resized = torchvision.Resize(min(height, width))(image)
        expected = torchvision.CenterCrop((height, width))(resized)
        assert (fit(image, height, width, "original") - expected).abs().max() < 1e-6


def test_an_image_of_the_right_size_is_not_touched(comfy):
    hints = comfy.pack("comfy_bridge.hints")
    image = edges(72, 136).movedim(-1, 1)
    for how in hints.FITS:
        assert torch.allclose(hints.fit(image, 72, 136, how), image, atol=1e-6)


@pytest.fixture(scope="module")
def kl_vae(comfy):
    """A small random VAE of Stable Diffusion's kind: the bundled one knows no distribution."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.sd import VAE

    dims = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    config = {"params": {"ddconfig": dims, "embed_dim": 4}}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        weights = AutoencoderKL(**config["params"]).state_dict()
        weights = {
            name: torch.randn(t.shape, generator=generator) * 0.05 + (name.endswith("norm1.weight"))
            for name, t in weights.items()
        }
        return VAE(sd=weights, config=config)


def test_a_sample_of_the_posterior_has_its_mean_and_spread_and_its_seed(comfy, kl_vae):
    encode, network = comfy.pack("comfy_bridge.hints").encode, kl_vae.first_stage_model
    image = edges().movedim(-1, 1)
    with torch.inference_mode():
        mode = encode(kl_vae, image, None)
        mean, log_variance = network.quant_conv(network.encoder(image * 2 - 1)).chunk(2, dim=1)
        noise = torch.randn(mode.shape, generator=torch.Generator().manual_seed(7))
        expected = mean + noise * (log_variance.clamp(-30, 20) / 2).exp()
        assert mode.shape == (1, 4, 16, 16) and torch.allclose(mode, mean, atol=1e-5)
        assert torch.allclose(encode(kl_vae, image, 7), expected, atol=1e-5)
        assert torch.equal(encode(kl_vae, image, 7), encode(kl_vae, image, 7))
        assert not torch.equal(encode(kl_vae, image, 8), encode(kl_vae, image, 7))
        assert torch.equal(kl_vae.encode(image.movedim(1, -1)), mode)  # the VAE is left as it was


def test_a_vae_without_a_distribution_cannot_be_sampled(comfy, sigma, load, apply_ours):
    with pytest.raises(ValueError, match="one latent and no distribution .* set `posterior` to mode"):
        sample(comfy, sigma, *apply_ours(load(), posterior="sample"))


def test_both_halves_share_one_sample_of_the_posterior(comfy, sigma, load, apply_ours, kl_vae):
    encode = comfy.pack("comfy_bridge.hints").encode
    watching, calls = watched(sigma)
    sample(comfy, watching, *apply_ours(load(), posterior="sample", posterior_seed=3, vae=kl_vae), steps=2)
    with torch.inference_mode():
        hint = encode(kl_vae, edges().movedim(-1, 1), 3) * SCALE["sigma"]
    for (x, t, context, mask, *_), out in calls:
        expected = steered(network(SIGMA), [(control_network(SIGMA), hint, 1.0)], x, t, context, mask)
        assert x.shape[0] == 2 and (out - expected).abs().max() < 1e-5


def test_our_node_with_its_defaults_does_what_comfyuis_does(comfy, sigma, load, apply, apply_ours):
    assert torch.equal(sample(comfy, sigma, *apply_ours(load())), sample(comfy, sigma, *apply(load())))


def test_the_prompts_that_came_in_are_left_alone(load, apply_ours):
    positive, negative = prompt(7, 1), prompt(3, 2)
    apply_ours(load(), None, positive, negative)
    assert "control" not in positive[0][1] and "control" not in negative[0][1]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_and_transparent_images_count_as_their_visible_part(comfy, sigma, load, apply, channels, caplog):
    grey, alpha = edges()[..., :1], edges(seed=3)[..., :1].round()
    image = {1: grey, 2: torch.cat([grey, alpha], -1), 4: torch.cat([grey.expand(-1, -1, -1, 3), alpha], -1)}[channels]
    visible = (grey if channels == 1 else grey * alpha).expand(-1, -1, -1, 3)
    out = sample(comfy, sigma, *apply(load(), image))
    assert torch.equal(out, sample(comfy, sigma, *apply(load(), visible)))
    assert ("alpha channel" in caplog.text) == (channels != 1)


# What does not fit


def nan_image():
    image = edges()
    image[0, 5, 5, 1] = torch.nan
    return image


@pytest.mark.parametrize("image, message", [
    (nan_image(), r"values that are no numbers .* Look at what"), (edges(1, 1), r"1 x 1 pixels, .* at least 16 x 16"),
    (torch.rand(1, 64, 64, 5), r"shape \(1, 5, 64, 64\).* Connect an IMAGE"),
])  # fmt: skip
def test_an_image_that_cannot_be_followed_is_refused_where_it_is_applied(load, apply, apply_ours, image, message):
    for node in (apply, apply_ours):
        with pytest.raises(ValueError, match=rf"sigma.safetensors got an image .*{message}"):
            node(load(), image)


def test_without_a_vae_the_node_says_what_to_connect(load, apply):
    with pytest.raises(ValueError, match="connect the VAE that belongs to the PixArt model to the `vae` input"):
        apply(load(), vae=None)


def test_a_vae_of_another_kind_is_named_by_its_latents(comfy, sigma, load, apply):
    class Vae:
        def encode(self, pixels):
            return torch.zeros(pixels.shape[0], 16, pixels.shape[1] // 8, pixels.shape[2] // 8)

    with pytest.raises(ValueError, match=r"latents of shape \(16, 16, 16\).* works on \(4, 16, 16\)"):
        sample(comfy, sigma, *apply(load(), vae=Vae()))


def test_a_control_net_of_another_base_is_refused_with_the_difference(comfy, sigma, load_model, files, load, apply):
    wide = replace(SIGMA, hidden_size=72, num_heads=6)
    save_controlnet(random_control(wide), files / "wide.safetensors", wide, "sigma", "a test")
    deep = replace(SIGMA, depth=5)
    save_controlnet(random_control(deep, 4), files / "deep.safetensors", deep, "sigma", "a test")
    for name, reason in (
        ("wide", "the width of its blocks is 72, of the model's 48"), ("deep", "trained on 5 blocks, the model has 3"),
        ("alpha_ms", "trained on PixArt-alpha, the model is PixArt-sigma"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.safetensors does not fit sigma.safetensors: .*{reason}"):
            sample(comfy, sigma, *apply(load(f"{name}.safetensors")))


def test_our_control_net_on_a_model_of_another_loader_is_refused(comfy, load, apply):
    import comfy.model_base

    class Other(comfy.model_base.BaseModel):
        def __init__(self):
            pass

    control = apply(load())[0][0][1]["control"]
    with pytest.raises(ValueError, match="used on a Other model. Load the PixArt model with PixArt Load Model"):
        control.pre_run(Other(), lambda percent: 1 - percent)


def test_a_control_net_of_another_kind_on_our_model_is_refused(comfy, sigma, apply_ours):
    from comfy.controlnet import ControlNet

    foreign = ControlNet(torch.nn.Linear(1, 1), load_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="another model's ControlNet. Load it with PixArt Load ControlNet"):
        apply_ours(foreign)
    conds = [[entry[0], {"control": foreign}] for entry in prompt(7, 1)]
    with pytest.raises(ValueError, match="sigma.safetensors got a ControlNet for another kind of model. Take one for"):
        sample(comfy, sigma, conds)


@pytest.mark.parametrize("widgets, message", [
    ({"block_weights": "1, x"}, "'1, x' should be numbers"), ({"block_weights": "nan"}, "should be numbers"),
    ({"block_weights": "1 1 1"}, "has 3 numbers, but this ControlNet has 2 blocks"),
    ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 is after end_percent 0.2"),
])  # fmt: skip
def test_widgets_that_make_no_sense_are_refused(load, apply_ours, widgets, message):
    with pytest.raises(ValueError, match=message):
        apply_ours(load(), **widgets)


def test_a_name_that_is_not_listed_is_refused(load):
    with pytest.raises(FileNotFoundError, match="not in ComfyUI's ControlNet folders"):
        load("../../etc/passwd")


# The base in the same file


def test_the_base_in_the_file_can_be_taken(comfy, files, load_model, apply):
    from comfy_execution.graph_utils import ExecutionBlocker

    both = {f"base_model.{name}": tensor for name, tensor in random_weights(SIGMA).items()} | random_control(SIGMA)
    torch.save({"state_dict": both}, files / "original.pth")
    (files / "config.json").write_text('{"num_heads": 4, "hidden_size": 48, "caption_channels": 32, "base_size": 16, '
                                       '"pe_interpolation": 0.5}')  # fmt: skip
    try:
        widgets = {"control_net_name": "original.pth", "weight_dtype": "auto"}
        control, model = comfy.call("PixArtLoadControlNet", base="from this file", **widgets)
        other, blocked = comfy.call("PixArtLoadControlNet", base="load it elsewhere", **widgets)
    finally:
        (files / "config.json").unlink()
    assert isinstance(blocked, ExecutionBlocker) and "PixArt Load Model" in blocked.message
    out = sample(comfy, model, *apply(control))
    assert torch.allclose(out, sample(comfy, load_model(), *apply(other)), atol=1e-6)
    loader, arguments = model.cached_patcher_init[:2]
    assert arguments[-1] is True


def test_a_file_without_a_base_says_so(comfy, files):
    with pytest.raises(ValueError, match="sigma.safetensors: There is no base model in this ControlNet's file"):
        comfy.call("PixArtLoadControlNet", control_net_name="sigma.safetensors", base="from this file",
                   weight_dtype="auto")  # fmt: skip
