"""Fills the feature cache: pictures -> VAE moments, captions -> T5 features. The encoders come in as callables."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import replacing
from ..text.captions import clean_caption
from .cache import Store, content_key
from .manifest import Bucket, Manifest, Progress, Sample
from .pictures import load_pixels

PROBES = 16  # places of a weight that its fingerprint looks at
FINGERPRINT_TEXT = "A fingerprint of the tokenizer: 1024 Foxes, 25 % snow!"
NULL_CAPTION = None  # the caption key of T5("") with its pads


@dataclass(frozen=True)
class Encoders:
    """A VAE and a T5 as this package needs them."""

    family: str  # "alpha" or "sigma": what the features are for
    vae_id: str
    encode_images: Callable[[Tensor], Tensor]  # (B, H, W, 3) in 0..1 -> mean, or mean and std: (B, 4 or 8, H/8, W/8)
    t5_id: str
    prepare: Callable[[str], str]  # cleans a caption
    encode_captions: Callable[[list[str]], list[Tensor]]  # prepared captions -> (L, D) each, L <= token_limit
    null_caption: Callable[[], Tensor]  # -> (token_limit, D), pads included
    token_limit: int

    def caption_key(self, caption: str | None) -> str:
        prepared = caption if caption is NULL_CAPTION else self.prepare(caption)
        return content_key("caption", self.t5_id, self.token_limit, prepared)

    def latent_key(self, digest: str, bucket: Bucket) -> str:
        return content_key("latent", self.vae_id, digest, bucket.height, bucket.width)


@dataclass
class Report:
    """What `fill` did in this process."""

    images: int = 0  # encoded now
    captions: int = 0
    known_images: int = 0  # there already
    known_captions: int = 0
    set_aside: list[str] = field(default_factory=list)

    def summary(self) -> str:
        lines = [
            f"{self.images} pictures and {self.captions} captions encoded, "
            f"{self.known_images} and {self.known_captions} were cached already"
        ]
        lines += [f"damaged shard put aside, its content made again: {name}" for name in self.set_aside]
        return "\n".join(lines)


def caption_cleaner(family: str) -> Callable[[str], str]:
    """What the original does to a training caption: web-text cleaning for alpha, nothing for Sigma."""
    return clean_caption if family == "alpha" else str.strip


def weights_id(tensors: Iterable[Tensor], extra: str = "") -> str:
    """A fingerprint of weights that does not depend on their names, order, or whether fp32 was rounded to bf16.

    Looks at PROBES runs of 16 values in each tensor, so 20 GB take no time.
    """
    prints = set()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(16, flat.numel() // PROBES)
        values = [value for at in range(0, flat.numel(), step) for value in bits(flat[at : at + 16])]
        prints.add(hashlib.blake2b(struct.pack(f"<q{len(values)}h", flat.numel(), *values), digest_size=16).digest())
    return hashlib.blake2b(b"".join(sorted(prints)) + extra.encode(), digest_size=8).hexdigest()


def bits(values: Tensor) -> list[int]:
    return values.float().cpu().to(torch.bfloat16).view(torch.int16).tolist()


def stores(root, encoders: Encoders, rank: int = 0) -> tuple[Store, Store]:
    """The folders of this VAE's latents and of this T5's captions below a cache's root.

    Raises ValueError when this VAE's latents were made for the other family.
    """
    latents = Path(root) / "latents" / encoders.vae_id
    claim_family(latents / "family.json", encoders.family)
    return Store(latents, rank), Store(Path(root) / "captions" / encoders.t5_id, rank)


def claim_family(path: Path, family: str):
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"family": family}), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))["family"]
    if before != family:
        raise ValueError(
            f"This VAE has been used for PixArt {before} in {path.parents[2]}, and now for {family}. alpha needs the "
            "VAE of SD 1.5, Sigma the VAE of SDXL: connect the right one, or choose the right family. If this is what "
            "you want, take another cache folder."
        )


def fill(
    manifest: Manifest, encoders: Encoders, latents: Store, captions: Store, *, prompts: Iterable[str] = (),
    rank: int = 0, world: int = 1, batch_size: int = 1, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Encodes what the stores lack; process `rank` of `world` takes every world-th of it.

    All pictures first, then all captions, so that one model is needed at a time. Raises ValueError for a picture that
    changed since the scan, and for features with NaN or infinity; what was encoded before that is kept.
    """
    pictures = wanted_pictures(manifest, encoders)
    texts = wanted_captions(manifest, encoders, prompts)
    # The share first, then what is missing of it: the stores of two processes need not look alike.
    pictures, texts = list(pictures.items())[rank::world], list(texts.items())[rank::world]
    todo = [item for item in pictures if item[0] not in latents]
    said = [item for item in texts if item[0] not in captions]
    report = Report(known_images=len(pictures) - len(todo), known_captions=len(texts) - len(said))
    total = len(todo) + len(said)
    with latents:
        for batch in batches_of_one_size(todo, batch_size):
            for (key, (path, _, _)), latent in zip(batch, encode_batch(batch, encoders), strict=True):
                latents.put(key, finite(latent, path, "the VAE", "fp32, or sdxl-vae-fp16-fix").float())
            report.images += len(batch)
            if progress:
                progress(report.images, total)
    with captions:
        for at in range(0, len(said), batch_size):
            batch = said[at : at + batch_size]
            for (key, text), rows in zip(batch, encode_texts([text for _, text in batch], encoders), strict=True):
                captions.put(key, finite(rows.half(), text, "T5", "bf16 or fp32"))
            report.captions += len(batch)
            if progress:
                progress(report.images + report.captions, total)
    report.set_aside = latents.set_aside + captions.set_aside
    return report


def wanted_pictures(manifest: Manifest, encoders: Encoders) -> dict[str, tuple[str, str, Bucket]]:
    """{key: (path, digest, bucket)} of all pictures and control images."""
    wanted = {}
    for sample in manifest.samples:
        for path, digest in ((sample.path, sample.digest), (sample.control, sample.control_digest)):
            if path:
                wanted[encoders.latent_key(digest, sample.bucket)] = (path, digest, sample.bucket)
    return wanted


def wanted_captions(manifest: Manifest, encoders: Encoders, prompts: Iterable[str]) -> dict[str, str | None]:
    """{key: text} of all captions, validation prompts and the null caption."""
    texts = [text for sample in manifest.samples for text in captions_of(sample)]
    return {encoders.caption_key(text): text for text in (NULL_CAPTION, *prompts, *texts)}


def captions_of(sample: Sample) -> list[str]:
    return [text for text in (sample.caption, sample.vlm_caption) if text]


def batches_of_one_size(todo, batch_size: int):
    """[(key, (path, digest, bucket)), ...] in lists of at most batch_size with the same bucket."""
    groups = {}
    for item in todo:
        groups.setdefault(item[1][2][1:], []).append(item)
    for items in groups.values():
        yield from (items[at : at + batch_size] for at in range(0, len(items), batch_size))


def encode_batch(batch, encoders: Encoders) -> Tensor:
    pixels = [load_pixels(path, digest, bucket.height, bucket.width) for _, (path, digest, bucket) in batch]
    return encoders.encode_images(torch.stack(pixels))  # (B, 4 or 8, H/8, W/8)


def encode_texts(texts: list[str | None], encoders: Encoders) -> list[Tensor]:
    said = iter(encoders.encode_captions([encoders.prepare(text) for text in texts if text is not NULL_CAPTION]))
    return [encoders.null_caption() if text is NULL_CAPTION else next(said) for text in texts]


def finite(features: Tensor, source: str | None, encoder: str, remedy: str) -> Tensor:
    """Raises ValueError for NaN, infinity, and what becomes infinite in the cache's 16 bit (captions only)."""
    if not torch.isfinite(features).all():
        raise ValueError(f"{encoder} made NaN or infinity of {source or 'the null caption'}: run it in {remedy}.")
    return features
