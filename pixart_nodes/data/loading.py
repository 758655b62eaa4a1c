"""VAE (diffusers) and T5 (transformers) as encoders for processes without ComfyUI."""

import json
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from ..checkpoints.configs import LATENT_SCALE
from ..checkpoints.files import load_file_tensors
from ..text import t5, t5_files
from ..text.captions import TOKEN_LIMITS
from ..text.tokenizer import T5Pieces
from .encode import FINGERPRINT_TEXT, Encoders, caption_cleaner, weights_id

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The autoencoder of SD 1.5 and of SDXL alike, for files without a config.json.
KL_CONFIG = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def load_encoders(family: str, vae: str, t5_path: str, device, dtype: str = "auto") -> Encoders:
    """Encoders from files. `dtype` as the weights are computed in; "auto": fp32 for the VAE, T5 as in its file.

    On a CPU everything is computed in fp32. Raises ValueError or FileNotFoundError, with the file's name.
    """
    on_cpu = torch.device(device).type == "cpu"
    wanted = torch.float32 if on_cpu else DTYPES[dtype]
    vae_id, encode_images = load_vae(Path(vae), family, device, wanted or torch.float32)
    t5_id, encode_captions, null_caption = load_t5(Path(t5_path), TOKEN_LIMITS[family], device, wanted)
    return Encoders(
        family=family, vae_id=vae_id, encode_images=encode_images, t5_id=t5_id, prepare=caption_cleaner(family),
        encode_captions=encode_captions, null_caption=null_caption, token_limit=TOKEN_LIMITS[family],
    )  # fmt: skip


def load_vae(path: Path, family: str, device, dtype: torch.dtype):
    """(id, pixels (B, H, W, 3) in 0..1 -> moments) of a diffusers folder or a single file."""
    found = read_vae(path, family)
    return (taesd_encoder if isinstance(found, dict) else kl_encoder)(found, device, dtype)


def load_decoder(path: Path, family: str, device, dtype: torch.dtype):
    """scaled latent (B, 4, H/8, W/8) -> pixels (B, H, W, 3) in 0..1, fp32 on the CPU, of the same files."""
    found = read_vae(path, family)
    decode = (taesd_decoder if isinstance(found, dict) else kl_decoder)(found, device, dtype)

    @torch.inference_mode()
    def run(latent: Tensor) -> Tensor:
        pixels = decode((latent / LATENT_SCALE[family]).to(device, dtype))
        return pixels.float().cpu().clamp(0, 1).movedim(1, -1)

    return run


def read_vae(path: Path, family: str) -> AutoencoderKL | dict[str, Tensor]:
    """The autoencoder, or the tensors of a TAESD. Raises ValueError or FileNotFoundError, with the file's name."""
    if path.is_dir():
        return read_vae_folder(path, family)
    tensors, _ = load_file_tensors(path)
    tensors = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    if any(name.startswith("taesd_encoder.") for name in tensors):
        return tensors
    if not any(name.startswith("encoder.") for name in tensors):
        raise ValueError(f"{path.name} is no VAE of Stable Diffusion: it has no encoder. ({path})")
    model = AutoencoderKL(**KL_CONFIG)
    try:
        if not any(name.startswith("encoder.down_blocks.") for name in tensors):
            tensors = convert_ldm_vae_checkpoint(tensors, model.config)
        model.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path.name} is no VAE of SD 1.5 or SDXL ({str(error):.200}). ({path})") from error
    return model


def read_vae_folder(path: Path, family: str) -> AutoencoderKL:
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no VAE: it has no config.json. Give a diffusers folder or a file.")
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{folder} is no AutoencoderKL, which PixArt's VAEs are.")
    model = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    scale = model.config.scaling_factor
    other = "sigma" if family == "alpha" else "alpha"
    if abs(scale - LATENT_SCALE[other]) < 1e-4:
        raise ValueError(
            f"{folder} is the VAE of {other} (scaling_factor {scale}), but the family is {family}, whose VAE has "
            f"{LATENT_SCALE[family]}."
        )
    return model


def kl_encoder(model: AutoencoderKL, device, dtype: torch.dtype):
    names = ("encoder.", "quant_conv.")
    fingerprint = weights_id(weight for name, weight in model.state_dict().items() if name.startswith(names))
    model = model.eval().requires_grad_(False).to(device, dtype)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        posterior = model.encode(pixels.movedim(-1, 1).to(device, dtype) * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1).float().cpu()  # (B, 8, H/8, W/8)

    return fingerprint, encode


def kl_decoder(model: AutoencoderKL, device, dtype: torch.dtype):
    model = model.eval().requires_grad_(False).to(device, dtype)
    del model.encoder
    return lambda latent: model.decode(latent).sample / 2 + 0.5


def taesd_encoder(tensors: dict[str, Tensor], device, dtype: torch.dtype):
    """TAESD as ComfyUI keeps it: `vae_scale` turns its latents into those of the big VAE; the mean alone."""
    fingerprint = weights_id(weight for name, weight in tensors.items() if name.startswith(("taesd_encoder.", "vae_s")))
    encoder = AutoencoderTiny().encoder
    prefix = "taesd_encoder."
    encoder.layers.load_state_dict({
        name.removeprefix(prefix): weight for name, weight in tensors.items() if name.startswith(prefix)
    })  # fmt: skip
    encoder = encoder.eval().requires_grad_(False).to(device, dtype)
    scale, shift = taesd_scale(tensors)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        latent = encoder.layers(pixels.movedim(-1, 1).to(device, dtype)).float().cpu()
        return latent / scale + shift  # (B, 4, H/8, W/8)

    return fingerprint, encode


def taesd_scale(tensors: dict[str, Tensor]) -> tuple[float, float]:
    return float(tensors.get("vae_scale", 1.0)), float(tensors.get("vae_shift", 0.0))


def taesd_decoder(tensors: dict[str, Tensor], device, dtype: torch.dtype):
    decoder, prefix = AutoencoderTiny().decoder, "taesd_decoder."
    names = {name: name.removeprefix(prefix).partition(".") for name in tensors if name.startswith(prefix)}
    decoder.layers.load_state_dict({  # ComfyUI counts the clamp in front as a layer
        f"{int(layer) - 1}.{leaf}": tensors[name] for name, (layer, _, leaf) in names.items()
    })  # fmt: skip
    decoder = decoder.eval().requires_grad_(False).to(device, dtype)
    scale, shift = taesd_scale(tensors)
    return lambda latent: decoder((latent - shift) * scale) / 2 + 0.5


def load_t5(path: Path, limit: int, device, dtype: torch.dtype | None):
    """(id, captions -> features, () -> null caption) of a Hugging Face folder or a single file with a tokenizer."""
    files = t5_files.locate(str(path))
    if not files.tokenizers:
        raise FileNotFoundError(f"No tokenizer.json or spiece.model lies beside {path}. Copy the T5's own there.")
    pieces = T5Pieces(files.tokenizers[0])
    model = build_t5(files, path.name, dtype)
    weights = [weight for name, weight in model.state_dict().items() if name != "encoder.embed_tokens.weight"]
    fingerprint = weights_id(weights, repr(pieces(FINGERPRINT_TEXT)["input_ids"]))
    model = model.eval().requires_grad_(False).to(device)
    pad = model.config.pad_token_id

    @torch.inference_mode()
    def run(rows: list[list[int]], length: int):
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)  # (B, L)
        lengths = torch.tensor([[len(row)] for row in rows], device=device)
        mask = (torch.arange(length, device=device) < lengths).long()
        return model(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu()  # (B, L, D)

    def encode(texts: list[str]) -> list[Tensor]:
        rows = [cut(pieces(text)["input_ids"], limit) for text in texts]
        return [features[: len(row)] for row, features in zip(rows, run(rows, max(map(len, rows))), strict=True)]

    return fingerprint, lambda texts: encode(texts) if texts else [], partial(null_caption, run, pieces, limit)


def null_caption(run, pieces: T5Pieces, limit: int) -> Tensor:
    return run([cut(pieces("")["input_ids"], limit)], limit)[0]  # (L, D)


def cut(ids: list[int], limit: int) -> list[int]:
    """The first limit - 1 tokens and the closing `</s>`."""
    return ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:]


def build_t5(files: t5_files.T5Files, where: str, dtype: torch.dtype | None) -> T5EncoderModel:
    tensors = {name: weight for path in files.weights for name, weight in load_file_tensors(Path(path))[0].items()}
    prefix = t5.encoder_prefix(tensors)
    if prefix is None:
        raise ValueError(f"{where} is no complete T5 encoder. Download it again, with all of its shards.")
    weights = t5.encoder_weights(tensors, prefix, where)
    params = t5.params_from(weights, t5_files.read_config(files.config) if files.config else None, where)
    scaled = any(name.endswith(".scale_weight") for name in weights)
    weights = t5.cast(weights, torch.bfloat16 if scaled and dtype is None else dtype, where)
    config = T5Config(
        vocab_size=params.vocab_size, d_model=params.d_model, num_layers=params.num_layers, d_kv=params.d_kv,
        num_heads=params.num_heads, d_ff=params.d_ff, relative_attention_num_buckets=params.num_buckets,
        relative_attention_max_distance=params.max_distance, layer_norm_epsilon=params.layer_norm_eps,
        feed_forward_proj="gated-gelu" if params.gated else "relu", eos_token_id=params.eos, pad_token_id=params.pad,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5EncoderModel(config)
    for name in list(weights):
        if name.endswith(".wo.weight") and weights[name].dtype == torch.float16:
            weights[name] = weights[name].float()  # its output overflows fp16; transformers keeps it so, too
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model.load_state_dict(weights, assign=True)
    return model
