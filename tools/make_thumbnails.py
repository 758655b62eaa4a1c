"""Make the template browser's pictures of the workflows, with the tiny model on a running ComfyUI.

    python tools/make_thumbnails.py http://127.0.0.1:8188 [WORKFLOW ...]
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from PIL import Image  # noqa: E402

from tools.comfy_client import ComfyClient, images  # noqa: E402

SIDE = 384  # px
# Workflow -> (the workflow that draws its thumbnail, another prompt for that one)
THUMBNAILS = {
    "text_to_image_tiny": ("text_to_image_tiny", None),
    "image_to_image": ("image_to_image", None),
    "lcm_4_steps_tiny": ("lcm_4_steps_tiny", None),
    "text_to_image_alpha_1024": ("text_to_image_tiny", "a large green star in the center, on a navy background"),
    "text_to_image_sigma_1024": (
        "text_to_image_tiny",
        "A large orange ring at the left and a large purple triangle at the right on a sky blue checkered background, "
        "with a small white circle at the top.",
    ),
    "lcm_alpha_1024": ("text_to_image_tiny", "a large yellow circle at the top right, on a dark green background"),
    "dmd_one_step": ("text_to_image_tiny", "a large white star in the center, on a sky blue background"),
    "lora": ("text_to_image_tiny", "a large purple ring in the center and a small orange star at the top left"),
    "low_vram_8gb": ("text_to_image_tiny", "a small red square in the center, on a beige background"),
    "lora_tiny": ("lora_tiny", None),
    "controlnet_tiny": ("controlnet_tiny", None),
    "faster_tiny": ("faster_tiny", None),
    "highres_img2img_tiny": ("highres_img2img_tiny", None),
    "train_lora": ("lora_tiny", "a small zorb at the left and a large zorb at the right, on a plain pink background"),
    "train_lcm": ("lcm_4_steps_tiny", "a large orange ring at the top and a small white circle, on a navy background"),
    "train_controlnet": (
        "controlnet_tiny",
        "a yellow circle at the top left, a red triangle at the right and a white square at the bottom left, on a "
        "plain dark green background",
    ),
    "caption_pictures": ("text_to_image_tiny", "a small white star at the top and a large purple circle at the left"),
    "controlnet_hed_1024": ("text_to_image_tiny", "a large green triangle in the center, on a pink background"),
    "sigma_4k_tiny": (
        "text_to_image_tiny",
        "a large red circle at the top left, a large blue star at the bottom right, a small yellow ring in the center",
    ),
    "sigma_2k": ("text_to_image_tiny", "a large blue triangle at the bottom and a small white circle at the top right"),
    "sigma_4k_two_stage": (
        "text_to_image_tiny",
        "a large orange star at the left and a large green ring at the right, on a navy checkered background",
    ),
}


def draw(comfy: ComfyClient, name: str, prompt: str | None) -> list[Image.Image]:
    """Every picture of a workflow's API copy, with its last positive prompt replaced by `prompt`."""
    graph = json.loads((ROOT / "tests" / "workflows_api" / f"{name}.json").read_text(encoding="utf-8"))
    if prompt:
        encoders = [node["inputs"] for node in graph.values() if node["class_type"] == "PixArtTextEncode"]
        [inputs for inputs in encoders if inputs["unconditional"] == "prompt"][-1]["text"] = prompt
    return [Image.open(io.BytesIO(comfy.image(entry))).convert("RGB")
            for entry in images(comfy.run(graph)) if entry["type"] == "output"]


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """One picture, or four of them two by two, as a square."""
    columns = 2 if len(pictures) >= 4 else 1
    side = SIDE // columns
    square = Image.new("RGB", (SIDE, SIDE))
    for index, picture in enumerate(pictures[: columns**2]):
        place = (index % columns * side, index // columns * side)
        square.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return square


def main(url: str, *names: str) -> None:
    comfy = ComfyClient(url)
    for name in names or THUMBNAILS:
        source, prompt = THUMBNAILS[name]
        sheet(draw(comfy, source, prompt)).save(ROOT / "workflows" / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
