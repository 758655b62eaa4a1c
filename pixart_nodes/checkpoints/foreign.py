"""Says what a file is when it is not a PixArt transformer, from the names of its tensors."""

import re

# Rows are (pattern of a tensor name, what the file is, what to do). First match wins.
# These hold even where names of a PixArt transformer occur as well.
LOOKALIKES = (
    (
        r"(^|\.|_)lora_(unet|te\w*)_(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|text_model)|"
        r"^(unet|text_encoder)\.(down_blocks|up_blocks|mid_block|text_model)\..*lora",
        "a Stable Diffusion LoRA", "it does not fit PixArt",
    ),
    (
        r"\.(lora_[AB]|lora_up|lora_down|lora\.up|lora\.down|lora_linear_layer|lora_magnitude_vector|dora_scale|"
        r"hada_w[12]_[ab]|lokr_w[12](_[ab])?)(\.|$)",
        "a LoRA", "load a PixArt model first and put the LoRA on it with a LoRA loader",
    ),
    (
        r"(^|\.)controlnet\.\d+\.(copied_block|before_proj|after_proj)\.|(^|\.)controlnet_blocks\.\d+\.",
        "a PixArt ControlNet", "load it with PixArtLoadControlNet, which also hands out the base in it",
    ),
    (r"(^|\.)patchify_proj\.", "an LTX-Video transformer", "it is no PixArt model"),
    (r"(^|\.)temporal_transformer_blocks\.\d", "a Latte video transformer", "it is no PixArt model"),
    (r"(^|\.)blocks\.0\.attn_temp\.", "an Open-Sora video transformer", "it is no PixArt model"),
    (r"(^|\.)attention_y_norm\.weight$", "a Sana transformer", "it is no PixArt model"),
)  # fmt: skip

# These are looked at when no PixArt transformer was found.
OTHERS = (
    (r"^block1\.convs\.0\.weight$", "a HED edge detector", "it makes the edge maps for a PixArt ControlNet"),
    (
        r"(^|\.)(zero_convs|input_hint_block|controlnet_cond_embedding|controlnet_down_blocks)\.",
        "a Stable Diffusion ControlNet", "it does not fit PixArt",
    ),
    (
        r"^(model\.diffusion_model\.|diffusion_model\.|unet\.)?(input_blocks|down_blocks)\.\d",
        "a Stable Diffusion or SDXL model (a UNet)", "load it with ComfyUI's own checkpoint loader",
    ),
    (
        r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.|(^|\.)shared\.weight$",
        "a T5 text encoder", "load it with PixArtLoadT5",
    ),
    (
        r"(^|\.)(text_model|vision_model)\.encoder\.layers\.|(^|\.)transformer\.resblocks\.",
        "a CLIP model", "PixArt reads prompts with T5",
    ),
    (
        r"(^|\.)(encoder|decoder)\.(conv_in|conv_out|up|down|mid|up_blocks|down_blocks|mid_block)\.|"
        r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(conv|skip|weight|bias)",
        "a VAE", "load it with a VAE loader",
    ),
    (
        r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d",
        "a Flux-like transformer", "load it with ComfyUI's own diffusion model loader",
    ),
    (
        r"(^|\.)joint_blocks\.\d|(^|\.)transformer_blocks\.\d+\.attn\.add_[qkv]_proj\.",
        "a Stable Diffusion 3 transformer", "load it with ComfyUI's own diffusion model loader",
    ),
    (r"(^|\.)y_embedder\.embedding_table\.", "a class-conditional DiT", "it takes class labels, not captions"),
    (
        r"(^|\.)(transformer_blocks|blocks|layers|joint_transformer_blocks)\.\d+\.",
        "a transformer of another kind", "it is no PixArt model",
    ),
)  # fmt: skip


def describe(names, rows) -> str | None:
    """"a VAE: load it with a VAE loader" by the first row that matches any of the names."""
    text = "\n".join(names)
    for pattern, what, advice in rows:
        if re.search(pattern, text, re.MULTILINE):
            return f"{what}: {advice}"
    return None
