"""PixArtCacheFeatures: what a trainer reads instead of pictures and captions."""

from functools import partial
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..comfy_bridge import features
from ..comfy_bridge.compat import build
from ..data.cache import folder_bytes
from ..data.encode import FINGERPRINT_TEXT, Encoders, caption_cleaner, fill, stores, weights_id
from ..data.imports import import_features
from ..data.index import index_of
from ..data.manifest import problem_lines
from ..text.captions import TOKEN_LIMITS
from .dataset import Dataset, Progress, input_path, shown

Cache = io.Custom("PIXART_CACHE")
CACHE_FOLDER = "pixart_cache"


def cache_path(text: str) -> Path:
    """The user's cache folder: absolute, or below ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory(), Path(text.strip() or CACHE_FOLDER).expanduser())


class PixArtCacheFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtCacheFeatures",
            display_name="PixArt Cache Features",
            category="PixArt/training",
            description="Encodes the pictures and captions of a data set once and keeps them on disk, so that training "
            "needs neither VAE nor T5. What is there already is not encoded again.",
            search_aliases=["latent cache", "text embeddings", "precompute", "npz", "extract features"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "family",
                    options=list(TOKEN_LIMITS),
                    default="alpha",
                    tooltip="Of the model that is to be trained. alpha: VAE of SD 1.5, 120 tokens, cleaned captions. "
                    "sigma: VAE of SDXL, 300 tokens.",
                ),
                io.String.Input(
                    "cache_folder",
                    default=CACHE_FOLDER,
                    tooltip="Where features are kept. A full path, or one below ComfyUI's output folder. One folder "
                    "serves all data sets.",
                ),
                io.String.Input(
                    "validation_prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line, from which the trainer makes pictures to watch.",
                ),
                io.Boolean.Input(
                    "verify",
                    default=False,
                    tooltip="Reads every stored byte first, and makes again what a disk has damaged.",
                ),
                Dataset.Input("dataset", optional=True, tooltip="From PixArt Dataset."),
                io.Vae.Input("vae", optional=True, tooltip="SD 1.5's VAE for alpha, SDXL's for sigma."),
                io.Clip.Input("clip", optional=True, tooltip="T5, from PixArt Load T5."),
                build(
                    io.String.Input,
                    "pixart_features",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Instead of dataset, vae and clip: a folder with data_info.json and the .npy and .npz "
                    "features of PixArt's own scripts.",
                ),
            ],
            outputs=[Cache.Output(display_name="cache", tooltip="For the trainer.")],
        )

    @classmethod
    def execute(
        cls, family, cache_folder, validation_prompts, verify, dataset=None, vae=None, clip=None, pixart_features=""
    ) -> io.NodeOutput:
        root, progress = cache_path(cache_folder), Progress()
        if pixart_features.strip():
            index, report = imported(pixart_features, family, root, progress)
        elif dataset is None or vae is None or clip is None:
            raise ValueError("Connect dataset, vae and clip, or name a folder in pixart_features.")
        else:
            prompts = [line.strip() for line in validation_prompts.splitlines() if line.strip()]
            index, report = encoded(dataset, encoders(family, vae, clip), root, prompts, verify, progress)
        size = folder_bytes((root / "latents" / index.meta["vae_id"], root / "captions" / index.meta["t5_id"]))
        return io.NodeOutput(index, ui=shown(cls, f"{report}\n{index.summary()}\n{size / 2**20:.1f} MiB of features"))


def encoders(family: str, vae, clip) -> Encoders:
    t5, ids = features.t5_weights(clip, FINGERPRINT_TEXT)
    return Encoders(
        family=family,
        vae_id=weights_id(features.vae_encoder_weights(vae)),
        encode_images=partial(features.vae_moments, vae),
        t5_id=weights_id(t5, ids),
        prepare=caption_cleaner(family),
        encode_captions=partial(features.encode_captions, clip, limit=TOKEN_LIMITS[family]),
        null_caption=partial(features.encode_null, clip, family),
        token_limit=TOKEN_LIMITS[family],
    )


def encoded(dataset, encoders: Encoders, root: Path, prompts, verify: bool, progress):
    """(training set, report) of a data set, encoded where that was not done before."""
    latents, texts = stores(root, encoders)
    for store in (latents, texts):
        store.sweep()
        if verify:
            store.verify()
    report = fill(dataset, encoders, latents, texts, prompts=prompts, progress=progress)
    return index_of(root, dataset, encoders, latents, texts, prompts), report.summary()


def imported(folder: str, family: str, root: Path, progress):
    """(training set, report) of features that PixArt's own scripts made."""
    index, problems = import_features(input_path(folder), root, progress=progress)
    index.require(family)
    lines = [f"{len(index)} pictures imported, {len(problems)} problems"]
    return index, "\n".join([*lines, *problem_lines(problems)])


NODES = [PixArtCacheFeatures]
