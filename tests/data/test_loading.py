"""Encoders without ComfyUI: every form in which VAEs and T5s lie on disks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from pixart_nodes.data import loading
from pixart_nodes.data.loading import load_decoder, load_encoders, load_t5, load_vae

TINY_T5 = Path(loading.__file__).parents[1] / "assets" / "tiny" / "text_encoders" / "pixart-tiny-t5"
SMALL = {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4,
         "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL, scaling_factor=0.13025).eval()


def ldm_names(state, blocks=2):
    """diffusers' names -> those of the original files."""
    renamed = {}
    for name, weight in state.items():
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        for old, new in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"mid_block.attentions.0.{old}", f"mid.attn_1.{new}")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for n in range(blocks):
            name = name.replace(f"encoder.down_blocks.{n}.resnets", f"encoder.down.{n}.block")
            name = name.replace(f"encoder.down_blocks.{n}.downsamplers.0", f"encoder.down.{n}.downsample")
            name = name.replace(f"decoder.up_blocks.{n}.resnets", f"decoder.up.{blocks - 1 - n}.block")
            name = name.replace(f"decoder.up_blocks.{n}.upsamplers.0", f"decoder.up.{blocks - 1 - n}.upsample")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        is_attention = "mid.attn_1" in name and "norm" not in name and name.endswith("weight")
        renamed[name] = (weight[..., None, None] if is_attention else weight).contiguous()
    return renamed


def test_folder_file_and_original_names_are_the_same_vae(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "KL_CONFIG", SMALL)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    save_file(vae.state_dict(), tmp_path / "diffusers.safetensors")
    save_file(ldm_names(vae.state_dict()), tmp_path / "original.safetensors")
    pixels = torch.rand(2, 32, 48, 3)
    posterior = vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist
    expected, ids = torch.cat([posterior.mean, posterior.std], 1), set()
    for path in ("pipeline", "pipeline/vae", "diffusers.safetensors", "original.safetensors"):
        number, encode = load_vae(tmp_path / path, "sigma", "cpu", torch.float32)
        ids.add(number)
        assert torch.allclose(encode(pixels), expected, atol=1e-5), path
    assert len(ids) == 1


def test_a_vae_of_the_other_family_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the VAE of sigma .*0.13025.*, but the family is alpha"):
        load_vae(tmp_path, "alpha", "cpu", torch.float32)


def test_what_is_no_vae_is_named(tmp_path):
    save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "dit.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(2)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="dit.safetensors is no VAE"):
        load_vae(tmp_path / "dit.safetensors", "alpha", "cpu", torch.float32)
    with pytest.raises(ValueError, match="part.safetensors is no VAE of SD 1.5 or SDXL"):
        load_vae(tmp_path / "part.safetensors", "alpha", "cpu", torch.float32)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_vae(tmp_path, "alpha", "cpu", torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(ValueError, match="is no AutoencoderKL"):
        load_vae(tmp_path, "alpha", "cpu", torch.float32)


def test_captions_come_out_as_transformers_alone_makes_them_whatever_their_batch(tmp_path):
    reference = T5EncoderModel.from_pretrained(TINY_T5, dtype=torch.float32).eval()
    number, encode, null = load_t5(TINY_T5, 20, "cpu", torch.float32)
    texts = ["a red circle", "", "a small blue square on a green triangle, " * 9]
    together, alone = encode(texts), [encode([text])[0] for text in texts]
    assert encode([]) == []
    pieces = loading.T5Pieces(str(TINY_T5 / "tokenizer.json"))
    for text, a, b in zip(texts, together, alone, strict=True):
        ids = loading.cut(pieces(text)["input_ids"], 20)
        expected = reference(input_ids=torch.tensor([ids])).last_hidden_state[0].detach()
        assert len(ids) <= 20 and ids[-1] == 1
        assert torch.allclose(a, expected, atol=1e-4) and torch.allclose(b, expected, atol=1e-4)
    assert null().shape == (20, 128) and torch.allclose(null()[:1], alone[1], atol=1e-4)


def test_a_single_file_with_a_tokenizer_beside_it_is_the_same_t5(tmp_path):
    shutil.copy(TINY_T5 / "model.safetensors", tmp_path / "t5.safetensors")
    with pytest.raises(FileNotFoundError, match="No tokenizer.json"):
        load_t5(tmp_path / "t5.safetensors", 120, "cpu", torch.float32)
    shutil.copy(TINY_T5 / "tokenizer.json", tmp_path)
    assert load_t5(tmp_path / "t5.safetensors", 120, "cpu", None)[0] == load_t5(TINY_T5, 120, "cpu", torch.float32)[0]


def test_what_is_no_t5_is_named(tmp_path):
    shutil.copy(TINY_T5 / "tokenizer.json", tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors is no complete T5"):
        load_t5(tmp_path / "x.safetensors", 120, "cpu", None)
    tensors = load_file(TINY_T5 / "model.safetensors")
    tensors.pop(next(name for name in tensors if "wi_0" in name))
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="part.safetensors is incomplete"):
        load_t5(tmp_path / "part.safetensors", 120, "cpu", None)


def test_sigma_reads_more_tokens_and_keeps_the_case():
    vae = TINY_T5.parents[1] / "vae" / "pixart-tiny-vae.safetensors"
    alpha, sigma = (load_encoders(family, vae, TINY_T5, "cpu") for family in ("alpha", "sigma"))
    assert (alpha.token_limit, sigma.token_limit) == (120, 300)
    assert (alpha.prepare("A <b>Fox</b> "), sigma.prepare(" A Fox ")) == ("a fox", "A Fox")
    assert len({alpha.caption_key("x"), sigma.caption_key("x")}) == 2


def test_a_decoder_gives_back_the_pixels_of_the_vaes_own_decode(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    latent = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        expected = (vae.decode(latent / 0.13025).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    found = load_decoder(tmp_path, "sigma", "cpu", torch.float32)(latent)
    torch.testing.assert_close(found, expected)
