"""PixArtLoadT5 and PixArtTextEncode."""

import folder_paths
from comfy_api.latest import io, ui

from ..comfy_bridge import conditioning, text_encoder
from ..comfy_bridge.compat import build, executing_node, show_text
from ..text import t5_files

PIPELINE_FOLDERS = ("diffusion_models", "checkpoints", "diffusers")  # where whole diffusers pipelines are put
FAMILIES = ["alpha", "sigma"]
UNCONDITIONAL = ["prompt", "null caption"]


def encoder_roots():
    return folder_paths.get_folder_paths("text_encoders")


def pipeline_roots():
    known = folder_paths.folder_names_and_paths
    return [root for key in PIPELINE_FOLDERS if key in known for root in folder_paths.get_folder_paths(key)]


def encoder_path(name: str) -> str:
    return t5_files.find(name, [*encoder_roots(), *pipeline_roots()])


class PixArtLoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = t5_files.list_encoders(
            encoder_roots(), folder_paths.get_filename_list("text_encoders"), pipeline_roots()
        )
        return build(
            io.Schema,
            node_id="PixArtLoadT5",
            display_name="PixArt Load T5",
            category="PixArt/loaders",
            description="Loads the T5 text encoder of PixArt: one file, or a Hugging Face folder with all its shards.",
            search_aliases=["t5", "clip loader", "text encoder", "t5xxl"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=names,
                    tooltip="A file or a folder with a config.json, in models/text_encoders; also the text_encoder "
                    "folder of a diffusers pipeline in models/diffusion_models, checkpoints or diffusers.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(text_encoder.DTYPES),
                    default="auto",
                    tooltip="How the weights are kept in memory; T5 always computes in fp32. auto: as in the file (16 "
                    "bit for fp32 files beyond 4 GiB). fp8_e4m3fn halves 16 bit, with one scale per layer. int8 "
                    "takes as little and is closer, nf4 and fp4 a quarter at a visible loss: these need bitsandbytes.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip="default: ComfyUI decides, and frees the GPU afterwards. cpu: slower, takes no GPU memory.",
                ),
                io.Combo.Input(
                    "after_encoding",
                    options=list(text_encoder.AFTER_ENCODING),
                    default="keep",
                    optional=True,
                    tooltip="keep: T5 stays in memory, where ComfyUI manages it. leave: it is read when a new prompt "
                    "needs it and dropped when sampling starts. Prompts encoded before never need it again.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="For PixArt Text Encode or CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name, dtype, device, **inputs):
        return text_encoder.identity(encoder_path(t5_name), dtype, device)

    @classmethod
    def execute(cls, t5_name, dtype, device, after_encoding="keep") -> io.NodeOutput:
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(text_encoder.load_t5(encoder_path(t5_name), dtype, device, embeddings, after_encoding))


class PixArtTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return build(
            io.Schema,
            node_id="PixArtTextEncode",
            display_name="PixArt Text Encode",
            category="PixArt/conditioning",
            description="Encodes a prompt the way PixArt was trained: cleaned for alpha, cut to 120 or 300 tokens. "
            "The node shows how many tokens there were and what was cut off.",
            search_aliases=["prompt", "negative prompt", "clip text encode", "null caption"],
            inputs=text_encode_inputs(),
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For a sampler or guider.")],
        )

    @classmethod
    def execute(
        cls, clip, text, family, unconditional, clean, token_limit, one_prompt_per_line, width, height,
        aspect_ratio=0.0, model=None, positive=None,
    ) -> io.NodeOutput:  # fmt: skip
        sizes = {"width": width, "height": height, "aspect_ratio": aspect_ratio}
        common = {"token_limit": token_limit, "extra": {name: size for name, size in sizes.items() if size}}
        if unconditional == "null caption":
            entries, notice = conditioning.null_caption(clip, family, model=model, positive=positive, **common)
        else:
            entries, notice = conditioning.encode_prompt(
                clip, text, family, clean=clean, one_prompt_per_line=one_prompt_per_line, **common
            )
        show_text(executing_node(), notice)
        return io.NodeOutput(entries, ui=ui.PreviewText(notice))


def text_encode_inputs():
    return [
        io.Clip.Input("clip", tooltip="T5, from PixArt Load T5 or CLIPLoader with type pixart."),
        io.String.Input(
            "text",
            multiline=True,
            dynamic_prompts=True,
            tooltip="The prompt. Weights like (red:1.3) work. May be empty: T5 then sees its end token alone.",
        ),
        io.Combo.Input(
            "family",
            options=FAMILIES,
            default="alpha",
            tooltip="alpha (also delta, LCM, DMD): 120 tokens, cleaned. sigma: 300 tokens, the text as it is.",
        ),
        io.Combo.Input(
            "unconditional",
            options=UNCONDITIONAL,
            default="prompt",
            tooltip="prompt: encode the text. null caption: for the negative input only, the caption that PixArt was "
            "trained to drop to, as long as the positive prompt; the text is ignored.",
        ),
        io.Combo.Input(
            "clean",
            options=["auto", "on", "off"],
            default="auto",
            tooltip="PixArt's web-text cleaning: lower case, no links, no HTML, no brackets. auto: on for alpha, off "
            "for sigma, as in training.",
        ),
        io.Int.Input(
            "token_limit",
            default=0,
            min=0,
            max=4096,
            tooltip="Tokens that are kept, end token included. 0: 120 for alpha, 300 for sigma. The models were never "
            "trained beyond that.",
        ),
        io.Boolean.Input(
            "one_prompt_per_line",
            default=False,
            tooltip="Every line that is not blank is the prompt of one image of the batch.",
        ),
        build(
            io.Int.Input,
            "width",
            default=0,
            min=0,
            max=16384,
            advanced=True,
            tooltip="Width in pixels that alpha-1024 is told. 0: the width of the latent. Other models ignore it.",
        ),
        build(
            io.Int.Input,
            "height",
            default=0,
            min=0,
            max=16384,
            advanced=True,
            tooltip="Height in pixels that alpha-1024 is told. 0: the height of the latent. Other models ignore it.",
        ),
        build(
            io.Float.Input,
            "aspect_ratio",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip="Height / width that alpha-1024 is told. 0: from height and width. Other models ignore it.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Only for alpha's null caption, which is stored in the checkpoint.",
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="Only for the null caption: the positive prompt, whose number of tokens it takes.",
        ),
    ]


NODES = [PixArtLoadT5, PixArtTextEncode]
