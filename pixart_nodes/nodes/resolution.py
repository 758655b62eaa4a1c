"""PixArt Resolution: the sizes that PixArt was trained on."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..comfy_bridge.compat import build
from ..data.buckets import TABLES, nearest, nearest_key

AUTO = "auto (nearest to image)"
BY_NAME = {"1:1": 1, "4:3": 3 / 4, "3:2": 2 / 3, "16:9": 9 / 16, "2:1": 1 / 2, "21:9": 9 / 21,
           "3:4": 4 / 3, "2:3": 3 / 2, "9:16": 16 / 9, "1:2": 2, "9:21": 21 / 9}  # fmt: skip
RATIOS = BY_NAME | {f"{key:.2f}": key for key in TABLES["1024"]}  # height / width


class PixArtResolution(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtResolution",
            display_name="PixArt Resolution",
            category="PixArt/latent",
            description="A picture size from PixArt's training, by aspect ratio or nearest to a picture, "
            "and an empty latent of that size.",
            search_aliases=["pixart size", "aspect ratio", "empty latent image", "bucket", "4k"],
            inputs=[
                io.Combo.Input(
                    "table",
                    options=list(TABLES),
                    default="1024",
                    tooltip="Side in pixels of a square picture. Take the model's own size; 2880 and 4096 need much "
                    "memory and time.",
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[AUTO, *RATIOS],
                    tooltip="width:height, or height / width as PixArt lists it (0.25 wide to 4.00 tall). auto takes "
                    "the shape of the image input, or a square without one.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many latents to make."),
                io.Image.Input("image", optional=True, tooltip="For auto: a picture whose shape to come near to."),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="Pixels from left to right."),
                io.Int.Output(display_name="height", tooltip="Pixels from top to bottom."),
                io.Latent.Output(display_name="latent", tooltip="Empty latents of this size, for the sampler."),
                io.Float.Output(
                    display_name="aspect_ratio",
                    tooltip="Height / width as the table rounds it, which PixArt-alpha 1024 was trained with.",
                ),
            ],
        )

    @classmethod
    def execute(cls, table, aspect_ratio, batch_size, image=None) -> io.NodeOutput:
        buckets = TABLES[table]
        if aspect_ratio != AUTO:
            ratio = nearest_key(buckets, RATIOS[aspect_ratio])
            height, width = buckets[ratio]
        else:
            ratio, height, width = nearest(buckets, *((1, 1) if image is None else image.shape[1:3]))
        device = comfy.model_management.intermediate_device()
        latent = torch.zeros(batch_size, 4, height // 8, width // 8, device=device)
        # ComfyUI 0.33 resizes empty latents to models with another factor by this; older versions ignore it.
        return io.NodeOutput(width, height, {"samples": latent, "downscale_ratio_spacial": 8}, ratio)


NODES = [PixArtResolution]
