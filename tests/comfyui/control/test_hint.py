"""The picture that a ControlNet follows: encoding, fitting, posterior."""

import pytest
import torch

from ..drive import latent, prompt, sample
from ..tiny import SIGMA
from .conftest import SCALE, control_network, edges, network, steered, watched


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
    as_rgb = comfy.pack("comfy_bridge.hints").as_rgb
    seen, expected = (as_rgb(picture.movedim(-1, 1), "a hint")[0] for picture in (image, visible))
    assert torch.equal(seen, expected)
    drawn, expected = (sample(comfy, sigma, *apply(load(), picture)) for picture in (image, visible))
    # their layout in memory changes the last bits of a product on some processors
    assert (drawn - expected).norm() < 1e-3 * expected.norm()
    assert ("alpha channel" in caplog.text) == (channels != 1)


@pytest.mark.parametrize("seed", [None, 7])
def test_an_image_is_encoded_in_tiles_where_memory_is_short(comfy, kl_vae, monkeypatch, seed):
    import comfy.model_management as mm

    encode, network = comfy.pack("comfy_bridge.hints").encode, kl_vae.first_stage_model
    whole, refused = network.encode, []

    def short_of_memory(*args, **kwargs):
        if not refused:
            refused.append(True)
            raise mm.OOM_EXCEPTION("out of memory")
        return whole(*args, **kwargs)

    image = edges().movedim(-1, 1)
    with torch.inference_mode():
        expected = encode(kl_vae, image, seed)
        monkeypatch.setattr(network, "encode", short_of_memory)
        tiled = encode(kl_vae, image, seed)
    assert refused and tiled.shape == expected.shape and (tiled - expected).abs().max() < 0.05
    assert kl_vae.latent_channels == 4
